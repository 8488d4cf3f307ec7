"""Two installations in turns: the rule on made-up pairs, and real processes on a tiny model."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import batchbench
from batchbench import version
from batchbench.batching.experiment import Experiment
from batchbench.errors import BatchbenchError, OutOfTimeError, UsageError
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate import duet, processes, report, worker
from batchbench.studies.gate.duet import (
    Cut,
    DuetResult,
    Pair,
    ProcessPairs,
    Series,
    TurnsWatch,
    contamination,
    make_duet_gate,
    record_of,
    run_duet,
)
from batchbench.studies.gate.evidence import Answer, Gate, Kind, Side
from batchbench.studies.gate.processes import (
    Installation,
    ProcessReport,
    Workers,
    draw_core,
    install_revision,
    this_installation,
)
from batchbench.studies.gate.spec import DuetSpec, timed_strategies
from batchbench.studies.gate.worker import Turn

PACKAGE = Path(batchbench.__file__).parent
WORK = {"forward_passes": 10, "slot_steps": 80, "output_digest": "a" * 64}


# The rule, on pairs that are made up


def turn(step_ns: float, *, busy: float = 1.0, kernel_ns: int = 20_000_000) -> Turn:
    wall = round(10 * step_ns)
    return Turn(10, wall, round(wall / busy), kernel_ns)


def made_up(log: float, *, busy: float = 1.0, kernel: float = 0.0, seconds: float = 10.0) -> Pair:
    """A pair in which new takes exp(log) times as long."""
    told = (
        turn(1e6, busy=busy),
        turn(1e6 * math.exp(log), busy=busy, kernel_ns=round(20e6 * math.exp(kernel))),
    )
    cold = (turn(9e6), turn(1e6))  # the first pair of turns is left out
    turns, passes = {"continuous": [cold, told, told, told]}, {"continuous": (10, 10)}
    return Pair(turns, passes, {"continuous": 1}, seconds, False)


class MadeUp:
    """Pairs from a function, and the clock that they move."""

    def __init__(self, pair: Callable[[int], Pair], works: Sequence[Mapping[str, Any]]) -> None:
        self._pair, self._works = pair, works
        self.count, self.seconds = 0, 0.0
        self.learnt: list[object] = []
        self.afresh_at: list[int] = []

    def restart(self) -> None:
        self.afresh_at.append(self.count)

    def pair(self, names: Sequence[str], known: object) -> Any:
        pair = self._pair(self.count)
        self.count += 1
        self.seconds += pair.seconds
        self.learnt.append(known)
        environment = {"packages": {"torch": "2"}, "cpu": "a cpu", "git_commit": None}
        told = [
            {
                "model": {"device": "cpu", "dtype": "float32"},
                "workload": {"closed": True, "total_output_tokens": 100},
                "environment": environment,
                "also": {} if known else {"static": dict(work)},
            }
            for work in self._works
        ]
        done = [
            {"work": {"continuous": dict(work)}, "varied": {"continuous": work.get("varied")}}
            for work in self._works
        ]
        hello = [{"version": "1", "file": name} for name in "ab"]
        return pair, tuple(map(ProcessReport, hello, told, done))


def gate_on(result: DuetResult, *, allow_improvement: bool = False) -> Gate:
    sides = (Side("base", {"python": "a"}), Side("new", {"python": "b"}))
    return make_duet_gate(result, sides, "again", allow_improvement=allow_improvement)


def found_of(
    pair: Callable[[int], Pair],
    spec: DuetSpec | None = None,
    works: Sequence[Mapping[str, Any]] = (WORK, WORK),
) -> tuple[DuetResult, Gate, MadeUp]:
    source = MadeUp(pair, works)
    asked = spec or DuetSpec()
    found = run_duet(source, ["continuous"], asked, TurnsWatch(), clock=lambda: source.seconds)
    gate = gate_on(found, allow_improvement=asked.allow_improvement)
    return found, gate, source


def scattered(mean: float, sd: float, seed: int = 0) -> Callable[[int], Pair]:
    chance = random.Random(seed)
    return lambda _: made_up(chance.gauss(mean, sd))


def test_equal_versions_pass() -> None:
    _, gate, source = found_of(scattered(0.0, 0.005))
    assert gate.answer is Answer.PASSED
    assert source.seconds <= 120


def test_a_loss_fails_when_a_second_run_has_confirmed_it() -> None:
    found, gate, source = found_of(scattered(0.05, 0.005))
    assert gate.answer is Answer.FAILED
    assert found.confirmation is not None
    assert len(found.confirmation.pairs) >= 4
    assert source.seconds <= 300
    evidence = gate.failures[0]
    assert evidence.name == "continuous.output_throughput"
    assert evidence.change == pytest.approx(math.expm1(-0.05), abs=0.01)


def test_a_gain_passes() -> None:
    _, gate, _ = found_of(scattered(-0.1, 0.005))
    assert gate.answer is Answer.PASSED
    assert "faster" in gate.sentence


def test_a_loss_that_only_one_run_has_is_no_failure() -> None:
    # As where memory lies badly for one side for as long as the first run takes.
    loss = scattered(0.05, 0.005)
    first_run = len(found_of(loss)[0].first.pairs)
    loss, none = scattered(0.05, 0.005), scattered(0.0, 0.005)
    found, gate, _ = found_of(lambda n: loss(n) if n < first_run else none(n))
    assert found.first.decisions["continuous"].verdict is Verdict.SLOWER
    assert gate.answer is Answer.UNKNOWN
    assert "did not confirm" in gate.sentence


def test_noise_cannot_be_told_and_says_what_would_do() -> None:
    _, gate, source = found_of(scattered(0.0, 0.10), DuetSpec(max_time=200))
    assert gate.answer is Answer.UNKNOWN
    assert "min would probably be enough" in gate.sentence
    assert gate.exit_code(strict=False) == 0
    assert gate.exit_code(strict=True) == 3
    assert source.seconds <= 200


def test_a_kernel_that_differs_makes_the_times_say_nothing() -> None:
    _, gate, _ = found_of(lambda _: made_up(0.08, kernel=0.05), DuetSpec(max_time=100))
    assert gate.answer is Answer.UNKNOWN
    assert "calibration kernel" in gate.sentence


class Player:
    """One side's worker process, which logs what it is told and when it has answered."""

    def __init__(self, name: str, log: list[str], *, forks: bool) -> None:
        self._name, self._log, self._forks = name, log, forks
        self._step = 0

    def ready(self) -> None:
        pass

    def begin(self) -> Mapping[str, Any]:
        return {"forks": self._forks, "version": "1"}

    def tell_open(self, *_: object) -> None:
        self._log.append(f"{self._name} opens")

    def answer(self) -> Mapping[str, Any]:
        self._log.append(f"{self._name} is open")
        return {"lanes": {"continuous": {"steps": 10, "step_ns": 1e6, "work": None}}}

    def turn(self, strategy: str, steps: int) -> Turn:
        return turn(1e6)

    def finish(self) -> Mapping[str, Any]:
        return {}


@pytest.mark.parametrize("forks", [True, False])
def test_two_processes_that_may_share_a_gpu_open_one_after_the_other(forks: bool) -> None:
    """Both would find its memory free, and each would slow the other's calibration."""
    log: list[str] = []
    sides: Any = (Player("base", log, forks=True), Player("new", log, forks=forks))
    ProcessPairs(sides, Experiment(), []).pair(["continuous"], None)
    apart = ["base opens", "base is open", "new opens", "new is open"]
    together = ["base opens", "new opens", "base is open", "new is open"]
    assert log == (together if forks else apart)


def test_a_burst_in_one_pairs_kernel_is_no_contamination() -> None:
    pairs = [made_up(0.0) for _ in range(5)]
    assert contamination([*pairs, made_up(0.0, kernel=0.2)], 0.01, on_cpu=True) is None
    differs = contamination([made_up(0.0, kernel=0.02)] * 5, 0.01, on_cpu=True)
    assert differs is not None
    assert "calibration kernel" in differs


def test_a_core_that_others_had_makes_the_times_say_nothing() -> None:
    _, gate, _ = found_of(lambda _: made_up(0.08, busy=1.5), DuetSpec(max_time=100))
    assert gate.answer is Answer.UNKNOWN
    assert "other processes used the core" in gate.sentence
    assert contamination([made_up(0.08, busy=1.5)], 0.01, on_cpu=False) is None


def test_too_little_time_is_no_pass() -> None:
    _, gate, _ = found_of(scattered(0.0, 0.001), DuetSpec(max_time=25))
    assert gate.answer is Answer.UNKNOWN
    assert "raise --max-time" in gate.sentence


def test_the_time_is_kept() -> None:
    for mean in (0.0, 0.02, 0.03, 0.05):
        for seed in range(5):
            assert found_of(scattered(mean, 0.02, seed))[2].seconds <= 300


def test_other_work_fails_at_once_and_is_counted_twice() -> None:
    more = {**WORK, "forward_passes": 11}
    _, gate, source = found_of(scattered(0.0, 0.005), works=(WORK, more))
    assert gate.answer is Answer.FAILED
    assert "forward_passes grew by 1" in gate.sentence
    assert source.count == 2
    assert all(each.kind == "work" for each in gate.evidence)


def test_less_work_may_be_allowed_and_is_then_timed() -> None:
    less = {**WORK, "forward_passes": 9, "slot_steps": 72}
    fewer = DuetSpec(allow_improvement=True)
    assert found_of(scattered(-0.1, 0.005), works=(WORK, less))[1].answer is Answer.FAILED
    assert found_of(scattered(-0.1, 0.005), fewer, (WORK, less))[1].answer is Answer.PASSED


def test_work_that_varies_is_no_pass() -> None:
    unsteady = {**WORK, "varied": "forward_passes"}
    _, gate, _ = found_of(scattered(0.0, 0.005), works=(WORK, unsteady))
    assert gate.answer is not Answer.PASSED


def test_what_confirms_has_nothing_in_common_with_what_found() -> None:
    found, _, source = found_of(scattered(0.05, 0.005))
    assert source.afresh_at == [len(found.first.pairs)]


def test_what_the_first_processes_learnt_the_others_are_told() -> None:
    source = found_of(scattered(0.0, 0.005))[2]
    assert source.learnt[:2] == [None, None]
    assert all(known is not None for known in source.learnt[2:])


# The time is up


class RunsOut(MadeUp):
    """Pairs until some number of them, then a side that owes an answer until the time is up."""

    def __init__(self, pair: Callable[[int], Pair], finished: int, waited_s: float) -> None:
        super().__init__(pair, (WORK, WORK))
        self._finished, self._waited_s = finished, waited_s

    def pair(self, names: Sequence[str], known: object) -> Any:
        if self.count >= self._finished:
            self.seconds += self._waited_s
            raise OutOfTimeError("new had not answered for a while", self._waited_s)
        return super().pair(names, known)


def cut_off_at(
    finished: int, waited_s: float, mean: float = 0.0, sd: float = 0.1
) -> tuple[DuetResult, Gate]:
    source = RunsOut(scattered(mean, sd), finished, waited_s)
    found = run_duet(source, ["continuous"], DuetSpec(), TurnsWatch(), lambda: source.seconds)
    gate = gate_on(found)
    json.loads(record_of(found, gate))
    return found, gate


def test_without_a_finished_pair_nothing_can_be_told() -> None:
    found, gate = cut_off_at(0, 40.0)
    assert gate.answer is Answer.UNKNOWN
    assert gate.evidence == []
    assert gate.sentence == (
        "CANNOT TELL: no pair of processes was finished in --max-time (new had not answered for "
        "a while); raise it."
    )
    assert found.first.pairs == []
    for render in (
        report.render_markdown,
        report.render_json,
        report.render_junit,
        report.render_annotations,
    ):
        assert render(gate, strict=False) is not None
    Console(file=io.StringIO()).print(report.render_terminal(gate, strict=True))


def test_finished_pairs_count_where_the_last_was_cut_off() -> None:
    found, gate = cut_off_at(12, 3.0)
    assert len(found.first.pairs) == 12
    assert gate.evidence
    assert any("was not finished when --max-time was up" in note for note in gate.notes)
    assert gate.unsure is None


def test_a_side_that_hangs_never_passes() -> None:
    """Equal so far, which the last look would call the same."""
    _, quick = cut_off_at(8, 3.0, sd=0.02)
    assert quick.answer is Answer.PASSED
    _, hung = cut_off_at(8, 60.0, sd=0.02)
    assert hung.answer is Answer.UNKNOWN
    assert "longer than any pair of processes took" in hung.sentence


def test_a_loss_that_could_not_be_confirmed_is_not_called() -> None:
    for finished in range(4, 20):
        found, gate = cut_off_at(finished, 3.0, mean=0.2, sd=0.005)
        if found.confirmation is not None and not found.confirmation.pairs:
            assert gate.answer is Answer.UNKNOWN
            assert "no time for a second to confirm it" in gate.sentence
            break
    else:
        pytest.fail("the confirming run was never cut off")


# How trials are cut


@pytest.mark.parametrize("steps", [1, 4, 7, 130, 400])
@pytest.mark.parametrize("step_ns", [1e4, 1e6, 5e6, 5e7, 1e9])
def test_turns_cover_whole_trials(steps: int, step_ns: float) -> None:
    cut = Cut.of(steps, steps * step_ns / 1e9, 0.2)
    pieces = cut.pieces
    sizes = list(islice(cut.sizes(steps), 3 * pieces))
    assert sum(sizes) % (3 * steps) == 0
    assert sizes[:pieces] == sizes[pieces : 2 * pieces]
    assert min(sizes) >= min(4, steps)
    if step_ns < 2e7:
        assert 0.1e9 < max(sizes) * step_ns < 0.4e9


def test_a_loss_in_a_few_passes_is_not_lost_among_the_others() -> None:
    # Three turns make a trial; new takes twice as long for the first, and as long for the others.
    one, two = turn(1e6), turn(2e6)
    turns = [(one, two), (one, one), (one, one)] * 4
    pair = Pair({"continuous": turns}, {"continuous": (30, 30)}, {"continuous": 3}, 10.0, False)
    assert pair.value("continuous") == pytest.approx(math.log(4 / 3))


def test_a_burst_in_one_turn_bends_nothing() -> None:
    one, burst = turn(1e6), turn(9e6)
    turns = [(one, one)] * 12
    turns[5] = (one, burst)
    turns[10] = (burst, one)
    pair = Pair({"continuous": turns}, {"continuous": (30, 30)}, {"continuous": 3}, 10.0, False)
    assert pair.value("continuous") == 0


def test_a_record_has_all_that_a_pair_measured() -> None:
    found, gate, _ = found_of(scattered(0.0, 0.005))
    (first, *_), pair = json.loads(record_of(found, gate))["first"]["pairs"], found.first.pairs[0]
    turns = {
        name: [(Turn(*base), Turn(*new)) for base, new in pairs]
        for name, pairs in first["turns"].items()
    }
    assert Pair(**{**first, "turns": turns}).value("continuous") == pair.value("continuous")
    assert turns == pair.turns


# What is asked


def test_the_last_strategy_is_timed_or_strategy_or_those_asked_for() -> None:
    asked = Experiment.of({"strategy": "static,continuous"})
    assert timed_strategies(asked, None) == (["continuous"], ["static"])
    assert timed_strategies(asked, "static,continuous") == (["static", "continuous"], [])
    with pytest.raises(UsageError, match="--timed static-oracle: is not among --strategy"):
        timed_strategies(asked, "static-oracle")
    with pytest.raises(UsageError, match="cannot take turns"):
        timed_strategies(Experiment.of({"strategy": "generate_batch"}), None)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkout of two commits, from which batchbench seems to run."""
    root = tmp_path / "repository"
    (root / "batchbench").mkdir(parents=True)
    marker = root / "batchbench" / "__init__.py"
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    for number in ("1", "2"):
        marker.write_text(f"__version__ = '{number}'\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", number], check=True)
    marker.write_text("__version__ = 'not committed'\n")
    monkeypatch.setattr(version, "__file__", str(marker))
    return root


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --base-ref REV"),
        (["--base-python", "/nowhere/python"], "no such file"),
        (["--base-python", "/"], "is a folder"),
        (["--base-python", "a", "--base-ref", "b"], "exclude each other"),
        (["--base-ref", "no-such-revision"], "has no such commit"),
        (["--base-ref", "HEAD", "--margin", "0.5%"], "must be above --floor"),
        (["--base-ref", "HEAD", "--timed", "what"], "--timed what"),
        (["--base-ref", "HEAD", "--max-time", "1"], "must be at least 20"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_bad_questions_are_answered_in_a_line(
    words: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused("duet", *words)


# Real processes


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns and pairs as short as they can be: what is tried is not how exact they are."""
    monkeypatch.setattr(duet, "PAIR_S", 0.05)
    monkeypatch.setattr(duet, "TURN_S", 0.01)


@pytest.fixture
def experiment(checkpoint: Path) -> Experiment:
    return Experiment.of(
        {
            "model": str(checkpoint),
            "device": "cpu",
            "queue_size": 6,
            "batch_size": 2,
            "output_tokens": "cycle:every=3,long=12,short=4",
            "prompt_tokens": "5",
        }
    )


def installed(folder: Path, changes: Mapping[str, tuple[str, str]]) -> Path:
    """The interpreter of an environment with a batchbench in which texts are changed, by file."""
    venv.create(folder, symlinks=os.name != "nt")
    library = next(folder.glob("[Ll]ib/**/site-packages"))
    shutil.copytree(PACKAGE, library / "batchbench", ignore=shutil.ignore_patterns("__pycache__"))
    (library / "rest.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    for name, (old, new) in changes.items():
        file = library / "batchbench" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.chmod(0o644)  # the original tree may be read-only
        file.write_text(text.replace(old, new), encoding="utf-8")
    return folder / "bin/python"


HELLO = {
    "protocol": worker.PROTOCOL, "forks": False, "pid": 1, "parent": 1, "version": "1", "file": "x",
    "environment": {"packages": {}},
}  # fmt: skip

SLOW_WORKER = """#!{python}
import json, sys, time
say = lambda told: print(json.dumps(told), flush=True)
for line in sys.stdin:
    asked = json.loads(line)["do"]
    if asked == {silent!r}:
        time.sleep(3600)
    time.sleep({pause})
    if asked == "begin":
        say({hello})
    elif asked == "turn":
        say({{"turn": [10, 1000000, 1000000, 1000000]}})
    elif asked == "open":
        lane = {{"steps": 10, "step_ns": 100000.0, "work": None}}
        say({{"lanes": {{"continuous": lane}}, "also": {{}}, "workload": {{}}, "environment": {{}},
             "model": {{}}}})
"""


def slow_worker(folder: Path, *, silent: str = "", pause: float = 0.0) -> Installation:
    """An interpreter that answers as a worker does: late, and to one question never."""
    file = folder / "python"
    hello, python = repr(HELLO), sys.executable
    file.write_text(
        SLOW_WORKER.format(python=python, silent=silent, pause=pause, hello=hello), encoding="utf-8"
    )
    file.chmod(0o755)
    return Installation("base", file)


@pytest.mark.parametrize(
    ("silent", "pause"),
    [("begin", 0.0), ("open", 0.0), ("turn", 0.0), ("finish", 0.0), ("", 0.2)],
)
def test_a_slow_or_silent_side_ends_with_the_time(
    silent: str, pause: float, experiment: Experiment, tmp_path: Path
) -> None:
    """Turns of 2 ms, of which a pair takes seconds' worth, each of them late."""
    spec = DuetSpec()
    began = time.monotonic()
    side = slow_worker(tmp_path, silent=silent, pause=pause)
    with Workers(side, 1, began + 2.0) as base, Workers(side, 1, began + 2.0) as new:
        stage = ProcessPairs((base, new), experiment, [])
        found = run_duet(stage, ["continuous"], spec, TurnsWatch())
    assert time.monotonic() - began < 30  # not 3600, nor the 500 turns of a pair
    assert found.first.cut_off is not None
    assert not found.first.pairs
    gate = gate_on(found)
    assert gate.answer is Answer.UNKNOWN


@pytest.mark.parametrize("said", ["no JSON at all", "[1, 2]", "{", "\x00"])
def test_an_answer_that_is_no_object_is_told(said: str, tmp_path: Path) -> None:
    file = tmp_path / "python"
    file.write_text(f"#!{sys.executable}\ninput()\nprint({said!r}, flush=True)\ninput()\n")
    file.chmod(0o755)
    with (
        Workers(Installation("base", file), 1) as workers,
        pytest.raises(UsageError, match="has no batchbench that can take turns"),
    ):
        workers.begin()


def test_a_worker_that_closes_its_output_and_stays_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ENDING_S", 0.2)
    file = tmp_path / "python"
    file.write_text(
        f"#!{sys.executable}\nimport os, time\ninput()\nos.close(1)\nos.close(2)\n"
        "time.sleep(3600)\n"
    )
    file.chmod(0o755)
    with (
        Workers(Installation("base", file), 1) as workers,
        pytest.raises(UsageError, match="ended by itself"),
    ):
        workers.begin()


def gate_of(base: Path, experiment: Experiment, *, pairs: int) -> Gate:
    """Pairs of processes: enough to compare the work."""
    sides = (
        Installation("base", base),
        Installation("new", Path(sys.executable), own=True),
    )
    run = Series(duet.Rule(), ["continuous"])
    with Workers(sides[0], 1) as base_workers, Workers(sides[1], 1) as new_workers:
        stage = ProcessPairs((base_workers, new_workers), experiment, ["static"])
        for _ in range(pairs):
            run.add(*stage.pair(run.strategies, run.calibrations))
    return gate_on(DuetResult(run))


@pytest.mark.usefixtures("short")
def test_an_installation_does_the_work_of_its_like(experiment: Experiment, tmp_path: Path) -> None:
    gate = gate_of(installed(tmp_path / "base", {}), experiment, pairs=2)
    work = gate.of(Kind.WORK)
    assert {each.strategy for each in work} == {"static", "continuous"}
    assert all(each.verdict is Verdict.SAME for each in work)
    assert {"computed_passes", "forward_passes", "outputs"} <= {each.metric for each in work}
    assert gate.unsure is None
    assert not gate.failures
    assert gate.answer is Answer.UNKNOWN  # two pairs are no proof of anything else


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("file", "old", "new", "metric"),
    [
        (  # a request holds its slot a step longer
            "batching/policies.py",
            "        return view.finished\n",
            "        return () if view.running else view.finished\n",
            "continuous.forward_passes",
        ),
        (  # the engine computes each prefill twice, which no plan tells
            "batching/engines/torch/slots.py",
            "        logits = self._forward_pass(ids, layout, keep)\n",
            "        if plan.chunks:\n"
            "            self._forward_pass(ids, layout, keep)\n"
            "        logits = self._forward_pass(ids, layout, keep)\n",
            "continuous.computed_passes",
        ),
        (  # other tokens
            "batching/engines/torch/base.py",
            "        self._last.index_copy_(0, self._yielding, self._forward(plan, step))\n",
            "        self._last.index_copy_(0, self._yielding, self._forward(plan, step) ^ 1)\n",
            "continuous.outputs",
        ),
    ],
)
def test_faults_of_the_work_are_found(
    experiment: Experiment, tmp_path: Path, file: str, old: str, new: str, metric: str
) -> None:
    gate = gate_of(installed(tmp_path / "base", {file: (old, new)}), experiment, pairs=1)
    assert gate.answer is Answer.FAILED
    assert metric in {each.name for each in gate.failures}


def test_an_environment_without_batchbench_is_named(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=os.name != "nt")
    with (
        Workers(Installation("base", tmp_path / "empty/bin/python"), 1) as workers,
        pytest.raises(UsageError, match="has no batchbench that can take turns"),
    ):
        workers.begin()


def test_what_a_worker_cannot_do_is_a_usage_error(experiment: Experiment) -> None:
    open_loop = Experiment.of({"model": experiment.model.model, "request_rate": 5.0})
    asked = {
        "do": "open",
        "config": open_loop.config(),
        "lanes": {"continuous": None},
        "also": [],
        "core": None,
    }
    with Workers(this_installation(), 1) as workers:
        for _ in range(2):  # it spoils nothing for those that come after it
            workers.begin()
            workers.tell(asked)
            with pytest.raises(
                UsageError, match="here: alternating turns need all requests at the start"
            ):
                workers.answer()


CANNOT_FORK = """#!/bin/sh
exec {python} -P -c "
from batchbench.studies.gate import worker
worker.can_fork = lambda: False
worker.main()
"
"""


@pytest.mark.parametrize("forks", [True, False])
def test_each_worker_is_a_process_of_its_own(
    forks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "FORKS_PER_PARENT", 2)
    installation = this_installation()
    if forks and not worker.can_fork():
        pytest.skip("beside a GPU nothing forks")
    if not forks:
        python = tmp_path / "python"
        python.write_text(CANNOT_FORK.format(python=sys.executable))
        python.chmod(0o755)
        installation = Installation("here", python, own=True)
    pids = []
    with Workers(installation, 1) as workers:
        for _ in range(3):
            told = workers.begin()
            assert told["forks"] is forks
            pids.append((told["pid"], told["parent"]))
            workers.finish()
    assert len({pid for pid, _ in pids}) == 3
    # Those of one parent, that has imported everything, are two at most.
    assert len({parent for _, parent in pids}) == (2 if forks else 1)


def test_no_worker_is_left_behind() -> None:
    with Workers(this_installation(), 1) as workers:
        pid = workers.begin()["pid"]
        assert state_of(pid) not in GONE
    for _ in range(100):
        if state_of(pid) in GONE:
            break
        time.sleep(0.05)
    assert state_of(pid) in GONE


GONE = ("", psutil.STATUS_ZOMBIE)
"""Ended, and perhaps not yet seen to by whoever sees to orphans."""


def state_of(pid: int) -> str:
    """Return a process's state; empty if there is no such process."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""


def test_a_worker_that_breaks_is_a_fault_and_no_verdict(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    hello = json.dumps({"protocol": worker.PROTOCOL, "forks": True})
    broken.write_text(f"#!/bin/sh\nread line\necho '{hello}'\necho out of order >&2\nexit 9\n")
    broken.chmod(0o755)
    with Workers(Installation("base", broken), 1) as workers:
        workers.begin()
        with pytest.raises(BatchbenchError, match="base: ended by itself: out of order") as raised:
            workers.answer()
    assert raised.value.exit_code == 70


@pytest.mark.parametrize("allowed", [{0}, {3}, {0, 1, 6}], ids=str)
def test_who_takes_turns_sits_on_a_core_that_it_may_use(
    allowed: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "allowed_cpus", lambda: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    chance = random.Random(0)
    assert {draw_core(1, chance) for _ in range(100)} == allowed
    assert draw_core(2, chance) is None
    monkeypatch.delattr(os, "sched_setaffinity")
    assert draw_core(1, chance) is None


# Revisions


@pytest.mark.usefixtures("repository")
def test_a_revision_is_installed_as_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond" / "added_beyond.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "beyond"))
    monkeypatch.setenv("BATCHBENCH_CACHE", str(tmp_path / "cache"))
    folder, commit = install_revision("HEAD~1")
    asked = "import batchbench, torch, added_beyond; print(batchbench.__version__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", asked],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=Installation("base", Path(sys.executable), own=True, folder=folder).environment(1),
    )
    assert done.stdout.strip() == "1"
    assert len(commit) == 40
    before = folder.stat().st_mtime_ns
    assert install_revision("HEAD~1")[0] == folder
    assert folder.stat().st_mtime_ns == before  # once a commit
