"""The help of every command: a line of purpose, grouped options, and examples that work."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from support.baselines import write_baseline
from support.commands import ALL
from support.program import on_a_terminal

from batchbench.batching.models import source
from batchbench.cli.main import run_command

MEASURED = (
    "batchbench run --model toy-gpt2 --device cpu --batch-size 2 --queue-size 8 --trials 2 "
    "--output batchbench-results/my-run --quiet"
)
"""The result that examples name: measured, since predictions are made from nothing else."""

MEASURES = ("run", "probe", "ladder", "capacity", "duet", "check", "baseline save")
"""Commands whose examples measure a real model for minutes: they are run with ``--dry-run``, and
only parsed where there is no such option."""

SMALLER = {"n_embd": 32, "n_layer": 2, "vocab_size": 500}
"""The shape of toy-gpt2 in this test, small since results of examples do not matter."""

ON_A_TERMINAL = ("watch",)


def examples_of(command: Any) -> list[str]:
    """The command lines that a help shows as examples."""
    return re.findall(r"^Example: (batchbench .*)$", command.help, re.MULTILINE)


EXAMPLES = [(path, line) for path, command in ALL.items() for line in examples_of(command)]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_help_has_a_line_of_purpose_grouped_options_and_an_example(path: tuple[str, ...]) -> None:
    command = ALL[path]
    purpose = command.help.split("\n\n")[0]
    assert purpose.endswith(".")
    assert len(purpose) < 120
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    assert [p.name for p in options if not p.rich_help_panel and p.name != "help_all"] == []
    assert [p.name for p in options if not p.help] == []
    assert examples_of(command)
    for line in examples_of(command):
        assert shlex.split(line)[1 : 1 + len(path)] == list(path)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    assert call(MEASURED, folder) == 0
    write_baseline(folder / "baseline.json")
    return folder


def call(line: str, folder: Path) -> int:
    """The exit code of a command line that is typed in a folder."""
    words = shlex.split(line)
    assert words[0] == "batchbench"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(source.MADE_UP, "toy-gpt2", {**source.MADE_UP["toy-gpt2"], **SMALLER})
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", list(sys.path))
        return run_command()


@pytest.mark.parametrize(("path", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_works_as_printed(
    path: tuple[str, ...], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if " ".join(path) in MEASURES:
        if not any(p.name == "dry_run" for p in ALL[path].params):
            ALL[path].make_context(path[-1], shlex.split(line)[1 + len(path) :])
            return
        line += " --dry-run"
    if path[0] in ON_A_TERMINAL:
        code, said = on_a_terminal(line, here)
        assert code == 0, said
        return
    code, said = call(line, here), capsys.readouterr()
    assert code == 0, said.err
    assert said.out
