"""The self-audit: reasons to doubt a run, with their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from batchbench.batching.recording import Recording
from batchbench.batching.trials import WarmUp, requests_that_differ
from batchbench.batching.verification import Verification, draws_by_itself
from batchbench.reports import metrics, time_budget
from batchbench.reports.latency import gaps_ms, ttft_ms
from batchbench.reports.statistics import Distribution
from batchbench.reports.text import label_of, percent, plural
from batchbench.workloads import Workload

LITTLE, HOST_SHARE, DRIFT, FOREIGN_CORES = 0.02, 0.03, 0.10, 0.2
"""Limits: error of Little's law, share of time outside the steps, change between the first and the
last trials, and cores that other processes use."""

RESIDUAL, SMALLEST_RESIDUAL_S = 0.01, 0.001
"""Limits of the time budget's residual: a share of the wall time, and the precision to which two
clocks agree."""

LAG = 0.05
"""Limit of the arrival lag as a share of TTFT, and of the error of the arrival rate."""


def wrong_tokens(requests: int) -> str:
    return f"{plural(requests, 'request')} got wrong tokens"


def audit(
    workload: Workload,
    recordings: Mapping[str, Sequence[Recording]],
    verification: Verification,
    warm_up: WarmUp,
    stopped: str | None,
    requested_rate: float | None = None,
    *,
    served: bool = False,
) -> list[str]:
    """Return the reasons to suspect a run; none if it is valid.

    Args:
        served: a server did the work. It may be one of this machine's other processes, and the
            outputs of its trials are compared elsewhere (``reports.served``).
        requested_rate: requests per second that the user requested; None if the workload has its
            own times, such as a trace.
    """
    reasons = [stopped] if stopped else []
    if verification.wrong:
        reasons.append(wrong_tokens(verification.wrong))
    if not warm_up.settled and warm_up.last_change is not None:
        watched = "E2E latency of its requests" if served else "step time"
        reasons.append(
            f"warm-up had not settled: the median {watched} still changed by "
            f"{percent(warm_up.last_change, sign='+')} after {warm_up.rounds} rounds"
        )
    for name, trials in recordings.items():
        found = list(_broken_laws(workload, trials))
        if not found:
            found = list(_doubts(workload, trials))
            if not trials[0].header.simulated:
                found += _doubts_of_times(workload, trials, requested_rate)
                found += [] if served else _doubts_of_machine(workload, trials, verification, name)
        label = label_of(name, has_steps=trials[0].has_steps)
        reasons += [f"{label}: {doubt}" for doubt in found]
    return reasons


def _broken_laws(workload: Workload, trials: Sequence[Recording]) -> Iterator[str]:
    if not all(_complete(r) for r in trials):
        yield "the log is wrong: not every request was served exactly once"
    if not all(_conserved(workload, r) for r in trials):
        yield "the log is wrong: tokens are not conserved"
    if not all(_adds_up(r) for r in trials if r.has_steps):
        yield "the log is wrong: slot-steps do not add up"


def _doubts(workload: Workload, trials: Sequence[Recording]) -> Iterator[str]:
    """Yield reasons to doubt the log of the steps; a strategy that logs none gives none."""
    stepped = [r for r in trials if r.has_steps]
    worst = max((abs(time_budget.littles_law(r)) for r in stepped), default=0.0)
    if worst > LITTLE:
        yield f"Little's law is off by {percent(worst, 1)}"
    for r in stepped:
        computed = r.header.about.get("computed_passes")
        if computed not in (None, r.num_steps):
            yield f"the model computed {computed:,} passes for {r.num_steps:,} steps"
            break
    vary = any(r.header.about.get("steps_vary") for r in stepped)
    counts = [metrics.counters(r) for r in stepped]
    if workload.closed and (vary or any(count != counts[0] for count in counts)):
        yield "counters differ between trials of a closed workload"


def _doubts_of_times(
    workload: Workload, trials: Sequence[Recording], requested_rate: float | None
) -> Iterator[str]:
    stepped = [r for r in trials if r.has_steps]
    share = float(np.median([time_budget.host_share(r) for r in stepped])) if stepped else 0.0
    if share > HOST_SHARE:
        yield f"{percent(share, 1)} of the time passed outside the steps"
    budget = time_budget.typical_budget(trials)
    if budget and abs(budget.residual_s) > max(RESIDUAL * budget.wall_s, SMALLEST_RESIDUAL_S):
        yield f"{percent(budget.residual_s / budget.wall_s, 1)} of the time is not accounted for"
    yield from _late(workload, trials, requested_rate)
    if len(trials) >= 2:
        durations, half = [r.duration_ns for r in trials], len(trials) // 2
        change = float(np.median(durations[-half:]) / np.median(durations[:half]) - 1)
        if abs(change) > DRIFT:
            direction = "slower" if change > 0 else "faster"
            yield f"its trials became {percent(abs(change))} {direction} from first to last"


def _doubts_of_machine(
    workload: Workload, trials: Sequence[Recording], verification: Verification, name: str
) -> Iterator[str]:
    differing = {i for r in trials[1:] for i in requests_that_differ(trials[0], r)}
    differing.update(*(r.header.about.get("differing_requests", ()) for r in trials))
    ties = {
        finding.request
        for finding in verification.findings
        if (finding.strategy, finding.verdict) == (name, "numerical tie")
    }
    own_random = workload.sampling is not None and draws_by_itself(trials[0])
    if not (own_random or differing <= ties):
        yield "outputs differ between trials"
    cores = max(r.header.about.get("foreign_cores") or 0.0 for r in trials)
    if cores > FOREIGN_CORES:
        yield f"other processes kept {cores:.1f} cores busy"


def _late(
    workload: Workload, trials: Sequence[Recording], requested_rate: float | None
) -> Iterator[str]:
    """Yield reasons if arrivals were noticed late, or came at another rate than requested."""
    lags = [lag for r in trials if (lag := time_budget.arrival_lag_ms(r)) is not None]
    if not lags:
        return
    delay = Distribution.of(np.concatenate(lags))
    ttft = Distribution.of(np.concatenate([ttft_ms(r) for r in trials]))
    for where, late, whole in (
        ("on average", delay.mean(), ttft.mean()),
        ("at p99", delay.percentile(99), ttft.percentile(99)),
    ):
        if late and whole and late > LAG * whole:
            share = percent(late / whole)
            yield f"arrivals were noticed {late:.3g} ms late {where}, {share} of TTFT"
    target = requested_rate or time_budget.rate_of(workload.due_ns)
    if workload.max_concurrency is None and target is not None:
        achieved = float(np.median([time_budget.arrival_rate(r) or 0.0 for r in trials]))
        if abs(achieved / target - 1) > LAG:
            yield f"requests arrived at {achieved:.3g}/s instead of {target:.3g}/s"


def _complete(r: Recording) -> bool:
    if r.token_ends_ns is not None:  # each request began when it was due, and then token by token
        begun = r.admitted_ns >= r.requests.due_ns
        gaps = gaps_ms(r)
        forward = not gaps.count or gaps.values[0] >= 0
        return bool(begun.all() and (r.first_token_ns >= r.admitted_ns).all() and forward)
    q = r.requests
    steps = np.stack([0 * q.admitted, q.admitted, q.started, q.first, q.last, q.released - 1])
    return bool((np.diff(steps, axis=0) >= 0).all() and (q.released <= r.num_steps).all())


def _conserved(workload: Workload, r: Recording) -> bool:
    produced, requested = r.requests.output_tokens, workload.output_tokens
    fewest = 1 if workload.stop_at_eos else requested
    return bool(((fewest <= produced) & (produced <= requested)).all())


def _adds_up(r: Recording) -> bool:
    counts = metrics.counters(r)
    parts = (
        *(counts["useful_slot_steps"], counts["prompt_slot_steps"], counts["finished_slot_steps"]),
        *(counts["empty_slot_steps"], counts["stalled_slot_steps"]),
    )
    return min(parts) >= 0 and sum(parts) == counts["slot_steps"]
