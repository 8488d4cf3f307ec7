"""Files of traces: archives, encodings, pipes, other kinds of files, and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.trace_samples import AZURE, MOONCAKE, SAMPLES, SHAREGPT, read, write

from batchbench.cli.main import run_command
from batchbench.errors import UsageError
from batchbench.workloads.traces import BadRow
from batchbench.workloads.traces.reading import _ARCHIVES, HEAD_BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def refusal(file: Path, content: bytes, **more: object) -> str:
    """Return the one line that refuses a file."""
    with pytest.raises(UsageError) as refused:
        read(write(file, content), **more)
    text = str(refused.value)
    assert text.startswith(f"--trace {file}: ")
    assert len(text) < 500
    return text.removeprefix(f"--trace {file}: ")


# Archives and encodings

PACK: dict[str, Callable[[bytes], bytes]] = {
    "a gzip archive": gzip.compress,
    "a bzip2 archive": bz2.compress,
    "an xz archive": lzma.compress,
    "a zstd archive": lambda content: zstd.compress(
        content, options={zstd.CompressionParameter.checksum_flag: 1}
    ),
}

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16 be", "crlf", "mac")


def encoded(text: str, encoding: str) -> bytes:
    """Return a text in the encoding of another system."""
    if encoding == "utf-16 be":
        return b"\xfe\xff" + text.encode("utf-16-be")
    if encoding in ("crlf", "mac"):
        return text.replace("\n", "\r" if encoding == "mac" else "\r\n").encode()
    return text.encode(encoding)


def test_every_archive_that_is_read_is_tested() -> None:
    assert {kind for _, kind, _ in _ARCHIVES} == set(PACK)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [None, *PACK])
def test_archives_and_encodings_are_read_by_their_content(
    name: str, encoding: str, kind: str | None, file: Path
) -> None:
    text, prompt, output, _ = SAMPLES[name]
    content = encoded(text, encoding)
    trace = read(write(file.with_suffix(".csv"), PACK[kind](content) if kind else content))
    assert trace.format == name.split()[0]
    assert trace.prompt_tokens.tolist() == prompt
    assert trace.output_tokens.tolist() == output


@pytest.mark.parametrize("kind", PACK)
def test_an_archive_may_have_several_parts(kind: str, file: Path) -> None:
    half = len(AZURE) // 2
    pack = PACK[kind]
    content = pack(AZURE[:half].encode()) + pack(AZURE[half:].encode())
    assert read(write(file, content)).prompt_tokens.tolist() == [374, 396, 879]


@pytest.mark.parametrize("kind", PACK)
def test_an_archive_that_is_cut_off_or_damaged_is_named(kind: str, file: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:46.{i * 7919 % 10**6:06},{i + 1},7\n" for i in range(12_000))
    content = PACK[kind]((AZURE + rows).encode())
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0x55
    assert refusal(file, bytes(damaged))
    for spoiled in (content[: len(content) // 2], content[:-1]):
        told = refusal(file, spoiled)
        assert told.startswith((f"is {kind} that cannot be read", "line "))
        with pytest.raises(UsageError, match=f"is {kind} that cannot be read"):
            read(file, on_bad_row=lambda row: None)  # a cut archive is not a wrong row


HUGE = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (lzma.compress(b"x", filters=HUGE), "an xz archive"),
        (b"\x28\xb5\x2f\xfd\x00\xa0" + bytes(9), "a zstd archive"),  # a window of 2^30 bytes
    ],
)
def test_an_archive_that_needs_a_gibibyte_is_refused(content: bytes, kind: str, file: Path) -> None:
    assert refusal(file, content).startswith(f"is {kind} that cannot be read: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_that_is_cut_off_within_a_character_is_named(encoding: str, file: Path) -> None:
    told = refusal(file, AZURE.encode(encoding)[:-1])
    assert told.startswith("is not the kind of text that its first bytes indicate: ")


# Files that are not traces


def zipped(name: str) -> bytes:
    """Return a zip archive with a file of this name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


OTHERS: dict[str, bytes] = {
    "an empty file; ": b"",
    "blank text; ": b" \n\t\r\n" * 99,
    "a zip archive; ": zipped("trace.csv"),
    "a spreadsheet; ": zipped("xl/workbook.xml"),
    "a spreadsheet or another Office file; ": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
    "a parquet file; ": b"PAR1\x15\x04\x15" + bytes(99),
    "an Arrow file; ": b"ARROW1\0\0" + bytes(99),
    "an SQLite database; ": b"SQLite format 3\0" + bytes(99),
    "a Python pickle; ": b"\x80\x04\x95" + bytes(99),
    "a NumPy array; ": b"\x93NUMPY\x01\0" + bytes(99),
    "an HDF5 file; ": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "a PDF; ": b"%PDF-1.7\n%\xe2\xe3\n",
    "a picture; ": b"\x89PNG\r\n\x1a\n\0\0",
    "a Git LFS pointer; fetch it with git lfs pull": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4bb3\nsize 52283111\n"
    ),
    "an HTML page; download the raw file": b"\n<!DOCTYPE html>\n<html><head>",
    "XML; ": b'<?xml version="1.0"?><rows/>',
    "a tar archive; ": b"trace.csv".ljust(257, b"\0") + b"ustar\0" + bytes(300),
    "a 7z archive; ": b"7z\xbc\xaf\x27\x1c\0\x04",
    "a gzip archive of a gzip archive; ": gzip.compress(gzip.compress(AZURE.encode())),
    "an xz archive of a tar archive; ": lzma.compress(b"t".ljust(257, b"\0") + b"ustar\0"),
    "a zstd archive of a parquet file; ": zstd.compress(b"PAR1" + bytes(99)),
    "a bzip2 archive of an empty file; ": bz2.compress(b""),
    "UTF-16 text without a byte-order mark; save it": AZURE.encode("utf-16-le"),
    "binary data of no known kind; ": bytes(range(256)) * 40,
    "JSON with the keys model, prompt, of no known format": b'{"model": "a", "prompt": "b"}\n',
    "text that begins with 'Model,Tokens', of no known format": b"Model,Tokens\na,1\n",
    "a gzip archive of text that begins with 'hello', of": gzip.compress(b"hello\n"),
}


@pytest.mark.parametrize("told", OTHERS)
def test_another_kind_of_file_is_named(told: str, file: Path) -> None:
    assert refusal(file, OTHERS[told]).startswith(f"is {told}")


@pytest.mark.parametrize("told", [told for told in OTHERS if " of" not in told])
@pytest.mark.parametrize("format", ["azure", "sharegpt"])
def test_another_kind_of_file_is_named_with_any_format(told: str, format: str, file: Path) -> None:
    assert refusal(file, OTHERS[told], format=format).startswith(f"is {told}")


# The first 64 KiB


def sorted_keys(ids: int) -> str:
    """Return a line of Mooncake with sorted keys, so that its hash ids come first."""
    row = {"timestamp": 0, "input_length": ids * 512, "output_length": 9}
    return json.dumps({**row, "hash_ids": list(range(100_000, 100_000 + ids))}, sort_keys=True)


@pytest.mark.parametrize("ids", [210, 2000, 20_000])
def test_a_format_is_found_in_the_first_64_kib(ids: int, file: Path) -> None:
    line = sorted_keys(ids).encode() + b"\n"
    for content in (line, gzip.compress(line), zstd.compress(line)):
        assert read(write(file, content)).format == "mooncake"
    late = b'{"padding": "' + b"x" * (HEAD_BYTES - 100) + b'", ' + MOONCAKE.encode()[1:]
    assert read(write(file, late)).format == "mooncake"


@contextmanager
def piped(path: Path, pieces: Iterator[bytes]) -> Iterator[Path]:
    """Write pieces to a pipe in a thread, until its reader closes it."""
    os.mkfifo(path)

    def feed() -> None:
        try:
            with path.open("wb", buffering=0) as pipe:
                for piece in pieces:
                    pipe.write(piece)
        except BrokenPipeError:
            pass

    writer = threading.Thread(target=feed, daemon=True)
    writer.start()
    yield path
    writer.join(timeout=10)
    assert not writer.is_alive()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd.compress, lzma.compress])
def test_a_pipe_that_gives_a_few_bytes_at_a_time_is_read(
    pack: Callable[[bytes], bytes], file: Path
) -> None:
    content = pack((sorted_keys(900) + "\n").encode("utf-16"))
    pieces = (content[i : i + 37] for i in range(0, len(content), 37))
    with piped(file, pieces) as pipe:
        assert read(pipe).prompt_tokens.tolist() == [900 * 512]


# Endless and hostile files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    ("begin", "piece", "told"),
    [
        (b"", b"y\n", "is text that begins with 'y', of no known format"),
        (b"", bytes(4096), "is binary data"),
        (b"", b"\n" * 4096, "is blank text"),
        (AZURE.encode(), b"9" * 65536, "line 5: is longer than 8,388,608 characters"),
        (AZURE.encode(), b"\n" * 65536, "line 1000005: follows 1,000,000 blank lines"),
        (MOONCAKE.encode(), b" " * 65536, "line 4: is longer than 41,943,040 characters"),
        (b'[{"messages": "', b"x" * 65536, "row 1: is longer than 8,388,608 characters"),
        (b'[{"messages": ', b" " * 65536, "row 1: is longer than 8,388,608 characters"),
        (b'[{"messages": ', b"[" * 65536, "row 1: is not readable JSON: it is nested too deep"),
        (b'[{"messages": 7}', b",7" * 4096, "row 1: has no list of conversations"),
    ],
)
def test_an_endless_file_is_refused(begin: bytes, piece: bytes, told: str, file: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield begin
        while True:
            yield piece

    with piped(file, pieces()) as pipe, pytest.raises(UsageError, match=told):
        read(pipe)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    ("begin", "piece", "told"),
    [
        (AZURE.encode(), b"9" * 65536, "line 5: is longer than 41,943,040 characters"),
        (AZURE.partition("\n")[0].encode() + b"\n", b"x\n" * 4096, "its first 50,000 rows are all"),
        (
            b'[{"messages": 7}',
            b",7" * 4096,
            "its first 50,000 rows are all invalid, such as row 50000: is 7",
        ),
    ],
)
def test_an_endless_file_is_refused_even_if_wrong_rows_are_left_out(
    begin: bytes, piece: bytes, told: str, file: Path
) -> None:
    def pieces() -> Iterator[bytes]:
        yield begin
        while True:
            yield piece

    with piped(file, pieces()) as pipe, pytest.raises(UsageError, match=told):
        read(pipe, on_bad_row=lambda row: None)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
@pytest.mark.parametrize("format", [None, "azure", "mooncake", "sharegpt", "batchbench"])
def test_a_device_without_an_end_is_refused(
    format: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["workload", "show", "--trace", "/dev/zero"]
    words += ["--trace-format", format] if format else []
    monkeypatch.setattr(sys, "argv", ["batchbench", *words])
    assert run_command() == 2
    assert capsys.readouterr().err == (
        "batchbench: --trace /dev/zero: is binary data of no known kind; give a file of text\n"
    )


DEEP = [
    b"[" * 20_000,
    b"[" * 2_000_000,
    b'{"input_length": ' + b"[" * 20_000,
    b'{"input_length": ' + b'{"a":' * 100_000,
    b'{"data": [' + b"[" * 20_000,
    b'{"conversations": ' * 20_000,
    b'[{"conversations": ' * 20_000,
    b"[" * 20_000 + b"]" * 20_000,
]


@pytest.mark.parametrize("content", DEEP, ids=lambda content: content[:20].decode())
def test_deep_nesting_takes_no_memory(content: bytes, file: Path) -> None:
    write(file, SHAREGPT)
    read(file)  # imports happen now
    write(file, content)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="nested too deep"):
            read(file, format="sharegpt")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(content) + 2**20


MEMORY = """
import re, sys
from pathlib import Path
from batchbench.errors import UsageError
from batchbench.workloads.prompts import byte_tokens
from batchbench.workloads.traces import read_trace
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
for file in sys.argv[1:]:
    for on_bad_row in (None, lambda row: None):
        try:
            read_trace(Path(file), byte_tokens, on_bad_row=on_bad_row)
        except UsageError as error:
            assert len(str(error)) < 500
        grown = (peak() - before) / 2**20
        assert grown < 200, f"{file}: {grown:.0f} MiB"
"""

MIB = 2**20
BOMB = bytes(64 * MIB)


def hostile() -> Iterator[tuple[str, bytes]]:
    """Return files that take much memory in a careless reader."""
    header = AZURE.encode()
    yield "line", gzip.compress(header + b"9" * (64 * MIB), 1)
    yield "spaces", zstd.compress(header + b" " * (64 * MIB))
    yield "string", gzip.compress(b'[{"a": "' + b"9" * (64 * MIB), 1)
    yield "digits", b'{"input_length": ' + b"9" * (8 * MIB) + b"}\n"
    yield "lists", b'{"input_length": [' + b"[]," * (5 * MIB) + b"[]]}\n"
    yield "objects", b'[{"a": [' + b"{}," * (2 * MIB) + b"{}]}]"
    keys = b"".join(b'"%d":1,' % i for i in range(MIB))
    yield "keys", b'{"input_length": 1, ' + keys + b'"a": 1}\n'
    text = b'"' + b"a" * (4 * MIB - 1) + "\N{GRINNING FACE}".encode() + b'"'
    yield "text", b'{"output_length": 1, "text_input": ' + text + b"}\n"
    turns = b'{"from": "human", "value": %b}, {"from": "gpt", "value": %b}' % (text, text)
    yield "turns", b'{"conversations": [' + turns + b"]}\n"
    yield "gzip", gzip.compress(BOMB, 1)
    yield "xz", lzma.compress(BOMB, preset=0)
    yield "zstd", zstd.compress(BOMB)
    yield "utf-16", gzip.compress((AZURE + "9" * (16 * MIB)).encode("utf-16"), 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM here")
def test_no_file_takes_more_than_200_mib(tmp_path: Path) -> None:
    for name, content in hostile():
        (tmp_path / name).write_bytes(content)
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_requests_that_fill_the_memory_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchbench.workloads.traces.reading.MEMORY_STEP", 100)

    class Memory:
        available = 100

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert refusal(file, AZURE.encode() * 9).startswith(
        "its first 5 requests fill the memory; take fewer with --queue-size"
    )
    assert len(read(file, limit=3).prompt_tokens) == 3


def test_a_wrong_row_beyond_the_limit_is_not_read(file: Path) -> None:
    write(file, MOONCAKE + "spoiled\n")
    assert len(read(file, limit=3).prompt_tokens) == 3
    bad: list[BadRow] = []
    assert len(read(file, limit=3, on_bad_row=bad.append).prompt_tokens) == 3
    assert bad == []
