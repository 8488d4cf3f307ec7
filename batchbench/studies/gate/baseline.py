"""A baseline: counts and speed ratios of one version on one machine, saved for later checks."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from batchbench.batching.experiment import Experiment, named_files, pinned
from batchbench.batching.machine import facts_of
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.files import reason_of
from batchbench.json_file import envelope, json_text, read_json
from batchbench.reports.result_file import fault_of, read_time
from batchbench.reports.text import plural
from batchbench.studies.gate.counts import Counts, Version
from batchbench.studies.gate.duet import TurnsWatch
from batchbench.studies.gate.evidence import Side
from batchbench.studies.gate.processes import (
    Calibrations,
    ProcessReport,
    Workers,
    draw_core,
    this_installation,
    varying_work,
)
from batchbench.studies.gate.turns import Cut, Turn
from batchbench.studies.gate.worker import Calibration
from batchbench.version import __version__

SCHEMA_VERSION = 1

OLD_DAYS = 90
"""Age from which a baseline says that it is old: drivers and libraries have changed."""

_SCHEMA_FILE = Path(__file__).with_name("baseline.schema.json")
"""The schema of a baseline, with bounds that keep results of arithmetic finite."""


@dataclass(frozen=True)
class Process:
    """Measurements of one fresh process.

    Attributes:
        ratios: log of the candidate's time over that of each reference strategy.
        step_ns: median time of a step, by strategy.
        passes: steps of a trial, by strategy.
        busy: share of the turns in which other processes had the core.
        seconds: time from its start to its end.
    """

    ratios: Mapping[str, float]
    step_ns: Mapping[str, float]
    passes: Mapping[str, int]
    busy: float
    seconds: float

    @property
    def speedups(self) -> str:
        return ", ".join(f"{exp(-log):.2f}× as fast as {name}" for name, log in self.ratios.items())


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
        name: str = self.data["lanes"][0]
        return name

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
        environment = self.data["environment"]
        name: str = environment.get("gpu") or environment["cpu"]
        return name

    def version(self, label: str) -> Version:
        data = self.data
        facts = {
            "created": data["created_at"],
            "batchbench": data["batchbench_version"],
            "commit": data["environment"].get("git_commit"),
            "machine": self.machine,
        }
        return Version(
            Side(label, facts),
            [Counts.of_work(data["work"], data)],
            [facts_of(data["environment"], data["model"])],
        )

    def throughput(self, strategy: str) -> float:
        processes = self.processes
        step_ns = fmean(process.step_ns[strategy] for process in processes)
        tokens: int = self.data["workload"]["total_output_tokens"]
        return tokens / (processes[0].passes[strategy] * step_ns / 1e9)

    def speedup(self, reference: str) -> float:
        return exp(-fmean(process.ratios[reference] for process in self.processes))


def to_json(baseline: Baseline) -> str:
    return json_text(baseline.data)


def load_baseline(file: Path) -> Baseline:
    again = "make one with batchbench baseline save"
    try:
        data = read_json(file)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file; {again}") from error
    except IsADirectoryError as error:
        raise UsageError(
            f"{file}: is a folder; give the file that batchbench baseline save wrote"
        ) from error
    except (OSError, UsageError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise UsageError(f"{file}: cannot be read: {why}; {again}") from error
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        is_result = isinstance(data, dict) and "strategies" in data
        what = "a result, for batchbench compare" if is_result else "no baseline"
        raise UsageError(f"{file}: is {what}; {again}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{file}: has schema version {data.get('schema_version')}, and batchbench "
            f"{__version__} reads {SCHEMA_VERSION}; {again}"
        )
    schema = json.loads(_SCHEMA_FILE.read_text(encoding="utf-8"))
    fault = fault_of(data, schema) or _contradiction(data)
    if fault is not None:
        raise UsageError(f"{file}: is not a complete baseline: {fault}; {again}")
    return Baseline(data)


def _contradiction(data: Mapping[str, Any]) -> str | None:
    try:
        read_time(data["created_at"])
    except ValueError as error:
        return f"created_at: {error}"
    candidate, *references = data["lanes"]
    for number, process in enumerate(data["processes"]):
        if not process["ratios"].keys() >= set(references):
            return f"processes.{number}.ratios lacks a strategy of lanes"
        if any(not process[name].keys() >= set(data["lanes"]) for name in ("step_ns", "passes")):
            return f"processes.{number} lacks a strategy of lanes"
    if candidate not in data["work"]:
        return f"work.{candidate[:40]} is missing"
    return None


# Measuring

TURN_S = 0.3
"""Seconds of a turn of the slowest strategy; the others' turns cover the same part of the
workload and are shorter."""

PROCESS_S = 5.0
"""Seconds of turns in a process, rounded to whole trials."""

FEWEST_TURNS = 4
"""Minimum number of turns of a strategy in a process: enough for a median."""


def make_cut(strategies: Mapping[str, Mapping[str, Any]]) -> Cut:
    """Cut trials into turns by the ``steps`` and ``step_ns`` of each strategy."""
    trials = [known["steps"] * known["step_ns"] / 1e9 for known in strategies.values()]
    cut = Cut.of(min(known["steps"] for known in strategies.values()), max(trials), TURN_S)
    cycles = max(1, round(PROCESS_S / (sum(trials) * cut.times)))
    return replace(cut, cycles=max(cycles, math.ceil(FEWEST_TURNS / cut.pieces)))


@dataclass(frozen=True)
class Measured:
    """A process with its measurements, its cut, and its report."""

    process: Process
    cut: Cut
    report: ProcessReport


@dataclass
class Session:
    """Processes of one session; ``cut_off`` is set if the time was up during one of them."""

    measured: list[Measured] = field(default_factory=list)
    cut_off: OutOfTimeError | None = None

    @property
    def processes(self) -> list[Process]:
        return [measured.process for measured in self.measured]

    @property
    def report(self) -> ProcessReport:
        """Return the report of the first process, which counted all work."""
        return self.measured[0].report

    @property
    def calibrations(self) -> Calibrations | None:
        """Return what later processes need not measure, after two have counted all work."""
        if len(self.measured) < 2:
            return None
        process = self.processes[0]
        return {
            name: Calibration(steps, process.step_ns[name])
            for name, steps in process.passes.items()
        }

    @property
    def longest_s(self) -> float:
        return max(process.seconds for process in self.processes)

    @property
    def varied(self) -> str | None:
        return varying_work([measured.report for measured in self.measured])


def reference_strategies(experiment: Experiment) -> tuple[str, list[str]]:
    """Return the candidate, which is the last strategy, and its references.

    The references are the first strategy, and the candidate's strategy on the notebook engine.

    Raises:
        UsageError: no strategy can take turns, or there is no reference.
    """
    ours = list(experiment.serving.policies)
    if not ours:
        raise UsageError(
            f"--strategy {experiment.serving.strategy}: schedules by itself and cannot take "
            "turns; add continuous"
        )
    candidate = ours[-1]
    references = [ours[0]] if ours[0] != candidate else []
    if experiment.serving.engine != "notebook":
        references.append(f"notebook/{candidate}")
    if not references:
        raise UsageError(
            "--engine notebook: a baseline needs a reference in the same run; name two strategies, "
            "such as --strategy static,continuous"
        )
    return candidate, references


def measure_processes(
    experiment: Experiment,
    session: Session,
    count: int | None,
    cut: Cut | None,
    watch: TurnsWatch,
    until: float = math.inf,
) -> Iterator[int]:
    """Measure fresh processes until there are ``count``, or until ``time.monotonic`` is ``until``.

    Yield the number of processes after each.
    """
    chance = random.Random()
    with Workers(this_installation(), experiment.model.threads or 1, until) as workers:
        while count is None or len(session.measured) < count:
            total = "" if count is None else f" of {count}"
            watch.begins(f"process {len(session.measured) + 1}{total}")
            usual = session.measured[0].cut if session.measured else cut
            try:
                measured = measure_process(workers, experiment, session.calibrations, usual, chance)
            except OutOfTimeError as late:
                session.cut_off = late
                return
            session.measured.append(measured)
            yield len(session.measured)


def measure_process(
    workers: Workers,
    experiment: Experiment,
    calibrations: Calibrations | None,
    cut: Cut | None,
    chance: random.Random,
) -> Measured:
    """Start a process, let its strategies take turns, and end it.

    Args:
        calibrations: from earlier processes; None to measure them and to count all strategies.
        cut: the cut of earlier processes; None to choose one.
    """
    began = time.monotonic()
    candidate, references = reference_strategies(experiment)
    names = [candidate, *references]
    others = [name for name in experiment.serving.policies if name not in names]
    core = draw_core(experiment.model.threads or 1, chance)
    hello = workers.begin()
    workers.tell_open(experiment, names, calibrations, [] if calibrations else others, core)
    opened = workers.answer()
    cut = cut or make_cut(opened["lanes"])
    passes = {name: opened["lanes"][name]["steps"] for name in names}
    order = names[:]
    chance.shuffle(order)
    sizes = {name: cut.sizes(passes[name]) for name in order}
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    for _ in range(cut.pieces * cut.cycles + 1):
        for name in order:
            turns[name].append(workers.turn(name, next(sizes[name])))
    report = ProcessReport(hello, opened, workers.finish())
    return Measured(_process(turns, passes, time.monotonic() - began), cut, report)


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
    return Process(
        ratios={
            reference: fmean(
                math.log(own.step_ns / other.step_ns)
                for own, other in zip(counted[candidate], counted[reference], strict=True)
            )
            + math.log(passes[candidate] / passes[reference])
            for reference in references
        },
        step_ns={name: median(turn.step_ns for turn in taken) for name, taken in counted.items()},
        passes=dict(passes),
        busy=fmean(turn.is_busy for taken in counted.values() for turn in taken),
        seconds=seconds,
    )


def make_baseline(
    experiment: Experiment, processes: int, watch: TurnsWatch, command: str
) -> Baseline:
    session = Session()
    for number in measure_processes(experiment, session, processes, None, watch):
        watch.measured(f"process {number} of {processes}", session.processes[-1].speedups)
    if varied := session.varied:
        raise UsageError(f"{varied}: a baseline needs the same work in every process")
    opened = session.report.opened
    candidate, references = reference_strategies(experiment)
    return Baseline(
        {
            **envelope(SCHEMA_VERSION, command),
            "kind": "baseline",
            "config": pinned(experiment, opened["model"]).config(),
            "files": named_files(experiment),
            "environment": opened["environment"],
            "model": opened["model"],
            "workload": opened["workload"],
            "work": dict(session.report.work),
            "cut": asdict(session.measured[0].cut),
            "lanes": [candidate, *references],
            "processes": [asdict(process) for process in session.processes],
        }
    )
