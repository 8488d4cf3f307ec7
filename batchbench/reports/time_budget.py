"""The time budget: the parts of a trial's wall time, and the time that a candidate saved in each.

docs/metrics.md, "Time budget", has definitions and formulas. The parts of a trial add up to its
wall time; the differences between two strategies add up to the time saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.occupancy import SlotKinds, prompt_tokens_of_spans
from batchbench.reports.result_data import Explain, SavedPart, TimeBudgetData, Waterfall
from batchbench.reports.statistics import Floats, step_distribution

# Time outside the steps


def host_share(recording: Recording) -> float:
    """Return the share of a trial in which no step ran though there was something to compute.

    Scheduling, logging and display count; waiting for a time, such as an arrival, does not.
    """
    waited, host, _ = between_steps(recording, recording.waits.end_ns)
    return host / max(recording.duration_ns - waited, 1)


def _previous_ends(recording: Recording) -> Ints:
    return np.concatenate([[0], recording.span_ends_ns[:-1]])


def waited_by(recording: Recording, times: Ints, over_ns: Ints) -> Ints:
    """Return the total time waited up to each time, in ns, if each wait ends at ``over_ns``."""
    w = recording.waits
    # Before the first wait there is one of no length.
    starts, ends = np.append(-1, w.start_ns), np.append(-1, over_ns)
    wait = np.searchsorted(w.start_ns, times, side="right")
    spent = np.concatenate([[0], np.cumsum(ends - starts)])
    in_last: Ints = np.maximum(np.minimum(times, ends[wait]) - starts[wait], 0)
    return spent[wait] + in_last


# Arrivals


def noticed_ns(recording: Recording) -> Ints:
    """Return the time at which the scheduler knew of each request, ``[requests]``.

    The scheduler decides before each span and each wait. The log has the number of requests that
    were in a slot or waiting at each decision, and requests arrive in the order of their index.
    """
    s, w = recording.spans, recording.waits
    admitted = np.sort(recording.requests.admitted)
    known = np.concatenate(
        [
            s.waiting + np.searchsorted(admitted, recording.first_steps, side="right"),
            w.waiting + np.searchsorted(admitted, w.step),
        ]
    )
    times = np.concatenate([s.start_ns, w.start_ns])
    # A wait comes before the step of its number.
    is_span = np.concatenate([np.ones(len(s.steps)), np.zeros(len(w.step))])
    order = np.lexsort((is_span, np.concatenate([recording.first_steps, w.step])))
    count = np.arange(len(admitted))
    decision = np.searchsorted(np.maximum.accumulate(known[order]), count, side="right")
    return times[order][np.minimum(decision, len(order) - 1)]


def arrival_lag_ms(recording: Recording) -> Floats | None:
    """Return the delay with which each request was noticed, ``[requests]``.

    The delay begins when the request is due, or at the end of the step then under way, and ends
    with the first decision that knows of it. None if all requests are there at the start, or the
    strategy reports no steps.
    """
    due = recording.requests.due_ns
    if not due.any() or not recording.has_steps:
        return None
    late: Floats = np.maximum(noticed_ns(recording) - recording.free_from(due), 0) / 1e6
    return late


def arrival_rate(recording: Recording) -> float | None:
    """Return the requests per second as they were noticed; None as :func:`arrival_lag_ms`."""
    lag = arrival_lag_ms(recording)
    return None if lag is None else rate_of(recording.requests.due_ns + lag * 1e6)


def rate_of(times_ns: Ints | Floats) -> float | None:
    """Return events per second from the first to the last; None if no time lies between."""
    if len(times_ns) < 2 or times_ns.max() == times_ns.min():
        return None
    return float((len(times_ns) - 1) / (times_ns.max() - times_ns.min()) * 1e9)


def littles_law(recording: Recording) -> float:
    """Return L / (λW) − 1, which is not 0 if the log is wrong.

    L comes from the numbers waiting and running in each step, λW from the requests' latencies.
    """
    s, r = recording.spans, recording.requests
    starts, ends, before = s.start_ns, recording.span_ends_ns, _previous_ends(recording)
    there = s.waiting + SlotKinds.of(recording).running
    seen = (there * (ends - starts).astype(np.float64)).sum()
    # A request that arrives during a step is seen at its end.
    free = recording.free_from(r.due_ns)
    seen += (free - r.due_ns).astype(np.float64).sum()
    # Between two spans there are the requests due before the first ended and not done by then,
    # and those that arrive in between.
    done = np.searchsorted(np.sort(r.last), recording.first_steps)
    there = np.searchsorted(np.sort(r.due_ns), before, side="right") - done
    seen += (there * (starts - before).astype(np.float64)).sum()
    span = np.searchsorted(starts, r.due_ns)  # the first that begins at or after the arrival
    came = (span < len(starts)) & (free == r.due_ns)
    came[came] &= r.due_ns[came] > before[span[came]]
    seen += (starts[span[came]] - r.due_ns[came]).astype(np.float64).sum()
    spent = (recording.ends_of(r.last) - r.due_ns).astype(np.float64).sum()
    return float(seen / spent - 1)


# The parts


@dataclass(frozen=True)
class TimeBudget:
    """Parts of a trial's wall time, in seconds; they add up to it."""

    useful_decode_s: float  # decoding slots that get a token that was asked for
    finished_s: float  # slots held by requests that are done
    empty_s: float  # slots without a request
    prefill_useful_s: float  # computing prompts
    prefill_padding_s: float  # computing padding that makes prompts equally long
    stalled_s: float  # running requests that wait for the prefill of others
    waiting_s: float  # nothing to compute: waiting for arrivals, or for a batch to fill
    host_s: float  # no step under way though there was something to compute
    residual_s: float  # neither in a step nor in a gap between steps

    @property
    def wall_s(self) -> float:
        return math.fsum(asdict(self).values())


PARTS = tuple(field.name for field in fields(TimeBudget))

NAMES = {  # labels of the parts
    "useful_decode_s": "useful decode",
    "finished_s": "finished, slot held",
    "empty_s": "empty slots",
    "prefill_useful_s": "prefill",
    "prefill_padding_s": "prefill padding",
    "stalled_s": "stalled by a prefill",
    "waiting_s": "waiting for requests",
    "host_s": "host work",
    "residual_s": "residual",
}

_CAUSES = {  # words after "1.2 s saved", and after "1.2 s lost", for each part
    "useful_decode_s": ("by faster decode steps", "to slower decode steps"),
    "finished_s": ("by freeing slots when requests finish", "to slots held by finished requests"),
    "empty_s": ("by filling empty slots", "to empty slots"),
    "prefill_useful_s": ("by faster prefill", "to slower prefill"),
    "prefill_padding_s": ("by less prefill padding", "to prefill padding"),
    "stalled_s": ("by fewer stalls during prefill", "to stalls during prefill"),
    "waiting_s": ("by less waiting for requests", "to waiting for requests"),
    "host_s": ("by less host work", "to host work"),
    "residual_s": ("in unaccounted time", "to unaccounted time"),
}
SAVED_BY, LOST_TO = ({part: words[i] for part, words in _CAUSES.items()} for i in (0, 1))


def typical_budget(trials: Sequence[Recording]) -> TimeBudget | None:
    """Return the budget of the trial of median duration, or the mean of the middle two.

    Means are linear, so the parts still add up. None if the strategy reports no steps.
    """
    if not all(trial.has_steps for trial in trials):
        return None
    ranked = sorted(trials, key=lambda trial: trial.duration_ns)
    middle = ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1]
    budgets = [time_budget(trial) for trial in middle]
    return TimeBudget(*(float(np.mean([getattr(b, part) for b in budgets])) for part in PARTS))


def time_budget(recording: Recording) -> TimeBudget:
    """Return the budget of one trial that has steps."""
    spent = recording.span_ends_ns - recording.spans.start_ns
    reads = recording.spans.chunks > 0  # these spans have one step each
    kinds, slots = SlotKinds.of(recording), recording.header.slots
    # Whole nanoseconds × slots, so that it does not matter where the log splits equal steps.
    useful, finished, empty, idle_rows = (
        _product(spent[~reads], kind[~reads]) / slots
        for kind in (kinds.useful, kinds.finished, kinds.empty, kinds.stalled)
    )
    decode = _decode_phase(recording, spent[reads], reads)
    prompt, share = spent[reads] - decode, decode / slots
    reading = SlotKinds(*(kind[reads] for kind in kinds))
    # Requests that are not done and whose prompt is not computed in this pass.
    kept_waiting = reading.useful + reading.stalled
    concerned = reading.prompts + kept_waiting  # above 0, since prompts are read
    prefill = share * reading.prompts + prompt * reading.prompts / concerned
    stalled = share * reading.stalled + prompt * kept_waiting / concerned
    padding = 0 * prefill
    if recording.header.about.get("pads_prompts", False):
        prompts, padded = prompt_tokens_of_spans(recording)
        padding = prefill * (1 - prompts[reads] / padded[reads])
    # A wait lasts until its target time; what it oversleeps is the host's.
    w = recording.waits
    over = np.maximum(np.minimum(w.end_ns, w.until_ns), w.start_ns)
    waiting, host, overlap = between_steps(recording, over)
    parts = (
        useful + share @ reading.useful,
        finished + share @ reading.finished,
        empty + share @ reading.empty,
        prefill.sum() - padding.sum(),
        padding.sum(),
        idle_rows + stalled.sum(),
        waiting,
        host,
        wall_ns(recording) - int(recording.span_ends_ns[-1]) + overlap,
    )
    return TimeBudget(*(float(ns) / 1e9 for ns in parts))


def _product(ns: Ints, slots: Ints) -> int | float:
    """Return the sum of nanoseconds × slots, exactly if it fits 64 bits."""
    fits = float(ns.sum()) * float(slots.max(initial=0)) < 2**62
    return int(ns @ slots) if fits else math.fsum(ns * slots.astype(np.float64))


def wall_ns(recording: Recording) -> int:
    """Return the time from the start to when the loop knew that all was done, on the host."""
    return int(recording.header.about.get("wall_ns", recording.duration_ns))


def _decode_phase(recording: Recording, spent: Ints, reads: NDArray[np.bool_]) -> Floats:
    """Return the time that goes to decoding in each pass that reads prompts, in ns.

    In a mixed pass it is the median time of the trial's steps without prompts and with as many
    rows, interpolated between numbers of rows. If there is no such step, it is the whole pass.
    """
    rows, alone = recording.spans.decoding, np.flatnonzero(~reads)
    mixed = rows[reads] > 0
    phase = np.where(mixed, spent, 0.0)
    if not mixed.any() or not len(alone):
        return phase
    counts = np.unique(rows[alone])
    steps = [step_distribution(recording, alone[rows[alone] == count]) for count in counts]
    medians = [float(of_count.percentile(50) or 0) for of_count in steps]
    usual = np.interp(rows[reads][mixed], counts, medians)
    phase[mixed] = np.minimum(phase[mixed], usual)
    return phase


def between_steps(recording: Recording, over_ns: Ints) -> tuple[int, int, int]:
    """Return the time between steps in ns: waited, used by the host, and (negative) overlap."""
    starts, before = recording.spans.start_ns, _previous_ends(recording)
    later = np.maximum(starts, before)
    waits = waited_by(recording, later, over_ns) - waited_by(recording, before, over_ns)
    waited, gaps = int(waits.sum()), int((later - before).sum())
    return waited, gaps - waited, int(np.minimum(starts - before, 0).sum())


def explain(recordings: Mapping[str, Sequence[Recording]], warm_up_s: float | None) -> Explain:
    """Return ``explain`` of the result: each strategy's budget, and the waterfalls."""
    budgets = {name: typical_budget(trials) for name, trials in recordings.items()}
    strategies: dict[str, TimeBudgetData | None] = {
        name: None
        if budget is None
        else {"wall_s": budget.wall_s, "parts": asdict(budget), "warm_up_s": warm_up_s}
        for name, budget in budgets.items()
    }
    (baseline, before), *candidates = budgets.items()
    falls: list[Waterfall] = []
    for name, after in candidates:
        if before is not None and after is not None:
            saved, steps = waterfall(before, after)
            falls.append(
                {"baseline": baseline, "candidate": name, "saved_s": saved, "steps": steps}
            )
    return {"strategies": strategies, "waterfall": falls}


def waterfall(baseline: TimeBudget, candidate: TimeBudget) -> tuple[float, list[SavedPart]]:
    """Return the seconds saved in all and by each part; a negative part was lost."""
    saved = {part: getattr(baseline, part) - getattr(candidate, part) for part in PARTS}
    steps: list[SavedPart] = [{"part": part, "saved_s": seconds} for part, seconds in saved.items()]
    return baseline.wall_s - candidate.wall_s, steps
