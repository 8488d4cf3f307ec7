"""The command line: what is typed, what is said, which files there are, and the exit code."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from support.gates import FAILED
from support.laws import law
from support.program import Program, Said, experiments
from support.program import here as here
from support.program import program as program

import batchbench
from batchbench.batching import session as conducting
from batchbench.batching.batcher import Batcher
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.batching.progress import Progress
from batchbench.batching.verification import Finding, Verification
from batchbench.cli import output as streams
from batchbench.cli import run as running
from batchbench.cli.main import COMMANDS as PURPOSES
from batchbench.cli.main import app, load_command, run_command
from batchbench.cli.options import OutputSpec
from batchbench.cli.progress import LiveDisplay, PlainDisplay
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.gate.duet import make_record
from batchbench.workloads.spec import WorkloadSpec

COMMANDS = (
    *("run", "simulate", "predict", "breakeven", "ladder", "report", "reproduce", "watch"),
    *("compare", "duet", "check", "trend", "probe", "doctor", "help"),
)
HEAVY = ("torch", "transformers", "pandas", "matplotlib")


def found_in(folder: Path) -> list[str]:
    """Everything in a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def in_a_process(
    *words: str, cwd: Path, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own; or ``code`` with these arguments."""
    start = ["-m", "batchbench"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *words],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100"},
    )


# Bad questions: one line, exit code 2

BAD_OPTIONS = [
    ("--batch-size 0", "--batch-size 0: must be at least 1"),
    ("--batch-size -1", "--batch-size -1: must be at least 1"),
    ("--batch-size x", "--batch-size x: must be a whole number"),
    ("--batch-size nan", "--batch-size nan: must be a whole number"),
    ("--batch-size 1.5", "--batch-size 1.5: must be a whole number"),
    ("--batch-size 9999999", "--batch-size 9999999: must be at most 1048576"),
    ("--batch-size", "--batch-size"),
    ("--queue-size 0", "--queue-size 0: must be at least 1"),
    ("--queue-size -5", "--queue-size -5: must be at least 1"),
    ("--long-every 0", "--long-every 0: must be at least 1"),
    ("--long-tokens 0", "--long-tokens 0: must be at least 1"),
    ("--short-tokens -3", "--short-tokens -3: must be at least 1"),
    ("--prompt-tokens 0", "--prompt-tokens 0: a length must be at least 1"),
    ("--prompt-tokens 9:4", "--prompt-tokens 9:4: the smaller bound comes first (4:9)"),
    ("--prompt-tokens many", "--prompt-tokens many: must be a number"),
    ("--prompt-tokens uniform:min=1", "--prompt-tokens uniform:min=1: must be a number"),
    ("--prompts nowhere.txt", "--prompts nowhere.txt: no such file"),
    ("--prompts .", "--prompts .: is a directory"),
    ("--prompts empty.txt", "--prompts empty.txt: contains no prompts"),
    ("--prompts latin.txt", "--prompts latin.txt: is not UTF-8"),
    ("--prompts good.txt --prompt-tokens 7", "--prompts and --prompt-tokens exclude each other"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--slo ttft", "--slo ttft: must be one of ttft, tpot, e2el, a colon and milliseconds"),
    ("--slo itl:50", "--slo itl:50: must be one of ttft, tpot, e2el"),
    ("--slo ttft:0", "--slo ttft:0: must be"),
    ("--slo ttft:-5", "--slo ttft:-5: must be"),
    ("--slo ttft:nan", "--slo ttft:nan: must be"),
    ("--slo ttft:5 --slo ttft:6", "--slo ttft:6: ttft has a limit already"),
    ("--strategy nope", "--strategy nope: no such strategy; --strategy help lists all"),
    ("--strategy static-oracle --stop-at-eos", "--strategy static-oracle: needs output lengths"),
    ("--max-wait 5 --strategy continuous", "--max-wait 5: none of --strategy continuous waits"),
    ("--max-wait -1", "--max-wait -1: must be at least 0"),
    ("--strategy os:getcwd", "--strategy os:getcwd: is not a class"),
    ("--strategy os:nope", "--strategy os:nope: "),
    ("--strategy nowhere:Policy", "nowhere:Policy: there is no module nowhere"),
    ("--strategy broken:Policy", "--strategy broken:Policy: cannot be made: ZeroDivisionError"),
    ("--strategy :", "--strategy :"),
    ("--strategy ,", "--strategy: name at least one"),
    ("--strategy static,static", "--strategy static,static: has the same strategy twice"),
    ("--order x", "--order x: must be one of fifo, longest-first, shortest-first"),
    ("--engine x", "--engine x: must be one of slots, notebook"),
    ("--execution x", "--execution x: must be one of auto, eager, graph, compile"),
    ("--engine notebook --execution graph", "give --execution auto or --engine slots"),
    ("--prefill x", "--prefill x: must be one of auto, separate, mixed"),
    ("--prefill mixed --engine notebook", "--prefill mixed: the notebook engine"),
    ("--prefill mixed --max-batched-tokens 8", "--max-batched-tokens 8: must be above the batch"),
    ("--trials 0", "--trials 0: must be at least 1"),
    ("--verify -3", "--verify -3: must be all, none or a number"),
    ("--verify some", "--verify some: must be all, none or a number"),
    ("--verify nan", "--verify nan: must be all, none or a number"),
    ("--max-time nan", "--max-time nan: must be a number of seconds"),
    ("--max-time inf", "--max-time inf: must be a number of seconds"),
    ("--max-time 0", "--max-time 0: must be at least 0.001"),
    ("--max-time -1", "--max-time -1: must be at least 0.001"),
    ("--price-per-hour -1", "--price-per-hour -1: must be at least 0"),
    ("--price-per-hour nan", "--price-per-hour nan: must be a number"),
    ("--threads 0", "--threads 0: must be at least 1"),
    ("--dtype float8", "--dtype float8: must be one of auto, float32, bfloat16, float16"),
    ("--device foo", "--device foo: must be auto, cuda, cuda:N, mps or cpu"),
    ("--device cuda:x", "--device cuda:x: must be auto, cuda, cuda:N, mps or cpu"),
    ("--load-format x", "--load-format x: must be one of auto, pretrained, dummy"),
    ("--model ''", "--model '': is empty"),
    ("--nope", "--nope"),
    ("--nope 3", "--nope"),
    ("stray", "stray"),
]
LATER = [
    ("--long-tokens 2000", "lower --long-tokens, --short-tokens or the length of prompts"),
    ("--short-tokens 1018", "1018 output tokens exceed the 1024 that gpt2 takes"),
    ("--prompt-tokens 1000 --seed 3", "1000 prompt + 100 output tokens exceed the 1024"),
    ("--model nobody/nothing", "--model nobody/nothing: neither a folder nor in the local cache"),
    ("--model ./nowhere", "--model ./nowhere: no such file or folder; give a checkpoint's folder"),
    (
        "--model good.txt",
        "--model good.txt: is a file but not GGUF; give a checkpoint's folder",
    ),
    ("--model .", "--model .: is not a checkpoint: config.json is missing"),
    ("--model 'a b/c/d'", "--model a b/c/d: "),
    ("--output good.txt", "--output good.txt: cannot be written: "),
    ("--output good.txt/below", "--output good.txt/below: cannot be written: not a directory"),
    ("--output /proc/nowhere", "--output /proc/nowhere: cannot be written: "),
    ("--output /dev/null/x", "not a directory; give another place"),
]
"""Answered when the model's shape or the folder is looked at."""


@pytest.fixture
def prompts(here: Path) -> Path:
    """Files that options of these tests name."""
    (here / "empty.txt").write_text("\n \n")
    (here / "latin.txt").write_bytes("für\n".encode("latin-1"))
    (here / "good.txt").write_text("one\ntwo\n")
    (here / "broken.py").write_text("1 / 0")
    return here


@pytest.mark.parametrize("command", ["run", "simulate"])
@pytest.mark.parametrize(("words", "told"), BAD_OPTIONS, ids=[words for words, _ in BAD_OPTIONS])
def test_a_bad_option_is_answered_with_one_line(
    command: str, words: str, told: str, program: Program, prompts: Path
) -> None:
    before = found_in(prompts)
    said = program(command, *shlex.split(words))
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert told in said.error
    assert [f for f in found_in(prompts) if "__pycache__" not in f] == before


@pytest.mark.parametrize("command", ["run", "simulate"])
@pytest.mark.parametrize(("words", "told"), LATER, ids=[words for words, _ in LATER])
def test_what_cannot_be_served_is_answered_with_one_line(
    command: str, words: str, told: str, program: Program, prompts: Path
) -> None:
    before = found_in(prompts)
    said = program(command, *shlex.split(words))
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert told in said.error
    assert found_in(prompts) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "Missing command"),
        ("nope", "nope: no such command"),
        ("--nope", "--nope"),
        ("report", "RESULT: is missing"),
        ("report nowhere", "nowhere: no such folder; give the folder that batchbench run wrote"),
        ("report .", "holds no result.json"),
        (
            "report /dev/null",
            "/dev/null: is not a folder; give the folder that batchbench run wrote",
        ),
        ("simulate --stop-at-eos", "--stop-at-eos: a simulation runs no model"),
    ],
)
def test_other_bad_questions_are_answered_with_one_line(
    words: str, told: str, program: Program, here: Path
) -> None:
    said = program(*words.split())
    if not words:  # the help, for somebody who does not know what to type
        assert said.code == 2
        assert "Usage: batchbench" in said.out + said.err
        return
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert told in said.error
    assert found_in(here) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    device: str, program: Program, here: Path, checkpoint: Path
) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    for dry in ((), ("--dry-run",)):
        said = program("run", "--model", str(checkpoint), "--device", device, *dry)
        assert said.code == 2
        assert said.error.startswith(
            f"batchbench: --device {device}: not on this machine; it has cpu"
        )
        assert found_in(here) == []


def test_a_batch_that_does_not_fit_in_memory_is_told_the_largest_that_does(
    program: Program, here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = importlib.import_module("batchbench.batching.engines.torch.build")
    monkeypatch.setattr(making, "free_bytes", lambda device: 2**30)
    said = program("run", "--model", str(checkpoint), "--batch-size", "1000000", "--device", "cpu")
    assert said.code == 2
    found = re.search(r"--batch-size 1000000: needs .* the largest that fits is (\d+)", said.error)
    assert found
    assert 1000 < int(found[1]) < 100_000
    assert found_in(here) == []


def test_a_torn_checkpoint_is_told_by_its_file(
    program: Program, here: Path, checkpoint: Path, tmp_path: Path
) -> None:
    torn = shutil.copytree(checkpoint, tmp_path / "torn")
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = program("run", "--model", str(torn))
    assert said.code == 2
    assert f"--model {torn}: model.safetensors is cut off" in said.error
    assert found_in(here) == []


def test_a_folder_with_a_result_is_refused_and_left_as_it_was(program: Program, here: Path) -> None:
    assert program("simulate", "--output", "mine").code == 0
    before = (here / "mine" / "result.json").read_bytes()
    for command, *dry in (["simulate"], ["run"], ["simulate", "--dry-run"], ["run", "--dry-run"]):
        said = program(command, "--output", "mine", *dry)
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert said.error == (
            "batchbench: --output mine: holds a result; give another folder or --overwrite"
        )
    assert (here / "mine" / "result.json").read_bytes() == before
    assert program("simulate", "--queue-size", "9", "--output", "mine", "--overwrite").code == 0
    assert (here / "mine" / "result.json").read_bytes() != before


@pytest.mark.parametrize(
    "words",
    [
        *("run", "simulate", "sweep --simulated", "capacity --slo ttft:50", "ladder", "breakeven"),
        *("baseline save", "duet --base-ref HEAD", "probe http://127.0.0.1:9", "trend ."),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(
    words: str, program: Program, here: Path
) -> None:
    (here / "file").write_text("in the way")
    said = program(*words.split(), "--output", "file/below")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.error == (
        "batchbench: --output file/below: cannot be written: not a directory; give another place"
    )


def spoil(folder: Path, how: str) -> None:
    """Spoil a result."""
    file = folder / "result.json"
    text = file.read_text(encoding="utf-8")
    changed = {
        "torn": text[: len(text) // 2],
        "empty": "",
        "other version": text.replace('"schema_version": 1', '"schema_version": 99'),
        "NaN": text.replace('"price_per_hour": null', '"price_per_hour": NaN'),
    }
    if how in changed:
        file.write_text(changed[how], encoding="utf-8")
    elif how == "no recording":
        (folder / "recordings" / "1-0.npz").unlink()
    else:
        recording = folder / "recordings" / "0-0.npz"
        recording.write_bytes(recording.read_bytes()[:-200])


@pytest.mark.parametrize(
    "how", ["torn", "empty", "other version", "NaN", "no recording", "torn recording"]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_spoiled_result_is_answered_with_one_line_and_left_as_it_is(
    how: str, program: Program, here: Path
) -> None:
    assert program("simulate", "--output", "mine").code == 0
    spoil(here / "mine", how)
    before = found_in(here), (here / "mine" / "result.json").read_bytes()
    said = program("report", "mine")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "mine/" in said.error
    assert (found_in(here), (here / "mine" / "result.json").read_bytes()) == before


LOADED = f"""
import sys, shlex
from batchbench.cli.main import run_command
for line in sys.argv[1:]:
    sys.argv = ["batchbench", *shlex.split(line)]
    code = run_command()
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print("@", code, *heavy, file=sys.stderr)
"""


def loaded_by(lines: list[str], cwd: Path) -> list[tuple[str, str]]:
    """Each line with its exit code and what heavy packages are loaded after it."""
    done = in_a_process(*lines, cwd=cwd, code=LOADED)
    told = [line[2:] for line in done.stderr.splitlines() if line.startswith("@")]
    return list(zip(lines, told, strict=True))


def test_errors_about_options_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text("{}")
    lines = [
        "run --batch-size 0",
        "run --strategy nope",
        "simulate --order x",
        "run --dtype float8",
        "run --nope",
        "nope",
        "run --output file",
        "run --output old",
        "run --long-tokens 2000",
        "run --model ./nowhere",
        "run --output-tokens nope",
        "run --output-tokens 7 --long-tokens 9",
        "run --burstiness 2",
        "run --preset nope",
        "run --trace nowhere",
        "run --workload nowhere",
        "workload show --preset nope",
        "workload save file",
        "report nowhere",
    ]
    assert loaded_by(lines, tmp_path) == [(line, "2") for line in lines]


# Help


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    lines = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    lines += [f"workload {words}" for words in ("--help", "list", "show --help", "save --help")]
    assert loaded_by(lines, tmp_path) == [(line, "0") for line in lines]


def test_these_are_the_commands() -> None:
    groups = ("baseline", "capacity", "sweep", "workload")
    assert set(typer.main.get_command(app).commands) == {*COMMANDS, *groups}  # type: ignore[attr-defined]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str, program: Program) -> None:
    said = program(flag)
    assert (said.code, said.err) == (0, "")
    assert not re.search(r"<\w+[>\[]", said.out)  # the type of a flag or an argument
    for command in COMMANDS:
        assert command in said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(command: str, program: Program) -> None:
    said = program(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert not re.search(r"<\w+[>\[]", said.out)  # the type of a flag or an argument
    found = re.search(r"Example: (batchbench .*)", said.out)
    assert found
    words = found[1].split()
    assert words[:2] == ["batchbench", command]
    load_command(command).make_context(command, words[2:])


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_help_tells_every_option_once_and_its_default(command: str, program: Program) -> None:
    text = program(command, "--help-all").out
    for spec in (Basis, ServingSpec, WorkloadSpec, ModelSpec, TrialsSpec, GoalsSpec, OutputSpec):
        for name in spec.__dataclass_fields__:
            option = "--" + name.replace("_", "-")
            assert len(re.findall(rf"^│ {option}\s", text, re.MULTILINE)) == 1, option
    trials = 4 if command == "run" else 1
    assert re.search(rf"--trials [^\[]*\[default: {trials}\]", text)


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_short_help_fits_on_one_screen_and_names_the_full_help(
    command: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = program(command, "--help").out
    assert text.count("\n") <= 45
    for option in (
        "--batch-size     -b",
        "--queue-size     -n",
        "--output         -o",
        "--help-all",
    ):
        assert option in text
    assert "--trace-block-size" not in text


def test_lists_give_the_purpose_that_the_help_of_a_command_begins_with() -> None:
    for name, purpose in PURPOSES.items():
        command = load_command(name)
        assert command.help.split("\n\n")[0].replace("\n", " ") == purpose


NAMES_OF_VLLM = [
    ("--num-prompts 9", "--queue-size 9"),
    ("--num-prompts=9", "--queue-size 9"),
    ("--num-requests 9 --max-num-seqs 2", "--queue-size 9 --batch-size 2"),
    ("--input-len 5 --output-len 4", "--prompt-tokens 5 --output-tokens 4"),
    ("-b 2 -n 9 -o mine -q", "--batch-size 2 --queue-size 9 --output mine --quiet"),
]


@pytest.mark.parametrize(("words", "ours"), NAMES_OF_VLLM)
def test_short_options_and_names_of_vllm_mean_the_same_as_ours(words: str, ours: str) -> None:
    typed, named = (parsed(["", "simulate", *line.split()]) for line in (words, ours))
    assert typed == named


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run --goodput ttft:5", "--goodput: no such option; use --slo METRIC:MS"),
        ("run --num-promts 5", "--num-promts: no such option; did you mean --num-prompts?"),
        ("run --batchsize 5", "--batchsize: no such option; did you mean --batch-size?"),
        ("run --batch-sise 5", "--batch-sise: no such option; did you mean --batch-size?"),
        ("run --hlp", "--hlp: no such option; did you mean --help?"),
        (
            "baseline save --max-time 9",
            "--max-time: no such option; batchbench baseline save --help",
        ),
        ("report x --num-prompts 5", "--num-prompts: no such option; batchbench report --help"),
        ("swep", "swep: no such command; did you mean sweep?"),
        ("workload show nope", "nope: no such preset or file; the presets are notebook,"),
    ],
)
def test_an_error_names_what_to_type_instead(words: str, told: str, program: Program) -> None:
    said = program(*words.split())
    assert said.code == 2
    assert told in said.error


def test_a_workload_is_shown_by_the_name_of_a_preset_or_file(program: Program, here: Path) -> None:
    named = program("workload", "show", "chat", "-n", "8")
    assert named.code == 0
    assert named == program("workload", "show", "--preset", "chat", "-n", "8")
    assert program("workload", "save", "w.jsonl", "-n", "8").code == 0
    assert "8 requests" in program("workload", "show", "w.jsonl").out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("batchbench ca", ["capacity"]),
        ("batchbench run --queue", ["--queue-size"]),
        ("batchbench workload s", ["show", "save"]),
        ("batchbench run --strategy static,co", ["static,continuous"]),
        ("batchbench run --strategy=gen", ["generate_batch"]),
        ("batchbench sweep --engine no", ["notebook"]),
        ("batchbench simulate --preset c", ["chat", "code", "ci"]),
        ("batchbench report --format git", ["github-bigger", "github-smaller"]),
        ("batchbench ladder --rungs lean,pa", ["lean,packed"]),
        ("batchbench workload show ch", ["chat"]),
        ("batchbench help gl", ["glossary"]),
    ],
)
def test_completion_offers_commands_options_and_values(
    line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    monkeypatch.setenv("_BATCHBENCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    said = program()
    assert (said.code, said.out.split()) == (0, offered)


HELP_S = """
import resource, subprocess, sys
def least(*words):
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)
print(least("-m", "batchbench", "--help"), least("-c", "import typer"))
"""
"""Processor seconds, which other processes on the machine change little."""


def test_help_takes_at_most_four_times_as_long_as_importing_typer(tmp_path: Path) -> None:
    done = in_a_process(cwd=tmp_path, code=HELP_S)
    help_s, typer_s = map(float, done.stdout.split())
    assert help_s < max(0.3, 4 * typer_s)


def test_listing_commands_imports_none_of_them(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom batchbench.cli.main import run_command\nrun_command(['--help'])\n"
        "print([n for n in sys.modules if n.startswith('batchbench.cli.')], file=sys.stderr)"
    )
    loaded = in_a_process(cwd=tmp_path, code=code).stderr
    assert "cli.output" in loaded
    assert not re.search(r"cli\.(run|gate|studies|workload)", loaded)


def test_version(program: Program) -> None:
    assert program("--version") == Said(0, f"batchbench {batchbench.__version__}\n", "")


# simulate, from option to files

FILES = {"result.json", "report.html", "requests.csv", "steps.csv", "timeline.png", "timeline.svg"}


def test_simulate_ends_with_sentence_table_command_and_files(program: Program, here: Path) -> None:
    said = program("simulate", "--batch-size", "8", "--queue-size", "32", "--output", "mine")
    assert said.code == 0
    text = said.out
    places = [
        text.index(part)
        for part in (
            "In simulation, where every step costs the same, continuous batching was 3.08× as fast",
            "Forward passes",
            "Again: batchbench simulate --batch-size 8 --queue-size 32",
            "More:  batchbench report --verbose mine",
            "Page:  mine/report.html",
        )
    ]
    assert places == sorted(places)
    assert "KV cache peak" not in text
    said = program("report", "mine", "-v")
    assert "KV cache peak" in said.out
    assert "Files: mine/ with result.json" in said.out
    recordings = {"recordings", "recordings/0-0.npz", "recordings/1-0.npz"}
    assert set(found_in(here / "mine")) == FILES | recordings


def test_without_output_a_new_folder_is_made_each_time(program: Program, here: Path) -> None:
    for _ in range(2):
        assert program("simulate", "--quiet").code == 0
    assert len(list((here / "batchbench-results").glob("*-gpt2*/result.json"))) == 2


def test_simulate_counts_the_classic_workload(program: Program, here: Path) -> None:
    assert program("simulate", "--output", "mine").code == 0
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    static, continuous = (data["strategies"][name]["counters"] for name in data["strategies"])
    assert (static["forward_passes"], static["slot_steps"]) == (400, 3200)
    assert (static["useful_slot_steps"], continuous["forward_passes"]) == (680, 130)
    assert data["simulated"] is True


def test_simulate_takes_as_many_trials_as_asked(program: Program, here: Path) -> None:
    said = program("simulate", "--trials", "3", "--output", "mine")
    assert said.code == 0
    recordings = [f for f in found_in(here / "mine") if f.endswith(".npz")]
    assert len(recordings) == 6


def test_trials_turn_their_order_round(program: Program) -> None:
    said = program("simulate", "--trials", "3")
    told = re.findall(r"^trial (\d)/3 +(\w+)", said.err, re.MULTILINE)
    assert told == [
        *[("1", "static"), ("1", "continuous")],
        *[("2", "continuous"), ("2", "static")],
        *[("3", "static"), ("3", "continuous")],
    ]


def test_json_prints_the_file_and_nothing_else(program: Program, here: Path) -> None:
    said = program("simulate", "--json", "--output", "mine")
    assert said.code == 0
    assert said.out == (here / "mine" / "result.json").read_text(encoding="utf-8")
    assert json.loads(said.out)["validity"]["status"] == "valid"


def test_quiet_prints_one_line(program: Program) -> None:
    said = program("simulate", "--quiet")
    assert (said.code, said.err, said.out.count("\n")) == (0, "", 1)
    assert said.out.startswith("in simulation, ")


def test_price_adds_a_cost(program: Program) -> None:
    assert "Cost of 1M output tok" in program("simulate", "--price-per-hour", "2").out
    assert "Cost" not in program("simulate").out


def test_prompts_of_your_own_are_served(program: Program, prompts: Path) -> None:
    assert program("simulate", "--prompts", "good.txt", "--output", "mine").code == 0
    data = json.loads((prompts / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["workload"]["total_input_tokens"] == 32 * 3


OWN = """
class Own:
    def admit(self, view):
        return view.waiting[: view.free], None

    def release(self, view):
        return view.finished
"""


def test_a_policy_in_a_file_here_is_served_like_ours(program: Program, here: Path) -> None:
    (here / "own_policy.py").write_text(OWN)
    said = program("simulate", "--strategy", "static,own_policy:Own", "--output", "mine")
    assert said.code == 0
    assert "own_policy:Own was 3.08× as fast" in said.out
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["strategies"]["own_policy:Own"]["counters"]["forward_passes"] == 130
    assert program("report", "mine").code == 0


def test_a_policy_that_would_wait_for_ever_is_answered(program: Program, here: Path) -> None:
    (here / "stubborn.py").write_text(OWN.replace("view.waiting[: view.free]", "()"))
    said = program("simulate", "--strategy", "stubborn:Own")
    assert said.code == 2
    assert "it would wait forever" in said.error
    assert found_in(here / "batchbench-results") == []


def test_a_dry_run_of_simulate_tells_steps_and_writes_nothing(program: Program, here: Path) -> None:
    said = program("simulate", "--dry-run", "--trials", "3")
    assert said == Said(
        0, "steps   static 400, continuous 130 forward passes per trial; 3 trials each\n", ""
    )
    assert found_in(here) == []


def test_a_dry_run_tells_steps_memory_and_time_and_writes_nothing(
    program: Program, here: Path, checkpoint: Path
) -> None:
    said = program("run", "--dry-run", "--model", str(checkpoint), "--device", "cpu")
    waits = "loading torch and timing a matrix product (5 to 15 s) …\n"
    assert said.code == 0
    assert said.err.startswith(waits)
    steps, memory, seconds = said.out.splitlines()
    assert steps == "steps   static 400, continuous 130 forward passes per trial; 4 trials each"
    assert re.fullmatch(
        r"memory  \d+ MiB of weights and \d+ MiB of KV cache on cpu; at its peak [\d,]+ MiB with "
        r"activations, copies and libraries",
        memory,
    )
    assert re.match(r"time    [\d.e-]+ s for the matrix products of all trials", seconds)
    assert found_in(here) == []


# Again


def parsed(words: list[str]) -> tuple[Experiment, GoalsSpec, OutputSpec]:
    """Return the experiment of a command line."""
    found: list[tuple[Experiment, GoalsSpec, OutputSpec]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_conduct", lambda *asked: found.append(asked))
        patch.setattr(sys, "argv", words)
        assert run_command() == 0
    (asked,) = found
    return asked


@settings(law, max_examples=60, suppress_health_check=list(HealthCheck))
@given(experiments)
def test_the_command_of_an_experiment_asks_for_the_same_experiment(asked: Experiment) -> None:
    assert parsed(shlex.split(asked.command()))[0] == asked


@pytest.mark.parametrize(
    "words",
    [
        "--trials 1 --prompt-tokens 4:9 --seed 3 --order longest-first --price-per-hour 1.2345678",
        "--trials 4 --batch-size 3 --strategy continuous,static --price-per-hour 0",
        "--model gpt2-xl --prefill mixed --max-batched-tokens 99",
        "--slo ttft:500 --slo tpot:0.5 --slo e2el:3000",
    ],
)
def test_the_command_that_is_printed_asks_for_the_same_again(words: str, program: Program) -> None:
    said = program("simulate", *words.split(), "--output", "mine")
    found = re.search(r"^Again: (.*)$", said.out, re.MULTILINE)
    assert found
    again, asked = parsed(shlex.split(found[1])), parsed(["", "simulate", *words.split()])
    assert again[0] == asked[0]
    assert again[1] == asked[1]


# Crashes, interruptions, wrong outputs


def test_a_fault_of_ours_ends_with_70_and_a_traceback_in_a_file(
    program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(conducting, "conduct", fail)
    said = program("simulate")
    assert (said.code, said.err.count("\n")) == (70, 1)
    found = re.search(
        r"RuntimeError: boom and more; please report it with the traceback in (\S+)$", said.error
    )
    assert found
    text = Path(found[1]).read_text()
    assert text.startswith("Traceback")
    assert "in fail" in text
    assert found_in(here / "batchbench-results") == []


class Interrupting:
    """``Batcher.serve`` that gets Ctrl-C in its ``nth`` call."""

    def __init__(self, nth: int) -> None:
        self.left, self.serve = nth, Batcher.serve

    def __get__(self, batcher: Batcher, kind: type) -> Callable[..., Any]:
        def serve(*asked: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return self.serve(batcher, *asked, **more)

        return serve


@pytest.mark.parametrize("nth", [1, 2])
def test_ctrl_c_before_the_first_pair_keeps_nothing(
    nth: int, program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batcher, "serve", Interrupting(nth))
    said = program("simulate", "--trials", "3", "--output", "mine")
    assert said.code == 130
    assert said.error == "batchbench: interrupted; nothing was kept"
    assert found_in(here) == []


@pytest.mark.parametrize(("nth", "pairs"), [(3, 1), (4, 1), (5, 2)])
def test_ctrl_c_keeps_the_pairs_that_are_finished(
    nth: int, pairs: int, program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batcher, "serve", Interrupting(nth))
    said = program("simulate", "--trials", "3", "--output", "mine")
    reason = f"interrupted after {pairs} of 3 pairs"
    assert said.code == 130
    assert f"Run suspect ({reason})" in " ".join(said.out.split())
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["validity"] == {"status": "suspect", "reasons": [reason]}
    assert {len(s["trials"]) for s in data["strategies"].values()} == {pairs}
    assert data["verification"]["passed"] is None


def test_ctrl_c_while_verifying_keeps_all_pairs(
    program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(conducting.LocalBench, "verify", interrupted)
    said = program("simulate", "--trials", "2", "--output", "mine")
    assert said.code == 130
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["validity"]["status"] == "suspect"
    assert len(data["strategies"]["static"]["trials"]) == 2


@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)])
def test_wrong_outputs_end_with_1_and_are_written_and_shown(
    flags: tuple[str, ...], program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Finding(4, "continuous", "wrong", 9, 5.0, 0.2, "token 9 is another")
    found = Verification(32, 31, 0, 1, "teacher-forced", 5.0, (bad,))
    monkeypatch.setattr(conducting.LocalBench, "verify", lambda *_: found)
    said = program("simulate", "--output", "mine", *flags)
    assert said.code == 1
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    assert data["verification"]["passed"] is False
    assert data["validity"]["status"] == "suspect"
    if "--json" not in flags:
        assert "1 WRONG (first: request 4 under continuous" in " ".join(said.out.split())


# Progress


def progress(done: int, in_use: int = 3, slots: int = 8) -> Progress:
    """Return the progress of a trial."""
    return Progress("static", 0, slots, 32, done, in_use, 10, 500, 1_000_000_000)


def console() -> Console:
    """A terminal that one can read."""
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def test_live_lanes_tell_slots_requests_rate_and_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console()
    monkeypatch.setenv("TERM", "xterm")
    with LiveDisplay(terminal, 8) as display:
        for strategy in ("static", "continuous"):
            display.trial_begins(strategy, 1, 4)
            display.progressed(replace(progress(9), strategy=strategy))
            display._drawn = 0.0
            display.progressed(replace(progress(9), strategy=strategy))
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    for part in ("static", "continuous", "trial 2/4", "■■■□□□□□", "9/32", "500 tok/s"):
        assert part in text


def test_a_lane_tells_until_when_there_is_nothing_to_do() -> None:
    terminal = console()
    with LiveDisplay(terminal, 1) as display:
        display.trial_begins("static", 0, 1)
        lane = progress(9)
        lane.idle(1_000_000_000, 7_260_000_000)
        display.idles(lane)
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    assert "idle to 7.3 s" in text
    assert "□" * 8 in text


def test_many_slots_are_told_as_a_number() -> None:
    terminal = console()
    with LiveDisplay(terminal, 1) as display:
        display.trial_begins("static", 0, 1)
        display.progressed(progress(9, in_use=100, slots=256))
        display.trial_ends("static", 0, 1_000_000_000)
    assert isinstance(terminal.file, io.StringIO)
    assert "100/256 slots" in terminal.file.getvalue()


def test_plain_lines_have_no_escapes_and_need_no_markup() -> None:
    terminal = Console(file=io.StringIO(), width=20, soft_wrap=True)
    display = PlainDisplay(terminal, 1)
    display.note("a [bold]name[/bold] that is longer than the terminal is wide")
    display.trial_begins("static", 0, 4)
    display.trial_ends("static", 0, 1_500_000_000)
    assert isinstance(terminal.file, io.StringIO)
    assert terminal.file.getvalue() == (
        "a [bold]name[/bold] that is longer than the terminal is wide\n"
        "trial 1/4  static       1.5 s\n"
    )


def test_a_log_gets_a_line_in_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.02)
    log = Console(file=io.StringIO(), width=80)
    with PlainDisplay(log, 2) as display:
        display.phase("loading")
        time.sleep(0.15)
        display.trial_begins("static", 0, 1)
        time.sleep(0.03)
        display.progressed(progress(16))
        display.trial_ends("static", 0, 1_000_000_000)
    assert isinstance(log.file, io.StringIO)
    lines = log.file.getvalue().splitlines()
    assert lines[0].startswith("loading the model (a few seconds")
    assert lines[1].startswith("still loading, ")
    assert re.fullmatch(r"trial 1/1  static  16/32 requests, about .* left", lines[-2])
    before = log.file.getvalue()
    time.sleep(0.05)
    assert log.file.getvalue() == before


def test_turns_are_lines_in_a_log_and_a_bar_on_a_terminal() -> None:
    for screen, kind in (
        (Console(file=io.StringIO(), width=80), PlainDisplay),
        (console(), LiveDisplay),
    ):
        with kind(screen, max_time=60.0) as display:
            for turn in range(3):
                display.begins(f"turn {turn}")
            display.measured("pair 1", "1.01 times as fast")
        assert isinstance(screen.file, io.StringIO)
        text = screen.file.getvalue()
        assert "turn 0" in text
        assert ("turn 2" in text) is (kind is LiveDisplay)
        assert "pair 1       1.01 times as fast" in text


def test_a_cell_and_a_silent_console_print_no_line_for_a_phase() -> None:
    log = Console(file=io.StringIO(), width=80, quiet=True)
    PlainDisplay(log).phase("loading")
    assert isinstance(log.file, io.StringIO)
    assert log.file.getvalue() == ""


# On a model

ASKED = shlex.split(
    "--batch-size 4 --queue-size 10 --long-tokens 20 --short-tokens 5 --prompt-tokens 2:9 --seed 5"
)


@dataclass(frozen=True)
class Served:
    """A run in a process of its own, and its folder."""

    done: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def data(self) -> Any:
        """Its result."""
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One run of the tiny checkpoint, as a person would see it; not to be changed."""
    folder = tmp_path_factory.mktemp("served") / "mine"
    words = [*ASKED, "--model", str(checkpoint), "--device", "cpu", "--trials", "3"]
    return Served(in_a_process("run", *words, "--output", "mine", cwd=folder.parent), folder)


def test_a_run_ends_with_sentence_table_command_and_files(served: Served, checkpoint: Path) -> None:
    assert served.done.returncode == 0, served.done.stderr
    text = served.done.stdout
    sentence = " ".join(text.split())
    said = r"Continuous batching was \d+\.\d\d× as fast as static batching \(95 % CI "
    assert re.match(said, sentence)
    ratio = served.data["comparison"]["step_ratio"]
    said = f"counting steps only: {ratio:.2f}×. Outputs identical for 10/10 requests; run "
    assert said in sentence
    for label in ("Duration", "TTFT p99", "Forward passes", "Slot utilisation"):
        assert label in text
    assert f"Again: batchbench run {shlex.join(ASKED)[:30]}" in text
    assert f"--model {checkpoint}" in text
    assert "Page:  mine/report.html" in text
    assert "\x1b" not in text
    assert re.findall(r"^trial", served.done.stderr, re.MULTILINE) == ["trial"] * 6


PICTURES = 5


def test_a_run_writes_result_page_frames_recordings_and_pictures(served: Served) -> None:
    files = found_in(served.folder)
    assert {"result.json", "report.html", "requests.csv", "steps.csv"} < set(files)
    assert len([f for f in files if f.endswith(".npz")]) == 6
    for format in (".png", ".svg"):
        assert len([f for f in files if f.endswith(format)]) == PICTURES
    assert len(files) == 4 + 1 + 6 + 2 * PICTURES


def test_requests_csv_of_a_run_carries_the_texts(served: Served) -> None:
    frame = pd.read_csv(served.folder / "requests.csv", keep_default_na=False)
    assert len(frame) == 2 * 3 * 10
    texts = {row["request"]: row["output"] for row in served.data["outputs"]}
    assert frame.output_text.tolist() == [texts[request] for request in frame.request]
    assert len(set(texts.values())) > 1


def test_a_run_takes_the_steps_that_a_simulation_counts(
    served: Served, checkpoint: Path, program: Program
) -> None:
    said = program("simulate", *ASKED, "--model", str(checkpoint), "--json")
    expected = json.loads(said.out)
    assert served.data["workload"] == expected["workload"]
    for name in ("static", "continuous"):
        counted = expected["strategies"][name]["counters"]
        assert served.data["strategies"][name]["counters"] == counted


def test_the_notebook_engine_takes_the_same_steps_and_gives_the_same_tokens(
    served: Served, checkpoint: Path, program: Program
) -> None:
    words = shlex.split("--device cpu --engine notebook --trials 1 --json")
    said = program("run", *ASKED, "--model", str(checkpoint), *words)
    notebook = json.loads(said.out)
    assert said.code == 0
    assert notebook["config"]["serving"]["engine"] == "notebook"
    assert notebook["verification"]["identical"] == 10
    said = program("simulate", *ASKED, "--model", str(checkpoint), "--engine", "notebook", "--json")
    simulated = json.loads(said.out)["strategies"]
    for name, strategy in notebook["strategies"].items():
        assert strategy["counters"] == simulated[name]["counters"]
        assert strategy["counters"]["mixed_passes"] == 0
        assert strategy["output_digest"] == served.data["strategies"][name]["output_digest"]


REMAKING = "making the report (a few seconds) …\n"

WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from batchbench.cli.main import main
sys.argv = ["batchbench", *sys.argv[1:]]
main()
"""


def test_report_draws_everything_again_without_torch(served: Served, tmp_path: Path) -> None:
    folder = shutil.copytree(served.folder, tmp_path / "mine")
    for file in folder.iterdir():
        if file.suffix in (".png", ".svg", ".csv"):
            file.unlink()
    done = in_a_process("report", "mine", cwd=tmp_path, code=WITHOUT_TORCH)
    assert (done.returncode, done.stderr[: len(REMAKING)]) == (0, REMAKING)
    assert done.stdout == served.done.stdout
    assert found_in(folder) == found_in(served.folder)
    for name in found_in(folder):
        if name.endswith((".json", ".csv", ".npz")):
            assert (folder / name).read_bytes() == (served.folder / name).read_bytes(), name


def test_report_writes_a_page_or_markdown_where_it_is_told(
    served: Served, program: Program, here: Path
) -> None:
    shutil.copytree(served.folder, here / "mine")
    (here / "mine" / "report.html").unlink()
    said = program("report", "mine", "--format", "html")
    assert said == Said(0, "File: mine/report.html\n", REMAKING)
    assert "<h1>" in (here / "mine" / "report.html").read_text(encoding="utf-8")
    assert program("report", "mine", "--output", "a page.html", "--quiet") == Said(0, "", "")
    assert (here / "a page.html").read_bytes() == (here / "mine" / "report.html").read_bytes()
    said = program("report", "mine", "--format", "markdown", "--output", "-")
    assert (said.code, said.err) == (0, REMAKING)
    assert said.out.startswith("**continuous batching")
    assert "](mine/timeline.png)" in said.out
    assert program("report", "mine", "--format", "markdown").out == "File: mine/report.md\n"
    assert "](timeline.png)" in (here / "mine" / "report.md").read_text(encoding="utf-8")


def test_report_sets_several_results_side_by_side(program: Program, here: Path) -> None:
    for name, slots in (("four", "4"), ("eight", "8")):
        words = ("--batch-size", slots, "--queue-size", "16", "--long-every", "4", "--quiet")
        assert program("simulate", *words, "--output", name).code == 0
    before = found_in(here)
    said = program("report", "four", "eight")
    assert (said.code, said.err) == (0, REMAKING)
    assert re.search(r"^ batch size +4 +8 *$", said.out, re.MULTILINE)
    assert said.out.startswith("2 results side by side: ")
    assert found_in(here) == before
    assert program("report", "four", "eight", "--format", "html").out == "File: report.html\n"
    assert program("report", "four", "eight", "--quiet").out.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("mine --format pdf", "--format pdf: must be one of terminal, json, html, markdown"),
        ("mine --file x.txt", "--file x.txt: needs a format; use the ending .html or .md"),
        ("mine --output mine --format html", "--file mine: is a directory"),
        ("mine --output mine/requests.csv/x.html", "cannot be written: not a directory"),
        ("mine --json --format html", "--json and --format html: give one of them"),
        ("mine mine", "mine: is named twice"),
        ("mine nowhere --json", "--json: works for one result"),
        ("mine nowhere --trace-out x", "--trace-out: works for one result"),
        ("mine nowhere", "nowhere: no such folder"),
        ("mine --trace-out nowhere/x", "--trace-out nowhere/x: no such folder as nowhere"),
        ("mine --trace-out mine", "--trace-out mine: is a directory"),
    ],
)
def test_report_answers_a_bad_question_with_one_line(
    words: str, told: str, served: Served, program: Program, here: Path
) -> None:
    shutil.copytree(served.folder, here / "mine")
    before = found_in(here)
    said = program("report", *words.split())
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert told in said.error
    assert found_in(here) == before


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_a_trace_that_cannot_be_written_is_told_before_anything_runs(
    command: str, program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(conducting, "conduct", never)
    said = program(command, "--trace-out", "nowhere/trace.json")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "--trace-out nowhere/trace.json: no such folder as nowhere; make it first" in said.error
    assert found_in(here / "batchbench-results") == []


@pytest.mark.parametrize("name", ["mine/trace.json", "trace.json.gz"])
def test_a_trace_is_written_beside_the_result(name: str, program: Program, here: Path) -> None:
    words = ("simulate", "--queue-size", "8", "--output", "mine", "--quiet")
    assert program(*words, "--trace-out", name).code == 0
    first = (here / name).read_bytes()
    assert program("report", "mine", "--trace-out", name, "--quiet").code == 0
    assert (here / name).read_bytes() == first
    assert (first[:2] == b"\x1f\x8b") is name.endswith(".gz")


def test_report_shows_a_study_again(program: Program, here: Path) -> None:
    assert program("sweep", "-b", "2,4", "-n", "8", "--simulated", "-o", "swept").code == 0
    words = "capacity --slo ttft:50 --simulated -n 100 --max-trials 1 --precision 1 -o carried"
    assert program(*words.split()).code == 0
    for folder, part in (("swept", "over 2 cells"), ("carried", "req/s")):
        before = found_in(here)
        said = program("report", folder)
        assert (said.code, said.err) == (0, "reading the study (a few seconds) …\n")
        assert part in said.out
        assert f"Files: {folder}/ with" in said.out
        assert program("report", folder, "--quiet").out.count("\n") == 1
        json.loads(program("report", folder, "--json").out)
        assert (
            "give only --format terminal or --json"
            in program("report", folder, "--format", "html").error
        )
        assert found_in(here) == before
    (here / "swept" / "sweep.json").write_text('{"schema_version": 1}')
    assert "swept/sweep.json: is damaged" in program("report", "swept").error


def test_report_shows_a_trend_and_the_record_of_a_gate_again(program: Program, here: Path) -> None:
    assert program("simulate", "-n", "8", "-o", "mine", "-q").code == 0
    first = program("trend", "mine", "--output", "history", "--quiet").out
    again = program("report", "history")
    assert (again.code, again.err) == (0, "reading the study (a few seconds) …\n")
    assert program("report", "history", "--quiet").out == first
    assert "static.output_throughput" in again.out
    assert "Again:" not in again.out  # trend.json does not hold the command
    assert "trend.json" in again.out
    (here / "duel").mkdir()
    (here / "duel" / "duet.json").write_bytes(make_record(FAILED, 1))
    again = program("report", "duel")
    assert (again.code, again.err) == (0, "reading the study (a few seconds) …\n")
    assert program("report", "duel", "--quiet").out == f"{FAILED.sentence}\n"
    for evidence in FAILED.evidence:
        assert evidence.name in again.out
        assert str(evidence.verdict) in again.out


def test_report_prints_json_by_either_name(program: Program, here: Path) -> None:
    assert program("simulate", "-n", "8", "-o", "mine", "-q").code == 0
    text = (here / "mine" / "result.json").read_text(encoding="utf-8")
    assert program("report", "mine", "--format", "json").out == text


def test_report_has_json_and_quiet_too(served: Served, program: Program, here: Path) -> None:
    shutil.copytree(served.folder, here / "mine")
    text = (here / "mine" / "result.json").read_text(encoding="utf-8")
    assert program("report", "mine", "--json") == Said(0, text, REMAKING)
    assert program("report", "mine/result.json", "--json") == Said(0, text, REMAKING)
    quiet = program("report", "mine", "--quiet")
    assert (quiet.code, quiet.err, quiet.out.count("\n")) == (0, "", 1)


def test_commands_do_no_arithmetic_on_results() -> None:
    """Options in, a report out: the commands' file holds no product and no quotient."""
    tree = ast.parse(Path(running.__file__).read_text(encoding="utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp)]
    assert not [n for n in found if isinstance(n.op, ast.Mult | ast.Div) and not _path(n)]


def _path(node: ast.BinOp) -> bool:
    """Return True if it joins a path."""
    return isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant)
