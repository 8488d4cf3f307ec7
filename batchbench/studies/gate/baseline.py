"""A baseline: what one version did on one machine, kept to hold later ones against."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from batchbench.batching.experiment import PARTS, Experiment
from batchbench.errors import UsageError
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.reports.result_file import fault_of, read_time
from batchbench.studies.gate.counts import Work, work_told
from batchbench.studies.gate.processes import Workers, draw_core
from batchbench.studies.gate.turns import Turn
from batchbench.version import __version__

SCHEMA_VERSION = 1

OLD_DAYS = 90
"""A baseline older than this says so: machines, drivers and libraries have moved on."""

Schema = Mapping[str, Any]

_TEXT: Schema = {"type": "string"}

_WORDS: Schema = {"type": ["string", "null"]}


def _object(
    properties: Schema | None = None, rest: Schema | bool = True, optional: Sequence[str] = ()
) -> Schema:
    """Return the schema of an object with these properties and others of ``rest``."""
    properties = properties or {}
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": rest,
    }


_FACTS: Schema = {"type": ["string", "number", "boolean", "null", "object"]}

_RATIO: Schema = {"type": "number", "minimum": -20, "maximum": 20}

_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**60}

_PASSES: Schema = {"type": "integer", "minimum": 1, "maximum": 2**60}

_STEP: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e18}

_AMOUNT: Schema = {"type": "number", "minimum": 0, "maximum": 1e18}

SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_object(
        {
            "schema_version": {"const": SCHEMA_VERSION},
            "kind": {"const": "baseline"},
            "batchbench_version": _TEXT,
            "created_at": {"type": "string", "format": "date-time"},
            "command": _TEXT,
            "config": _object({part: {"type": "object"} for part in PARTS}),
            "environment": _object(
                {
                    "packages": _object(rest=_WORDS),
                    "cpu": _TEXT,
                    "gpu": _WORDS,
                    "python": _WORDS,
                    "git_commit": _WORDS,
                },
                _FACTS,
                optional=("gpu", "python", "git_commit"),
            ),
            "model": _object({"name": _TEXT, "device": _TEXT, "dtype": _TEXT}, _FACTS),
            "workload": _object(
                {"digest": _TEXT, "closed": {"type": "boolean"}, "total_output_tokens": _PASSES}
            ),
            "work": {
                **_object(rest=_object({"output_digest": _WORDS}, _COUNT)),
                "minProperties": 1,
            },
            "cut": _object(dict.fromkeys(("pieces", "times", "cycles"), _PASSES), _PASSES),
            "lanes": {"type": "array", "items": _TEXT, "minItems": 1},
            "processes": {
                "type": "array",
                "minItems": 2,
                "items": _object(
                    {
                        "ratios": _object(rest=_RATIO),
                        "step_ns": _object(rest=_STEP),
                        "passes": _object(rest=_PASSES),
                        "busy": _AMOUNT,
                        "seconds": _AMOUNT,
                    },
                    rest=False,
                ),
            },
        }
    ),
}
"""Bounds of numbers, so that results of arithmetic are finite: a ratio is at most e²⁰."""


@dataclass(frozen=True)
class Process:
    """What one fresh process measured.

    Attributes:
        ratios: log of the candidate's time over its twin's, by the twin's lane.
        step_ns: median time of a step, by lane.
        passes: steps of a trial, by lane.
        busy: share of the turns in which somebody else had the core.
        seconds: from its start to its end.
    """

    ratios: Mapping[str, float]
    step_ns: Mapping[str, float]
    passes: Mapping[str, int]
    busy: float
    seconds: float


@dataclass(frozen=True)
class Baseline:
    """The file's data, and what is read of it."""

    data: Mapping[str, Any]

    @property
    def processes(self) -> list[Process]:
        """What was measured, process by process."""
        return [Process(**each) for each in self.data["processes"]]

    @property
    def candidate(self) -> str:
        """The strategy that is gated: the first lane; the others are its twins."""
        name: str = self.data["lanes"][0]
        return name

    @property
    def work(self) -> Work:
        """Counters and outputs."""
        return work_told(self.data["work"], self.data)

    @property
    def age_days(self) -> float:
        """Since it was made."""
        return (datetime.now(UTC) - read_time(self.data["created_at"])).total_seconds() / 86400

    @property
    def age(self) -> str:
        """The same in words."""
        days = self.age_days
        if days < 0:
            return "made later than now by this machine's clock"
        if days < 1:
            return f"{days * 24:.1f} hours old"
        old = "; renew it" if days > OLD_DAYS else ""
        return f"{days:.0f} day{'s' * (round(days) != 1)} old{old}"

    @property
    def machine(self) -> str:
        """What it was made on."""
        environment = self.data["environment"]
        name: str = environment.get("gpu") or environment["cpu"]
        return name

    def throughput(self, lane: str) -> float:
        """Tokens a second of the mean process."""
        return throughput(self.processes, lane, self.data["workload"]["total_output_tokens"])


def throughput(processes: Sequence[Process], lane: str, tokens: int) -> float:
    """Useful tokens a second of a lane, by the mean step over processes."""
    step_ns = fmean(each.step_ns[lane] for each in processes)
    return tokens / (processes[0].passes[lane] * step_ns / 1e9)


def speedup(processes: Sequence[Process], twin: str) -> float:
    """How many times faster the candidate is than its twin: the geometric mean over processes."""
    return exp(-fmean(each.ratios[twin] for each in processes))


def to_json(baseline: Baseline) -> str:
    """The file's content."""
    return json.dumps(baseline.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def load_baseline(file: Path) -> Baseline:
    """Read a baseline.

    Raises:
        UsageError: there is none, or it is torn, or of another schema version.
    """
    again = "make one with batchbench baseline save"
    try:
        data = read_json(file)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file; {again}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{file}: is a folder; give the file that baseline save wrote") from error
    except (OSError, UsageError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise UsageError(f"{file}: cannot be read: {why}; {again}") from error
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        what = "a result, for batchbench compare" if _is_result(data) else "no baseline"
        raise UsageError(f"{file}: is {what}; {again}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{file}: has schema version {data.get('schema_version')}, and batchbench "
            f"{__version__} reads {SCHEMA_VERSION}; {again}"
        )
    fault = fault_of(data, SCHEMA) or _contradiction(data)
    if fault is not None:
        raise UsageError(f"{file}: is not a whole baseline: {fault}; {again}")
    return Baseline(data)


def _contradiction(data: Mapping[str, Any]) -> str | None:
    """Return words for the first two valid parts that do not fit together; None if all fit."""
    try:
        read_time(data["created_at"])
    except ValueError as error:
        return f"created_at: {error}"
    candidate, *twins = data["lanes"]
    for number, each in enumerate(data["processes"]):
        if not each["ratios"].keys() >= set(twins):
            return f"processes.{number}.ratios lack lanes that it names"
        if any(not each[name].keys() >= set(data["lanes"]) for name in ("step_ns", "passes")):
            return f"processes.{number} lacks lanes that it names"
    if candidate not in data["work"]:
        return f"work.{candidate[:40]} is missing"
    return None


def _is_result(data: Any) -> bool:
    return isinstance(data, dict) and "strategies" in data


TURN_S = 0.3
"""Of the slowest lane; the others' turns cover the same part of the workload and are shorter."""

PROCESS_S = 5.0
"""Seconds of turns in a process: whole trials, as near to it as they come."""

FEWEST_STEPS = 4


@dataclass(frozen=True)
class Cut:
    """How trials are cut into turns: ``pieces`` a trial, or ``times`` trials a turn.

    ``cycles`` is how often all pieces are gone through; the first turn, which is not counted, comes
    before them. Two sessions must be cut alike, since parts of a workload differ.
    """

    pieces: int
    times: int
    cycles: int

    def sizes(self, steps: int) -> Iterator[int]:
        """Sizes of a lane's turns, whose trial has so many steps."""
        while True:
            for i in range(self.pieces):
                yield (steps * (i + 1) // self.pieces - steps * i // self.pieces) * self.times

    @property
    def turns(self) -> int:
        """Of each lane."""
        return self.pieces * self.cycles + 1


def make_cut(lanes: Mapping[str, Mapping[str, Any]]) -> Cut:
    """The cut that suits lanes as a worker told of them."""
    trials = [lane["steps"] * lane["step_ns"] / 1e9 for lane in lanes.values()]
    slowest, steps = max(trials), min(lane["steps"] for lane in lanes.values())
    pieces = max(1, min(round(slowest / TURN_S), steps // FEWEST_STEPS))
    times = 1
    if pieces == 1:
        times = max(1, round(TURN_S / max(slowest, 1e-9)), -(-FEWEST_STEPS // steps))
    cycle = sum(trials) * times
    cycles = max(1, round(PROCESS_S / cycle))
    if pieces * cycles < FEWEST_STEPS:  # enough for a median
        cycles = -(-FEWEST_STEPS // pieces)
    return Cut(pieces, times, cycles)


@dataclass(frozen=True)
class Seen:
    """One process: what it measured, what it is, and the work that it did."""

    process: Process
    cut: Cut
    told: Mapping[str, Any]
    hello: Mapping[str, Any]
    work: Mapping[str, Any]
    varied: str | None

    @property
    def counted(self) -> Work:
        """Its work, to be compared."""
        return work_told(self.work, self.told)


def lanes_of(experiment: Experiment) -> list[str]:
    """The candidate, which is the last strategy, and its twins.

    Raises:
        UsageError: no strategy is one of ours.
    """
    ours = list(experiment.serving.policies)
    if not ours:
        raise UsageError(
            "--strategy generate_batch: schedules for itself and cannot take turns; add continuous"
        )
    candidate = ours[-1]
    twins = [ours[0]] if ours[0] != candidate else []
    if experiment.serving.engine != "notebook":
        twins.append(f"notebook/{candidate}")
    if not twins:
        raise UsageError(
            "--engine notebook: with one strategy there is nothing to hold it against in the same "
            "run; name two, such as --strategy static,continuous"
        )
    return [candidate, *twins]


def observe_process(
    workers: Workers,
    experiment: Experiment,
    known: Mapping[str, Any] | None,
    cut: Cut | None,
    chance: random.Random,
) -> Seen:
    """Start a process, let its lanes take turns, and end it.

    Args:
        known: steps and nanoseconds of a step, by lane, where an earlier process has learnt them;
            where not, the work of every strategy is counted.
        cut: as an earlier process cut it; None to choose.
    """
    began = time.monotonic()
    lanes, threads = lanes_of(experiment), experiment.model.threads or 1
    others = [name for name in experiment.serving.policies if name not in lanes]
    asked = {
        "do": "open",
        "config": experiment.config(),
        "lanes": {lane: known[lane] if known else None for lane in lanes},
        "also": [] if known else others,
        "core": draw_core(threads, chance),
    }
    hello = workers.begin()
    workers.tell(asked)
    told = workers.answer()
    cut = cut or make_cut(told["lanes"])
    turns = _turns(workers, {lane: told["lanes"][lane]["steps"] for lane in lanes}, cut, chance)
    done = workers.finish()
    passes = {lane: told["lanes"][lane]["steps"] for lane in lanes}
    process = _process(turns, passes, time.monotonic() - began)
    work = {**told["also"], **{lane: work for lane, work in done["work"].items() if work}}
    varied = next((f"{n}.{what}" for n, what in done["varied"].items() if what), None)
    return Seen(process, cut, told, hello, work, varied)


def _turns(
    workers: Workers, passes: Mapping[str, int], cut: Cut, chance: random.Random
) -> dict[str, list[Turn]]:
    """Lane after lane, in an order that is drawn once a process."""
    order = list(passes)
    chance.shuffle(order)
    sizes = {lane: cut.sizes(passes[lane]) for lane in order}
    found: dict[str, list[Turn]] = {lane: [] for lane in order}
    for _ in range(cut.turns):
        for lane in order:
            found[lane].append(workers.turn(lane, next(sizes[lane])))
    return found


def _process(
    turns: Mapping[str, Sequence[Turn]], passes: Mapping[str, int], seconds: float
) -> Process:
    """What a process measured, the first turn of each lane left out.

    Of the ratios of turns the mean is taken, not the median: all pieces of a trial are there
    equally often, and as pieces differ far more than their noise, a median would jump between them
    (docs/log.md).
    """
    candidate, *twins = passes
    counted = {lane: told[1:] for lane, told in turns.items()}
    return Process(
        ratios={
            twin: fmean(
                math.log(own.step_ns / other.step_ns)
                for own, other in zip(counted[candidate], counted[twin], strict=True)
            )
            + math.log(passes[candidate] / passes[twin])
            for twin in twins
        },
        step_ns={lane: median(turn.step_ns for turn in told) for lane, told in counted.items()},
        passes=dict(passes),
        busy=fmean(turn.is_busy for told in counted.values() for turn in told),
        seconds=seconds,
    )


def as_data(process: Process) -> dict[str, Any]:
    """As JSON values."""
    return asdict(process)
