"""The search for the highest rate that is sustained: doubling until it is not, then bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from batchbench.studies.capacity.probe import Verdict

MOST_DOUBLINGS = 24
"""Up or down from the first rate: a factor of 16 million."""

MOST_PROBES = 40


@dataclass
class Search:
    """Asks for rates and hears verdicts; between ``low`` and ``high`` lies the capacity.

    A rate whose verdict is *border* stays between them: the search then closes in on it from
    either side, so that what is left of the interval is what the trials cannot tell apart.

    Args:
        first: the rate to begin with, in requests/s.
        precision: how far ``high`` may be above ``low`` at the end, as a share of ``low``.
    """

    first: float
    precision: float
    low: float = 0.0  # highest rate that is sustained
    high: float = math.inf  # lowest rate that is not
    border: list[float] = field(default_factory=list)
    probes: int = 0

    def next_rate(self) -> float | None:
        """The rate to be probed next; None where nothing is left to tell."""
        if self.probes >= MOST_PROBES:
            return None
        if self.low == 0 or self.high == math.inf:
            return self._widened()
        edges = [self.low, *self.border, self.high]
        gaps = [(edges[0], edges[1]), (edges[-2], edges[-1])]
        below, above = max(gaps, key=lambda gap: gap[1] / gap[0])
        return None if above / below <= 1 + self.precision else math.sqrt(below * above)

    def _widened(self) -> float | None:
        """Twice the highest rate so far while all are sustained, half the lowest while none is."""
        known = [*self.border, *({self.low, self.high} - {0, math.inf})]
        if not known:
            return self.first
        rate = 2 * max(known) if self.high == math.inf else min(known) / 2
        return rate if abs(math.log2(rate / self.first)) <= MOST_DOUBLINGS else None

    def tell(self, rate: float, verdict: Verdict) -> None:
        """A rate was probed. More load is never easier: what contradicts that is overruled."""
        self.probes += 1
        if verdict is Verdict.SUSTAINED:
            self.low = max(self.low, rate)
        elif verdict is Verdict.NOT_SUSTAINED:
            self.high = min(self.high, rate)
        else:
            self.border = sorted([*self.border, rate])
        self.border = [rate for rate in self.border if self.low < rate < self.high]
