"""The machine of the tests: it hides the user's own, and one file of the code reads it."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.machine import GIVEN, HOME, KEPT, environment

import batchbench
from batchbench.batching import machine as processor_file
from batchbench.batching.machine import Processor

pytestmark = pytest.mark.machine
PACKAGE = Path(batchbench.__file__).parent

PLACES = {
    "sched_getaffinity": "batching/machine.py",
    "cpu_count": "batching/machine.py",
    "/proc/cpuinfo": "batching/machine.py",
    "ATEN_CPU_CAPABILITY": "batching/machine.py",
    "g++": "batching/machine.py",
}
"""Words with which code reads the machine, each with the only file that may."""

USERS = {
    *("NO_COLOR", "FORCE_COLOR", "LINES", "COLORTERM", "TTY_COMPATIBLE", "PAGER", "EDITOR"),
    *("CI", "GITHUB_ACTIONS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "LC_CTYPE", "LANGUAGE"),
    *("XDG_DATA_HOME", "HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "BATCHBENCH_CACHE", "GIT_DIR"),
    *("MPLBACKEND", "MATPLOTLIBRC", "PYTHONSTARTUP", "PYTHONWARNINGS", "MKL_NUM_THREADS"),
}

TELL = """
import json, locale, os, shutil, sys
facts = [os.environ["HOME"], sys.stdout.encoding, locale.getpreferredencoding().lower()]
print(json.dumps([*facts, shutil.get_terminal_size().columns]))
"""


@given(st.dictionaries(st.sampled_from(sorted({*USERS, *KEPT, *GIVEN})), st.just("the user's")))
def test_no_test_sees_a_variable_of_the_user_but_those_that_are_kept(users: dict[str, str]) -> None:
    seen = environment(users, "/home of the tests")
    assert {name for name, value in seen.items() if value == "the user's"} == users.keys() & KEPT
    assert seen.items() >= GIVEN.items()
    assert not seen.keys() & USERS


def test_this_test_sees_what_is_given() -> None:
    assert os.environ.items() >= GIVEN.items()


def test_the_home_is_an_empty_folder_of_the_tests() -> None:
    assert Path.home() == Path(os.environ[HOME])
    assert Path.home().name.startswith("batchbench-tests-")


def test_a_process_sees_the_same_home_encoding_and_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", TELL], capture_output=True, check=True)
    assert json.loads(done.stdout) == [os.environ[HOME], "utf-8", "utf-8", 80]


def test_a_process_handles_signals_as_in_the_foreground() -> None:
    """A shell starts background jobs, and so a run of the tests, with SIGINT ignored."""
    tell = "import signal; print(*[signal.getsignal(n) is signal.SIG_IGN for n in (1, 2, 15)])"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, check=True)
    assert done.stdout.split() == [b"False"] * 3


def test_there_is_no_network() -> None:
    with socket.socket() as away, pytest.raises(OSError, match="tests have no network"):
        away.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen("https://192.0.2.1/", timeout=5)


@pytest.mark.parametrize("value", ["default", "avx2", "AVX2"])
def test_torchs_own_variable_makes_an_older_processor(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id: a\nflags: fma avx2 avx512f avx512_bf16 amx_tile\n", "utf-8")
    monkeypatch.setattr(processor_file, "CPUINFO", file)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
    assert Processor.here() == Processor("a", frozenset({"fma", "avx2"}))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert Processor.here().features >= {"avx512f", "amx_tile"}


@pytest.mark.parametrize("word", PLACES)
def test_one_file_reads_each_fact_about_the_machine(word: str) -> None:
    """A test must be able to set each of these facts."""
    asking = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr == word)
        or (isinstance(node, ast.Constant) and node.value == word)
    }
    assert asking == {PLACES[word]}
