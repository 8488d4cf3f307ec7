"""What a machine allows: the least time of a decode step, and the most tokens a second.

A decode step reads all weights and the cached keys and values of the running requests once, so with
few rows (weights + KV read) / bandwidth is the least that it can take: its *floor*. Where the
processor is too weak for its memory arithmetic binds first, and the matrix products alone tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

TIMES_THE_CACHE = 4
"""A buffer this many times the last-level cache is read from memory."""


@dataclass(frozen=True)
class Bandwidth:
    """How fast memory is read, as measured."""

    bytes_per_s: float
    method: str  # of the ways tried the fastest
    buffer_bytes: int
    cache_bytes: int | None  # of the last level; None where the machine does not tell
    passes: int
    threads: int | None  # None on a GPU

    @property
    def beyond_cache(self) -> bool | None:
        """Whether the buffer was large enough; None where the size of the cache is not known."""
        if self.cache_bytes is None:
            return None
        return self.buffer_bytes >= TIMES_THE_CACHE * self.cache_bytes


@dataclass(frozen=True)
class Reading:
    """What a decode step of a model has to read."""

    dtype: str
    weight_bytes: int  # all of them
    step_weight_bytes: int  # those that a step reads: of a table of embeddings it reads some rows
    kv_token_bytes: int

    def step_bytes(self, kv_tokens: float) -> float:
        """Weights, and keys and values of so many cached tokens."""
        return self.step_weight_bytes + kv_tokens * self.kv_token_bytes


@dataclass(frozen=True)
class Ceiling:
    """Both together, for a decode step of ``rows`` requests with ``kv_tokens`` cached tokens.

    ``products_s`` is how long its matrix products take alone.
    """

    bandwidth: Bandwidth
    reading: Reading
    products_s: float
    rows: int
    kv_tokens: float

    @property
    def floor_s(self) -> float:
        """(weights + KV read) / bandwidth."""
        return self.reading.step_bytes(self.kv_tokens) / self.bandwidth.bytes_per_s

    @property
    def bound(self) -> str:
        """What binds: memory, or arithmetic."""
        return "memory" if self.floor_s >= self.products_s else "arithmetic"

    @property
    def tokens_per_s(self) -> float:
        """With all rows in use, of a step that takes no longer than what binds."""
        return self.rows / max(self.floor_s, self.products_s)


def middle(ceilings: Sequence[Ceiling]) -> Ceiling:
    """Of the same step measured at several times, the medians: a machine's speed drifts."""
    first = ceilings[0]
    speed = statistics.median(c.bandwidth.bytes_per_s for c in ceilings)
    alone = statistics.median(c.products_s for c in ceilings)
    return replace(
        first,
        bandwidth=replace(first.bandwidth, bytes_per_s=speed),
        products_s=alone,
    )
