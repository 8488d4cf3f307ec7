"""The account of the time: where each second of a trial went, and what a candidate saved.

Definitions and formulas are in docs/metrics.md, "Account of the time". The wall time of a trial is
divided among parts that add up to it; from one strategy to another the differences of the parts
add up to what was saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.statistics import Floats, step_distribution


def host_share(recording: Recording) -> float:
    """Share of the trial in which no step was under way though there was something to do.

    Scheduling, logging, display; not the time in which there was nothing to wait for but time.
    """
    starts, ends = recording.spans.start_ns, recording.span_ends_ns
    before = np.concatenate([[0], ends[:-1]])
    over = recording.waits.end_ns
    waited = waited_by(recording, starts, over) - waited_by(recording, before, over)
    outside = np.maximum(starts - before, 0).sum() - waited.sum()
    return float(outside / max(recording.duration_ns - waited.sum(), 1))


def waited_by(recording: Recording, times: Ints, over_ns: Ints) -> Ints:
    """How long was waited up to each of these times, in ns.

    Args:
        over_ns: when each wait is taken to be over, ``[waits]``.
    """
    w = recording.waits
    if not len(w.step):
        return np.zeros(len(times), np.int64)
    wait = np.searchsorted(w.start_ns, times, side="right") - 1
    spent = np.concatenate([[0], np.cumsum(over_ns - w.start_ns)])
    in_last = np.minimum(times, over_ns[wait]) - w.start_ns[wait]
    waited: Ints = np.where(wait >= 0, spent[wait] + np.maximum(in_last, 0), 0)
    return waited


def noticed_ns(recording: Recording) -> Ints:
    """When the scheduler knew of each request, ``[requests]``.

    It decides before each run of steps and each wait, and the log tells of each how many requests
    were in a slot or waiting; they come in the order of their index.
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
    order = np.lexsort(
        (
            np.concatenate([np.ones(len(s.steps)), np.zeros(len(w.step))]),
            np.concatenate([recording.first_steps, w.step]),
        )
    )
    count = np.arange(len(admitted))
    decision = np.searchsorted(np.maximum.accumulate(known[order]), count, side="right")
    return times[order][np.minimum(decision, len(order) - 1)]


def arrival_lag_ms(recording: Recording) -> Floats | None:
    """How late each request was noticed, ``[requests]``.

    None where all are there at the start, or no steps are shown.

    From when it was due, or from the end of the step then under way, to the decision that first
    knew of it. So it counts what the loop did beside stepping and waiting, and waits that
    overslept; that nobody joins a step that has begun is batching and no lag.
    """
    due = recording.requests.due_ns
    if not due.any() or not recording.has_steps:
        return None
    late: Floats = np.maximum(noticed_ns(recording) - recording.free_from(due), 0) / 1e6
    return late


def arrival_rate(recording: Recording) -> float | None:
    """Requests a second as they came: as they were due, and noticed as late as they were.

    None for fewer than two requests, or where all are there at the start.
    """
    lag = arrival_lag_ms(recording)
    if lag is None:
        return None
    return rate_of(recording.requests.due_ns + lag * 1e6)


def rate_of(times_ns: Ints | Floats) -> float | None:
    """Events a second from the first to the last; None where no time lies between."""
    if len(times_ns) < 2 or times_ns.max() == times_ns.min():
        return None
    return float((len(times_ns) - 1) / (times_ns.max() - times_ns.min()) * 1e9)


def littles_law(recording: Recording) -> float:
    """L / (λW) − 1: requests in the system as the steps saw them, against what latencies imply.

    The one comes from the numbers waiting and running in each step, the other from each request's
    arrival and end; a log in which they differ is wrong.
    """
    s, r = recording.spans, recording.requests
    starts, ends, first_steps = s.start_ns, recording.span_ends_ns, recording.first_steps
    done = np.searchsorted(np.sort(r.last), first_steps)
    running = np.searchsorted(np.sort(r.admitted), first_steps, side="right") - done
    seen = ((s.waiting + running) * (ends - starts).astype(np.float64)).sum()
    # Whoever came while a step was under way was seen at its end.
    free = recording.free_from(r.due_ns)
    seen += (free - r.due_ns).astype(np.float64).sum()
    # Between two runs are those that were due when the first ended, less who was done, and whoever
    # came then.
    before = np.concatenate([[0], ends[:-1]])
    due = np.sort(r.due_ns)
    there = np.searchsorted(due, before, side="right") - done
    seen += (there * (starts - before).astype(np.float64)).sum()
    span = np.searchsorted(starts, r.due_ns)  # the first that begins at or after it
    came = (span < len(starts)) & (free == r.due_ns)
    came[came] &= r.due_ns[came] > before[span[came]]
    seen += (starts[span[came]] - r.due_ns[came]).astype(np.float64).sum()
    spent = (recording.ends_of(r.last) - r.due_ns).astype(np.float64).sum()
    return float(seen / spent - 1)


@dataclass(frozen=True)
class Account:
    """Parts of a trial's wall time, in seconds; they add up to it."""

    useful_decode_s: float  # decoding slots that get a token which was asked for
    finished_s: float  # slots held by requests that are done
    empty_s: float  # slots without a request
    prefill_useful_s: float  # prompts being read
    prefill_padding_s: float  # what an engine computes to make prompts equally long
    stalled_s: float  # running requests that sit out the prefill of others
    waiting_s: float  # nothing to compute: for arrivals, or for a batch to fill
    host_s: float  # no step under way though there was something to do
    residual_s: float  # what neither the steps nor the gaps between them cover

    @property
    def wall_s(self) -> float:
        """All of them."""
        return math.fsum(asdict(self).values())


PARTS = tuple(f.name for f in fields(Account))

NAMES = {
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
"""What people read of each part."""

SAVED_BY = {
    "useful_decode_s": "by cheaper steps for the same tokens",
    "finished_s": "by freeing slots when requests finish",
    "empty_s": "by filling empty slots",
    "prefill_useful_s": "by cheaper prefill",
    "prefill_padding_s": "by less prefill padding",
    "stalled_s": "by fewer stalls during prefill",
    "waiting_s": "by less waiting for requests",
    "host_s": "by less host work",
    "residual_s": "in unaccounted time",
}
"""Words after "1.2 s saved" for each part."""

LOST_TO = {
    "useful_decode_s": "to dearer steps for the same tokens",
    "finished_s": "to slots held by finished requests",
    "empty_s": "to empty slots",
    "prefill_useful_s": "to dearer prefill",
    "prefill_padding_s": "to prefill padding",
    "stalled_s": "to stalls during prefill",
    "waiting_s": "to waiting for requests",
    "host_s": "to host work",
    "residual_s": "to unaccounted time",
}
"""Words after "1.2 s lost" for each part."""


def account_of(trials: Sequence[Recording]) -> Account | None:
    """Of the trial of median duration; of an even number the mean of the middle two.

    Means are linear, so the parts add up, and to the median duration. None where the strategy
    shows no steps.
    """
    if not all(trial.has_steps for trial in trials):
        return None
    ranked = sorted(trials, key=lambda trial: trial.duration_ns)
    middle = [account(trial) for trial in ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1]]
    return Account(*(float(np.mean([getattr(a, part) for a in middle])) for part in PARTS))


def account(recording: Recording) -> Account:
    """Return the account of one trial that has steps."""
    spent = recording.span_ends_ns - recording.spans.start_ns
    reads = recording.spans.chunks > 0  # these spans have one step each
    slots, few = _Slots.of(recording), recording.header.slots
    # Whole nanoseconds × slots, so that it does not matter where the log splits equal steps.
    useful, finished, empty, idle_rows = (
        _product(spent[~reads], kind[~reads]) / few
        for kind in (slots.useful, slots.finished, slots.empty, slots.stalled)
    )
    decode = _decode_phase(recording, spent[reads], reads)
    prompt, share, reading = spent[reads] - decode, decode / few, slots.where(reads)
    wanting = reading.prompts + reading.sitting_out  # above 0 if prompts are read
    prefill = share * reading.prompts + prompt * reading.prompts / wanting
    stalled = share * reading.stalled + prompt * reading.sitting_out / wanting
    padding = prefill * _padding(recording)
    waiting, host, overlap = _between(recording)
    residual = wall_ns(recording) - int(recording.span_ends_ns[-1]) + overlap
    parts = (
        useful + share @ reading.useful,
        finished + share @ reading.finished,
        empty + share @ reading.empty,
        prefill.sum() - padding.sum(),
        padding.sum(),
        idle_rows + stalled.sum(),
        waiting,
        host,
        residual,
    )
    return Account(*(float(ns) / 1e9 for ns in parts))


def _product(ns: Ints, slots: Ints) -> int | float:
    """Return the sum of nanoseconds × slots, exactly if it fits 64 bits."""
    fits = float(ns.sum()) * float(slots.max(initial=0)) < 2**62
    return int(ns @ slots) if fits else math.fsum(ns * slots.astype(np.float64))


def wall_ns(recording: Recording) -> int:
    """Start of the trial to when the loop knew that all was done, on the host's own clock."""
    return int(recording.header.about.get("wall_ns", recording.duration_ns))


@dataclass(frozen=True, eq=False)
class _Slots:
    """What the slots do in each span, ``[spans]`` each; all but ``sitting_out`` add up to them."""

    useful: Ints
    finished: Ints
    empty: Ints
    prompts: Ints  # have a piece of their prompt computed
    stalled: Ints  # hold a request that is not done, and nothing is computed for it

    @property
    def sitting_out(self) -> Ints:
        """Requests that are not done and whose prompt is not computed now."""
        return self.useful + self.stalled

    def where(self, chosen: NDArray[np.bool_]) -> _Slots:
        """Return the chosen spans."""
        return _Slots(*(getattr(self, f.name)[chosen] for f in fields(self)))

    @classmethod
    def of(cls, recording: Recording) -> _Slots:
        """Counted at the first step of each span: within one nobody comes, ends or leaves."""
        r, s, step = recording.requests, recording.spans, recording.first_steps
        released = np.searchsorted(np.sort(r.released), step, side="right")
        held = np.searchsorted(np.sort(r.admitted), step, side="right") - released
        finished = np.searchsorted(np.sort(r.last), step) - released
        useful = np.where(s.decoding > 0, s.decoding - finished, 0)
        empty = recording.header.slots - held
        return cls(useful, finished, empty, s.chunks, held - finished - useful - s.chunks)


def _decode_phase(recording: Recording, spent: Ints, reads: NDArray[np.bool_]) -> Floats:
    """Return the time that goes to decoding in each pass that reads prompts.

    It is 0 if nobody decodes. In a mixed pass it is the median time of the trial's steps without
    prompts and with as many rows, interpolated between numbers of rows; the rest of the pass goes
    to the prompts. If the trial has no step without prompts, all of the pass is decoding.

    Args:
        spent: time of each of these passes, in ns.
        reads: True for these spans, ``[spans]``.
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


def _padding(recording: Recording) -> Floats:
    """Return the share of padding in each prefill, a row for each span that reads prompts.

    An engine that pads computes newcomers × longest prompt; the slots engine computes no more
    tokens than there are.
    """
    chunks, c = recording.spans.chunks[recording.spans.chunks > 0], recording.chunks
    if not recording.header.about.get("pads_prompts", False) or not len(chunks):
        return np.zeros(len(chunks))
    begins, size = np.cumsum(chunks) - chunks, c.stop - c.start
    rectangle = chunks * np.maximum.reduceat(size, begins)
    share: Floats = 1 - np.add.reduceat(size, begins) / rectangle
    return share


def _between(recording: Recording) -> tuple[int, int, int]:
    """Time between the steps in ns: waited, spent by the host, and (negative) counted twice."""
    starts, ends = recording.spans.start_ns, recording.span_ends_ns
    before = np.concatenate([[0], ends[:-1]])
    starts_or_later = np.maximum(starts, before)
    w = recording.waits
    # A wait lasts until what it waited for; what it oversleeps is the host's.
    over = np.maximum(np.minimum(w.end_ns, w.until_ns), w.start_ns)
    by_start = waited_by(recording, starts_or_later, over)
    waited = int((by_start - waited_by(recording, before, over)).sum())
    gaps = int((starts_or_later - before).sum())
    return waited, gaps - waited, int(np.minimum(starts - before, 0).sum())


def explain(
    recordings: Mapping[str, Sequence[Recording]], warm_up_s: float | None
) -> dict[str, Any]:
    """``explain`` of the result: each strategy's account, and the waterfalls from the first.

    Args:
        recordings: the trials of each strategy; the first is the baseline.
        warm_up_s: what the warm-up before all trials took; None where there was none.
    """
    accounts = {name: account_of(trials) for name, trials in recordings.items()}
    baseline, *candidates = accounts
    return {
        "strategies": {
            name: None
            if found is None
            else {"wall_s": found.wall_s, "parts": asdict(found), "warm_up_s": warm_up_s}
            for name, found in accounts.items()
        },
        "waterfall": [
            {"baseline": baseline, "candidate": name, **waterfall(before, after)}
            for name in candidates
            if (before := accounts[baseline]) is not None and (after := accounts[name]) is not None
        ],
    }


def waterfall(baseline: Account, candidate: Account) -> dict[str, Any]:
    """Seconds that each part gave to the difference, in the order of the parts.

    Positive is saved, negative lost; they add up to the difference of the wall times.
    """
    steps = [
        {"part": part, "saved_s": getattr(baseline, part) - getattr(candidate, part)}
        for part in PARTS
    ]
    return {"saved_s": baseline.wall_s - candidate.wall_s, "steps": steps}
