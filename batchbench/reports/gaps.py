"""Gaps between successive tokens, each the true one, and which step made the longest so long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.distribution import Distribution

MOST_STALLS = 5
STALL = 1.5
"""A gap this many times the median one is a stall."""


@dataclass(frozen=True, eq=False)
class Gaps:
    """All gaps of one trial, ``[kinds of gaps]`` each: equal ones that lie in one span share a row.

    A gap reaches from the end of one step to that of another, in both of which a request got a
    token and in none between.
    """

    ns: Ints
    count: Ints  # requests × times
    requests: Ints  # that share it
    from_step: Ints
    to_step: Ints  # of one of them, where there are several

    @classmethod
    def of(cls, recording: Recording) -> Gaps:
        """Every gap of every request.

        All requests that run get a token at every step that decodes, so a gap from one such step
        to the next belongs to all of them; only the one after a first token may begin elsewhere.
        """
        own = _first_gaps(recording)
        return cls(*map(np.concatenate, zip(own, *_shared_gaps(recording), strict=True)))

    @property
    def distribution(self) -> Distribution:
        """ITL in milliseconds, none averaged away."""
        return Distribution.of(self.ns / 1e6, self.count)


def gaps_ms(recording: Recording) -> Distribution:
    """ITL in milliseconds, also where no steps are shown but when each token was there."""
    if recording.token_ends_ns is None:
        return Gaps.of(recording).distribution
    within = np.ones(len(recording.token_ends_ns), bool)
    within[recording.token_offsets[:-1]] = False  # a first token ends no gap
    later = np.flatnonzero(within)
    gaps = recording.token_ends_ns[later] - recording.token_ends_ns[later - 1]
    return Distribution.of(gaps / 1e6)


Columns = tuple[Ints, Ints, Ints, Ints, Ints]


@dataclass(frozen=True, eq=False)
class _Decodes:
    """Numbering of the steps that decode, without a list of them."""

    first: Ints  # step, of each span that decodes
    steps: Ints
    upto: Ints  # steps that decode, up to the span and with it

    @classmethod
    def of(cls, recording: Recording) -> _Decodes:
        decoding = recording.spans.decoding > 0
        steps = recording.spans.steps[decoding]
        return cls(recording.first_steps[decoding], steps, np.cumsum(steps))

    def numbered(self, step: Ints) -> Ints:
        """How many steps decode up to these and with them."""
        span = np.searchsorted(self.first, step, side="right") - 1
        within = np.minimum(step - self.first[span] + 1, self.steps[span])
        numbers = (self.upto - self.steps)[span] + within
        return np.where(span >= 0, numbers, 0)

    def step(self, number: Ints) -> Ints:
        """Which step is the one of this number, counted from 0."""
        span = np.searchsorted(self.upto, number, side="right")
        return self.first[span] + number - (self.upto - self.steps)[span]


def _first_gaps(recording: Recording) -> Columns:
    """From each request's first token to its second."""
    r = recording.requests
    several = r.last > r.first
    first, shared = np.unique(r.first[several], return_counts=True)
    decodes = _Decodes.of(recording)
    second = decodes.step(decodes.numbered(first))
    gaps = recording.ends_of(second) - recording.ends_of(first)
    return gaps, shared, shared, first, second


def _shared_gaps(recording: Recording) -> list[Columns]:
    """From a step that decodes to the next: for all that got a token in both."""
    r = recording.requests
    decodes = _Decodes.of(recording)
    if not len(decodes.first):
        return []
    several = r.last > r.first
    # A request shares gaps from its second token on: from that step's number to its last's.
    begins = np.sort(decodes.numbered(r.first[several]) + 1)
    ceases = np.sort(decodes.numbered(r.last[several]))

    def sharing(number: Ints) -> Ints:
        """Requests that share the gap which ends with the step of this number, from 0."""
        begun = np.searchsorted(begins, number, side="right")
        return begun - np.searchsorted(ceases, number, side="right")

    # Between spans that decode …
    number = decodes.upto[:-1]
    before, after = (decodes.first + decodes.steps - 1)[:-1], decodes.first[1:]
    shared = sharing(number)
    gaps = recording.ends_of(after) - recording.ends_of(before)
    between = (gaps, shared, shared, before, after)
    # … and within them, where the same requests share all.
    inner = np.flatnonzero(decodes.steps > 1)
    first, steps = decodes.first[inner], decodes.steps[inner]
    shared = sharing((decodes.upto - decodes.steps)[inner] + 1)
    if recording.ends_ns is None:  # they are equal
        gaps = recording.ends_of(first + 1) - recording.ends_of(first)
        return [between, (gaps, shared * (steps - 1), shared, first, first + 1)]
    after = np.repeat(first - np.cumsum(steps - 1) + steps, steps - 1) + np.arange(
        int((steps - 1).sum())
    )
    shared = np.repeat(shared, steps - 1)
    gaps = recording.ends_ns[after] - recording.ends_ns[after - 1]
    return [between, (gaps, shared, shared, after - 1, after)]


def stalls(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    """The longest gaps that are 1.5 times the median one or more, longest first.

    Each names the step that took the most of it, and what that step did; a strategy that shows no
    steps has none to name.
    """
    found = []
    for trial, recording in enumerate(recordings):
        if not recording.has_steps:
            continue
        gaps = Gaps.of(recording)
        median = gaps.distribution.percentile(50)
        if median is None:
            continue
        long = np.flatnonzero((gaps.count > 0) & (gaps.ns >= STALL * median * 1e6))
        longest = long[np.argsort(-gaps.ns[long], kind="stable")[:MOST_STALLS]]
        found += [_stall(trial, recording, gaps, int(i)) for i in longest]
    return sorted(found, key=lambda stall: -stall["gap_ms"])[:MOST_STALLS]


def _stall(trial: int, recording: Recording, gaps: Gaps, i: int) -> dict[str, Any]:
    steps = np.arange(gaps.from_step[i] + 1, gaps.to_step[i] + 1)
    spent = recording.ends_of(steps) - recording.starts_of(steps)
    outside = int(gaps.ns[i] - spent.sum())
    longest = int(spent.argmax())
    step: int | None = int(steps[longest])
    cause = what_happened(recording, int(steps[longest]))
    if outside > spent[longest]:
        step, cause = None, "time outside the steps"
    return {
        "trial": trial,
        "gap_ms": gaps.ns[i] / 1e6,
        "requests": int(gaps.requests[i]),
        "start_ms": int(recording.ends_of(gaps.from_step[i : i + 1])[0]) / 1e6,
        "step": step,
        "cause": cause,
    }


def what_happened(recording: Recording, step: int) -> str:
    """What a step computed: ``prefill of 3 requests, 512 tokens``."""
    span = int(recording.spans_of(np.array([step]))[0])
    spans, log = recording.spans, recording.chunks
    decoding, chunks = int(spans.decoding[span]), int(spans.chunks[span])
    parts = []
    if chunks:
        begin = int(spans.chunks[:span].sum())
        tokens = int((log.stop - log.start)[begin : begin + chunks].sum())
        parts.append(
            f"prefill of {chunks:,} request{'s' * (chunks > 1)}, "
            f"{tokens:,} token{'s' * (tokens > 1)}"
        )
    if decoding:
        parts.append(f"decode of {decoding:,} slot{'s' * (decoding > 1)}")
    return " + ".join(parts)
