"""The cost of a step: coefficients fitted on a real run, and the least time the hardware allows.

A decode step reads all weights and the cached keys and values of the running requests once, so with
few rows (weights + KV read) / bandwidth is the least time that it can take, the memory-bandwidth
limit. On a processor that is too weak for its memory, the matrix products are the limit instead.
On a GPU that is too fast for a small model, the time to launch the products is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchbench import settings
from batchbench.settings import setting

if TYPE_CHECKING:
    from batchbench.batching.plan import Plan  # needs NumPy, which the specs do without

PS = 1000
"""Picoseconds per nanosecond: a cached token may add a fraction of a nanosecond."""


@dataclass(frozen=True)
class CostSpec:
    """The source of a simulation's step times."""

    cost: Path | None = setting(
        None,
        "Folder of a result of batchbench run. Step times are fitted to its steps, so simulated "
        "times are predictions. The result's model is used unless --model is given.",
        "Simulation",
        metavar="RESULT",
        default_text="every step takes 1 ms",
    )

    def __post_init__(self) -> None:
        settings.check(self)


@dataclass(frozen=True)
class StepCost:
    """The time of one forward pass in nanoseconds, as a sum of coefficients times counts.

    The count of ``cached_ns`` is the number of rows that decode times the length of the longest,
    because both engines read the cache up to the longest, also for held rows of finished requests.
    """

    step_ns: float  # per pass
    row_ns: float = 0.0  # per row that decodes, up to the first bend
    cached_ns: float = 0.0  # per cached token that is read
    prompt_ns: float = 0.0  # per token of a prompt
    chunk_ns: float = 0.0  # per piece of a prompt
    host_ns: float = 0.0  # per new plan: time of the host before its first pass
    bends: tuple[tuple[int, float], ...] = ()
    """Numbers of rows, ascending, each with the time of a row beyond it, up to the next number."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StepCost:
        # Earlier versions have no bends.
        bends = tuple((int(rows), float(ns)) for rows, ns in values.get("bends", ()))
        return cls(**{name: float(values[name]) for name in _COEFFICIENTS}, bends=bends)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bends": [list(bend) for bend in self.bends]}

    def scaled(self, by: float) -> StepCost:
        """Return the cost of passes that take ``by`` times as long; the host's time stays."""
        numbers = {name: getattr(self, name) * by for name in _COEFFICIENTS if name != "host_ns"}
        return replace(self, **numbers, bends=tuple((rows, ns * by) for rows, ns in self.bends))

    def rows_ns(self, rows: int) -> float:
        """Return the time that this many decoding rows add to a pass."""
        total, slope, since = 0.0, self.row_ns, 0
        for bend, ns in self.bends:
            if rows <= bend:
                break
            total, slope, since = total + slope * (bend - since), ns, bend
        return total + slope * (rows - since)

    @cached_property
    def _cached_ps(self) -> int:
        # An integer, so that passes add up to the same however they are cut into spans.
        return round(self.cached_ns * PS)

    def of_plan(self, plan: Plan) -> Passes:
        rows = len(plan.slots)
        ns = self.step_ns + self.rows_ns(rows)
        for _, _, start, stop in plan.chunks:
            ns += self.chunk_ns + self.prompt_ns * (stop - start)
        first, growth, valid = round(ns * PS), 0, plan.repeat
        if rows and self._cached_ps:
            reading = rows * self._cached_ps
            longest = int(plan.positions.max())
            first += (longest + 1) * reading
            growth = 0 if plan.chunks else reading  # a pass with a prompt is not repeated
            if growth and not plan.growing.all():
                short_by = longest - int(plan.positions[plan.growing > 0].max())
                if short_by:  # a finished request is the longest for so many passes
                    growth, valid = 0, min(valid, short_by)
        return Passes(max(first, PS), growth, valid)


_COEFFICIENTS = tuple(field.name for field in fields(StepCost) if field.name != "bends")


class Passes(NamedTuple):
    """Successive passes: the cost of the first, and the growth from each pass to the next.

    The costs are integers (picoseconds), so that adding passes one by one or at once is the same.
    """

    first_ps: int
    growth_ps: int
    alike: int  # number of passes for which the growth holds

    def total_ps(self, count: int) -> int:
        return count * self.first_ps + self.growth_ps * (count * (count - 1) // 2)

    def until_ps(self, time: int) -> int:
        """Return the least number of passes, at least 1, that take ``time`` or longer."""
        low, high = 1, max(1, -(-time // self.first_ps))  # with growth fewer than without
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.total_ps(middle) >= time else (middle + 1, high)
        return low


@dataclass(frozen=True)
class KnownCost:
    """A cost fitted on a run, and the range of its steps, beyond which it is an extrapolation."""

    source: str  # the result's folder, as typed
    cost: StepCost
    rows: tuple[int, ...]  # numbers of rows that decoded together
    prompt_tokens: int  # most prompt tokens of a step
    longest: int  # tokens of the longest request

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            **self.cost.as_dict(),
            "rows_seen": list(self.rows),
            "most_prompt_tokens_seen": self.prompt_tokens,
            "longest_seen": self.longest,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> KnownCost:
        most, longest = values["most_prompt_tokens_seen"], values["longest_seen"]
        rows = tuple(values["rows_seen"])
        return cls(values["source"], StepCost.of(values), rows, most, longest)


TIMES_THE_CACHE = 4
"""A buffer of this many times the last-level cache is read from memory."""


@dataclass(frozen=True)
class Bandwidth:
    """The measured speed of reading memory."""

    bytes_per_s: float
    method: str  # the fastest of several
    buffer_bytes: int
    cache_bytes: int | None  # of the last level; None if it is not known
    passes: int
    threads: int | None  # None on a GPU

    @property
    def beyond_cache(self) -> bool | None:
        """True if the buffer was large enough; None if the size of the cache is not known."""
        cache = self.cache_bytes
        return None if cache is None else self.buffer_bytes >= TIMES_THE_CACHE * cache


@dataclass(frozen=True)
class Reading:
    """The memory that a decode step of a model reads."""

    dtype: str
    weight_bytes: int  # all weights
    step_weight_bytes: int  # those that a step reads: only some rows of an embedding table
    kv_token_bytes: int

    def step_bytes(self, kv_tokens: float) -> float:
        """Return the bytes of the weights, and of the keys and values of the cached tokens."""
        return self.step_weight_bytes + kv_tokens * self.kv_token_bytes


@dataclass(frozen=True)
class Ceiling:
    """The hardware limit for a decode step of ``rows`` requests with ``kv_tokens`` cached tokens.

    ``products_s`` is the time of its matrix products alone. On a GPU ``arithmetic_s`` is that time
    at the rate of a large product, and ``launching_s`` the time of as many products with almost no
    work: kernels run one after another, and each takes microseconds to start and to end.
    """

    bandwidth: Bandwidth
    reading: Reading
    products_s: float
    rows: int
    kv_tokens: float
    arithmetic_s: float | None = None
    launching_s: float | None = None

    @property
    def floor_s(self) -> float:
        """The memory-bandwidth limit: (weights + KV read) / bandwidth."""
        return self.reading.step_bytes(self.kv_tokens) / self.bandwidth.bytes_per_s

    @property
    def bound(self) -> str:
        """The cause of the slower limit: memory, arithmetic or launching."""
        if self.floor_s >= self.products_s:
            return "memory"
        if self.arithmetic_s is None or self.launching_s is None:
            return "arithmetic"
        memory, arithmetic, launching = self.floor_s, self.arithmetic_s, self.launching_s
        slowest = max((memory, "memory"), (arithmetic, "arithmetic"), (launching, "launching"))
        return slowest[1]

    @property
    def tokens_per_s(self) -> float:
        """Highest number of tokens per second, with all rows in use."""
        return self.rows / max(self.floor_s, self.products_s)


def middle(ceilings: Sequence[Ceiling]) -> Ceiling:
    """Return the median of one step's limit measured several times, since a machine drifts."""
    speed = statistics.median(c.bandwidth.bytes_per_s for c in ceilings)
    times: dict[str, Any] = {}
    for name in ("products_s", "arithmetic_s", "launching_s"):
        known = [time for c in ceilings if (time := getattr(c, name)) is not None]
        times[name] = statistics.median(known) if known else None
    bandwidth = replace(ceilings[0].bandwidth, bytes_per_s=speed)
    return replace(ceilings[0], bandwidth=bandwidth, **times)
