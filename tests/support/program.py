"""The program, called in this process or on a pseudo-terminal, and experiments to ask it for."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from batchbench.batching import trials
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.cli.main import run_command
from batchbench.reports import output as folders
from batchbench.workloads.spec import WorkloadSpec


@dataclass(frozen=True)
class Said:
    """The exit code and the output of a call."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line of the error, after any lines of progress."""
        *before, last = self.err.splitlines()
        assert last.startswith("batchbench: ")
        assert not any(line.startswith("batchbench: ") for line in before)
        assert "Traceback" not in self.err
        assert self.out == ""
        return last


Program = Callable[..., Said]

Call = Callable[..., tuple[int, str, str]]
"""A call of the program with these words: its exit code, output and errors."""


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs the program in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["batchbench", *words])
        code = run_command()
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Return a function that runs the program in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return caller(monkeypatch, capsys)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.fixture
def program(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Program:
    """Return a function that runs the program here, in this process, without real pictures."""
    monkeypatch.setattr(folders, "draw", lambda recordings, title: {"timeline": None})
    monkeypatch.setattr(folders, "figure_bytes", lambda figure, format: format.encode())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(trials.gc, "collect", lambda: 0)  # this process holds much
    monkeypatch.setenv("COLUMNS", "100")

    call = caller(monkeypatch, capsys)
    return lambda *words: Said(*call(*words))


texts = st.text("ab/.- '\"$éß\\", min_size=1, max_size=9).filter(
    lambda text: text.strip() and not text.startswith("-")
)


experiments = st.builds(
    Experiment,
    serving=st.builds(
        ServingSpec,
        batch_size=st.integers(1, 20),
        strategy=st.sampled_from(["static", "continuous,static", "static,support.laws:Patient"]),
        order=st.sampled_from(["fifo", "longest-first", "shortest-first"]),
        prefill=st.sampled_from(["separate", "mixed"]),
        max_batched_tokens=st.integers(21, 4096),
    )
    | st.just(ServingSpec(engine="notebook")),
    workload=st.builds(
        WorkloadSpec,
        queue_size=st.integers(1, 1000),
        long_every=st.none() | st.integers(1, 9),
        long_tokens=st.integers(1, 200),
        short_tokens=st.integers(1, 200),
        prompt_tokens=st.none() | st.sampled_from(["7", "4:64", "uniform:min=4,max=64"]),
        stop_at_eos=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
    ),
    model=st.builds(
        ModelSpec,
        model=texts,
        load_format=st.sampled_from(["auto", "dummy"]),
        revision=st.none() | texts,
        dtype=st.sampled_from(["auto", "bfloat16"]),
        device=st.sampled_from(["auto", "cpu", "cuda:3"]),
        threads=st.none() | st.integers(1, 64),
    ),
    trials=st.builds(
        TrialsSpec,
        trials=st.integers(1, 9),
        verify=st.sampled_from(["all", "none", "12"]),
        max_time=st.none() | st.floats(0.001, 1e9),
    ),
    simulated=st.booleans(),
)


def on_a_terminal(line: str, folder: Path) -> tuple[int, str]:
    """Return the exit code of a command on a pseudo-terminal, and its output."""
    control, terminal = pty.openpty()
    words = [sys.executable, "-m", "batchbench", *shlex.split(line)[1:]]
    started = subprocess.Popen(
        words,
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    said = b""
    try:
        while piece := os.read(control, 65536):
            said += piece
    except OSError:  # nobody writes there any more
        pass
    os.close(control)
    return started.wait(), said.decode()
