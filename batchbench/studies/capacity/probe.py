"""Probe a request rate: serve trials at it, and judge whether they show that it is sustained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from batchbench.batching.batcher import Strategy
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import open_bench
from batchbench.batching.trials import beginning
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports import latency as latencies
from batchbench.reports.served import doubts_of_client
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import CONFIDENCE, Floats, mean_interval
from batchbench.reports.validity import audit, wrong_tokens
from batchbench.workloads import Workload, WorkloadSpec

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start

GROWTH = 0.1
"""The largest growth of a sustained queue: one in ten arriving requests stays in it."""

FEWEST_TRIALS = 2
"""Minimum number of trials for an interval: requests of one trial share its queue."""

UNLOADED_REQUESTS = 16
"""Requests served one at a time, to measure latency without load; all in a simulation."""


class Verdict(Enum):
    """The verdict on one rate under one strategy; the value is as in ``capacity.json``."""

    SUSTAINED = "sustained"
    NOT_SUSTAINED = "not sustained"
    BORDERLINE = "border"  # the largest number of trials does not decide

    def __str__(self) -> str:
        return "borderline" if self is Verdict.BORDERLINE else self.value


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialFigures:
    """The results of one trial at a rate."""

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
    values = {name: latency_ms(recording, name) for name in limits_ms}
    known = {name: ms for name, ms in values.items() if not np.isnan(ms).all()}
    shown = {name: float(np.nanpercentile(ms, 100 * attainment)) for name, ms in known.items()}
    return TrialFigures(len(met), int(met.sum()), queue_growth(recording), shown)


def latency_ms(recording: Recording, name: str) -> Floats:
    """Return a latency of each request by its name in ``--slo``, ``[requests]``."""
    of = {"ttft": latencies.ttft_ms, "tpot": latencies.tpot_ms, "e2el": latencies.e2el_ms}
    return of[name](recording)


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
            taken = np.nanpercentile(latency_ms(recording, name), percentile)
            raise UsageError(
                f"--slo {name}:{limits_ms[name]:g}: no rate is low enough, since requests take "
                f"{taken:.4g} ms even without load (p{percentile:g} of {name}, one at a time); "
                "raise the limit above that, or lower --slo-attainment"
            )
        names = ("ttft", "tpot", "e2el")
        return {name: float(np.nanmedian(latency_ms(recording, name))) for name in names}

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
