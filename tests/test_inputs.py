"""Files that a user names: endless, huge and silent ones are refused early."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from support.commands import call

from batchbench import files as inputs
from batchbench.errors import UsageError
from batchbench.files import MIB, open_binary, read_binary

ENDLESS = Path("/dev/zero")

NEEDS = {
    "--prompts ": "16 MiB",
    "--workload ": "65,536 bytes",
    "--prompt-tokens empirical:": "16 MiB",
    "--output-tokens empirical:": "16 MiB",
}
"""Options whose file is read whole, with their limits."""


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a named pipe, and shorten the wait for its writer."""
    monkeypatch.setattr(inputs, "PATIENCE_S", 0.05)
    file = tmp_path / "pipe"
    os.mkfifo(file)
    return file


def write_later(file: Path, content: bytes) -> threading.Thread:
    """Write to a pipe in a thread, which starts when the pipe has a reader."""
    thread = threading.Thread(target=file.write_bytes, args=(content,))
    thread.start()
    return thread


@pytest.mark.skipif(not ENDLESS.exists(), reason="there is no endless device")
@pytest.mark.parametrize("option", NEEDS)
def test_an_endless_file_is_refused_with_its_limit(option: str) -> None:
    words = f"{option}{ENDLESS} --model toy-gpt2".split()
    code, out, line = call(("workload", "show"), words)
    assert (code, out) == (2, "")
    assert line == f"{option}{ENDLESS}: is longer than {NEEDS[option]}; give a smaller file"


def test_a_file_of_lengths_without_end_is_refused_with_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    with file.open("wb") as content:
        content.write(b"7\n")
        content.truncate(16 * MIB + 1)  # a hole, which takes no room on the disk
    words = [f"--output-tokens=empirical:{file}", "--model=toy-gpt2"]
    code, _, line = call(("workload", "show"), words)
    assert code == 2
    assert "is longer than 16 MiB" in line


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "huge"
    with file.open("wb") as content:
        content.truncate(2**40)
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"^--prompts: is longer than 1 MiB"):
        read_binary(file, "--prompts", MIB)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.parametrize("option", ["--prompts", "--workload", "--output-tokens"])
def test_a_pipe_to_which_nobody_writes_is_refused(option: str, pipe: Path) -> None:
    value = f"empirical:{pipe}" if option == "--output-tokens" else str(pipe)
    code, _, line = call(("workload", "show"), [f"{option}={value}", "--model=toy-gpt2"])
    assert code == 2
    assert line == f"{option} {value}: is a pipe that no process writes to; give a file"


@pytest.mark.parametrize("content", [b"7\n", b"\xef\xbb\xbf7\n" * 50_000, b"x"])
def test_a_pipe_is_read_to_its_end(content: bytes, pipe: Path) -> None:
    thread = write_later(pipe, content)
    try:
        found = read_binary(pipe, "here", MIB)
    finally:
        thread.join()
    assert found == content.removeprefix(b"\xef\xbb\xbf")


def test_a_pipe_that_is_too_long_is_refused(pipe: Path) -> None:
    words = [sys.executable, "-c", f"open({str(pipe)!r}, 'wb').write(bytes(2**21))"]
    writer = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        # Python needs a moment to start, and the pipe has no writer until then.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inputs, "PATIENCE_S", 60.0)
            with pytest.raises(UsageError, match=r"^here: is longer than 1 MiB"):
                read_binary(pipe, "here", MIB)
    finally:
        writer.wait()


def test_reading_waits_for_a_silent_writer(pipe: Path) -> None:
    writer = os.open(pipe, os.O_RDWR)  # both ends, so that neither waits for the other
    try:
        content = open_binary_later(pipe, writer)
    finally:
        os.close(writer)
    assert content == b"late"


def open_binary_later(pipe: Path, writer: int) -> bytes:
    """Open a pipe whose writer waits until it is open."""
    timer = threading.Timer(0.2, os.write, (writer, b"late"))
    timer.start()
    try:
        with open_binary(pipe, "here") as content:
            return content.read(4)
    finally:
        timer.join()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a" + ".a" * 30_000 + " = 1", "line 1: has more than 100 dots"),
        ("# " + "." * 200 + "\nqueue_size = '3'", "queue_size = '3': must be a whole number"),
        ("queue_size = " + "[" * 30_000, "is not TOML"),
        ("queue_size = 0x" + "f" * 5_000, "must be at most"),
        ("request_rate = 1" + "0" * 400, "must be a number"),
        ("request_rate = nan", "must be a finite number"),
        ('"red\\u001b" = 1', r"unknown key red\x1b;"),
        ("output_tokens = '" + "x" * 5_000 + "'", "must be a number (7)"),
        ("queue_size = 1.5e0", "queue_size = 1.5: must be a whole number"),
        ("queue_size = 1e400", "must be a whole number"),
    ],
)
def test_a_hostile_workload_file_is_refused_in_a_line(
    content: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "w.toml"
    file.write_text(content, encoding="utf-8")
    code, _, line = call(("workload", "show"), [f"--workload={file}", "--model=toy-gpt2"])
    assert code == 2
    assert said in line
    assert len(line) < 900
    assert line.isprintable()


@pytest.mark.parametrize("kind", ["folder", "missing", "loop", "long", "nul"])
def test_a_name_that_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    names = {"long": "x" * 400, "nul": "a\0b"}
    with pytest.raises(UsageError, match=r"^here: ") as refused:
        open_binary(tmp_path / names.get(kind, kind), "here")
    assert str(refused.value).isprintable()


def test_prompts_beyond_the_queue_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"ab\n" * (2**20))
    from batchbench.workloads.prompts import read_prompts

    tracemalloc.start()
    assert read_prompts(file, 3) == ["ab"] * 3
    assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize("line", ["12", " 12 ", "1.2e1", "12.0", "+12", "1_2", "12\r"])
def test_a_line_of_lengths_is_a_number_of_any_usual_form(line: str, tmp_path: Path) -> None:
    from batchbench.workloads.lengths import Empirical

    file = tmp_path / "lengths.txt"
    file.write_bytes(f"{line}\n7\n".encode())
    assert Empirical(file, "--output-tokens").lengths().tolist() == [7, 12]
