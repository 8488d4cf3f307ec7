"""Tests of streams in any encoding, closed or full ones, and signals at any moment."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.programs import EVERY_COMMAND, PLAIN, program

from batchbench.cli import output as streams
from batchbench.errors import ClosedPipe, OutputError

SMALL = ("simulate", "--queue-size", "8", "--output", "mine", "--quiet")


# Encodings


def printed_in(name: str, taught: Path, folder: Path, *few: str, **variables: str) -> str:
    """Return the output of every command, or of some; all end with 0."""
    process = program(str(taught), *few, cwd=folder, env=variables, code=EVERY_COMMAND)
    out, err = process.communicate()
    assert process.returncode == 0, err.decode(name, "replace")[-2000:]
    assert "Traceback" not in err.decode(name)
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    # Files are UTF-8 whatever the streams are.
    assert "×" in (folder / "one" / "report.md").read_text(encoding="utf-8")
    return out.decode(name)


@pytest.mark.parametrize("name", ["ascii", "cp1252"])
def test_every_command_prints_in_a_small_encoding(name: str, taught: Path, tmp_path: Path) -> None:
    text = printed_in(name, taught, tmp_path, PYTHONIOENCODING=f"{name}:strict")
    assert "Why: continuous saved" in text


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("cp437", {"PYTHONIOENCODING": "cp437"}),
        ("latin-1", {"PYTHONIOENCODING": "latin-1"}),
        ("utf-16", {"PYTHONIOENCODING": "utf-16"}),
        ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("utf-8", {"LC_ALL": "C"}),
    ],
    ids=["cp437", "latin-1", "utf-16", "C", "C as UTF-8"],
)
def test_a_table_is_the_same_in_any_encoding(
    name: str, variables: dict[str, str], taught: Path, tmp_path: Path
) -> None:
    text = printed_in(name, taught, tmp_path, "few", **variables)
    assert "Why: continuous saved" in text
    assert re.search(r"Duration +. s +. +0\.", text)
    if not name.startswith("utf"):
        assert "+-----" in text


@law
@given(st.text(), st.sampled_from(("ascii", "cp437", "cp1252", "latin-1", "utf-16", "utf-8")))
def test_any_text_is_printed_in_any_encoding_with_the_characters_that_it_has(
    text: str, encoding: str
) -> None:
    streams.register()
    printed = text.encode(encoding, streams.STAND_INS).decode(encoding)
    kept = "".join(c for c in text if c.encode(encoding, "ignore"))
    rest = iter(printed)
    assert all(c in rest for c in kept)


@law
@given(st.text(), st.sampled_from(("ascii", "cp437", "cp1252", "latin-1", "utf-16", "utf-8")))
def test_json_means_the_same_in_any_encoding(text: str, encoding: str) -> None:
    document = json.dumps({"text": text}, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        patch.setattr(sys, "stdout", out)
        streams.echo_json(document)
        out.seek(0)
        assert json.loads(out.read()) == {"text": text}


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("1.5×", "1.5x"),
        ("warming up …", "warming up ..."),
        ("a cut cel…", "a cut cel~"),
        ("≤ 5 ms, 2–3, −1", "<= 5 ms, 2-3, -1"),
        ("┏━┓│ █▁", "+-+| #."),
        ("é, 模 and 🚀", "e, ?? and ??"),
        ("a\udcffb", "a?b"),
    ],
)
def test_stand_ins_look_like_what_they_stand_for(text: str, printed: str) -> None:
    streams.register()
    assert text.encode("ascii", streams.STAND_INS).decode() == printed


# Closed, full, unread


def told_by(command: str, cwd: Path) -> tuple[int, str, str]:
    """Run a shell command that calls ``batchbench``; return its exit code and both outputs."""
    done = subprocess.run(
        ["bash", "-c", command.replace("batchbench", f"{sys.executable} -m batchbench")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**PLAIN, "COLUMNS": "100"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("where", "why"),
    [(">&-", "is closed"), ("> /dev/full", "cannot be written: no space left on device")],
)
def test_results_are_on_disk_before_standard_output_fails(
    where: str, why: str, tmp_path: Path
) -> None:
    line = f"batchbench: standard output {why}; the results are in mine\n"
    assert told_by(f"batchbench {' '.join(SMALL)} {where}", tmp_path) == (2, "", line)
    assert (tmp_path / "mine" / "result.json").exists()
    line = f"batchbench: standard output {why}\n"
    assert told_by(f"batchbench --help {where}", tmp_path) == (2, "", line)
    assert told_by(f"batchbench --version {where}", tmp_path) == (2, "", line)
    assert told_by(f"batchbench workload list {where}", tmp_path) == (2, "", line)


def test_a_closed_pipe_is_quiet_and_its_exit_code_is_141(tmp_path: Path) -> None:
    # The reader has gone before the first byte is written.
    for words in ("--help", "workload list", "simulate --queue-size 8 --output mine --json"):
        command = f"batchbench {words} | true; echo ${{PIPESTATUS[0]}}"
        code, out, err = told_by(
            f"exec 3>&1; (sleep 0.01; batchbench {words}; echo $? >&3) | true", tmp_path
        )
        assert (code, out) == (0, "141\n"), command
        assert "Traceback" not in err
        assert "batchbench:" not in err


@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_a_closed_or_full_standard_error_stops_nothing(where: str, tmp_path: Path) -> None:
    code, out, err = told_by(f"batchbench {' '.join(SMALL[:-1])} {where}", tmp_path)
    assert (code, err) == (0, "")
    assert "Page:  mine/report.html" in out
    assert told_by(f"batchbench simulate --queue-size x {where}", tmp_path)[0] == 2


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    assert told_by(f"batchbench {' '.join(SMALL)} <&- >&- 2>&-", tmp_path) == (2, "", "")
    assert json.loads((tmp_path / "mine" / "result.json").read_text(encoding="utf-8"))


def test_errors_of_standard_output_are_ours(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    pipe = streams._Output(open(write, "wb"), "utf-8")  # noqa: SIM115
    pipe.write("text")
    with pytest.raises(ClosedPipe):
        pipe.flush()
    pipe.close()  # buffered text is discarded
    full = streams._Output(open("/dev/full", "wb"), "utf-8")  # noqa: SIM115
    with pytest.raises(OutputError, match="cannot be written: no space left on device"):
        full.write("text" * 10_000)
    full.close()


# Signals


STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

INTERRUPTED = """
import os, signal, sys
from batchbench.batching.batcher import Batcher
from batchbench.cli import main
number, left = int(sys.argv[1]), int(sys.argv[2])
serve = Batcher.serve

def interrupted(*asked, **more):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    return serve(*asked, **more)

Batcher.serve = interrupted
from matplotlib.figure import Figure
Figure.savefig = lambda self, out, **_: out.write(b"a picture")
sys.argv = ["batchbench", *sys.argv[3:]]
main.main()
"""


@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
def test_a_signal_keeps_the_pairs_that_are_finished(number: signal.Signals, tmp_path: Path) -> None:
    words = ("simulate", "--queue-size", "8", "--trials", "3", "--output", "mine", "--quiet")
    process = program(str(int(number)), "4", *words, cwd=tmp_path, code=INTERRUPTED)
    out, err = process.communicate()
    reason = "interrupted after 1 of 3 pairs"
    assert process.returncode == STOPS[number]
    assert err.decode() == f"batchbench: {reason}; the results are in mine\n"
    assert reason in out.decode()
    data = json.loads((tmp_path / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["validity"]["reasons"] == [reason]
    assert len(data["strategies"]["static"]["trials"]) == 1


@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("words", "line", "left"),
    [
        ("simulate --queue-size 8", "interrupted; nothing was kept", []),
        (
            "capacity --slo ttft:50 --simulated --queue-size 100",
            "interrupted; nothing was kept",
            [],
        ),
        (
            "sweep --queue-size 4,8 --simulated",
            "interrupted; 0 of 2 cells are kept in mine: the same command continues from there",
            [],
        ),
    ],
    ids=["simulate", "capacity", "sweep"],
)
def test_a_signal_before_anything_is_finished_leaves_nothing(
    words: str, line: str, left: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    asked = (*words.split(), "--output", "mine", "--quiet")
    process = program(str(int(number)), "1", *asked, cwd=tmp_path, code=INTERRUPTED)
    _, err = process.communicate()
    assert (process.returncode, err.decode()) == (STOPS[number], f"batchbench: {line}\n")
    assert os.listdir(tmp_path) == left


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    script = f"trap '' HUP; exec {sys.executable} -c \"$1\" 1 1 {' '.join(SMALL)}"
    done = subprocess.run(
        ["bash", "-c", script, "bash", INTERRUPTED], cwd=tmp_path, env=PLAIN, capture_output=True
    )
    assert done.returncode == 0, done.stderr


ANYWHERE = """
import os, random, signal, sys
from matplotlib.figure import Figure
import batchbench.batching.session, batchbench.reports.output, batchbench.reports.formats.terminal
from batchbench.cli import main, progress
Figure.savefig = lambda self, out, **_: out.write(b"a picture")
chance = random.Random(int(sys.argv[1]))
stops, calls, sys.argv = sys.argv[2].split(","), int(sys.argv[3]), ["batchbench", *sys.argv[4:]]

def count(frame, event, argument):
    global left
    left -= 1
    if left == 0:
        sys.setprofile(None)
        os.kill(os.getpid(), number)

for place in range(12):
    number, left = int(chance.choice(stops)), chance.randrange(1, calls)
    os.mkdir(str(place))
    child = os.fork()
    if child == 0:
        os.chdir(str(place))
        os.dup2(os.open("../%d.err" % place, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.setprofile(count)
        main.main()
    print(place, number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""A program that runs again and again, with a signal at a random call or return."""

CALLS = 2_000_000
"""About the number of calls and returns of a small simulation, without imports."""


@pytest.mark.parametrize("seed", range(2))
def test_a_signal_at_any_moment_is_one_line_and_leaves_nothing_torn(
    seed: int, tmp_path: Path
) -> None:
    numbers = ",".join(str(int(number)) for number in (*STOPS, signal.SIGKILL))
    process = program(str(seed), numbers, str(CALLS), *SMALL, cwd=tmp_path, code=ANYWHERE)
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    ends = [tuple(map(int, line.split())) for line in out.decode().splitlines()]
    assert len(ends) == 12
    for place, number, code in ends:
        folder, said = tmp_path / str(place), (tmp_path / f"{place}.err").read_text("utf-8")
        assert code in (0, -number if number == signal.SIGKILL else STOPS[signal.Signals(number)])
        assert len(said.splitlines()) == (code > 0), said
        assert code < 0 or set(os.listdir(folder)) <= {"mine"}
        if (folder / "mine").exists():
            json.loads((folder / "mine" / "result.json").read_text(encoding="utf-8"))
            assert {"requests.csv", "report.html", "recordings"} <= set(os.listdir(folder / "mine"))


ORPHANS = """
import sys
from pathlib import Path
from batchbench.cli import main
from batchbench.studies.gate.processes import Installation, Workers

def command():
    with Workers(Installation("new", Path(sys.argv[1]), own=True), 1) as workers:
        workers.ready()
        print(workers._running._process.pid, flush=True)
        workers.answer()

main.run_command = command
main.main()
"""


@pytest.mark.parametrize("number", [*STOPS, signal.SIGKILL], ids=lambda n: n.name)
def test_no_worker_outlives_the_program(number: signal.Signals, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"  # it reads, as a worker does, until nobody asks any more
    interpreter.write_text("#!/bin/sh\nsh -c 'cat'\n", encoding="utf-8")
    interpreter.chmod(0o755)
    process = program(str(interpreter), cwd=tmp_path, code=ORPHANS)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate()
    for _ in range(200):
        try:
            os.killpg(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there")
