"""Capacity: the highest request rate that each strategy sustains within the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Verification
from batchbench.errors import UsageError
from batchbench.studies.capacity.probe import Asked, Bench, CapacityWatch, Interval, Probe, Verdict

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


@dataclass(frozen=True)
class Capacity:
    """What one strategy carries: ``low`` requests/s are sustained, ``high`` are not."""

    strategy: str
    low: float
    high: float
    probes: Sequence[Probe]


@dataclass(frozen=True)
class CapacityFindings:
    """What came of a search, of every strategy."""

    experiment: Experiment
    asked: Asked
    precision: float
    lone_ms: Mapping[str, float]  # medians of a request that is alone
    capacities: Sequence[Capacity]
    verification: Verification
    warm_up: WarmUp
    reasons: Sequence[str]  # to suspect it
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    workload: str

    @property
    def ratio(self) -> Interval | None:
        """The last strategy's capacity over the first's, and what it may be at the extremes."""
        base, other = self.capacities[0], self.capacities[-1]
        if base is other or not base.low:
            return None
        return Interval(other.low / base.low, other.low / base.high, other.high / base.low)


def find_capacity(
    experiment: Experiment, asked: Asked, precision: float, watch: CapacityWatch | None = None
) -> CapacityFindings:
    """Search the capacity of each strategy of ``experiment``, whose own rate does not matter.

    Every trial of a rate draws arrivals and lengths from a seed of its own; the seeds are the same
    for every rate and strategy, and a higher rate has the same gaps, shortened. The strategies take
    turns, so that a machine that drifts does so for all of them.

    Args:
        precision: how far the lowest rate that is not sustained may be above the highest that is,
            as a share.

    Raises:
        UsageError: no limit is given, requests miss them even alone, or no rate is too high.
    """
    if not asked.goals.slo:
        raise UsageError("--slo: within which limits? Give one or more, such as --slo ttft:500")
    bench = Bench(experiment, asked, watch or CapacityWatch())
    lone_ms = bench.check_alone()
    searches = {b.name: Search(1e3 / lone_ms["e2el"], precision) for b in bench.strategies}
    probes: dict[str, list[Probe]] = {name: [] for name in searches}
    turn = list(bench.strategies)
    while turn:
        for strategy in list(turn):
            rate = searches[strategy.name].next_rate()
            if rate is None:
                turn.remove(strategy)
                continue
            probe = bench.probe(strategy, rate)
            searches[strategy.name].tell(rate, probe.verdict)
            probes[strategy.name].append(probe)
        turn.reverse()
    requests = len(bench.session.workload)
    for name, search in searches.items():
        # All of them within the time that one takes is a burst, and no load.
        if math.isinf(search.high) or requests / search.high < lone_ms["e2el"] / 1e3:
            raise UsageError(
                f"--queue-size {requests}: {name} still holds out where all of them come at once: "
                f"so few do not keep {experiment.serving.batch_size} slots busy; raise it"
            )
    verification, reasons = bench.check_outputs()
    return CapacityFindings(
        experiment=experiment,
        asked=asked,
        precision=precision,
        lone_ms=lone_ms,
        capacities=[Capacity(n, s.low, s.high, probes[n]) for n, s in searches.items()],
        verification=verification,
        warm_up=bench.warm_up,
        reasons=reasons,
        model=bench.session.model,
        environment=bench.session.environment,
        workload=bench.session.workload.name.replace(f"; {experiment.workload.process}", ""),
    )
