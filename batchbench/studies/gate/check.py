"""A saved baseline of one version, and the check of the present version against it.

A baseline holds the counts and speed ratios of fresh processes. A check runs its experiment in
fresh processes and compares counts exactly, and the ratios of the candidate to its reference
strategies by the rule of ``compare`` for several runs: the process is the sample.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from batchbench.batching.experiment import Experiment, named_files, pinned
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.files import reason_of
from batchbench.json_file import envelope, read_json
from batchbench.reports.result_file import fault_of, read_time
from batchbench.reports.statistics import Decision, Rule, Verdict, compare_means
from batchbench.reports.text import plural
from batchbench.studies.gate import duet
from batchbench.studies.gate.compare import Sample, judge
from batchbench.studies.gate.evidence import (
    Evidence,
    Gate,
    MetricQuery,
    Side,
    Version,
    as_result,
    compare_work,
    make_gate,
    mismatches,
    shown_facts,
)
from batchbench.studies.gate.processes import (
    ProcessReport,
    Workers,
    draw_core,
    this_installation,
    varying_work,
)
from batchbench.studies.gate.spec import METRICS, CheckSpec, taking_turns
from batchbench.studies.gate.worker import Calibration, Turn
from batchbench.version import __version__

SCHEMA_VERSION = 1

OLD_DAYS = 90
"""Age from which a baseline says that it is old: drivers and libraries have changed."""

_SCHEMA_FILE = Path(__file__).with_name("baseline.schema.json")
"""The schema of a baseline, with bounds that keep results of arithmetic finite."""

TURN_S = 0.3
"""Seconds of a turn of the slowest strategy; the others' turns cover the same part of the
workload and are shorter."""

PROCESS_S = 5.0
"""Seconds of turns in a process, rounded to whole trials."""

FEWEST_TURNS = 4
"""Minimum number of turns of a strategy in a process: enough for a median."""

FIRST_LOOK, NEXT_LOOK = 8, 4
"""Processes before the first decision, and between two decisions."""

MACHINE = (
    *("cpu", "gpu", "cpu_cores", "threads"),
    *("cpu_kernels", "device", "dtype", "execution"),
)
"""Facts that make another machine, on which ratios may differ without a regression."""

BUSY = 0.5
"""Largest share of turns with other processes on the core at which ratios are used."""

FLOOR, FLOOR_ELSEWHERE, MARGIN = 10.0, 20.0, 1.5
"""Floors in percent, on the baseline's machine and on another, and the margin in floors.

Between two sessions of one machine, half an hour apart, the ratio to the notebook engine moved by
7 % (docs/regressions.md)."""

# The file


@dataclass(frozen=True)
class Process:
    """Measurements of one fresh process; mappings are by strategy."""

    ratios: Mapping[str, float]  # log of the candidate's time over that of each reference
    step_ns: Mapping[str, float]  # median
    passes: Mapping[str, int]  # steps of a trial
    busy: float  # share of the turns in which other processes had the core
    seconds: float  # from its start to its end

    @property
    def speedups(self) -> str:
        ratios = self.ratios.items()
        return ", ".join(f"{math.exp(-log):.2f}× as fast as {name}" for name, log in ratios)


@dataclass(frozen=True)
class Baseline:
    """A baseline's data, and the parts that checks read."""

    data: Mapping[str, Any]

    @property
    def processes(self) -> list[Process]:
        return [Process(**process) for process in self.data["processes"]]

    @property
    def candidate(self) -> str:
        """Return the strategy that is gated; the others are its references."""
        return str(self.data["lanes"][0])

    @property
    def age_days(self) -> float:
        return (datetime.now(UTC) - read_time(self.data["created_at"])).total_seconds() / 86400

    @property
    def age(self) -> str:
        days = self.age_days
        if days < -1e-3:
            return "in the future by this machine's clock"
        for unit, length in (("day", 1.0), ("hour", 1 / 24), ("minute", 1 / 1440)):
            if days >= length:
                count = math.floor(days / length + 1e-3)
                old = "; renew it" if days > OLD_DAYS else ""
                return f"{plural(count, unit)} ago{old}"
        return "just now"

    @property
    def machine(self) -> str:
        return str(self.data["environment"].get("gpu") or self.data["environment"]["cpu"])

    def version(self, label: str) -> Version:
        data = self.data
        result = as_result(data, data["work"], data["batchbench_version"])
        facts = {"created": data["created_at"], **shown_facts(result)}
        return Version(Side(label, facts), [result])


def load_baseline(file: Path) -> Baseline:
    again = "make a baseline with batchbench baseline save"
    try:
        data = read_json(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {reason_of(error)}; {again}") from error
    except UsageError as error:
        raise UsageError(f"{error}; {again}") from error
    if fault := _fault(data):
        raise UsageError(f"{file}: {fault}; {again}")
    return Baseline(data)


def _fault(data: Any) -> str | None:
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        is_result = isinstance(data, dict) and "strategies" in data
        result = "is a result, not a baseline (compare results with batchbench compare)"
        return result if is_result else "is not a baseline"
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version")
        return f"has schema version {found}, and batchbench {__version__} reads {SCHEMA_VERSION}"
    schema = json.loads(_SCHEMA_FILE.read_text(encoding="utf-8"))
    fault = fault_of(data, schema) or next(_contradictions(data), None)
    return fault and f"is not a complete baseline: {fault}"


def _contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    try:
        read_time(data["created_at"])
    except ValueError as error:
        yield f"created_at: {error}"
    candidate, *references = lanes = data["lanes"]
    for number, process in enumerate(data["processes"]):
        for part, names in (("ratios", references), ("step_ns", lanes), ("passes", lanes)):
            if not process[part].keys() >= set(names):
                yield f"processes.{number}.{part} lacks a strategy of lanes"
    if candidate not in data["work"]:
        yield f"work.{candidate[:40]} is missing"


# Measuring


def make_cut(strategies: Mapping[str, Mapping[str, Any]]) -> duet.Cut:
    """Cut trials into turns by the ``steps`` and ``step_ns`` of each strategy."""
    steps = [known["steps"] for known in strategies.values()]
    trials = [known["steps"] * known["step_ns"] / 1e9 for known in strategies.values()]
    cut = duet.Cut.of(min(steps), max(trials), TURN_S)
    cycles = max(1, round(PROCESS_S / (sum(trials) * cut.times)))
    return replace(cut, cycles=max(cycles, math.ceil(FEWEST_TURNS / cut.pieces)))


def compared_strategies(experiment: Experiment) -> list[str]:
    """Return the candidate, which is the last strategy, and then its references.

    The references are the first strategy, and the candidate's strategy on the notebook engine.

    Raises:
        UsageError: no strategy can take turns, or there is no reference.
    """
    ours = taking_turns(experiment)
    names = list(dict.fromkeys([ours[-1], ours[0]]))
    if experiment.serving.engine != "notebook":
        names.append(f"notebook/{ours[-1]}")
    if len(names) == 1:
        raise UsageError(
            "--engine notebook: a baseline needs a reference in the same run; name two strategies, "
            "such as --strategy static,continuous"
        )
    return names


@dataclass
class Session:
    """Fresh processes that serve an experiment, one after another."""

    experiment: Experiment
    cut: duet.Cut | None = None  # of every process; None to let the first choose one
    processes: list[Process] = field(default_factory=list)
    reports: list[ProcessReport] = field(default_factory=list)
    cut_off: OutOfTimeError | None = None  # the time was up in a process, which does not count

    def measure(
        self, watch: duet.TurnsWatch, of: str = "", until: float = math.inf
    ) -> Iterator[int]:
        """Measure one process after another until ``time.monotonic`` is ``until``.

        Yield the number of processes after each. ``of`` is what the watch shows after it.
        """
        chance = random.Random()
        with Workers(this_installation(), self.experiment.model.threads or 1, until) as workers:
            while True:
                watch.begins(f"process {len(self.processes) + 1}{of}")
                try:
                    process, report = measure_process(workers, self, chance)
                except OutOfTimeError as late:
                    self.cut_off = late
                    return
                self.processes.append(process)
                self.reports.append(report)
                yield len(self.processes)

    @property
    def longest_s(self) -> float:
        return max(process.seconds for process in self.processes)


def measure_process(
    workers: Workers, session: Session, chance: random.Random
) -> tuple[Process, ProcessReport]:
    """Start a process, let its strategies take turns, and end it.

    The first two processes count all work, and measure their passes and step times. Later ones are
    told those of the first.
    """
    began = time.monotonic()
    experiment, known = session.experiment, None
    names = compared_strategies(experiment)
    others = [name for name in experiment.serving.policies if name not in names]
    if len(session.processes) > 1:
        others, first = [], session.processes[0]
        known = {n: Calibration(first.passes[n], first.step_ns[n]) for n in first.passes}
    core = draw_core(experiment.model.threads or 1, chance)
    hello = workers.begin()
    workers.tell_open(experiment, names, known, others, core)
    opened = workers.answer()
    cut = session.cut = session.cut or make_cut(opened["lanes"])
    passes = {name: opened["lanes"][name]["steps"] for name in names}
    order = chance.sample(names, len(names))
    sizes = {name: cut.sizes(passes[name]) for name in order}
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    for _ in range(cut.pieces * cut.cycles + 1):
        for name in order:
            turns[name].append(workers.turn(name, next(sizes[name])))
    report = ProcessReport(hello, opened, workers.finish())
    return _process(turns, passes, time.monotonic() - began), report


def _process(
    turns: Mapping[str, Sequence[Turn]], passes: Mapping[str, int], seconds: float
) -> Process:
    """Return the measurements of a process, without the first turn of each strategy.

    Ratios of turns are averaged by the mean, not the median: all pieces of a trial occur equally
    often, and since pieces differ by more than their noise, a median would jump between them
    (docs/log.md).
    """
    candidate, *references = passes
    counted = {name: taken[1:] for name, taken in turns.items()}
    ratios = {}
    for reference in references:
        pairs = zip(counted[candidate], counted[reference], strict=True)
        of_steps = fmean(math.log(own.step_ns / other.step_ns) for own, other in pairs)
        ratios[reference] = of_steps + math.log(passes[candidate] / passes[reference])
    step_ns = {name: median(turn.step_ns for turn in taken) for name, taken in counted.items()}
    busy = fmean(turn.is_busy for taken in counted.values() for turn in taken)
    return Process(ratios, step_ns, passes, busy, seconds)


def make_baseline(
    experiment: Experiment, processes: int, watch: duet.TurnsWatch, command: str
) -> Baseline:
    session = Session(experiment)
    of = f" of {processes}"
    for number in session.measure(watch, of):
        watch.measured(f"process {number}{of}", session.processes[-1].speedups)
        if number == processes:
            break
    if varied := varying_work(session.reports):
        raise UsageError(f"{varied}: a baseline needs the same work in every process")
    report, cut = session.reports[0], session.cut
    assert cut is not None
    return Baseline(
        {
            **envelope(SCHEMA_VERSION, command),
            "kind": "baseline",
            "config": pinned(experiment, report.opened["model"]).config(),
            "files": named_files(experiment),
            **{name: report.opened[name] for name in ("environment", "model", "workload")},
            "work": dict(report.work),
            "cut": asdict(cut),
            "lanes": compared_strategies(experiment),
            "processes": [asdict(process) for process in session.processes],
        }
    )


# The check


def rule_of(spec: CheckSpec, ratios: int, *, other: bool) -> Rule:
    floor = spec.floor if spec.floor is not None else FLOOR_ELSEWHERE if other else FLOOR
    margin = spec.margin if spec.margin is not None else MARGIN * floor
    return duet.make_rule(floor, margin, spec.confidence).shared(ratios)


def decide_ratios(
    base: Sequence[Process], new: Sequence[Process], rule: Rule, look: int
) -> dict[str, Decision]:
    """Decide on the ratio to each reference at the ``look``-th look.

    The first look may spend half of α, the next a quarter, and so on, so that all looks together
    spend at most α (spending functions: Lan and DeMets 1983).
    """
    spending = replace(rule, alpha=rule.alpha / 2**look)
    return {
        name: compare_means([p.ratios[name] for p in base], [p.ratios[name] for p in new], spending)
        for name in base[0].ratios
    }


def run_check(
    baseline: Baseline, file: Path, spec: CheckSpec, watch: duet.TurnsWatch, typed: str
) -> tuple[Gate, Session]:
    """Run the baseline's experiment in fresh processes until all is decided or the time is up."""
    began = time.monotonic()
    data = baseline.data
    experiment = Experiment.from_config(data["config"])
    if spec.preset is not None and experiment.preset != spec.preset:
        raise UsageError(
            f"--preset {spec.preset}: {file} was made with --preset {experiment.preset}; make one "
            f"with batchbench baseline save --preset {spec.preset}"
        )
    base, here = baseline.version(str(file)), Side("this installation")
    session = Session(experiment, duet.Cut(**data["cut"]))
    decisions, looks = dict[str, Decision](), 0
    until = began + spec.max_time
    for count in session.measure(watch, until=until):
        if count == 1:
            _check_same_question(file, data, session.reports[0].opened)
            new = session.reports[0].version(here)
            other = bool(mismatches(base, new, MACHINE))
            rule = rule_of(spec, len(data["lanes"]) - 1, other=other)
            work = compare_work(base, new, allow_improvement=spec.allow_improvement)
            changed = any(evidence.fails for evidence in work)
        if changed and count == 2:
            break  # ratios of different work cannot be compared
        last = time.monotonic() + 1.05 * session.longest_s > until
        progress = session.processes[-1].speedups
        if last or (count >= FIRST_LOOK and (count - FIRST_LOOK) % NEXT_LOOK == 0):
            looks += 1
            decisions = decide_ratios(baseline.processes, session.processes, rule, looks)
            progress = duet.describe_decisions(_queries(baseline, rule), decisions)
            last = last or all(decision.is_sure for decision in decisions.values())
        watch.measured(f"process {count}", progress)
        if last:
            break
    seconds, late = time.monotonic() - began, session.cut_off
    if not session.processes:
        here = replace(here, facts={"batchbench": __version__})
        return duet.empty_gate("check", typed, (base.side, here), "process", late, seconds), session
    if late:
        decisions = decide_ratios(baseline.processes, session.processes, rule, looks + 1)
    times = [] if changed else list(_times(baseline, session, decisions, rule))
    gate = make_gate(
        "check",
        typed,
        base,
        new,
        [*work, *times],
        notes=list(_notes(baseline, session, changed=changed, wide=other and spec.floor is None)),
        unsure=varying_work(session.reports) or duet.hung(late, session.longest_s, "process"),
        seconds=seconds,
    )
    return gate, session


def _check_same_question(file: Path, data: Mapping[str, Any], opened: Mapping[str, Any]) -> None:
    parts = {"a different workload": ("workload", "digest")}
    parts["different weights"] = ("model", "weights_digest")
    for what, (part, key) in parts.items():
        if data[part].get(key) != opened[part][key]:
            raise UsageError(
                f"{file}: the same settings give {what} here, so nothing can be "
                "compared; make a new baseline with batchbench baseline save"
            )


def _queries(baseline: Baseline, rule: Rule) -> dict[str, MetricQuery]:
    queries = {}
    for name in baseline.data["lanes"][1:]:
        called = "speedup_over_notebook" if "/" in name else "speedup"
        metric = replace(METRICS["speedup"], name=called)
        queries[name] = MetricQuery(metric, baseline.candidate, math.expm1(rule.floor), True)
    return queries


def _times(
    baseline: Baseline, session: Session, decisions: Mapping[str, Decision], rule: Rule
) -> Iterator[Evidence]:
    sides = baseline.processes, session.processes
    busy = fmean(process.busy for process in session.processes)
    queries = _queries(baseline, rule)
    for name, decision in decisions.items():
        why = None if decision.is_sure else "is still too uncertain after this time"
        if session.reports[0].on_cpu and busy > BUSY:
            decision = replace(decision, verdict=Verdict.UNKNOWN)
            why = f"is in doubt: other processes used the core in {busy:.0%} of the turns"
        base, new = (Sample([process.ratios[name] for process in side]) for side in sides)
        needed = f"{decision.needed} processes per side" if decision.needed else None
        yield judge(queries[name], base, new, decision, why, needed)
    # The throughput is never gated: sessions of one machine differ by 10 %.
    name, tokens = baseline.candidate, baseline.data["workload"]["total_output_tokens"]
    base, new = (
        Sample([math.log(p.step_ns[name] * p.passes[name] / 1e9 / tokens) for p in side])
        for side in sides
    )
    query = MetricQuery(METRICS["output_throughput"], name, math.expm1(rule.floor), False)
    why = "is from another session: reported, not gated"
    yield judge(query, base, new, compare_means(base.logs, new.logs, rule), why)


def _notes(baseline: Baseline, session: Session, *, changed: bool, wide: bool) -> Iterator[str]:
    yield f"the baseline was saved {baseline.age} on {baseline.machine}"
    here, then = len(session.processes), len(baseline.data["processes"])
    yield duet.CHANGED_NOTE if changed else f"{here} fresh processes here, {then} in the baseline"
    if session.cut_off:
        yield duet.CUT_OFF_NOTE.format("process")
    if wide:
        yield f"the machine is not the baseline's, so the floor is {FLOOR_ELSEWHERE:g} %"


def record_of(session: Session, gate: Gate) -> bytes:
    processes = [asdict(process) for process in session.processes]
    return duet.make_record(gate, SCHEMA_VERSION, processes=processes)
