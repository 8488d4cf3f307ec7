"""One strategy beside its twins, in turns within one process, so that the machine cancels out.

A twin does the same work in another way: the baseline strategy on the same engine, and the same
strategy on the notebook engine. How much faster the candidate is than a twin depends far less on
the machine's mood than how fast it is, and so can be held against a number of yesterday.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.errors import UsageError
from batchbench.studies.gate.baseline import Process
from batchbench.studies.gate.counts import Work, work_told
from batchbench.studies.gate.processes import Workers, draw_core
from batchbench.studies.gate.turns import Turn

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
