"""The self-audit: whether a run can be believed, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from batchbench.batching.recording import Recording
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Verification
from batchbench.reports import metrics
from batchbench.reports import time_budget as timekeeping
from batchbench.reports.latency import gaps_ms, ttft_ms
from batchbench.reports.statistics import Distribution
from batchbench.reports.time_budget import account_of
from batchbench.workloads import Workload

LITTLE, HOST_SHARE, DRIFT, FOREIGN_CORES = 0.02, 0.03, 0.10, 0.2
"""Limits: of Little's law, of time outside the steps, of change between the first and the last
trials, and of other processes' use of the processor in cores."""

RESIDUAL, SMALLEST_RESIDUAL_S = 0.01, 0.001
"""Limit of the time that the account leaves over, as a share of the wall time; what is below the
other is how finely two clocks agree."""

LAG = 0.05
"""Limit of the lag of arrivals as a share of TTFT, and of their rate's distance from the asked."""


def audit(
    workload: Workload,
    recordings: Mapping[str, Sequence[Recording]],
    verification: Verification,
    warm_up: WarmUp,
    stopped: str | None,
    asked_rate: float | None = None,
) -> list[str]:
    """Reasons to suspect the run; none if it is valid.

    Args:
        asked_rate: requests a second that the user requested; None if the workload has its own
            times, such as a trace.
    """
    reasons = [stopped] if stopped else []
    if verification.wrong:
        reasons.append(f"{verification.wrong} requests got wrong tokens")
    if not warm_up.settled and warm_up.last_change is not None:
        reasons.append(
            f"warm-up had not settled: the median step still changed by "
            f"{warm_up.last_change:+.0%} after {warm_up.rounds} rounds"
        )
    for name, trials in recordings.items():
        reasons += [f"{name}: {reason}" for reason in _of_strategy(workload, trials, asked_rate)]
    return reasons


def _of_strategy(
    workload: Workload, trials: Sequence[Recording], asked_rate: float | None
) -> list[str]:
    reasons = []
    for law, holds in (
        ("every request was served once", all(_complete(r) for r in trials)),
        ("tokens are conserved", all(_conserved(workload, r) for r in trials)),
        ("slot-steps add up", all(_adds_up(r) for r in trials if r.has_steps)),
    ):
        if not holds:
            reasons.append(f"the log breaks a law: {law}")
    if reasons:
        return reasons
    shown = [r for r in trials if r.has_steps]  # a strategy may schedule for itself and show none
    if (worst := max((abs(timekeeping.littles_law(r)) for r in shown), default=0.0)) > LITTLE:
        reasons.append(f"Little's law is off by {worst:.1%}")
    for r in shown:
        if (computed := r.header.about.get("computed_passes")) not in (None, r.num_steps):
            reasons.append(f"the model computed {computed:,} passes for {r.num_steps:,} steps")
            break
    if workload.closed and len({tuple(metrics.counters(r).values()) for r in shown}) > 1:
        reasons.append("counters differ between trials of a closed workload")
    if (
        not trials[0].header.simulated
        and len({None if r.tokens is None else r.tokens.tobytes() for r in trials}) > 1
    ):
        reasons.append("outputs differ between trials")
    if trials[0].header.simulated:
        return reasons
    share = float(np.median([timekeeping.host_share(r) for r in shown])) if shown else 0.0
    if share > HOST_SHARE:
        reasons.append(f"{share:.1%} of the time passed outside the steps")
    found = account_of(trials)
    if found and abs(found.residual_s) > max(RESIDUAL * found.wall_s, SMALLEST_RESIDUAL_S):
        reasons.append(f"{found.residual_s / found.wall_s:.1%} of the time is not accounted for")
    reasons += _late(workload, trials, asked_rate)
    durations = [r.duration_ns for r in trials]
    if len(durations) >= 2:
        half = len(durations) // 2
        change = float(np.median(durations[-half:]) / np.median(durations[:half]) - 1)
        if abs(change) > DRIFT:
            slower = "slower" if change > 0 else "faster"
            reasons.append(f"its trials became {abs(change):.0%} {slower} from first to last")
    foreign = [r.header.about.get("foreign_cores") for r in trials]
    busiest = max((f for f in foreign if f is not None), default=0.0)
    if busiest > FOREIGN_CORES:
        reasons.append(f"other processes kept {busiest:.1f} cores busy")
    return reasons


def _late(workload: Workload, trials: Sequence[Recording], asked_rate: float | None) -> list[str]:
    """Yield reasons: arrivals that were noticed late, or came at another rate than requested."""
    lags = [lag for r in trials if (lag := timekeeping.arrival_lag_ms(r)) is not None]
    if not lags:
        return []
    reasons = []
    found = Distribution.of(np.concatenate(lags))
    ttft = Distribution.of(np.concatenate([ttft_ms(r) for r in trials]))
    for what, late, whole in (
        ("on average", found.mean(), ttft.mean()),
        ("at p99", found.percentile(99), ttft.percentile(99)),
    ):
        if late and whole and late > LAG * whole:
            reasons.append(
                f"arrivals were noticed {late:.3g} ms late {what}, {late / whole:.0%} of TTFT"
            )
    asked = asked_rate or timekeeping.rate_of(workload.due_ns)
    if workload.max_concurrency is None and asked is not None:
        achieved = float(np.median([timekeeping.arrival_rate(r) or 0.0 for r in trials]))
        if abs(achieved / asked - 1) > LAG:
            reasons.append(f"requests came at {achieved:.3g}/s where {asked:.3g}/s were asked")
    return reasons


def _complete(r: Recording) -> bool:
    if r.token_ends_ns is not None:  # each request began when it was due, and then token by token
        begun = r.admitted_ns >= r.requests.due_ns
        gaps = gaps_ms(r)
        forward = not gaps.count or gaps.values[0] >= 0
        return bool(begun.all() and (r.first_token_ns >= r.admitted_ns).all() and forward)
    q = r.requests
    ordered = (
        (q.admitted <= q.started)
        & (q.started <= q.first)
        & (q.first <= q.last)
        & (q.last < q.released)
    )
    return bool((q.admitted >= 0).all() and ordered.all() and (q.released <= r.num_steps).all())


def _conserved(workload: Workload, r: Recording) -> bool:
    produced, asked = r.requests.output_tokens, workload.output_tokens
    if workload.stop_at_eos:
        return bool(((produced >= 1) & (produced <= asked)).all())
    return bool((produced == asked).all())


def _adds_up(r: Recording) -> bool:
    c = metrics.counters(r)
    kinds = ("useful", "prompt", "finished", "empty", "stalled")
    parts = [c[f"{kind}_slot_steps"] for kind in kinds]
    return min(parts) >= 0 and sum(parts) == c["slot_steps"]
