"""Search the highest request rate that each strategy sustains within the limits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.policies import WAITING
from batchbench.batching.progress import Watch
from batchbench.batching.remote.outcome import ServerFacts
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Verification
from batchbench.errors import UsageError
from batchbench.studies.capacity.probe import (
    CapacityQuery,
    CapacityWatch,
    Interval,
    Probe,
    ProbeRunner,
    Verdict,
)
from batchbench.studies.executors.jobs import Done, Executor, Job, kinds_of, run_parts

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start

MOST_DOUBLINGS = 24
"""Maximum number of doublings or halvings of the first rate: a factor of 16 million."""

MOST_PROBES = 40


@dataclass
class Search:
    """Choose the rates to probe; the capacity lies between ``low`` and ``high``.

    A borderline rate stays between them: the search then closes in on it from both sides, so that
    the remaining interval holds the rates that the trials cannot decide.
    """

    first: float  # the rate to begin with, in requests/s
    precision: float  # how far high may be above low at the end, as a share of low
    lowest: float = 0.0  # rate to stop at: below it, too few requests meet for load to matter
    low: float = 0.0  # highest rate that is sustained
    high: float = math.inf  # lowest rate that is not
    borderline: list[float] = field(default_factory=list)
    probes: int = 0

    def next_rate(self) -> float | None:
        """Return the rate to probe next; None if the search is over."""
        if self.probes >= MOST_PROBES:
            return None
        if self.low == 0 or self.high == math.inf:
            return self._widened()
        rates = [self.low, *self.borderline, self.high]
        below, above = max((rates[:2], rates[-2:]), key=lambda gap: gap[1] / gap[0])
        return None if above / below <= 1 + self.precision else math.sqrt(below * above)

    def _widened(self) -> float | None:
        """Return twice the highest rate while all are sustained, half the lowest while none is."""
        known = [*self.borderline, *({self.low, self.high} - {0, math.inf})]
        if not known:
            return self.first
        rate = 2 * max(known) if self.high == math.inf else min(known) / 2
        far = abs(math.log2(rate / self.first)) > MOST_DOUBLINGS
        return None if far or rate < self.lowest else rate

    def record(self, rate: float, verdict: Verdict) -> None:
        """Record a verdict. It overrules earlier ones, since more load is never easier."""
        self.probes += 1
        if verdict is Verdict.SUSTAINED:
            self.low = max(self.low, rate)
        elif verdict is Verdict.NOT_SUSTAINED:
            self.high = min(self.high, rate)
        else:
            self.borderline.append(rate)
        self.borderline = sorted(rate for rate in self.borderline if self.low < rate < self.high)


@dataclass(frozen=True)
class Capacity:
    """The capacity of a strategy: ``low`` requests/s are sustained, ``high`` are not."""

    strategy: str
    low: float
    high: float
    probes: Sequence[Probe]


@dataclass(frozen=True)
class CapacityFindings:
    """The results of a search, from which every report is derived."""

    experiment: Experiment
    query: CapacityQuery
    precision: float
    unloaded_ms: Mapping[str, float]  # median latencies of requests one at a time
    capacities: Sequence[Capacity]
    verification: Verification
    warm_up: WarmUp
    reasons: Sequence[str]  # to suspect it
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    workload: str
    server: ServerFacts | None = None
    nodes: Mapping[str, str] | None = None  # where each strategy was searched, if elsewhere
    machines: Sequence[str] = ()  # kinds of these machines

    @property
    def ratio(self) -> Interval | None:
        """The last strategy's capacity over the first's, with the extremes that it may have."""
        base, other = self.capacities[0], self.capacities[-1]
        if base is other or not base.low:
            return None
        return Interval(other.low / base.low, other.low / base.high, other.high / base.low)


def find_capacity(
    experiment: Experiment,
    query: CapacityQuery,
    precision: float,
    watch: CapacityWatch | None = None,
    start: Start | None = None,
) -> CapacityFindings:
    """Search the capacity of each strategy of ``experiment``, whose own rate is ignored.

    Every trial of a rate draws arrivals and lengths from its own seed; the seeds are the same for
    every rate and strategy, and a higher rate has the same gaps, shortened. Strategies alternate,
    so that a drift of the machine's speed affects all of them. Raises UsageError if no limit is
    given, requests miss them even without load, or no rate is too high. ``start`` starts the
    clients of a server on other machines.
    """
    if not query.goals.slo:
        raise UsageError("--slo: give one or more latency limits, such as --slo ttft:500")
    runner = ProbeRunner(experiment, query, watch or CapacityWatch(), start)
    with closing(runner.session):
        return _search(runner, experiment, query, precision)


def _search(
    runner: ProbeRunner, experiment: Experiment, query: CapacityQuery, precision: float
) -> CapacityFindings:
    session, unloaded_ms = runner.session, runner.measure_unloaded()
    alone = 1e3 / unloaded_ms["e2el"]  # at a share of this rate, about that share meets another
    lowest = alone * (1 - query.attainment) / 2
    searches = {s.name: Search(alone, precision, lowest) for s in runner.strategies}
    probes: dict[str, list[Probe]] = {name: [] for name in searches}
    open_searches = list(runner.strategies)
    while open_searches:
        for strategy in list(open_searches):
            search = searches[strategy.name]
            if (rate := search.next_rate()) is None:
                open_searches.remove(strategy)
                continue
            probe = runner.probe(strategy, rate)
            search.record(rate, probe.verdict)
            probes[strategy.name].append(probe)
        open_searches.reverse()
    requests = len(session.workload)
    for name, search in searches.items():
        # If all requests arrive within the time that one takes, they are a burst, not a load.
        if math.isinf(search.high) or requests / search.high < unloaded_ms["e2el"] / 1e3:
            raise UsageError(
                f"--queue-size {requests}: {name} sustains even a rate at which all requests "
                f"arrive at once, since so few do not keep {experiment.serving.batch_size} slots "
                "busy; raise it"
            )
    verification, reasons = runner.check_outputs()
    return CapacityFindings(
        experiment=experiment,
        query=query,
        precision=precision,
        unloaded_ms=unloaded_ms,
        capacities=[Capacity(n, s.low, s.high, probes[n]) for n, s in searches.items()],
        verification=verification,
        warm_up=runner.warm_up,
        reasons=reasons,
        model=session.model,
        environment=session.environment,
        workload=session.workload.name.replace(f"; {experiment.workload.process}", ""),
        server=session.server(),
    )


@dataclass(frozen=True)
class SearchWork:
    """The search for one strategy, on any machine."""

    experiment: Experiment
    query: CapacityQuery
    precision: float

    def __call__(self, watch: Watch, models: ModelCache) -> Done:
        return Done({"": pickle.dumps(find_capacity(self.experiment, self.query, self.precision))})


def find_capacity_on(
    executor: Executor,
    experiment: Experiment,
    query: CapacityQuery,
    precision: float,
    watch: CapacityWatch,
) -> CapacityFindings:
    """Search the capacity of each strategy as a job of its own, and put the findings together.

    A search is sequential, since each rate depends on the verdict on the one before. Strategies
    do not alternate, because each may have another machine.
    """
    serving, jobs = experiment.serving, list[Job]()
    for name in serving.strategies:
        wait = serving.max_wait if name in WAITING else 0.0
        own = replace(experiment, serving=replace(serving, strategy=name, max_wait=wait))
        jobs.append(Job(name, SearchWork(own, query, precision), own.server))
    ends = run_parts(jobs, executor, watch)
    nodes = {job.key: ends[job.key][1] for job in jobs}
    parts: list[CapacityFindings] = [
        pickle.loads(cast("bytes", ends[job.key][0][""])) for job in jobs
    ]
    machines = [] if experiment.simulated else kinds_of(part.environment for part in parts)
    reasons = [reason for part in parts for reason in part.reasons]
    if len(machines) > 1:
        reasons.append(
            f"strategies were searched on {len(machines)} kinds of machines "
            f"({'; '.join(machines)}): drop --any-hardware"
        )
    return replace(
        parts[0],
        experiment=experiment,
        capacities=[capacity for part in parts for capacity in part.capacities],
        verification=_all(part.verification for part in parts),
        reasons=list(dict.fromkeys(reasons)),
        nodes=nodes,
        machines=machines,
    )


def _all(checks: Iterable[Verification]) -> Verification:
    """Return the outcome of checks of different recordings of one workload."""
    parts = list(checks)
    gaps = [part.max_logit_gap for part in parts if part.max_logit_gap is not None]
    return Verification(
        requests_checked=sum(part.requests_checked for part in parts),
        identical=sum(part.identical for part in parts),
        numerical_ties=sum(part.numerical_ties for part in parts),
        wrong=sum(part.wrong for part in parts),
        reference=next((part.reference for part in parts if part.reference), None),
        max_logit_gap=max(gaps, default=None),
        findings=tuple(finding for part in parts for finding in part.findings),
    )
