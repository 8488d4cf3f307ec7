"""Distributions of lengths, and the small grammar in which options name them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchbench.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAMMAR = "a number (7), a range (4:64) or uniform:min=4,max=64"


@dataclass(frozen=True)
class Uniform:
    """Integers from ``min`` to ``max``, both included, all equally likely."""

    min: int
    max: int

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """``size`` lengths, in tokens."""
        return rng.integers(self.min, self.max, size=size, endpoint=True)

    def __str__(self) -> str:
        return f"uniform:min={self.min},max={self.max}" if self.min < self.max else f"{self.min}"


def parse_lengths(text: str, option: str) -> Uniform:
    """The distribution that ``text`` names.

    Raises:
        UsageError: the text is not of the grammar, or its bounds are empty; names ``option``.
    """
    found = re.fullmatch(
        r"(?P<one>\d{1,9})|(?P<lo>\d{1,9}):(?P<hi>\d{1,9})"
        r"|uniform:min=(?P<min>\d{1,9}),max=(?P<max>\d{1,9})",
        text.strip(),
    )
    if found is None:
        raise UsageError(f"{option} {text}: must be {GRAMMAR}")
    low, high = (
        int(found[a] or found[b] or found["one"]) for a, b in (("lo", "min"), ("hi", "max"))
    )
    if low < 1:
        raise UsageError(f"{option} {text}: a length is at least 1 token")
    if high < low:
        raise UsageError(f"{option} {text}: the smaller bound comes first ({high}:{low})")
    return Uniform(low, high)
