"""The reader of traces: it opens a file, finds its format and streams rows into columns."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import psutil

from batchbench.errors import UsageError
from batchbench.files import open_binary, reason_of
from batchbench.workloads.prompts import Encode
from batchbench.workloads.request import Ints, Ragged
from batchbench.workloads.spec import TRACE_FORMATS
from batchbench.workloads.traces.formats import READERS, format_of
from batchbench.workloads.traces.rows import InvalidError, Row, Source, TraceError, shown

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MEMORY_STEP = 2**26
"""Growth of columns, in bytes, between two checks of the memory that is left."""

_MOST_INVALID_ROWS = 50_000
"""Number of invalid rows at the beginning after which reading ends."""


class BadRow(NamedTuple):
    """A row that is skipped: its place, such as ``line 7``, the reason, and the kind of reason."""

    number: int
    reason: str
    unit: str
    kind: str
    harmless: bool

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a trace as columns, ``[requests]`` each, in the order of their times.

    ``due_ns`` counts from the first request; it is None if the trace has no times. ``prompts`` are
    the tokens of prompts if they are known, ``blocks`` the names of their blocks of
    ``block_tokens`` tokens.
    """

    format: str
    prompt_tokens: Ints
    output_tokens: Ints
    due_ns: Ints | None
    prompts: Ragged | None
    blocks: Ragged | None
    about: Mapping[str, Any]  # the first line of our own format
    whole: bool  # False if a row was skipped, at the end or as an invalid one
    block_tokens: int
    remarks: tuple[str, ...]  # sentences for the user: assumptions, and skipped parts


def read_trace(
    file: Path,
    encode: Encode,
    *,
    format: str | None = None,
    limit: int | None = None,
    on_bad_row: Callable[[BadRow], None] | None = None,
    block_tokens: int | None = None,
    time_unit: str | None = None,
) -> Trace:
    """Read a trace row by row; memory grows only with the columns.

    The file may be compressed (gzip, bzip2, xz, zstd), and UTF-8, UTF-16 or UTF-32.

    Args:
        encode: text to token ids, for traces with texts.
        format: one of ``TRACE_FORMATS``; None finds it by the content.
        limit: number of valid rows after which reading ends.
        on_bad_row: called with each row that is skipped. Without it, the first invalid row ends
            the reading; harmless ones, such as blank lines, do not.
        block_tokens, time_unit: those of a Mooncake trace; None infers them.
    """
    where = f"--trace {file}"
    with open_trace(file, where) as (text, first, archive):
        head = first.decode("utf-8", "surrogateescape")
        fault = other_kind(first)
        if fault or not (format := format or format_of(head)):
            of_archive = archive and f"{archive} of "
            raise TraceError(f"is {of_archive}{fault or unknown_text(head)}")
        for option, value in (
            ("--trace-block-size", block_tokens),
            ("--trace-time-unit", time_unit),
        ):
            if value is not None and format != "mooncake":
                raise UsageError(
                    f"{option} {value}: is for Mooncake traces, and {where} is of the format "
                    f"{format}; drop it"
                )
        source = Source(text, head, encode, block_tokens, time_unit)
        columns, whole = _columns_of(source, format, limit, on_bad_row)
        if not len(columns):
            what = f"{'rows' if whole else 'valid rows'} of the format {format}"
            raise TraceError(f"contains no {what}; give a file with requests")
    return columns.trace(source, format, whole=whole)


def _columns_of(
    source: Source, format: str, limit: int | None, on_bad_row: Callable[[BadRow], None] | None
) -> tuple[_Columns, bool]:
    """Return the columns of the valid rows, and True if they are all rows of the file."""
    columns, invalid = _Columns(), 0
    for number, row in READERS[format](source):
        if limit is not None and len(columns) == limit:
            return columns, False
        if isinstance(row, Row) and len(columns) and (row.ids is None) == columns.with_ids:
            verb = "lacks" if columns.with_ids else "has"
            row = InvalidError(f"{verb} the content of its prompt, unlike the requests before it")
        if isinstance(row, Row):
            columns.append(row)
            if not columns.fit_memory():
                read = f"its first {len(columns):,} requests"
                raise TraceError(f"{read} fill the memory; take fewer with --queue-size")
            continue
        bad = BadRow(number, str(row), source.unit, row.kind, row.harmless)
        if bad.harmless:
            source.counts[bad.kind] += 1
        else:
            invalid += 1
            if on_bad_row is None:
                raise TraceError(f"{bad}; correct it, or skip such rows with --on-bad-row skip")
            if invalid == _MOST_INVALID_ROWS and not len(columns):
                raise TraceError(f"its first {invalid:,} rows are all invalid, such as {bad}")
        if on_bad_row is not None:
            on_bad_row(bad)
    return columns, not invalid


class _Columns:
    """Columns that grow; 8 bytes per number, 4 per token id."""

    def __init__(self) -> None:
        self.prompt_tokens, self.output_tokens, self.due_ns = array("q"), array("q"), array("q")
        self.blocks, self.block_counts = array("q"), array("q")
        self.ids, self.with_ids = array("i"), False
        self.next_check = MEMORY_STEP

    def __len__(self) -> int:
        return len(self.output_tokens)

    def append(self, row: Row) -> None:
        self.with_ids = row.ids is not None
        self.prompt_tokens.append(row.prompt_tokens)
        self.output_tokens.append(row.output_tokens)
        if row.due_ns is not None:
            self.due_ns.append(row.due_ns)
        self.ids.extend(row.ids or ())
        if row.blocks:  # traces without blocks have no such columns
            self.block_counts.extend(bytes(len(self) - 1 - len(self.block_counts)))
            self.block_counts.append(len(row.blocks))
            self.blocks.extend(row.blocks)

    def fit_memory(self) -> bool:
        """Return False if the columns are larger than the memory that is left."""
        size = 24 * len(self) + 4 * len(self.ids) + 8 * len(self.blocks)
        if size < self.next_check:
            return True
        self.next_check = size + MEMORY_STEP
        return size < psutil.virtual_memory().available

    def trace(self, source: Source, format: str, *, whole: bool) -> Trace:
        if self.blocks:
            self.block_counts.extend(bytes(len(self) - len(self.block_counts)))
        prompt, output, due, counts = (
            np.frombuffer(column, np.int64)
            for column in (self.prompt_tokens, self.output_tokens, self.due_ns, self.block_counts)
        )
        prompts = Ragged.of(np.frombuffer(self.ids, np.int32), prompt) if self.with_ids else None
        blocks = Ragged.of(np.frombuffer(self.blocks, np.int64), counts) if self.blocks else None
        if len(due) and format != "batchbench":  # ours counts from the start of the trial
            due -= due.min()  # in the array that was filled
        if (due[1:] < due[:-1]).any():
            order = np.argsort(due, kind="stable")
            due, prompt, output = due[order], prompt[order], output[order]
            prompts, blocks = (r and r.take(order) for r in (prompts, blocks))
        skipped = (f"{what}: {count:,}" for what, count in source.counts.items())
        return Trace(
            format=format,
            prompt_tokens=prompt,
            output_tokens=output,
            due_ns=due if len(due) else None,
            prompts=prompts,
            blocks=blocks,
            about=source.about,
            whole=whole,
            block_tokens=source.size_of_blocks,
            remarks=(*source.inferred, *skipped),
        )


# Archives and encodings

HEAD_BYTES = 2**16
"""Number of bytes from which the kind of a file is found."""

_MOST_MEMORY = 2**27
"""Maximum memory of a decompressor; xz -9 needs 65 MiB, zstd --long 128 MiB."""

_MARKED = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_trace(file: Path, where: str) -> Iterator[tuple[TextIO, bytes, str]]:
    """Open a trace; yield its text, its first 64 KiB in UTF-8, and ``a gzip archive`` or the like.

    Bytes that are not UTF-8 become unpaired surrogates. Errors of reading, and TraceErrors, in the
    body of the with statement become UsageErrors.
    """
    archive = ""
    try:
        with open_binary(file, where) as raw:
            stream, head = _looked_at(raw)
            for magic, kind, unpacked in _ARCHIVES:
                if head.startswith(magic):
                    archive = kind
                    stream, head = _looked_at(unpacked(stream))
                    break
            encoding = next((name for mark, name in _MARKED if head.startswith(mark)), "utf-8")
            if encoding != "utf-8":
                head = head.decode(encoding, "ignore").encode()
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            if old_mac := b"\r" in head and b"\n" not in head:
                head = head.replace(b"\r", b"\n")
            yield (
                io.TextIOWrapper(stream, encoding, errors, None if old_mac else "\n"),
                head,
                archive,
            )
    except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise UsageError(f"{where}: is {archive} that cannot be read: {error}") from error
    except UnicodeError as error:
        what = "is not the kind of text that its first bytes indicate"
        raise UsageError(f"{where}: {what}: {error}") from error
    except TraceError as error:
        raise UsageError(f"{where}: {error}") from error
    except OSError as error:
        what = f"is {archive} that " if archive else ""
        raise UsageError(f"{where}: {what}cannot be read: {reason_of(error)}") from error


def _looked_at(source: Any) -> tuple[io.BufferedReader, bytes]:
    """Return a stream of the source, whose reads are whole, and its beginning."""
    stream = io.BufferedReader(source, HEAD_BYTES)
    return stream, stream.peek()


class _XzFile(io.RawIOBase):
    """The content of an xz archive, in bounded memory, which ``lzma.LZMAFile`` does not offer."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._begin()

    def _begin(self) -> None:
        self._decoder = lzma.LZMADecompressor(memlimit=_MOST_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            piece = b""
            if self._decoder.eof:  # streams may follow one another, with padding between them
                piece = self._decoder.unused_data.lstrip(b"\0")
                while not piece:
                    if not (piece := self._source.read(HEAD_BYTES)):
                        return 0
                    piece = piece.lstrip(b"\0")
                self._begin()
            elif self._decoder.needs_input and not (piece := self._source.read(HEAD_BYTES)):
                raise EOFError("it ends early")
            if data := self._decoder.decompress(piece, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def _zstd_file(source: BinaryIO) -> zstd.ZstdFile:
    limit = {int(zstd.DecompressionParameter.window_log_max): _MOST_MEMORY.bit_length() - 1}
    return zstd.ZstdFile(source, options=limit)


_ARCHIVES: tuple[tuple[bytes, str, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", "a gzip archive", lambda source: gzip.GzipFile(fileobj=source)),
    (b"BZh", "a bzip2 archive", bz2.BZ2File),
    (b"\xfd7zXZ\x00", "an xz archive", lambda source: io.BufferedReader(_XzFile(source))),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _zstd_file),
    (b"\x50\x2a\x4d\x18", "a zstd archive", _zstd_file),  # as pzstd writes
)


# Files that are not traces

_UNPACK = "unpack it and give the file inside"
_TABLE = "save it as CSV"
_EXPORT = "save it as CSV, such as with pandas' to_csv"
_DATA = "give the data themselves"

_KINDS = (
    (rb"PK\x03\x04.*(?:\[Content_Types\]\.xml|xl/)", "a spreadsheet", _TABLE),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet or another Office file", _TABLE),
    (rb"PAR1", "a parquet file", _EXPORT),
    (rb"(?:ARROW1|FEA1)", "an Arrow file", _EXPORT),
    (rb"ORC", "an ORC file", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"SQLite format 3\x00", "an SQLite database", "save its table as CSV"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "save it as CSV or JSON"),
    (rb"%PDF-", "a PDF", _DATA),
    (rb"(?:\x89PNG|\xff\xd8\xff|GIF8)", "a picture", _DATA),
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch it with git lfs pull"),
    (rb"(?i)\s*<(?:!doctype html|html|head)", "an HTML page", "download the raw file"),
    (rb"\s*<(?:\?xml|[A-Za-z])", "XML", "save it as CSV or JSON"),
    (rb"GGUF", "a GGUF model", "give it with --model"),
    (rb"\x7fELF|MZ|#!", "a program", "give a file of data"),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (rb"\x1f\x9d", "a compress (.Z) archive", _UNPACK),
    *((re.escape(magic), kind, _UNPACK) for magic, kind, _ in _ARCHIVES),  # inside another
)

_TEXT = bytes({7, 8, 9, 10, 12, 13, 27, *range(0x20, 0x100)})


def other_kind(head: bytes) -> str | None:
    """Return the kind of a file that cannot be a trace, and some advice; else None."""
    if not head.strip():
        return f"{'blank text' if head else 'an empty file'}; give a file with requests"
    for pattern, kind, advice in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return f"{kind}; {advice}"
    start = head[:200]
    if 0 in (start[::2].count(0), start[1::2].count(0)) and start.count(0) * 3 > len(start):
        return "UTF-16 text without a byte-order mark; save it as UTF-8"
    if len(head.translate(None, _TEXT)) * 20 > len(head):
        return "binary data of no known kind; give a file of text"
    return None


def unknown_text(head: str) -> str:
    """Return words for a text of no known format, and some advice."""
    begin = head.lstrip()
    if begin.startswith(("{", "[")):
        names = list(dict.fromkeys(re.findall(r'"([^"\\]{1,40})"\s*:', begin)))
        kind = f"JSON with the keys {', '.join(names[:5])}," if names else "JSON"
    else:
        kind = f"text that begins with {shown(begin.partition(chr(10))[0].strip())},"
    return (
        f"{kind} of no known format ({', '.join(TRACE_FORMATS)}); if it is one of them, name it "
        "with --trace-format"
    )
