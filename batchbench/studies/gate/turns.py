"""Turns: the division of a trial, the times of a turn, and the value of a pair of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean, median
from typing import Any

FEWEST_STEPS = 4
"""Minimum number of steps of a turn; the first of them is not timed."""

BUSY = 1.2
"""Ratio of wall time to processor time of a turn above which another process had the core."""


@dataclass(frozen=True)
class Cut:
    """The division of a trial into turns.

    Two sides, and two sessions, need the same cut, since parts of a workload differ.

    Attributes:
        pieces: turns of a trial.
        times: trials of a turn; above 1 only for short trials, which are one piece.
        cycles: how often a process serves all pieces; 0 if the time limit decides.
    """

    pieces: int
    times: int
    cycles: int = 0

    @classmethod
    def of(cls, steps: int, trial_s: float, turn_s: float) -> Cut:
        """Cut a trial into turns of about ``turn_s`` seconds."""
        pieces = max(1, min(round(trial_s / turn_s), steps // FEWEST_STEPS))
        if pieces > 1:
            return cls(pieces, 1)
        return cls(1, max(1, round(turn_s / max(trial_s, 1e-9)), math.ceil(FEWEST_STEPS / steps)))

    def sizes(self, steps: int) -> Iterator[int]:
        """Yield the steps of one turn after another, for a trial of ``steps`` steps.

        A turn covers the same part of the workload on both sides even if one needs more steps.
        """
        while True:
            for i in range(self.pieces):
                yield (steps * (i + 1) // self.pieces - steps * i // self.pieces) * self.times


@dataclass(frozen=True)
class Turn:
    """Times of one turn, in ns.

    Attributes:
        steps: timed steps. The first step after another process had the machine is left out,
            unless it is the first of a trial.
        wall_ns: wall time of these steps.
        cpu_ns: processor time of the process within it.
        kernel_ns: time of the calibration kernel before the turn.
    """

    steps: int
    wall_ns: int
    cpu_ns: int
    kernel_ns: int

    @property
    def step_ns(self) -> float:
        return self.wall_ns / self.steps

    @property
    def is_busy(self) -> bool:
        return self.wall_ns > BUSY * self.cpu_ns


TurnPair = tuple[Turn, Turn]


@dataclass(frozen=True)
class Pair:
    """Two fresh processes, one of each installation, that took turns.

    Attributes:
        turns: pairs of turns by strategy, in order.
        passes: steps of a trial by strategy, of base and new.
        pieces: turns of a trial, by strategy.
        seconds: time from the start of the processes to their end.
        new_first: the new installation took the first turn of each pair.
    """

    turns: Mapping[str, Sequence[TurnPair]]
    passes: Mapping[str, tuple[int, int]]
    pieces: Mapping[str, int]
    seconds: float
    new_first: bool

    def value(self, strategy: str) -> float:
        """Return the log ratio of the time of a trial, new over base.

        For each piece of the trial it takes the median over pairs of turns, and over the pieces
        the mean, weighted by the base's time. Bursts of other load thus have no effect, and a loss
        in few passes, such as prefill, still counts. The first pair of turns is left out because
        caches are cold there.
        """
        count = self.pieces[strategy]
        weight = total = 0.0
        for piece in range(count):
            pairs = [
                pair for i, pair in enumerate(self.turns[strategy]) if i and i % count == piece
            ]
            if pairs:
                share = median(base.wall_ns for base, _ in pairs)
                ratio = median(math.log(new.wall_ns / base.wall_ns) for base, new in pairs)
                weight, total = weight + share, total + share * math.exp(ratio)
        return math.log(total / weight)

    def covers(self, strategy: str) -> float:
        return min(1.0, (len(self.turns[strategy]) - 1) / self.pieces[strategy])

    def kernel(self) -> float:
        """Return the log ratio of the calibration kernel, which is the same code on both sides."""
        return median(
            math.log(new.kernel_ns / base.kernel_ns)
            for turns in self.turns.values()
            for base, new in turns[1:]
        )

    def busy(self) -> float:
        return fmean(
            turn.is_busy for turns in self.turns.values() for pair in turns[1:] for turn in pair
        )

    def step_ns(self, strategy: str) -> tuple[float, float]:
        pairs = self.turns[strategy][1:]
        return (median(base.step_ns for base, _ in pairs), median(new.step_ns for _, new in pairs))

    def as_data(self) -> dict[str, Any]:
        """Return JSON values; a turn is its steps, and wall, processor and kernel time in ns."""
        turns = {
            name: [[astuple(turn) for turn in pair] for pair in pairs]
            for name, pairs in self.turns.items()
        }
        return {**vars(self), "turns": turns}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Pair:
        turns = {
            name: [(Turn(*base), Turn(*new)) for base, new in pairs]
            for name, pairs in data["turns"].items()
        }
        passes = {name: tuple(steps) for name, steps in data["passes"].items()}
        return cls(**{**data, "turns": turns, "passes": passes})


def contamination(pairs: Sequence[Pair], floor: float, *, on_cpu: bool) -> str | None:
    """Return the reason why these times cannot be used; None if they can.

    Args:
        floor: largest log ratio of the calibration kernel that is accepted.
        on_cpu: the model runs on the processor, so that processor time should equal wall time.
    """
    if not pairs:
        return None
    # The median: a burst in one pair is noise, which the scatter of the pairs accounts for.
    off = median(pair.kernel() for pair in pairs)
    if abs(off) > floor:
        differs = f"{math.expm1(off):+.1%}"
        return (
            f"the time of the calibration kernel, the same code on both sides, differs by {differs}"
        )
    if on_cpu and (busy := fmean(pair.busy() for pair in pairs)) > 0.5:
        return f"other processes used the core in {busy:.0%} of the turns"
    return None
