"""Presets, workload files and options: layers of one experiment, and the commands for workloads."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law
from support.program import Program, Said, caller

from batchbench.batching.bench import LocalBench
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.models import MADE_UP, ModelSpec, find_model
from batchbench.batching.presets import NOTEBOOK, PRESETS, Basis
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.cli import run as running
from batchbench.cli.main import load_command, run_command
from batchbench.errors import UsageError
from batchbench.reports import output as folders
from batchbench.reports.workload_profile import bars, pace, spread
from batchbench.settings import layered
from batchbench.workloads.generate import make_outline
from batchbench.workloads.spec import WorkloadSpec

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def program(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Program:
    """Runs the program in this process, in ``here``, with pictures that cost nothing."""
    monkeypatch.setattr(folders, "draw", lambda recordings, title: {"timeline": None})
    monkeypatch.setattr(folders, "figure_bytes", lambda figure, format: format.encode())
    monkeypatch.setenv("COLUMNS", "100")

    call = caller(monkeypatch, capsys)
    return lambda *words: Said(*call(*words))


def asked_by(words: Sequence[str]) -> Experiment:
    """Return the experiment of a command line."""
    found: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_conduct", lambda *asked: found.append(asked))
        patch.setattr(sys, "argv", ["batchbench", *words])
        assert run_command() == 0
    ((experiment, *_),) = found
    assert isinstance(experiment, Experiment)
    return experiment


def digest_of(experiment: Experiment) -> str:
    """The digest of the workload that an experiment serves."""
    return LocalBench(replace(experiment, simulated=True), Watch()).workload.digest


# Presets


def test_presets_set_what_there_is_to_set() -> None:
    names = [f.name for spec in PARTS.values() for f in fields(spec)]
    assert len(names) == len(set(names))
    for preset in PRESETS.values():
        assert preset.settings.keys() <= set(names)
        assert preset.about
        assert preset.source


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["gpt2", "gpt2-xl", None])
def test_every_preset_fits_the_models_context(name: str, model: str | None) -> None:
    given = {} if model is None else {"model": model}
    workload = LocalBench(Experiment.of(given, preset=name, simulated=True), Watch()).workload
    assert workload.max_total_tokens <= 1024
    assert len(workload) in (32, 64)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_preset_fits_a_small_context_too(name: str, seed: int, tmp_path: Path) -> None:
    shape = {**MADE_UP["toy-gpt2"], "n_positions": 128}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    asked = Experiment.of({"model": str(tmp_path), "seed": seed}, preset=name, simulated=True)
    workload = LocalBench(asked, Watch()).workload
    assert workload.max_total_tokens <= 128


def test_the_notebook_preset_is_the_default() -> None:
    assert Experiment.of() == Experiment()
    assert asked_by(["run", "--preset", NOTEBOOK]) == asked_by(["run"]) == Experiment()


def test_presets_have_the_lengths_that_their_sources_tell() -> None:
    """Lengths fit the model; means are within four standard errors and the clipping."""
    for name, prompt, output in (
        ("chat", ("mean", 161.31), ("mean", 337.99)),
        ("summarize", ("mean", 781), ("mean", 56)),
        ("code", ("median", 1500), ("median", 13)),
        ("anyscale", ("mean", 512), ("mean", 128)),
    ):
        spec = Experiment.of({"queue_size": 20_000}, preset=name).workload
        outline = make_outline(spec, batch_size=8, encode=None)
        for (statistic, told), lengths in (
            (prompt, outline.prompt_tokens),
            (output, outline.output_tokens),
        ):
            assert getattr(np, statistic)(lengths) == pytest.approx(told, rel=0.08)


@pytest.mark.parametrize("name", PRESETS)
def test_any_part_of_a_preset_is_overridden_by_its_option(name: str) -> None:
    words = [
        "run",
        "--preset",
        name,
        "--output-tokens",
        "3:5",
        "--batch-size",
        "3",
        "--trials",
        "2",
    ]
    asked = asked_by(words)
    usual = Experiment.of(preset=name)
    assert asked.workload.output_tokens == "3:5"
    assert asked.serving == replace(usual.serving, batch_size=3)
    assert asked.trials.trials == 2
    assert asked.workload.prompt_tokens == usual.workload.prompt_tokens
    assert asked.preset == name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--preset chat --long-tokens 50", {"output_tokens": None, "long_tokens": 50}),
        ("--preset chat --prompts p.txt", {"prompt_tokens": None, "prompts": Path("p.txt")}),
        ("--preset burst --arrivals at-once", {"request_rate": None, "burstiness": 1.0}),
        ("--preset burst --request-rate 9", {"request_rate": 9.0, "burstiness": 0.25}),
        ("--preset burst --arrivals ramp:from=1,to=9", {"request_rate": None}),
        ("--preset burst --trace t.csv", {"prompt_tokens": None, "request_rate": 4.0}),
        ("--preset burst --trace t.csv --speed 2", {"request_rate": None, "speed": 2.0}),
        ("--workload w.toml", {"queue_size": 9, "output_tokens": "7", "request_rate": 2.0}),
        ("--workload w.toml --queue-size 32", {"queue_size": 32, "output_tokens": "7"}),
        ("--workload w.toml --long-every 3", {"output_tokens": None, "long_every": 3}),
        ("--workload w.toml --no-such", None),
        ("--preset chat --workload w.toml", {"prompt_tokens": "4:9", "overlong": "scale"}),
    ],
)
def test_what_is_given_nearer_takes_out_what_it_replaces(
    words: str, expected: dict[str, Any] | None, here: Path, program: Program
) -> None:
    (here / "p.txt").write_text("one\n")
    (here / "t.csv").write_text(AZURE)
    (here / "w.toml").write_text(
        'queue_size = 9\noutput_tokens = 7\nprompt_tokens = "4:9"\nrequest_rate = 2\n'
    )
    if expected is None:
        assert program("simulate", *words.split()).code == 2
        return
    spec = asked_by(["run", *words.split()]).workload
    assert {name: getattr(spec, name) for name in expected} == expected


def test_an_option_that_repeats_a_default_is_given_all_the_same(here: Path) -> None:
    (here / "w.toml").write_text("queue_size = 9\nseed = 4\nburstiness = 2\nrequest_rate = 1\n")
    asked = asked_by(["run", "--workload", "w.toml", "--seed", "0", "--burstiness", "1"])
    assert (asked.workload.seed, asked.workload.burstiness) == (0, 1.0)
    simulated = asked_by(["simulate", "--trials", "1"])
    assert simulated.trials.trials == asked_by(["simulate"]).trials.trials == 1


settings_of_workloads = st.fixed_dictionaries(
    {},
    optional={
        "queue_size": st.integers(1, 50),
        "output_tokens": st.sampled_from(["7", "3:9", "zipf:alpha=2,max=30"]),
        "long_tokens": st.integers(1, 99),
        "prompt_tokens": st.sampled_from(["4", "exponential:mean=9,max=40"]),
        "arrivals": st.sampled_from(["at-once", "ramp:from=1,to=3"]),
        "request_rate": st.floats(0.1, 100),
        "burstiness": st.floats(0.1, 10),
        "max_concurrency": st.integers(1, 9),
        "overlong": st.sampled_from(["clip", "scale", "error"]),
        "stop_at_eos": st.booleans(),
        "batch_size": st.integers(1, 9),
        "order": st.sampled_from(["fifo", "longest-first"]),
        "model": st.sampled_from(["gpt2", "toy-gpt2"]),
        "trials": st.integers(1, 3),
        "seed": st.integers(0, 3),
    },
)


@settings(law, max_examples=60)
@given(st.sampled_from(list(PRESETS)), settings_of_workloads, st.booleans())
def test_the_command_of_a_changed_preset_asks_for_the_same_experiment(
    preset: str, given_settings: dict[str, Any], simulated: bool
) -> None:
    try:
        asked = Experiment.of(given_settings, preset=preset, simulated=simulated)
    except UsageError:
        return
    again = asked_by(shlex.split(asked.command())[1:])
    assert replace(again, preset=preset) == asked


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_to_ask_for_again(name: str) -> None:
    words = shlex.split(Experiment.of(preset=name).command())
    assert words[:2] == ["batchbench", "run"]
    assert ("--preset" in words) is (name != NOTEBOOK)
    assert set(words[2::2]) <= {"--preset", "--batch-size", "--queue-size"}


def test_what_no_option_can_take_away_is_asked_for_from_the_defaults() -> None:
    chat = Experiment.of(preset="chat")
    bare = replace(chat, workload=replace(chat.workload, output_tokens=None))
    words = shlex.split(bare.command())[1:]
    assert "--preset" not in words
    assert replace(asked_by(words), preset="chat") == bare


@pytest.mark.parametrize(
    "words",
    [
        "--preset chat --queue-size 9 --long-tokens 50",
        "--preset burst --seed 3",
        "--preset code --request-rate 2",
        "--preset ci",
        "--workload w.toml --arrivals ramp:from=1,to=4",
        "--trace t.csv --request-rate 5 --burstiness 0.5 --overlong clip",
    ],
)
def test_the_command_that_is_printed_serves_the_same_workload_again(
    words: str, here: Path, program: Program
) -> None:
    (here / "w.toml").write_text('output_tokens = "lognormal:mean=9,sigma=1"\nqueue_size = 9\n')
    (here / "t.csv").write_text(AZURE)
    said = program("simulate", *words.split(), "--output", "mine")
    assert said.code == 0, said.err
    (command,) = re.findall(r"^Again: batchbench (.*)$", said.out, re.MULTILINE)
    data = json.loads((here / "mine" / "result.json").read_text(encoding="utf-8"))
    assert digest_of(asked_by(shlex.split(command))) == data["workload"]["digest"]
    preset = re.search(r"--preset (\w+)", words)
    assert data["config"]["preset"] == (preset[1] if preset else NOTEBOOK)
    assert program("report", "mine", "--quiet").code == 0


def test_layers_that_contradict_themselves_do_not_lose_a_word() -> None:
    specs = list(PARTS.values())
    one, two = {"output_tokens": "7", "seed": 1}, {"long_tokens": 5, "short_tokens": 3}
    assert layered(specs, one, two) == {"seed": 1, **two}
    both = {"output_tokens": "7", "long_tokens": 5}
    assert layered(specs, two, both) == both


def test_from_python_a_setting_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="nope: an experiment has no such setting"):
        Experiment.of({"nope": 3})
    for wrong in (lambda: Experiment.of(preset="nope"), lambda: Experiment(preset="nope")):
        with pytest.raises(UsageError, match="--preset nope: must be one of notebook, anyscale"):
            wrong()


def test_the_ci_preset_runs_on_its_made_up_model(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up = LocalBench.warm_up
    monkeypatch.setattr(LocalBench, "warm_up", lambda session: warm_up(session, most=1))
    given_settings = {"trials": 1, "device": "cpu", "queue_size": 9, "long_tokens": 20}
    outcome = conduct(Experiment.of(given_settings, preset="ci"))
    assert outcome.workload.closed
    assert outcome.verification.passed
    assert outcome.model["name"] == "toy-gpt2"
    assert "random values" in outcome.model["note"]
    assert outcome.model["parameters"] < 20e6


def test_a_made_up_model_has_no_weights_to_load() -> None:
    assert find_model(ModelSpec(model="toy-gpt2", load_format="dummy")).load_format == "dummy"
    with pytest.raises(UsageError, match="--model toy-gpt2: has no trained weights"):
        find_model(ModelSpec(model="toy-gpt2", load_format="pretrained"))


# The workload file


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("queue_size =", "is not TOML"),
        ("queue_size = 3\nqueue_size = 4", "is not TOML"),
        ("queuesize = 3", "unknown key queuesize; it takes queue_size, long_every"),
        ("batch_size = 3", "unknown key batch_size"),
        ("[workload]\nqueue_size = 3", "unknown key workload"),
        ("queue_size = '3'", "queue_size = '3': must be a whole number"),
        ("queue_size = 3.5", "queue_size = 3.5: must be a whole number"),
        ("queue_size = true", "queue_size = true: must be a whole number"),
        ("queue_size = 0", "queue_size = 0: must be at least 1"),
        ("request_rate = inf", "request_rate = inf: must be a finite number"),
        ("request_rate = '2'", "request_rate = '2': must be a number"),
        ("stop_at_eos = 1", "stop_at_eos = 1: must be true or false"),
        ("output_tokens = 3.5", "output_tokens = 3.5: must be a text"),
        ("output_tokens = [3]", "output_tokens = [3]: must be a text"),
        ("overlong = 'weep'", "overlong = 'weep': must be one of error, clip, scale, skip"),
        ("prompts = 3", "prompts = 3: must be the name of a file"),
    ],
)
def test_a_wrong_workload_file_is_answered_with_one_line(
    content: str, told: str, here: Path, program: Program
) -> None:
    (here / "w.toml").write_text(content)
    said = program("simulate", "--workload", "w.toml")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("batchbench: --workload w.toml: ")
    assert told in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--workload nowhere.toml", "--workload nowhere.toml: no such file"),
        ("--workload .", "--workload .: is a directory; give a file"),
        ("--workload latin.toml", "--workload latin.toml: is not UTF-8 text"),
        ("--workload both.toml", "--output-tokens and --long-tokens exclude each other"),
        ("--workload rate.toml", "--burstiness 0.5: needs random arrivals"),
        ("--preset nope", "--preset nope: must be one of notebook, anyscale, chat"),
        ("--output-tokens 7 --long-tokens 100", "--output-tokens and --long-tokens exclude"),
        ("--output-tokens 7 --short-tokens 10", "--output-tokens and --short-tokens exclude"),
        ("--burstiness 0.5", "--burstiness 0.5: needs random arrivals; give --request-rate"),
        ("--trace nowhere.csv", "--trace nowhere.csv: no such file"),
        ("--trace t.csv --prompt-tokens 4", "--prompt-tokens and --trace exclude each other"),
    ],
)
def test_what_cannot_be_asked_is_answered_with_one_line(
    words: str, told: str, here: Path, program: Program
) -> None:
    (here / "latin.toml").write_bytes("# für\n".encode("latin-1"))
    (here / "both.toml").write_text("output_tokens = 7\nlong_tokens = 5\n")
    (here / "rate.toml").write_text("burstiness = 0.5\n")
    (here / "t.csv").write_text(AZURE)
    for command in (["simulate"], ["run"], ["workload", "show"], ["workload", "save", "x.jsonl"]):
        said = program(*command, *words.split())
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert told in said.err


def test_a_burstiness_in_the_file_and_a_rate_beside_it_go_together(here: Path) -> None:
    (here / "rate.toml").write_text("burstiness = 0.5\n")
    spec = asked_by(["run", "--workload", "rate.toml", "--request-rate", "2"]).workload
    assert (spec.burstiness, spec.request_rate) == (0.5, 2.0)


def test_files_that_a_workload_file_names_lie_beside_it(here: Path) -> None:
    beside = here / "beside"
    beside.mkdir()
    (beside / "lengths.txt").write_text("3\n5\n")
    (beside / "prompts.txt").write_text("one\n")
    (beside / "w.toml").write_text(
        'output_tokens = "empirical:lengths.txt"\nprompts = "prompts.txt"\n'
    )
    spec = asked_by(["run", "--workload", "beside/w.toml"]).workload
    assert spec.prompts == Path("beside/prompts.txt")
    assert spec.output_tokens == "empirical:beside/lengths.txt"


def test_a_workload_file_says_what_options_say(here: Path) -> None:
    (here / "lines.txt").write_text("one\n")
    options = {
        "queue_size": 9,
        "long_every": 3,
        "long_tokens": 20,
        "short_tokens": 2,
        "prompts": "lines.txt",
        "overlong": "clip",
        "seed": 5,
        "request_rate": 2.5,
        "burstiness": 0.5,
        "arrivals": "gamma",
        "max_concurrency": 4,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    (here / "w.toml").write_text("\n".join(lines))
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))]
    words = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    assert asked_by(["run", "--workload", "w.toml"]) == asked_by(["run", *words])


# Commands


def test_the_commands_of_workload() -> None:
    group = load_command("workload")
    assert set(group.commands) == {"list", "show", "save"}


@pytest.mark.parametrize("command", ["list", "show", "save"])
def test_help_has_an_example_that_works(command: str, program: Program) -> None:
    said = program("workload", command, "--help")
    assert (said.code, said.err) == (0, "")
    (example,) = re.findall(r"Example: batchbench (.*?) *$", said.out, re.MULTILINE)
    assert example.split()[:2] == ["workload", command]
    assert program(*example.split()).code == 0


@pytest.mark.parametrize("command", ["show", "save"])
def test_help_tells_the_options_of_a_workload_and_few_others(
    command: str, program: Program
) -> None:
    text = program("workload", command, "--help-all").out
    options = set(re.findall(r"^│ --([\w-]+)", text, re.MULTILINE))
    names = {f.name.replace("_", "-") for spec in (WorkloadSpec, Basis) for f in fields(spec)}
    others = {"batch-size", "model", "revision", "load-format", "overwrite", "output"}
    others |= {"help", "help-all"}
    assert names <= options <= names | others


def test_workload_alone_shows_its_help(program: Program) -> None:
    said = program("workload")
    assert said.code == 2
    assert "Usage: batchbench workload" in said.out + said.err
    assert not re.search(r"^batchbench: *$", said.err, re.MULTILINE)


def test_list_tells_every_preset_its_options_and_its_source(program: Program) -> None:
    text = " ".join(program("workload", "list").out.replace("│", " ").split())
    for name, preset in PRESETS.items():
        for part in (name, preset.about, preset.source):
            assert part in text
        for option, value in preset.settings.items():
            assert f"--{option.replace('_', '-')} {value}" in text


def test_show_tells_lengths_and_arrivals(program: Program) -> None:
    said = program(*shlex.split("workload show --prompt-tokens 20 --queue-size 16 --seed 3"))
    assert said.code == 0
    assert said.out.startswith("16 requests · 320 prompt tokens · 340 output tokens\n")
    assert re.search(r"prompt *│ *20 │ *20 │ *20 │ *20 │ *20 │ *20 │ *320", said.out)
    assert re.search(r"output *│ *21.25 │ *10 │ *10 │", said.out)
    assert "Arrivals: all at once\n" in said.out
    assert re.search(r"^ *20 █{40} +16$", said.out, re.MULTILINE)
    assert re.search(r"^ *10–19 █{40} +14$", said.out, re.MULTILINE)
    timed = program(*shlex.split("workload show --arrivals constant --request-rate 4"))
    assert "Arrivals: constant, 4 requests/s; 4 requests/s over 7.75 s" in timed.out


def test_show_tells_what_is_too_long_or_was_made_shorter(program: Program) -> None:
    said = program("workload", "show", "--long-tokens", "2000")
    assert (said.code, said.err.count("\n")) == (0, 1)
    assert "4 of 32 requests exceed the context of gpt2, 1,024 tokens; give --overlong" in said.err
    clipped = program("workload", "show", "--long-tokens", "2000", "--overlong", "clip")
    assert "requests clipped to the 1,024 tokens of the context: 4" in clipped.err


def test_show_draws_where_asked_and_replaces_nothing_unasked(program: Program, here: Path) -> None:
    words = ("workload", "show", "--preset", "burst", "--output", "mine")
    said = program(*words)
    assert said.code == 0
    assert "Files: mine/ with workload.png, workload.svg" in said.out
    assert sorted(f.name for f in (here / "mine").iterdir()) == ["workload.png", "workload.svg"]
    assert (here / "mine" / "workload.png").read_bytes().startswith(b"\x89PNG")
    svg = (here / "mine" / "workload.svg").read_text(encoding="utf-8")
    for text in ("prompt tokens per request", "output tokens per request", "4 requests/s"):
        assert text in svg
    assert 'id="come"' in svg
    refused = program(*words)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "mine/workload.png: already exists; give another name or --overwrite" in refused.err
    assert program(*words, "--overwrite").code == 0


def test_a_picture_of_requests_that_are_all_there_has_no_arrivals(
    program: Program, here: Path
) -> None:
    assert program("workload", "show", "--output", ".").code == 0
    svg = (here / "workload.svg").read_text(encoding="utf-8")
    assert "all at once" in svg
    assert 'id="come"' not in svg


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_saved_is_served_as_the_same_workload(
    name: str, program: Program, here: Path
) -> None:
    said = program("workload", "save", "w.jsonl", "--preset", name)
    assert said.code == 0
    digest = digest_of(Experiment.of(preset=name))
    assert f"digest {digest}" in said.out
    assert "Run it: batchbench run --trace w.jsonl\n" in said.out
    again = asked_by(["run", "--trace", "w.jsonl"])
    assert digest_of(again) == digest
    assert program("simulate", "--trace", "w.jsonl", "--quiet").code == 0


def test_save_replaces_nothing_unasked_and_writes_whole_or_not_at_all(
    program: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "w.jsonl").write_text("mine")
    refused = program("workload", "save", "w.jsonl")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "w.jsonl: already exists; give another name or --overwrite" in refused.err
    assert (here / "w.jsonl").read_text() == "mine"
    assert program("workload", "save", "w.jsonl", "--overwrite").code == 0
    before = (here / "w.jsonl").read_bytes()

    def torn(workload: object) -> Any:
        yield "half\n"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchbench.workloads.traces.write_workload", torn)
    said = program("workload", "save", "w.jsonl", "--overwrite")
    assert said.code == 2
    assert "w.jsonl: cannot be written: no space left on device" in said.err
    assert (here / "w.jsonl").read_bytes() == before
    assert [f.name for f in here.iterdir()] == ["w.jsonl"]
    for wrong in ("nowhere/no/w.jsonl", "w.jsonl/x.jsonl"):
        program("workload", "save", wrong)
    assert program("workload", "save", "w.jsonl/x.jsonl").code == 2


def test_a_saved_workload_that_ends_early_cannot_be_simulated(program: Program) -> None:
    assert program("workload", "save", "w.jsonl", "--stop-at-eos").code == 0
    said = program("simulate", "--trace", "w.jsonl")
    assert said.code == 2
    assert "--stop-at-eos: a simulation runs no model" in said.err
    dry = program("simulate", "--trace", "w.jsonl", "--dry-run")
    assert re.match(r"steps +static at most 400, continuous at most \d+ forward", dry.out)


# The numbers of show

columns = st.lists(st.integers(1, 10**6), min_size=1, max_size=60).map(
    lambda values: np.array(values, np.int64)
)


@given(columns, st.integers(1, 40))
@law
def test_bars_count_every_length_once(lengths: np.ndarray[Any, Any], most: int) -> None:
    found = bars(lengths, most)
    assert len(found) <= most
    assert sum(count for *_, count in found) == len(lengths)
    assert (found[0][0], found[-1][1]) == (lengths.min(), lengths.max())
    for low, high, count in found:
        assert count == ((lengths >= low) & (lengths <= high)).sum()
    for (_, last, _), (first, _, _) in pairwise(found):
        assert first == last + 1


@given(columns)
@law
def test_a_spread_is_that_of_numpy(lengths: np.ndarray[Any, Any]) -> None:
    _, least, _, p90, _, most, total = spread(lengths)
    assert (total, least, most) == (lengths.sum(), lengths.min(), lengths.max())
    assert p90 == np.percentile(lengths, 90)


def test_a_pace_counts_gaps() -> None:
    even = pace(np.array([0, 10**9, 2 * 10**9, 3 * 10**9]))
    assert (even.span_s, even.per_second, even.variation) == (3.0, 1.0, 0.0)
    assert pace(np.zeros(4, np.int64)).per_second is None
    assert pace(np.array([0, 10**9])).variation is None
