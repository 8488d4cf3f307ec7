"""Whether a rate is sustained: what a trial shows, and what several of them are proof of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from scipy import stats

from batchbench.batching.batcher import Strategy
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import Session
from batchbench.batching.trials import beginning
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports import latency as latencies
from batchbench.reports.audit import audit
from batchbench.reports.latency import within
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import CONFIDENCE, Floats, mean_interval
from batchbench.workloads import Workload, WorkloadSpec

GROWTH = 0.1
"""A queue grows if more than one in ten of those that come stays in it."""

FEWEST_TRIALS = 2
"""Requests of one trial share its queue, so that one trial has no interval."""


class Verdict(StrEnum):
    """On one rate under one strategy."""

    SUSTAINED = "sustained"
    NOT_SUSTAINED = "not sustained"
    BORDER = "border"  # as many trials as allowed do not tell


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth is, with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialFigures:
    """What one trial shows of a rate."""

    requests: int
    met: int  # requests within all limits
    growth: float  # of the queue, as a share of arrivals
    latency_ms: Mapping[str, float]  # of each latency that is limited, the percentile asked for

    @property
    def attainment(self) -> float:
        """Share of the requests within all limits."""
        return self.met / self.requests


def figures_of(
    recording: Recording, limits_ms: Mapping[str, float], attainment: float
) -> TrialFigures:
    """What a trial shows; percentiles are those that ``attainment`` asks to be within limits."""
    met = latencies.within(recording, limits_ms)
    return TrialFigures(
        requests=len(met),
        met=int(met.sum()),
        growth=queue_growth(recording),
        latency_ms={
            name: float(np.nanpercentile(latency_ms(recording, name), 100 * attainment))
            for name in limits_ms
            if not np.isnan(latency_ms(recording, name)).all()
        },
    )


def latency_ms(recording: Recording, name: str) -> Floats:
    """A latency of each request by the name that ``--slo`` has for it, ``[requests]``."""
    of = {"ttft": latencies.ttft_ms, "tpot": latencies.tpot_ms, "e2el": latencies.e2el_ms}
    return of[name](recording)


def queue_growth(recording: Recording) -> float:
    """How much longer the queue is in the last third of arrivals than in the middle third.

    As a share of those that came in between: with arrivals at the rate λ that are served at the
    rate μ < λ it tends to 1 - μ/λ; where all are served it stays near 0. The first third is left
    out, since an empty server fills up in it.
    """
    r = recording.requests
    due = np.sort(r.due_ns)
    # Who schedules for himself shows no admissions: there one waits until the first token.
    begun = recording.starts_of(r.admitted) if recording.has_steps else recording.ends_of(r.first)
    admitted = np.sort(begun)
    waiting = np.arange(1, len(due) + 1) - np.searchsorted(admitted, due, side="right")
    third = len(due) // 3
    if not third:
        return 0.0
    return float((waiting[-third:].mean() - waiting[-2 * third : -third].mean()) / third)


def attained(trials: Sequence[TrialFigures]) -> Interval:
    """Share of requests within all limits, over all trials.

    The interval covers both Wilson's for independent requests, which is honest where every trial
    shows the same, and Student's t for trials, which is honest where the requests of a trial share
    its luck.
    """
    met, requests = sum(t.met for t in trials), sum(t.requests for t in trials)
    found = stats.binomtest(met, requests).proportion_ci(CONFIDENCE, method="wilson")
    spread = mean_of([t.attainment for t in trials])
    share = met / requests
    return Interval(
        share,
        max(0.0, min(float(found.low), spread.low)),
        min(1.0, max(float(found.high), spread.high)),
    )


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean of trials with its interval."""
    return Interval(float(np.mean(values)), *mean_interval(values))


def judge(trials: Sequence[TrialFigures], attainment: float, most_trials: int) -> Verdict | None:
    """The verdict on a rate; None where it takes another trial.

    A rate is sustained if the share of requests within all limits is surely at least
    ``attainment`` and the queue surely does not grow; it is not if one of them is surely
    otherwise. With one trial allowed there are no intervals, and what it shows is taken for true.
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
    return Verdict.BORDER if len(trials) >= most_trials else None


LONE = 16
"""Requests that are measured one at a time, before any load; in simulation all are."""


@dataclass(frozen=True)
class Probe:
    """One rate under one strategy."""

    strategy: str
    rate: float
    trials: Sequence[TrialFigures]
    verdict: Verdict

    @property
    def attainment(self) -> Interval:
        """Share of the requests within all limits."""
        return attained(self.trials)

    @property
    def growth(self) -> Interval:
        """Of the queue, as a share of arrivals."""
        return mean_of([trial.growth for trial in self.trials])

    @property
    def latency_ms(self) -> dict[str, float]:
        """The percentile of each limited latency, median over trials."""
        names = self.trials[0].latency_ms
        return {
            name: float(np.median([trial.latency_ms[name] for trial in self.trials]))
            for name in names
        }


class CapacityWatch(Watch):
    """Hears of probes as well; says nothing of them."""

    def probe_begins(self, strategy: str, rate: float) -> None:
        """A rate is tried under a strategy."""

    def probe_ends(self, probe: Probe) -> None:
        """There is a verdict on it."""


@dataclass(frozen=True)
class Asked:
    """Within which limits, how surely."""

    goals: GoalsSpec
    attainment: float  # share of the requests that must be within all limits
    most_trials: int  # of one rate


class Bench:
    """Serves probes, and keeps what each strategy did at the highest rate that it sustained.

    Raises:
        UsageError: what is asked cannot be done here.
    """

    def __init__(self, experiment: Experiment, asked: Asked, watch: CapacityWatch) -> None:
        self._spec, self._asked, self._watch = experiment.workload, asked, watch
        planned = Session(replace(experiment, simulated=True), Watch())
        longest = max(
            planned.make(self._seeded(k)).max_total_tokens for k in range(asked.most_trials)
        )
        self.session = Session(experiment, watch, max_len=longest)
        self.warm_up = self.session.warm_up()
        self.strategies = self.session.strategies()
        self._kept: dict[str, tuple[float, Workload, Recording]] = {}

    def _seeded(self, trial: int, rate: float | None = None) -> WorkloadSpec:
        """The workload of a trial: its seed, and so its gaps, are the same at every rate."""
        spec = self._spec
        rate = spec.request_rate if rate is None else rate
        return replace(spec, seed=spec.seed + trial, request_rate=rate)

    def check_alone(self) -> dict[str, float]:
        """Medians in ms of the latencies of requests that are served one at a time.

        Raises:
            UsageError: even so they miss a limit.
        """
        self._watch.phase("serving requests one at a time")
        session = self.session
        count = len(session.workload) if session.engine.simulated else LONE
        alone = beginning(session.workload, count, output_tokens=session.workload.max_total_tokens)
        one = replace(alone, max_concurrency=1)
        recording = session.on(one).serve(session.batcher("continuous"), 0, 1)
        goals, attainment = self._asked.goals, self._asked.attainment
        figures = figures_of(recording, goals.limits_ms, attainment)
        if attained([figures]).value < attainment:
            raise UsageError(self._misses(recording))
        names = ("ttft", "tpot", "e2el")
        return {name: float(np.nanmedian(latency_ms(recording, name))) for name in names}

    def _misses(self, recording: Recording) -> str:
        """Which limit requests miss even when they are alone, and which one they would meet."""
        limits, attainment = self._asked.goals.limits_ms, self._asked.attainment
        shares = {n: within(recording, {n: limit}).mean() for n, limit in limits.items()}
        name = min(shares, key=lambda n: shares[n])
        taken = np.nanpercentile(latency_ms(recording, name), 100 * attainment)
        return (
            f"--slo {name}:{limits[name]:g}: no rate is low enough, since even alone requests take "
            f"{taken:.4g} ms (p{100 * attainment:g} of {name}, one at a time); "
            "raise the limit above that, or lower --slo-attainment"
        )

    def probe(self, strategy: Strategy, rate: float) -> Probe:
        """Serve trials at a rate until they tell, or are as many as may be."""
        self._watch.probe_begins(strategy.name, rate)
        asked, trials = self._asked, list[TrialFigures]()
        verdict: Verdict | None = None
        first: tuple[Workload, Recording] | None = None
        while verdict is None:
            workload = self.session.make(self._seeded(len(trials), rate))
            session = self.session.on(workload)
            recording = session.serve(strategy, len(trials), asked.most_trials)
            trials.append(figures_of(recording, asked.goals.limits_ms, asked.attainment))
            first = first or (workload, recording)
            verdict = judge(trials, asked.attainment, asked.most_trials)
        kept = self._kept.get(strategy.name)
        if verdict is Verdict.SUSTAINED and first and (kept is None or rate > kept[0]):
            self._kept[strategy.name] = (rate, *first)
        probe = Probe(strategy.name, rate, trials, verdict)
        self._watch.probe_ends(probe)
        return probe

    def check_outputs(self) -> tuple[Verification, list[str]]:
        """Verify each strategy's tokens at its capacity; and reasons to suspect its trial there.

        The prompts and lengths of a trial are the same at every rate.
        """
        kept = list(self._kept.values())
        session = self.session.on(kept[0][1]) if kept else self.session
        verification = session.verify([recording for _, _, recording in kept])
        reasons: Sequence[str] = [
            reason
            for name, (rate, workload, recording) in self._kept.items()
            for reason in audit(
                workload, {name: [recording]}, NOT_VERIFIED, self.warm_up, None, rate
            )
        ]
        if verification.wrong:
            reasons = [f"{verification.wrong} requests got wrong tokens", *reasons]
        return verification, list(dict.fromkeys(reasons))
