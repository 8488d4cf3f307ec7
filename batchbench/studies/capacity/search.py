"""Search the highest request rate that each strategy sustains within the limits.

A probe serves trials at one rate, and judges whether they show that it is sustained.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import stats

from batchbench.batching.batcher import Strategy
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.policies import WAITING
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import ServerFacts
from batchbench.batching.session import open_bench
from batchbench.batching.trials import WarmUp, beginning
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports import latency as latencies
from batchbench.reports.served import doubts_of_client
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import CONFIDENCE, mean_interval
from batchbench.reports.validity import audit, wrong_tokens
from batchbench.studies.executors.jobs import Done, Executor, Job, kinds_of, run_parts
from batchbench.workloads import Workload, WorkloadSpec

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start

GROWTH = 0.1
"""The largest growth of a sustained queue: one in ten arriving requests stays in it."""

FEWEST_TRIALS = 2
"""Minimum number of trials for an interval: requests of one trial share its queue."""

LATENCIES_MS = {
    "ttft": latencies.ttft_ms,
    "tpot": latencies.tpot_ms,
    "e2el": latencies.e2el_ms,
}
"""The function of each latency, ``[requests]``, by its name in ``--slo``."""

UNLOADED_REQUESTS = 16
"""Requests served one at a time, to measure latency without load; all in a simulation."""

MOST_DOUBLINGS = 24
"""Maximum number of doublings or halvings of the first rate: a factor of 16 million."""

MOST_PROBES = 40


# Probes of one rate


class Verdict(Enum):
    """The verdict on one rate under one strategy; the value is as in ``capacity.json``."""

    SUSTAINED = "sustained"
    NOT_SUSTAINED = "not sustained"
    BORDERLINE = "border"  # the largest number of trials does not decide

    def __str__(self) -> str:
        return "borderline" if self is Verdict.BORDERLINE else self.value


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialFigures:
    requests: int
    met: int  # requests within all limits
    growth: float  # of the queue, as a share of arrivals
    latency_ms: Mapping[str, float]  # a percentile of each limited latency

    @property
    def attainment(self) -> float:
        return self.met / self.requests


def figures_of(
    recording: Recording, limits_ms: Mapping[str, float], attainment: float
) -> TrialFigures:
    """Return a trial's results, with the percentiles that ``attainment`` sets limits to."""
    met = latencies.within(recording, limits_ms)
    values = {name: LATENCIES_MS[name](recording) for name in limits_ms}
    known = {name: ms for name, ms in values.items() if not np.isnan(ms).all()}
    shown = {name: float(np.nanpercentile(ms, 100 * attainment)) for name, ms in known.items()}
    return TrialFigures(len(met), int(met.sum()), queue_growth(recording), shown)


def queue_growth(recording: Recording) -> float:
    """Return how much longer the queue is in the last third of arrivals than in the middle third.

    It is a share of the arrivals in between: with arrivals at the rate λ that are served at the
    rate μ < λ it tends to 1 - μ/λ; if all are served it stays near 0. The first third is left out,
    since an empty server fills up in it.
    """
    r = recording.requests
    due = np.sort(r.due_ns)
    # A strategy without steps shows no admissions; there a request waits until its first token.
    begun = recording.admitted_ns if recording.has_steps else recording.first_token_ns
    waiting = np.arange(1, len(due) + 1) - np.searchsorted(np.sort(begun), due, side="right")
    third = len(due) // 3
    if not third:
        return 0.0
    return float((waiting[-third:].mean() - waiting[-2 * third : -third].mean()) / third)


def attained(trials: Sequence[TrialFigures]) -> Interval:
    """Return the share of requests within all limits, over all trials.

    The interval covers both Wilson's for independent requests, which is right if all trials give
    the same share, and Student's t for trials, which is right if requests of a trial depend on one
    another.
    """
    met, requests = sum(t.met for t in trials), sum(t.requests for t in trials)
    wilson = stats.binomtest(met, requests).proportion_ci(CONFIDENCE, method="wilson")
    low, high = mean_interval([t.attainment for t in trials])
    return Interval(
        met / requests,
        max(0.0, min(float(wilson.low), low)),
        min(1.0, max(float(wilson.high), high)),
    )


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean with Student's t interval; it is unbounded for one value."""
    return Interval(float(np.mean(values)), *mean_interval(values))


def judge(trials: Sequence[TrialFigures], attainment: float, most_trials: int) -> Verdict | None:
    """Return the verdict on a rate; None if it needs another trial.

    A rate is sustained if the interval of the share of requests within all limits lies at or above
    ``attainment``, and that of the queue's growth at or below :data:`GROWTH`. It is not sustained
    if one of them lies on the other side. A single allowed trial decides by itself.
    """
    if most_trials == 1:
        good = trials[0].attainment >= attainment and trials[0].growth <= GROWTH
        return Verdict.SUSTAINED if good else Verdict.NOT_SUSTAINED
    if len(trials) < FEWEST_TRIALS:
        return None
    share, growth = attained(trials), mean_of([t.growth for t in trials])
    if share.high < attainment or growth.low > GROWTH:
        return Verdict.NOT_SUSTAINED
    if share.low >= attainment and growth.high <= GROWTH:
        return Verdict.SUSTAINED
    return Verdict.BORDERLINE if len(trials) >= most_trials else None


@dataclass(frozen=True)
class Probe:
    """The trials at one rate under one strategy, and their verdict."""

    strategy: str
    rate: float
    trials: Sequence[TrialFigures]
    verdict: Verdict

    @property
    def attainment(self) -> Interval:
        return attained(self.trials)

    @property
    def growth(self) -> Interval:
        return mean_of([trial.growth for trial in self.trials])

    @property
    def latency_ms(self) -> dict[str, float]:
        """The percentile of each limited latency, as the median over trials."""
        names = self.trials[0].latency_ms
        return {n: float(np.median([trial.latency_ms[n] for trial in self.trials])) for n in names}


class CapacityWatch(Watch):
    """A watch that also receives the progress of a search; this base class ignores it."""

    def probe_begins(self, strategy: str, rate: float) -> None:
        pass

    def probe_ends(self, probe: Probe) -> None:
        pass


@dataclass(frozen=True)
class CapacityQuery:
    """The limits, and how surely they must be met."""

    goals: GoalsSpec
    attainment: float  # share of the requests that must be within all limits
    most_trials: int  # at one rate
    precision: float = 0.1  # how far apart a sustained and an unsustained rate may be, as a share


def check_enough(requests: int, query: CapacityQuery) -> None:
    """Raise UsageError if not even trials without a miss would show that a rate is sustained."""
    trials = [TrialFigures(requests, requests, 0.0, {})] * query.most_trials
    if judge(trials, query.attainment, query.most_trials) is not Verdict.SUSTAINED:
        raise UsageError(
            f"--queue-size {requests}: {query.most_trials} trials of so few requests prove at most "
            f"{100 * attained(trials).low:.4g} % within the limits, and --slo-attainment is "
            f"{100 * query.attainment:g} %; raise --queue-size or --max-trials"
        )


class ProbeRunner:
    """Serve probes; keep each strategy's first trial at the highest rate that it sustained."""

    def __init__(
        self,
        experiment: Experiment,
        query: CapacityQuery,
        watch: CapacityWatch,
        start: Start | None = None,
    ) -> None:
        self._spec, self._query, self._watch = experiment.workload, query, watch
        longest = 0
        if experiment.target is None:  # an engine is as large as its longest request
            planned = open_bench(replace(experiment, simulated=True), Watch())
            longest = max(
                planned.make(self._seeded(k)).max_total_tokens for k in range(query.most_trials)
            )
        self.session = open_bench(experiment, watch, max_len=longest, start=start)
        check_enough(len(self.session.workload), query)
        self.warm_up = self.session.warm_up()
        self.strategies = self.session.strategies()
        self._best: dict[str, tuple[float, Workload, Recording]] = {}

    def _seeded(self, trial: int, rate: float | None = None) -> WorkloadSpec:
        """Return a trial's workload; its seed, and so its gaps, are the same at every rate."""
        rate = self._spec.request_rate if rate is None else rate
        return replace(self._spec, seed=self._spec.seed + trial, request_rate=rate)

    def measure_unloaded(self) -> dict[str, float]:
        """Return median latencies in ms of requests served one at a time.

        Raises UsageError if even these miss a limit.
        """
        self._watch.phase("serving requests one at a time")
        session, limits_ms = self.session, self._query.goals.limits_ms
        count = len(session.workload) if session.simulated else UNLOADED_REQUESTS
        first = beginning(session.workload, count, output_tokens=session.workload.max_total_tokens)
        single = session.on(replace(first, max_concurrency=1))
        recording = single.serve(session.strategy("continuous"), 0, 1)
        if latencies.within(recording, limits_ms).mean() < self._query.attainment:
            shares = {n: latencies.within(recording, {n: ms}).mean() for n, ms in limits_ms.items()}
            name = min(shares, key=lambda n: shares[n])
            percentile = 100 * self._query.attainment
            taken = np.nanpercentile(LATENCIES_MS[name](recording), percentile)
            raise UsageError(
                f"--slo {name}:{limits_ms[name]:g}: no rate is low enough, since requests take "
                f"{taken:.4g} ms even without load (p{percentile:g} of {name}, one at a time); "
                "raise the limit above that, or lower --slo-attainment"
            )
        return {name: float(np.nanmedian(of(recording))) for name, of in LATENCIES_MS.items()}

    def probe(self, strategy: Strategy, rate: float) -> Probe:
        """Serve trials at a rate until they decide, or their largest number is reached."""
        self._watch.probe_begins(strategy.name, rate)
        query, served = self._query, list[tuple[Workload, Recording]]()
        trials, verdict = list[TrialFigures](), None
        while verdict is None:
            workload = self.session.make(self._seeded(len(trials), rate))
            recording = self.session.on(workload).serve(strategy, len(trials), query.most_trials)
            served = served or [(workload, recording)]
            trials.append(figures_of(recording, query.goals.limits_ms, query.attainment))
            verdict = judge(trials, query.attainment, query.most_trials)
        best = self._best.get(strategy.name)
        if verdict is Verdict.SUSTAINED and (best is None or rate > best[0]):
            self._best[strategy.name] = (rate, *served[0])
        probe = Probe(strategy.name, rate, trials, verdict)
        self._watch.probe_ends(probe)
        return probe

    def check_outputs(self) -> tuple[Verification, list[str]]:
        """Verify each strategy's tokens at its capacity; return also reasons to suspect the trials.

        The prompts and lengths of a trial are the same at every rate.
        """
        trials = list(self._best.values())
        session = self.session.on(trials[0][1]) if trials else self.session
        verification = session.verify([recording for _, _, recording in trials])
        reasons = [wrong_tokens(verification.wrong)] * bool(verification.wrong)
        for name, (rate, workload, recording) in self._best.items():
            served, trials_of = session.server() is not None, {name: [recording]}
            reasons += audit(
                workload, trials_of, NOT_VERIFIED, self.warm_up, None, rate, served=served
            )
            reasons += doubts_of_client(trials_of)
        return verification, list(dict.fromkeys(reasons))


# The search


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
    experiment: Experiment
    query: CapacityQuery
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
        return _search(runner, experiment, query)


def _search(runner: ProbeRunner, experiment: Experiment, query: CapacityQuery) -> CapacityFindings:
    session, unloaded_ms = runner.session, runner.measure_unloaded()
    alone = 1e3 / unloaded_ms["e2el"]  # at a share of this rate, about that share meets another
    lowest = alone * (1 - query.attainment) / 2
    searches = {s.name: Search(alone, query.precision, lowest) for s in runner.strategies}
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
    experiment: Experiment
    query: CapacityQuery

    def __call__(self, watch: Watch, models: ModelCache) -> Done:
        return Done({"": pickle.dumps(find_capacity(self.experiment, self.query))})


def find_capacity_on(
    executor: Executor,
    experiment: Experiment,
    query: CapacityQuery,
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
        jobs.append(Job(name, SearchWork(own, query), own.server))
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
