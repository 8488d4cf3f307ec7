"""What taking turns yields: turns, processes, and the value of each process or pair of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

BUSY = 1.2
"""Wall time over processor time of a turn above which somebody else had the core."""


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    ``steps`` are those that were timed, in ``wall_ns``, of which the process computed for
    ``cpu_ns``; the first step after another process had the machine is not among them, unless it
    is the first of a trial. The calibration kernel before it took ``kernel_ns``.
    """

    steps: int
    wall_ns: int
    cpu_ns: int
    kernel_ns: int

    @property
    def step_ns(self) -> float:
        """Mean time of a step."""
        return self.wall_ns / self.steps

    @property
    def is_busy(self) -> bool:
        """Whether somebody else had the core for a sixth of the time or more."""
        return self.wall_ns > BUSY * self.cpu_ns


TurnPair = tuple[Turn, Turn]


@dataclass(frozen=True)
class Pair:
    """A pair of turn-takers in fresh processes: two installations, or two lanes of one process.

    Attributes:
        turns: of each lane, its pairs of turns, in order.
        passes: steps of one trial of each lane, on the first side and on the second.
        pieces: how many turns of each lane make a trial.
        seconds: from the start of the processes to their end.
        new_first: whether the second side began.
    """

    turns: Mapping[str, Sequence[TurnPair]]
    passes: Mapping[str, tuple[int, int]]
    pieces: Mapping[str, int]
    seconds: float
    new_first: bool

    def value(self, lane: str) -> float:
        """Log ratio of what a trial takes, new over base.

        Of each piece of the trial the median over its pairs of turns, and of the pieces the mean,
        weighted by the time that the base takes for them: a burst of somebody else's work bends no
        median, and a loss in a few passes, such as those that prefill, is not lost among the
        others. The first pair of turns is left out: there the caches are cold.
        """
        count = self.pieces[lane]
        weight = total = 0.0
        for piece in range(count):
            told = [pair for i, pair in enumerate(self.turns[lane]) if i and i % count == piece]
            if told:
                share = median(base.wall_ns for base, _ in told)
                ratio = median(math.log(new.wall_ns / base.wall_ns) for base, new in told)
                weight, total = weight + share, total + share * math.exp(ratio)
        return math.log(total / weight)

    def covers(self, lane: str) -> float:
        """Share of a trial's pieces that were timed."""
        return min(1.0, (len(self.turns[lane]) - 1) / self.pieces[lane])

    def kernel(self) -> float:
        """The same of the calibration kernel, which is one code on both sides."""
        return median(
            math.log(new.kernel_ns / base.kernel_ns)
            for turns in self.turns.values()
            for base, new in turns[1:]
        )

    def busy(self) -> float:
        """Share of the turns in which somebody else had the core for a sixth of the time."""
        told = [turn for turns in self.turns.values() for pair in turns[1:] for turn in pair]
        return fmean(turn.is_busy for turn in told)

    def step_ns(self, lane: str) -> tuple[float, float]:
        """Median time of a step, base and new."""
        told = self.turns[lane][1:]
        return (
            median(base.step_ns for base, _ in told),
            median(new.step_ns for _, new in told),
        )

    def as_data(self) -> dict[str, Any]:
        """As JSON values: a turn is steps, wall, processor and kernel time in ns."""
        return {
            "seconds": self.seconds,
            "new_first": self.new_first,
            "passes": {lane: list(steps) for lane, steps in self.passes.items()},
            "pieces": dict(self.pieces),
            "turns": {
                lane: [[[t.steps, t.wall_ns, t.cpu_ns, t.kernel_ns] for t in pair] for pair in told]
                for lane, told in self.turns.items()
            },
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Pair:
        """The pair whose :meth:`as_data` was kept."""
        return cls(
            {
                lane: [(Turn(*base), Turn(*new)) for base, new in told]
                for lane, told in data["turns"].items()
            },
            {lane: (base, new) for lane, (base, new) in data["passes"].items()},
            data["pieces"],
            data["seconds"],
            data["new_first"],
        )


def contamination(pairs: Sequence[Pair], floor: float, *, on_cpu: bool) -> str | None:
    """Why these times say nothing of the two sides; None where they do.

    Args:
        floor: log ratio that the calibration kernel may be off by.
        on_cpu: the model runs on the processor, so that its time should be the wall's.
    """
    if not pairs:
        return None
    # The median, since a burst in one pair is noise, which the pairs' scatter accounts for.
    off = median(pair.kernel() for pair in pairs)
    if abs(off) > floor:
        differs = f"{math.expm1(off):+.1%}"
        return f"the calibration kernel, the same code on both sides, differs by {differs}"
    if on_cpu and (busy := fmean(pair.busy() for pair in pairs)) > 0.5:
        return f"others had the core in {busy:.0%} of the turns"
    return None
