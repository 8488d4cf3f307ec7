"""Hostile files: for any content, the program ends with 0 or with 2 and one line.

``BATCHBENCH_EXAMPLES=20000`` makes the mutation tests look for longer, and at new examples.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from support.baselines import baseline_data
from support.laws import law
from support.mutations import Change, changes, spoil_bytes, spoil_json, spoil_recording

from batchbench.batching.policies import View
from batchbench.cli.main import run_command
from batchbench.json_file import MOST_BYTES
from batchbench.workloads import Request

MORE = int(os.environ.get("BATCHBENCH_EXAMPLES", "0"))


def examples(usual: int) -> settings:
    """Return the settings of a mutation test: ``usual`` examples, the same each time."""
    if MORE:
        return settings(law, max_examples=MORE, derandomize=False, print_blob=True)
    return settings(law, max_examples=usual)


def call(*words: str) -> tuple[int, str, str]:
    """Call the program; return its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchbench", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command()
    return code, out.getvalue(), err.getvalue()


def survives(*words: str) -> tuple[int, str]:
    """Call the program, which must end with 0, or with 2 and one line."""
    code, _, err = call(*words)
    assert code in (0, 1, 2), err
    assert "Traceback" not in err
    if code == 2:
        assert err.startswith("batchbench: ")
        assert err.count("\n") == 1, err
    return code, err


@pytest.fixture(scope="module")
def quiet_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set the system's temporary folder, in which tracebacks are saved."""
    home = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(home))
        patch.setenv("COLUMNS", "120")
        yield home


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quiet_home: Path) -> Path:
    """A folder with simulated results, not to be changed: ``one`` and ``other``, of timed
    arrivals, and a closed one."""
    from batchbench.reports import output as folders

    folder = tmp_path_factory.mktemp("whole")
    usual = ["--batch-size", "3", "--queue-size", "7", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "draw", lambda recordings, title: {})
        for name, more in (
            ("one", ["--request-rate", "40", "--slo", "ttft:50", "--price-per-hour", "1"]),
            ("other", ["--request-rate", "40"]),
            ("closed", ["--strategy", "static,static-oracle,continuous"]),
        ):
            assert call("simulate", *usual, *more, "--output", str(folder / name))[0] == 0
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix not in (".json", ".npz"):
            file.unlink()
    return folder


def readers(spoiled: Path, good: Path) -> Mapping[str, list[str]]:
    """Return all fast commands that read a result."""
    page = str(spoiled.parent / "page.html")
    return {
        "markdown": ["report", str(spoiled), "--format", "markdown", "--output", "-"],
        "terminal": ["report", str(spoiled), str(good)],
        "html": ["report", str(spoiled), "--format", "html", "--output", page],
        "bencher": ["report", str(spoiled), "--format", "bencher", "--output", "-"],
        "pytest": ["report", str(spoiled), "--format", "pytest-benchmark", "--output", "-"],
        "trace": ["report", str(spoiled), "--quiet", "--trace-out", page + ".json.gz"],
        "compare": ["compare", str(spoiled), str(good)],
        "compare new": ["compare", str(good), str(spoiled), "--fail-if", "p99_ttft_ms > 10%"],
        "trend": ["trend", str(spoiled), str(good)],
        "predict": ["predict", str(spoiled), "--batch-size", "1:3", "--quiet"],
        "cost": ["simulate", "--cost", str(spoiled), "--quiet", "--dry-run"],
        "reproduce": ["reproduce", str(spoiled)],
    }


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Leave out pictures, which take seconds and have another test."""
    from batchbench.reports import output as folders

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "draw", lambda recordings, title: {})
        yield


def spoil(whole: Path, name: str, file: str, content: bytes) -> Path:
    """Return a copy of a result with another content of one file."""
    folder = whole.parent / "spoiled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / name, folder)
    (folder / file).write_bytes(content)
    return folder


def check_one(whole: Path, folder: Path, spoiled: list[Change], home: Path) -> None:
    """Run a command that reads the folder, another one for each example."""
    commands = list(readers(folder, whole / "other").values())
    survives(*commands[sum(map(sum, spoiled)) % len(commands)])
    assert list(home.glob("batchbench-crash-*")) == []


@given(changes)
@examples(30)
def test_a_changed_result_json_never_crashes_the_program(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    for name in ("one", "closed"):
        data = json.loads((whole / name / "result.json").read_text(encoding="utf-8"))
        folder = spoil(whole, name, "result.json", spoil_json(data, spoiled))
        check_one(whole, folder, spoiled, quiet_home)


@given(changes)
@examples(30)
def test_a_changed_recording_never_crashes_the_program(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    file = "recordings/0-0.npz"
    content = (whole / "one" / file).read_bytes()
    folder = spoil(whole, "one", file, spoil_recording(content, spoiled))
    check_one(whole, folder, spoiled, quiet_home)


@given(changes)
@examples(15)
def test_a_damaged_file_never_crashes_the_program(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    for file in ("recordings/0-0.npz", "result.json"):
        content = (whole / "one" / file).read_bytes()
        folder = spoil(whole, "one", file, spoil_bytes(content, spoiled))
        check_one(whole, folder, spoiled, quiet_home)


# Baselines


@given(changes)
@examples(25)
def test_a_changed_baseline_never_crashes_the_program(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    file = whole.parent / "baseline.json"
    file.write_bytes(spoil_json(baseline_data(), spoiled))
    survives("baseline", "show", str(file))
    assert list(quiet_home.glob("batchbench-crash-*")) == []


@pytest.mark.parametrize(
    ("created", "said"),
    [
        ("2999-01-01T00:00:00+00:00", "saved in the future by this machine's clock"),
        ("2020-01-01T00:00:00", "renew it"),
    ],
)
def test_a_baseline_from_the_future_is_refused(created: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({**baseline_data(), "created_at": created}), encoding="utf-8")
    code, out, _ = call("baseline", "show", str(file))
    assert code == 0
    assert said in " ".join(out.split())


# Files that once failed


CORPUS = Path(__file__).with_name("corpus")


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_files_that_once_failed_are_refused(
    file: Path, whole: Path, quiet_home: Path, refused: Callable[..., str]
) -> None:
    """Each file is named after its fault and replaces a file of a result."""
    kind = "recordings/0-0.npz" if file.suffix == ".npz" else "result.json"
    folder = spoil(whole, "one", kind, file.read_bytes())
    for command in ("report", "compare", "reproduce", "predict", "watch"):
        if command == "compare" and kind != "result.json":
            continue  # it reads no recording
        more = {"compare": [str(whole / "other")], "watch": ["--gif", str(whole.parent / "x.gif")]}
        assert str(folder) in refused(command, str(folder), *more.get(command, []))
    assert list(quiet_home.glob("batchbench-crash-*")) == []


# Bombs: small files that would become large


def npy(header: bytes, version: bytes = b"\1\0") -> bytes:
    """Return a member with this npy header and no data."""
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header


def claim(shape: str, kind: str = "'<i8'", order: str = "False") -> bytes:
    """Return an npy header of this shape."""
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def archive_of(content: bytes, name: str, member: bytes | Callable[[IO[bytes]], None]) -> bytes:
    """Return a recording's archive with another member for one column."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            if info.filename != name:
                new.writestr(info.filename, old.read(info))
        with new.open(name, "w", force_zip64=True) as column:
            column.write(member) if isinstance(member, bytes) else member(column)
    return out.getvalue()


def zeros(count: int) -> Callable[[IO[bytes]], None]:
    """Return a function that writes a column of zeros, a mebibyte at a time."""

    def write(column: IO[bytes]) -> None:
        column.write(npy(claim(f"({count},)")))
        for _ in range(count * 8 >> 20):
            column.write(bytes(2**20))

    return write


MEMBERS: Mapping[str, bytes | Callable[[IO[bytes]], None]] = {
    "128 MiB of zeros": zeros(2**24),
    "a shape of 10^12": npy(claim("(10**12,)")) + bytes(56),
    "a shape of a trillion": npy(claim("(1000000000000,)")) + bytes(56),
    "a negative shape": npy(claim("(-7,)")) + bytes(56),
    "a shape of two dimensions": npy(claim("(7, 1)")) + bytes(56),
    "no shape": npy(claim("()")) + bytes(56),
    "objects": npy(claim("(7,)", "'|O'")) + b"cos\nsystem\n(S'true'\ntR.",
    "a structured type": npy(claim("(7,)", "[('a', '<i8')]")) + bytes(56),
    "floats that are no number": npy(claim("(7,)", "'<f8'")) + b"\xff" * 56,
    "other bytes first": npy(claim("(7,)", "'>i8'")) + bytes(56),
    "a header of a gigabyte": npy(claim("(7,)"), b"\2\0")[:8] + struct.pack("<I", 2**30),
    "a header nested deep": npy(b"(" * 9000 + b")" * 9000),
    "a header with code": npy(b"__import__('os').abort()"),
    "no header": b"spoiled",
    "nothing": b"",
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_column_that_would_become_large_is_refused(
    name: str, whole: Path, refused: Callable[..., str]
) -> None:
    content = (whole / "one" / "recordings" / "0-0.npz").read_bytes()
    bomb = archive_of(content, "requests.due_ns.npy", MEMBERS[name])
    folder = spoil(whole, "one", "recordings/0-0.npz", bomb)
    tracemalloc.start()
    said = refused("report", str(folder), "--format", "markdown", "--output", "-")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "0-0.npz: is not a complete recording: " in said
    assert peak < 40 * 2**20


def test_members_that_share_their_bytes_are_refused(
    whole: Path, refused: Callable[..., str]
) -> None:
    """All members of the directory point to the same content, as in an overlapping zip bomb."""
    content = (whole / "one" / "recordings" / "0-0.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [info.filename for info in archive.infolist()]
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(names[0], os.urandom(100_000))
        for name in names[1:]:
            info = copy.copy(archive.infolist()[0])
            info.filename = name
            archive.filelist.append(info)
    folder = spoil(whole, "one", "recordings/0-0.npz", big.getvalue())
    assert "larger than the file" in refused("report", str(folder))


def test_an_archive_of_very_many_members_is_refused(
    whole: Path, refused: Callable[..., str]
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(300):
            archive.writestr(f"{number}.npy", b"")
    folder = spoil(whole, "one", "recordings/0-0.npz", out.getvalue())
    assert "has 300 members" in refused("report", str(folder))


JSON: Mapping[str, tuple[bytes, str]] = {
    "very many lists": (b"[" + b"[]," * 2_000_000 + b"[]]", "more than 1,000,000 values"),
    "nested deep": (b"[" * 10**6, "nested more than 64 deep"),
    "nested and closed": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 64 deep"),
    "a number of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "too large"),
    "a number beyond a double": (b'{"a": 1e999}', "is out of range"),
    "a key twice": (
        b'{"schema_version": 1, "schema_version": 1}',
        "has the key 'schema_version' twice",
    ),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "half a surrogate pair"),
    "another encoding": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "larger than the limit": (b" " * (MOST_BYTES + 1), "is longer than 64 MiB"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_would_become_large_is_refused(
    name: str, whole: Path, refused: Callable[..., str]
) -> None:
    content, said = JSON[name]
    folder = spoil(whole, "one", "result.json", content)
    for words in (["report", str(folder)], ["trend", str(folder)]):
        tracemalloc.start()
        began = time.process_time()
        assert said in refused(*words)
        assert time.process_time() - began < 5
        assert tracemalloc.get_traced_memory()[1] < 2.2 * MOST_BYTES
        tracemalloc.stop()


def test_a_pipe_in_a_result_is_not_waited_for(whole: Path, refused: Callable[..., str]) -> None:
    folder = spoil(whole, "one", "result.json", b"")
    for file in ("result.json", "recordings/0-0.npz"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        assert "pipe" in refused("report", str(folder))
        (folder / file).unlink()
        shutil.copy(whole / "one" / file, folder / file)


# Results of several files


def test_recordings_of_another_result_are_refused(whole: Path, refused: Callable[..., str]) -> None:
    other = (whole / "closed" / "recordings" / "0-0.npz").read_bytes()
    longer = (whole / "one" / "recordings" / "1-0.npz").read_bytes()
    for content in (longer,):
        folder = spoil(whole, "one", "recordings/0-0.npz", content)
        assert "do not belong together" in refused("report", str(folder))
    folder = spoil(whole, "one", "recordings/0-0.npz", other)
    survives("report", str(folder), "--format", "markdown", "--output", "-")


def test_unusual_names_of_folders_are_shown_unchanged(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets are no markup, ``:smile:`` is no emoji, and a line break stays out of a line."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("[red]x", "[bold", ":smile:", "🧪", "a\nb", "%s{}", "'q\""):
        folder = tmp_path / name
        shutil.copytree(whole / "one", folder)
        code, out, err = call("report", str(folder), "--quiet", "--format", "terminal")
        assert (code, err) == (0, "")
        code, out, _ = call("report", str(folder), str(whole / "other"))
        assert code == 0
        assert name.replace("\n", "\\n")[:3] in out
        (folder / "result.json").write_text("{")
        assert survives("report", str(folder))[0] == 2


class Forever:
    """A policy that asks again and again, and admits nobody."""

    def admit(self, view: View) -> tuple[list[Request], int]:
        return [], view.now + 1

    def release(self, view: View) -> list[int]:
        return list(view.finished)


class Leaves(Forever):
    """A policy that ends the program."""

    def admit(self, view: View) -> tuple[list[Request], int]:
        raise SystemExit(0)


@pytest.mark.parametrize(("name", "said"), [("Forever", "would wait forever"), ("Leaves", "Exit")])
def test_a_policy_that_never_decides_is_refused(
    name: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    words = ["--strategy", f"test_hostile:{name}", "--batch-size", "2", "--queue-size", "4"]
    assert said in refused("simulate", *words, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
