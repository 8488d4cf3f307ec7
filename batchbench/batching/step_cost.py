"""What a step costs: a line in what it computes, with coefficients fitted on a real run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchbench import settings
from batchbench.settings import setting

if TYPE_CHECKING:
    from batchbench.batching.plan import Plan  # NumPy, which no spec needs

PS = 1000
"""Picoseconds a nanosecond: what a cached token adds may be a fraction of a nanosecond."""


@dataclass(frozen=True)
class CostSpec:
    """Where a simulation takes its time from."""

    cost: Path | None = setting(
        None,
        "Folder of a result that batchbench run wrote: a step costs what its steps teach, and "
        "times are real ones. The model is the result's unless --model is given.",
        "Simulation",
        metavar="RESULT",
        default_text="every step costs one unit, 1 ms",
    )

    def __post_init__(self) -> None:
        settings.check(self)


@dataclass(frozen=True)
class StepCost:
    """Time of one forward pass, in nanoseconds: the first five times what is counted of it.

    ``cached`` counts the rows that decode times the longest of them, since both engines read the
    cache up to the longest, and rows of finished requests that are held are computed as well.
    """

    step_ns: float  # each pass
    row_ns: float = 0.0  # each row that decodes, up to the first bend
    cached_ns: float = 0.0  # each cached token that is read
    prompt_ns: float = 0.0  # each token of a prompt
    chunk_ns: float = 0.0  # each piece of a prompt
    host_ns: float = 0.0  # before a pass that is not the last one's like: deciding, preparing
    bends: tuple[tuple[int, float], ...] = ()
    """Numbers of rows, ascending, each with the time of a row beyond it, up to the next number."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> StepCost:
        """Read what :meth:`as_dict` returned; results of earlier versions have no bends."""
        bends = tuple((int(rows), float(ns)) for rows, ns in told.get("bends", ()))
        numbers = {name: float(told[name]) for name in _numbers()}
        return cls(**numbers, bends=bends)

    def as_dict(self) -> dict[str, Any]:
        """For a result."""
        return asdict(self) | {"bends": [list(bend) for bend in self.bends]}

    def scaled(self, by: float) -> StepCost:
        """Passes as many times as long; the host's time stays."""
        numbers = {name: getattr(self, name) * by for name in _numbers() if name != "host_ns"}
        return replace(self, **numbers, bends=tuple((rows, ns * by) for rows, ns in self.bends))

    def rows_ns(self, rows: int) -> float:
        """Return the time that this many rows that decode add to a pass."""
        total, slope, since = 0.0, self.row_ns, 0
        for bend, ns in self.bends:
            if rows <= bend:
                break
            total, slope, since = total + slope * (bend - since), ns, bend
        return total + slope * (rows - since)

    @cached_property
    def _cached_ps(self) -> int:
        """Whole, so that passes of growing requests add up to the same however they are cut."""
        return round(self.cached_ns * PS)

    def of_plan(self, plan: Plan) -> Passes:
        """What the passes of a plan cost."""
        rows = len(plan.slots)
        ns = self.step_ns + self.rows_ns(rows)
        for _, _, start, stop in plan.chunks:
            ns += self.chunk_ns + self.prompt_ns * (stop - start)
        first, growth, alike = round(ns * PS), 0, plan.repeat
        if rows and self._cached_ps:
            reading = rows * self._cached_ps
            longest = int(plan.positions.max())
            first += (longest + 1) * reading
            growth = 0 if plan.chunks else reading  # no other pass is like one with a prompt
            if growth and not plan.growing.all():
                short_by = longest - int(plan.positions[plan.growing > 0].max())
                if short_by:  # a request that is done and held is the longest, for so many passes
                    growth, alike = 0, min(alike, short_by)
        return Passes(max(first, PS), growth, alike)


def _numbers() -> list[str]:
    """Return the names of the coefficients that are one number each."""
    return [field.name for field in fields(StepCost) if field.name != "bends"]


class Passes(NamedTuple):
    """Passes in a row: what the first costs, and each after it more than the one before.

    Integers (picoseconds), so that passes added one by one and at once are the same.
    """

    first_ps: int
    growth_ps: int
    alike: int  # for so many passes the growth is this

    def total_ps(self, count: int) -> int:
        """What the first ``count`` cost together."""
        return count * self.first_ps + self.growth_ps * (count * (count - 1) // 2)

    def until_ps(self, time: int) -> int:
        """How many passes it takes for their time to be at least ``time``; one at least."""
        low, high = 1, max(1, -(-time // self.first_ps))  # with growth fewer than without
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.total_ps(middle) >= time else (middle + 1, high)
        return low


@dataclass(frozen=True)
class KnownCost:
    """Cost of a step as a run taught it, and what that run saw.

    ``rows`` are the numbers of rows that decoded together in the steps that were fitted, and
    ``prompt_tokens`` and ``longest`` the most prompt tokens of a step and the longest request;
    beyond them the line is an extrapolation.
    """

    source: str  # the result's folder, as typed
    cost: StepCost
    rows: tuple[int, ...]
    prompt_tokens: int
    longest: int

    def as_dict(self) -> dict[str, Any]:
        """For a result."""
        return {
            "source": self.source,
            **self.cost.as_dict(),
            "rows_seen": list(self.rows),
            "most_prompt_tokens_seen": self.prompt_tokens,
            "longest_seen": self.longest,
        }

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> KnownCost:
        """What :meth:`as_dict` told."""
        return cls(
            told["source"],
            StepCost.of(told),
            tuple(told["rows_seen"]),
            told["most_prompt_tokens_seen"],
            told["longest_seen"],
        )
