"""Whether a rate is sustained: what a trial shows, and what several of them are proof of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats

from batchbench.batching.recording import Recording
from batchbench.reports import latency as latencies
from batchbench.reports.comparison import CONFIDENCE, mean_interval
from batchbench.reports.statistics import Floats

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
