"""Where the time of a trial went, and whether arrivals were noticed when they were due."""

from __future__ import annotations

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.statistics import Floats


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
