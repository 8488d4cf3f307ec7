"""The third test: how many of the requests that are sent at once run at the same time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchbench.studies.probe.observations import Pace, Role, Round, Stream, median_gap

FEWEST_TOKENS = 3  # a request that ends earlier is over before it can be counted beside the others
Span = tuple[float, float]
"""The beginning and the end of a request."""


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once.

    Attributes:
        most: the largest number in progress at the same time.
        exact: others were waiting meanwhile, and began when room was made.
        midway: requests that began while others were in the middle of theirs.
        groups: sizes of the groups that ran one after another.
        gain: tokens per second as a multiple of those of one request alone.
        gradual: requests began one after another, so that the first ended before the last began.
        sequential: each certainly began after the one before it had ended.
    """

    sent: int
    refused: int
    most: int
    exact: bool
    midway: int
    groups: tuple[int, ...]
    gain: float
    gradual: bool
    sequential: bool


def burst_of(round: Round, pace: Pace) -> Burst:
    """Count the slots in a burst."""
    sent = round.of(Role.BURST)
    streams = sorted((s for s in sent if s.times_ns), key=lambda s: s.last_ns)
    tokens = sum(len(s.times_ns) for s in streams)
    gain = tokens * pace.gap_ns / max(round.duration_ns, 1)
    gap = median_gap(streams) or pace.gap_ns
    # The first are spans in which a request certainly ran, the others those in which it may have.
    spans = sorted((pace.begin_ns(s, 0.5), s.last_ns) for s in streams)
    most, groups = _most_at_once(spans, 0.3 * gap), _groups(spans, 0.3 * gap)
    midway = 0 if pace.buffered else _midway(streams)
    equal = len({len(s.times_ns) for s in streams}) == 1 or not pace.buffered
    exact, gradual = _is_full(groups) and equal, False
    overlap = _most_at_once([(pace.begin_ns(s, 0.85), s.last_ns) for s in streams], 0.0)
    if midway:
        exact, gradual = _saturated(streams, spans, most, gap, pace)
    whole = all(s.answered and len(s.times_ns) >= FEWEST_TOKENS for s in sent)
    refused = sum(s.refused for s in sent)
    return Burst(
        *(len(sent), refused, most, exact and whole, midway, groups, gain, gradual),
        sequential=max(most, overlap) == 1 and whole and equal,
    )


def _most_at_once(spans: Sequence[Span], shorter_ns: float) -> int:
    """Return the largest number in progress; each counts as a little shorter than it was.

    A request that follows another one begins at least one step after its end, so an end that
    arrives late does not count twice.
    """
    events = [(begin, 1) for begin, _ in spans]
    events += [(max(end - shorter_ns, begin), -1) for begin, end in spans]
    level = most = 0
    for _, change in sorted(events, key=lambda event: (event[0], -event[1])):
        level += change
        most = max(most, level)
    return most


def _groups(spans: Sequence[Span], shorter_ns: float) -> tuple[int, ...]:
    """Return the sizes of the groups between which nothing was in progress."""
    sizes: list[int] = []
    latest = -np.inf
    for begin, end in spans:
        if begin > latest - shorter_ns:
            sizes.append(0)
        sizes[-1] += 1
        latest = max(latest, end)
    return tuple(sizes)


def _midway(streams: Sequence[Stream]) -> int:
    """Return how many began when another one had several tokens and was not at its end."""
    return sum(
        any(
            2 <= np.searchsorted(other.arrivals_ns, one.first_ns) < len(other.arrivals_ns) - 1
            for other in streams
            if other is not one
        )
        for one in streams
    )


def _is_full(groups: Sequence[int]) -> bool:
    """Tell whether the largest group was full.

    The first group has only those requests that had arrived, and the last one the rest.
    """
    return max(groups, default=0) in groups[1:-1]


def _arrived(streams: Sequence[Stream], begin: float, end: float, gap: float) -> bool:
    """Tell whether a token arrived clearly between two times."""
    low, high = begin + 0.3 * gap, end - 0.3 * gap
    return any(((s.arrivals_ns > low) & (s.arrivals_ns < high)).any() for s in streams)


def _saturated(
    streams: Sequence[Stream], spans: Sequence[Span], most: int, gap: float, pace: Pace
) -> tuple[bool, bool]:
    """Tell whether the slots were full, and whether requests began only gradually.

    The slots were full if the first requests began together, then none for a while, and each later
    one right after one had ended.
    """
    ends = sorted(end for _, end in spans)
    starts = [begin for begin, _ in spans]
    first = [start for start in starts if start < ends[0] + 0.3 * gap]
    late = starts[len(first) :]
    if not late:
        return False, False
    quiet = late[0] - first[-1]
    # Two passes between which nothing arrived were one beginning.
    apart = [b - a for a, b in pairwise(first) if _arrived(streams, a, b, gap)]
    least = max(4 * gap, 3 * max(apart, default=0))
    gradual = bool(quiet < least)
    waits = [start - end for start, end in zip(late, ends, strict=False)]
    tight = [wait <= 2 * pace.ttft_ns + 4 * gap for wait in waits]
    alone = min(waits) > -0.3 * gap  # room that others left would show before an end
    full = len(first) == most and not gradual and alone and sum(tight) >= 0.8 * len(tight)
    return full, gradual
