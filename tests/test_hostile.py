"""Hostile files: whatever a file holds, the program ends with 0 or with 2 and one line.

``BATCHBENCH_EXAMPLES=20000`` makes the mutation tests look for longer, and at new examples.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from laws import law
from mutations import Change, changes, spoil_bytes, spoil_json, spoil_recording

from batchbench.cli.main import _guarded

MORE = int(os.environ.get("BATCHBENCH_EXAMPLES", "0"))


def examples(usual: int) -> settings:
    """The settings of a mutation test: ``usual`` examples, the same each time."""
    if MORE:
        return settings(law, max_examples=MORE, derandomize=False, print_blob=True)
    return settings(law, max_examples=usual)


def call(*words: str) -> tuple[int, str, str]:
    """Call the program: its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchbench", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _guarded()
    return code, out.getvalue(), err.getvalue()


def survives(*words: str) -> tuple[int, str]:
    """Call the program, which must end with 0, or with 2 and one line."""
    began = time.process_time()
    code, _, err = call(*words)
    assert code in (0, 1, 2), err
    assert "Traceback" not in err
    if code == 2:
        assert err.startswith("batchbench: ")
        assert err.count("\n") == 1, err
    assert time.process_time() - began < 20
    return code, err


@pytest.fixture(scope="module")
def quiet_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of the system's kind, in which a traceback would be left."""
    home = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(home))
        patch.setenv("COLUMNS", "120")
        yield home


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quiet_home: Path) -> Path:
    """A folder with simulated results, not to be changed: ``one`` and ``other``, of timed
    arrivals, and a closed one."""
    from batchbench.reports import folder as folders

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
    """Every command that reads a result, and takes less than a second."""
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
    """Pictures take seconds; those of spoiled results have a test of their own."""
    from batchbench.reports import folder as folders

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "draw", lambda recordings, title: {})
        yield


def spoil(whole: Path, name: str, file: str, content: bytes) -> Path:
    """A copy of a result in which one file is something else."""
    folder = whole.parent / "spoiled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / name, folder)
    (folder / file).write_bytes(content)
    return folder


def check_all(whole: Path, folder: Path, spoiled: list[Change], home: Path) -> None:
    """Each command that reads the folder survives; where there are many examples, one of them."""
    commands = readers(folder, whole / "other")
    names = list(commands)
    for name in [names[sum(map(sum, spoiled)) % len(names)]]:
        survives(*commands[name])
    assert list(home.iterdir()) == []


@given(changes)
@examples(60)
def test_no_result_json_makes_the_program_crash(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    for name in ("one", "closed"):
        data = json.loads((whole / name / "result.json").read_text(encoding="utf-8"))
        folder = spoil(whole, name, "result.json", spoil_json(data, spoiled))
        check_all(whole, folder, spoiled, quiet_home)


@given(changes)
@examples(60)
def test_no_recording_makes_the_program_crash(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    file = "recordings/0-0.npz"
    content = (whole / "one" / file).read_bytes()
    folder = spoil(whole, "one", file, spoil_recording(content, spoiled))
    check_all(whole, folder, spoiled, quiet_home)


@given(changes)
@examples(40)
def test_no_torn_file_makes_the_program_crash(
    whole: Path, quiet_home: Path, spoiled: list[Change]
) -> None:
    for file in ("recordings/0-0.npz", "result.json"):
        content = (whole / "one" / file).read_bytes()
        folder = spoil(whole, "one", file, spoil_bytes(content, spoiled))
        check_all(whole, folder, spoiled, quiet_home)
