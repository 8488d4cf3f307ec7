"""A kept baseline: what it holds, what spoils it, and what a check tells of later versions."""

from __future__ import annotations

import io
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.baselines import (
    COUNTS,
    ENVIRONMENT,
    MODEL,
    WORK,
    baseline_data,
    measured,
    process,
    write_baseline,
)

from batchbench.batching.experiment import Experiment
from batchbench.cli import output, progress
from batchbench.cli.main import run_command
from batchbench.cli.progress import LiveDisplay, PlainDisplay
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.studies.gate import check
from batchbench.studies.gate.check import (
    FIRST_LOOK,
    Baseline,
    Process,
    compared_strategies,
    load_baseline,
    make_baseline,
    make_cut,
    run_check,
)
from batchbench.studies.gate.duet import Cut, TurnsWatch
from batchbench.studies.gate.evidence import Answer, Gate
from batchbench.studies.gate.processes import ProcessReport
from batchbench.studies.gate.report import render_baseline
from batchbench.studies.gate.spec import CheckSpec

FILE = Path("baseline.json")
Measured = tuple[Process, ProcessReport]


def gate_of(
    monkeypatch: pytest.MonkeyPatch,
    now: Callable[[random.Random], Measured],
    kept: Mapping[str, Any] | None = None,
    **asked: Any,
) -> tuple[Gate, int]:
    """The gate on processes that are made up, and how many it took."""
    chance, count = random.Random(3), [0]

    def observe(*_: object) -> Measured:
        count[0] += 1
        return now(chance)

    monkeypatch.setattr(check, "measure_process", observe)
    spec = CheckSpec(baseline=FILE, **asked)
    gate, _ = run_check(Baseline(kept or baseline_data()), FILE, spec, TurnsWatch(), "again")
    return gate, count[0]


def test_the_same_version_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, count = gate_of(monkeypatch, lambda chance: measured(process(chance)))
    assert gate.answer is Answer.PASSED
    assert count == FIRST_LOOK
    assert [each.name for each in gate.evidence if each.gated and each.kind == "ratio"] == [
        "continuous.speedup",
        "continuous.speedup_over_notebook",
    ]
    assert not any(each.gated for each in gate.evidence if each.kind == "time")


def test_a_loss_of_the_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, _ = gate_of(monkeypatch, lambda chance: measured(process(chance, 0.15)))
    assert gate.answer is Answer.FAILED
    assert "continuous.speedup_over_notebook is slower" in gate.sentence


def test_an_absolute_time_alone_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_machine(chance: random.Random) -> Measured:
        made = process(chance)
        slower = {lane: 3 * step for lane, step in made.step_ns.items()}
        return measured(type(made)(**{**vars(made), "step_ns": slower}))

    gate, _ = gate_of(monkeypatch, slow_machine)
    assert gate.answer is Answer.PASSED


@pytest.mark.parametrize(
    ("lane", "counter"),
    [("continuous", "forward_passes"), ("static", "idle_slot_steps"),
     ("continuous", "computed_passes"), ("notebook/continuous", "output_digest")],
)  # fmt: skip
def test_other_work_always_fails(monkeypatch: pytest.MonkeyPatch, lane: str, counter: str) -> None:
    other: Any = "e" * 64 if counter == "output_digest" else WORK[lane][counter] + 1  # type: ignore[operator]
    work = {**WORK, lane: {**WORK[lane], counter: other}}
    gate, count = gate_of(monkeypatch, lambda chance: measured(process(chance), work))
    assert gate.answer is Answer.FAILED
    assert count <= FIRST_LOOK
    assert all(each.kind == "work" for each in gate.failures)


def test_less_work_passes_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = {**COUNTS, "forward_passes": 129, "computed_passes": 129, "idle_slot_steps": 352}

    def better(chance: random.Random) -> Measured:
        return measured(process(chance, -0.01), {**WORK, "continuous": fewer})

    assert gate_of(monkeypatch, better)[0].answer is Answer.FAILED
    assert gate_of(monkeypatch, better, allow_improvement=True)[0].answer is Answer.PASSED


def test_a_busy_machine_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, _ = gate_of(monkeypatch, lambda chance: measured(process(chance, busy=0.9)))
    assert gate.answer is Answer.UNKNOWN
    assert "other processes used the core" in gate.sentence


def cut_off_after(
    monkeypatch: pytest.MonkeyPatch, finished: int, waited_s: float, sd: float = 0.02
) -> Gate:
    """The gate where the time is up in a process after so many."""
    count = [0]

    def make(chance: random.Random) -> Measured:
        count[0] += 1
        if count[0] > finished:
            raise OutOfTimeError("here had not answered for a while", waited_s)
        return measured(process(chance, sd=sd))

    return gate_of(monkeypatch, make)[0]


def test_without_a_finished_process_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = cut_off_after(monkeypatch, 0, 240.0)
    assert gate.answer is Answer.UNKNOWN
    assert gate.evidence == []
    assert "no process was finished in --max-time (here had not answered" in gate.sentence


@pytest.mark.parametrize("finished", range(1, FIRST_LOOK))
def test_finished_processes_count_where_the_last_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    gate = cut_off_after(monkeypatch, finished, 3.0)
    assert gate.answer is not Answer.FAILED
    assert gate.unsure is None
    assert any("was not finished when --max-time was up" in note for note in gate.notes)
    ratios = [each for each in gate.evidence if each.kind == "ratio"]
    assert {each.samples for each in ratios} == {(12, finished)}


def test_a_process_that_hangs_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = cut_off_after(monkeypatch, FIRST_LOOK - 1, 100.0, sd=0.001)
    assert gate.answer is Answer.UNKNOWN
    assert "longer than any process took" in gate.sentence


def test_on_another_machine_only_large_losses_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**ENVIRONMENT, "cpu": "another cpu"}

    def there(loss: float) -> Gate:
        return gate_of(
            monkeypatch, lambda chance: measured(process(chance, loss), environment=other)
        )[0]

    assert there(0.18).answer is not Answer.FAILED
    assert there(0.3).answer is Answer.FAILED
    assert "cpu" in {each.name for each in there(0.0).environment}


def test_another_question_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, said in (
        ({"workload": {"digest": "f" * 64, "closed": True}}, "a different workload here"),
        ({"model": {**MODEL, "weights_digest": "f" * 64}}, "give different weights here"),
    ):
        with pytest.raises(UsageError, match=said):
            gate_of(monkeypatch, lambda chance, c=changes: measured(process(chance), **c))  # type: ignore[misc]
    with pytest.raises(UsageError, match="was made with --preset ci"):
        gate_of(monkeypatch, lambda chance: measured(process(chance)), preset="chat")


def test_equal_versions_raise_no_alarm_in_many_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for seed in range(150):
        chance = random.Random(seed)
        processes = [vars(process(chance, sd=0.04)) for _ in range(12)]
        kept = baseline_data(processes=processes)
        now = random.Random(1000 + seed)
        answers.append(
            gate_of(monkeypatch, lambda _, now=now: measured(process(now, sd=0.04)), kept)[0].answer  # type: ignore[misc]
        )
    assert Answer.FAILED not in answers


@pytest.mark.parametrize("terminal", [False, True])
def test_every_wait_shows_what_goes_on(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(output, "SILENCE_S", 0.05)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    kind = LiveDisplay if terminal else PlainDisplay
    with kind(console, max_time=240.0) as display:
        for what in ("process 1", "process 2"):
            display.begins(what)
            time.sleep(0.5)
            display.measured(what, "2.00× as fast as static")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for what in ("process 1", "process 2"):
        assert f"{what}    2.00× as fast as static" in shown
        assert f"{what} …" in shown if terminal else f"still {what}, " in shown
    assert " s so far" in shown


# The file


def spoil(change: Callable[[dict[str, Any]], object]) -> str:
    data = baseline_data()
    change(data)
    return json.dumps(data)


SPOILED = {
    "empty": ("", "is not readable JSON"),
    "torn": (json.dumps(baseline_data())[:-40], "is not readable JSON"),
    "NaN": (
        spoil(lambda d: d["processes"][0]["ratios"].update(static=float("nan"))),
        "NaN is not JSON",
    ),
    "a list": ("[]", "is not a baseline"),
    "a result": (
        '{"strategies": {}}',
        "is a result, not a baseline (compare results with batchbench compare)",
    ),
    "another version": (spoil(lambda d: d.update(schema_version=9)), "has schema version 9"),
    "no processes": (spoil(lambda d: d.update(processes=[])), "is not a complete baseline"),
    "a lane is missing": (
        spoil(lambda d: d["processes"][3]["ratios"].pop("static")),
        "lacks a strategy of lanes",
    ),
    "no config": (spoil(lambda d: d.pop("config")), "is not a complete baseline"),
    "an unknown setting": (
        spoil(lambda d: d["config"]["serving"].update(from_the_future=1)),
        "--from-the-future",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_baselines_are_named(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    content, said = SPOILED[name]
    file = tmp_path / "baseline.json"
    file.write_text(content, encoding="utf-8")
    assert said in refused("check", "--baseline", str(file))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "--baseline: name the file"),
        (["check", "--baseline", "/nowhere.json"], "no such file"),
        (["check", "--baseline", "/"], "is a directory"),
        (["baseline", "show", "/nowhere.json"], "no such file"),
        (["baseline", "save", "--processes", "3"], "must be at least 8"),
        (["baseline", "save", "--output", "/nowhere/at/all/b.json"], "cannot be written"),
    ],
)
def test_bad_questions_are_answered_in_a_line(
    words: list[str], said: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cannot be written" in said:
        monkeypatch.setattr(Path, "mkdir", _no_room)
    assert said in refused(*words)


def _no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_baseline_says_how_old_it_is_and_what_it_was_made_on(tmp_path: Path) -> None:
    shown = {}
    for days in (0.5, 1, 200):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(
            render_baseline(load_baseline(write_baseline(tmp_path / "b.json", days=days)))
        )
        shown[days] = console.export_text()
    assert "saved 12 hours ago" in shown[0.5]
    assert "saved 1 day ago" in shown[1]
    assert "saved 200 days ago; renew it" in shown[200]
    assert all("a cpu" in text and "c0ffee" in text for text in shown.values())


# Reference strategies


def test_the_references_are_the_first_strategy_and_the_notebook() -> None:
    of = Experiment.of
    assert compared_strategies(of()) == ["continuous", "static", "notebook/continuous"]
    assert compared_strategies(of({"strategy": "continuous"})) == [
        "continuous",
        "notebook/continuous",
    ]
    assert compared_strategies(of({"engine": "notebook"})) == ["continuous", "static"]
    with pytest.raises(UsageError, match="needs a reference in the same run"):
        compared_strategies(of({"engine": "notebook", "strategy": "continuous"}))


@pytest.mark.parametrize("step_ms", [0.001, 1.0, 8.0, 50.0, 1000.0])
def test_a_process_goes_through_whole_trials(step_ms: float) -> None:
    steps = {"continuous": 130, "static": 400, "notebook/continuous": 132}
    cut = make_cut({n: {"steps": s, "step_ns": step_ms * 1e6} for n, s in steps.items()})
    for count in steps.values():
        sizes = cut.sizes(count)
        turns = [next(sizes) for _ in range(cut.pieces * cut.cycles + 1)]
        assert sum(turns[1:]) == count * cut.times * cut.cycles or cut.pieces == 1
        assert min(turns) >= 4
    assert cut.pieces * cut.cycles >= 4


def test_a_baseline_is_made_of_real_processes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "PROCESS_S", 0.01)
    monkeypatch.setattr(check, "TURN_S", 0.02)
    experiment = Experiment.of(
        {
            "model": str(checkpoint),
            "device": "cpu",
            "queue_size": 6,
            "batch_size": 2,
            "output_tokens": "cycle:every=3,long=12,short=4",
            "prompt_tokens": "5",
        }
    )
    made = make_baseline(experiment, 2, TurnsWatch(), "batchbench baseline save")
    file = tmp_path / "b.json"
    file.write_text(json.dumps(made.data))
    kept = load_baseline(file)
    assert kept.candidate == "continuous"
    assert set(kept.data["work"]) == {"continuous", "static", "notebook/continuous"}
    assert {work["output_digest"] for work in kept.data["work"].values()} == {
        kept.data["work"]["static"]["output_digest"]
    }
    assert kept.data["config"]["model"]["device"] == "cpu"
    assert Experiment.from_config(kept.data["config"]).serving.execution == "eager"
    assert isinstance(Cut(**kept.data["cut"]), Cut)


def test_a_check_keeps_what_each_process_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(3)
    monkeypatch.setattr(check, "measure_process", lambda *_: measured(process(chance)))
    file, folder = write_baseline(tmp_path / "baseline.json"), tmp_path / "kept"
    words = ["batchbench", "check", "--baseline", str(file), "--output", str(folder), "--quiet"]
    for more, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        assert run_command() == code, capsys.readouterr()
    assert "holds a result; give another folder or --overwrite" in capsys.readouterr().err
    data = json.loads((folder / "check.json").read_text())
    assert len(data["processes"]) == FIRST_LOOK
    assert data["gate"]["answer"] == "passed"
    assert {"floor", "change"} <= set(data["gate"]["shares"])
    assert [path.name for path in folder.iterdir()] == ["check.json"]
