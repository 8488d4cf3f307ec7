"""Latencies of requests: functions of one Recording, an entry a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.statistics import Distribution, Floats, step_distribution

MOST_STALLS = 5

STALL = 1.5
"""A gap this many times the median one is a stall."""


@dataclass(frozen=True, eq=False)
class Gaps:
    """Gaps between successive tokens of one request, ``[rows]`` each.

    A gap is the time between the ends of two steps, in both of which a request got a token and in
    none between. ``times`` successive gaps of the same length, each one step long, share a row.
    """

    ns: Ints
    requests: Ints  # number that share the gap
    times: Ints
    from_step: Ints  # step at which the row's first gap begins
    to_step: Ints

    @classmethod
    def of(cls, recording: Recording) -> Iterator[Gaps]:
        """Yield all gaps of all requests in blocks, so that memory stays bounded.

        All requests that run get a token at every step that decodes, so a gap from one such step
        to the next belongs to all of them; only the one after a first token may begin elsewhere.
        """
        decodes = _Decodes.of(recording)
        yield _first_gaps(recording, decodes)
        yield from _shared_gaps(recording, decodes)


def gaps_ms(recording: Recording) -> Distribution:
    """ITL in milliseconds, also where no steps are shown but when each token was there."""
    if recording.token_ends_ns is None:
        parts = [Distribution.of(g.ns, g.requests * g.times) for g in Gaps.of(recording)]
        return Distribution.pooled(parts).in_units_of(1e6)
    within = np.ones(len(recording.token_ends_ns), bool)
    within[recording.token_offsets[:-1]] = False  # a first token ends no gap
    later = np.flatnonzero(within)
    gaps = recording.token_ends_ns[later] - recording.token_ends_ns[later - 1]
    return Distribution.of(gaps / 1e6)


@dataclass(frozen=True, eq=False)
class _Decodes:
    """Numbering of the steps that decode, without a list of them."""

    span: Ints  # numbers of the spans that decode
    first: Ints  # first step of each of these spans
    steps: Ints
    upto: Ints  # steps that decode, up to the span and with it

    @classmethod
    def of(cls, recording: Recording) -> _Decodes:
        decoding = np.flatnonzero(recording.spans.decoding > 0)
        steps = recording.spans.steps[decoding]
        return cls(decoding, recording.first_steps[decoding], steps, np.cumsum(steps))

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


def _first_gaps(recording: Recording, decodes: _Decodes) -> Gaps:
    """Return the gaps from each request's first token to its second."""
    r = recording.requests
    several = r.last > r.first
    first, shared = np.unique(r.first[several], return_counts=True)
    second = decodes.step(decodes.numbered(first))
    gaps = recording.ends_of(second) - recording.ends_of(first)
    return Gaps(gaps, shared, np.ones_like(gaps), first, second)


def _shared_gaps(recording: Recording, decodes: _Decodes) -> Iterator[Gaps]:
    """Yield gaps from a step that decodes to the next, for the requests with a token in both."""
    r = recording.requests
    if not len(decodes.first):
        return
    several = r.last > r.first
    # A request shares gaps from its second token on: from that step's number to its last's.
    begins = np.sort(decodes.numbered(r.first[several]) + 1)
    ceases = np.sort(decodes.numbered(r.last[several]))

    def sharing(number: Ints) -> Ints:
        """Requests that share the gap which ends with the step of this number, from 0."""
        begun = np.searchsorted(begins, number, side="right")
        return begun - np.searchsorted(ceases, number, side="right")

    # Between spans that decode …
    before, after = (decodes.first + decodes.steps - 1)[:-1], decodes.first[1:]
    gaps = recording.ends_of(after) - recording.ends_of(before)
    yield Gaps(gaps, sharing(decodes.upto[:-1]), np.ones_like(gaps), before, after)
    # … and within them, where the same requests share all.
    inner = np.zeros(len(recording.spans.steps), np.int64)
    inner[decodes.span] = sharing(decodes.upto - decodes.steps + 1)
    for part in recording.step_times(decodes.span, skip=1):
        yield Gaps(part.ns, inner[part.span], part.count, part.step - 1, part.step)


def stalls(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    """The longest gaps that are 1.5 times the median one or more, longest first.

    Each names the step that took the most of it, and what that step did; a strategy that shows no
    steps has none to name.
    """
    found = []
    for trial, recording in enumerate(recordings):
        if recording.has_steps:
            found += [_stall(trial, recording, gap) for gap in _longest(recording)]
    return sorted(found, key=lambda stall: -stall["gap_ms"])[:MOST_STALLS]


class _Gap(NamedTuple):
    """A gap that several requests share."""

    ns: int
    requests: int
    from_step: int
    to_step: int


def _longest(recording: Recording) -> list[_Gap]:
    """Return the longest stalls of a trial; of equal ones the earliest."""
    median = gaps_ms(recording).percentile(50)
    if median is None:
        return []
    found: dict[tuple[int, int], _Gap] = {}
    for part in Gaps.of(recording):
        long = np.flatnonzero((part.requests > 0) & (part.ns >= STALL * median * 1e6))
        order = np.lexsort((part.from_step[long], -part.ns[long]))[:MOST_STALLS]
        columns = (part.ns, part.requests, part.times, part.from_step)
        rows = zip(*(column[long[order]].tolist() for column in columns), strict=True)
        for (ns, requests, times, first), to_step in zip(
            rows, part.to_step[long[order]].tolist(), strict=True
        ):
            for later in range(min(times, MOST_STALLS)):
                steps = first + later, to_step + later
                # Requests with their first token at the step differ from the others.
                others = found[steps].requests if steps in found else 0
                found[steps] = _Gap(ns, others + requests, *steps)
    return sorted(found.values(), key=lambda gap: (-gap.ns, gap.from_step))[:MOST_STALLS]


def _stall(trial: int, recording: Recording, gap: _Gap) -> dict[str, Any]:
    steps = np.arange(gap.from_step + 1, gap.to_step + 1)
    spent = recording.ends_of(steps) - recording.starts_of(steps)
    outside = int(gap.ns - spent.sum())
    longest = int(spent.argmax())
    step: int | None = int(steps[longest])
    cause = what_happened(recording, int(steps[longest]))
    if outside > spent[longest]:
        step, cause = None, "time outside the steps"
    return {
        "trial": trial,
        "gap_ms": gap.ns / 1e6,
        "requests": gap.requests,
        "start_ms": int(recording.ends_of(np.array([gap.from_step]))[0]) / 1e6,
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


def queue_ms(recording: Recording) -> Floats:
    """Time from arrival to the start of the first step that computes the request."""
    queued: Floats = (recording.started_ns - recording.requests.due_ns) / 1e6
    return queued


def ttft_ms(recording: Recording) -> Floats:
    """Time from arrival to the first output token."""
    first: Floats = (recording.first_token_ns - recording.requests.due_ns) / 1e6
    return first


def e2el_ms(recording: Recording) -> Floats:
    """Time from arrival to the last output token."""
    last: Floats = (recording.last_token_ns - recording.requests.due_ns) / 1e6
    return last


def tpot_ms(recording: Recording) -> Floats:
    """(E2E − TTFT) / (output tokens produced − 1); NaN for outputs of one token."""
    gaps = recording.requests.output_tokens - 1.0
    gaps[gaps == 0] = np.nan
    per_token: Floats = (recording.last_token_ns - recording.first_token_ns) / (gaps * 1e6)
    return per_token


def within(recording: Recording, limits_ms: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which requests meet all limits, by latency (``ttft``, ``tpot``, ``e2el``).

    A request of one output token has no TPOT and so keeps within any.
    """
    good = np.ones(len(recording.requests.slot), np.bool_)
    of = {"ttft": ttft_ms, "tpot": tpot_ms, "e2el": e2el_ms}
    for name, limit in limits_ms.items():
        found = of[name](recording)
        good &= (found <= limit) | np.isnan(found)
    return good


@dataclass(frozen=True, eq=False)
class Latencies:
    """Latencies of one trial in milliseconds, or of several pooled."""

    queue: Distribution
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution

    @classmethod
    def of(cls, recording: Recording) -> Latencies:
        """Of one trial."""
        tpot = tpot_ms(recording)
        return cls(
            queue=Distribution.of(queue_ms(recording)),
            ttft=Distribution.of(ttft_ms(recording)),
            tpot=Distribution.of(tpot[~np.isnan(tpot)]),
            itl=gaps_ms(recording),
            e2el=Distribution.of(e2el_ms(recording)),
        )

    @classmethod
    def pooled(cls, parts: Sequence[Latencies]) -> Latencies:
        """All observations of several trials."""
        names = [field.name for field in fields(cls)]
        return cls(*(Distribution.pooled([getattr(p, name) for p in parts]) for name in names))


MOST_CLASSES = 4

Class = tuple[int, int]
"""Smallest and largest output of a class, in tokens, both included."""


def length_classes(output_tokens: Ints) -> list[Class]:
    """Classes of output lengths: each length its own if there are few, else quarters."""
    lengths = np.unique(output_tokens)
    if len(lengths) <= MOST_CLASSES:
        return [(int(length), int(length)) for length in lengths]
    shares = np.arange(1, MOST_CLASSES) / MOST_CLASSES
    inner = np.quantile(output_tokens, shares, method="inverted_cdf")
    tops = np.unique([*inner, lengths[-1]])
    bottoms = [lengths[0], *(lengths[np.searchsorted(lengths, top) + 1] for top in tops[:-1])]
    return [(int(low), int(high)) for low, high in zip(bottoms, tops, strict=True)]


def slowdown(recording: Recording) -> Floats:
    """E2E latency over what the request would take alone, ``[requests]``.

    Alone it would take a step a token, of the trial's median step.
    """
    step_ms = max(median_step_ms(recording), 1e-6)  # a clock may show 0 for a step
    alone = recording.requests.output_tokens * step_ms
    found: Floats = e2el_ms(recording) / alone
    return found


def median_step_ms(recording: Recording) -> float:
    """Median duration of a step, or of the gaps between tokens where no steps are shown."""
    if not recording.has_steps:
        gaps = gaps_ms(recording).percentile(50)
        return float(np.median(ttft_ms(recording))) if gaps is None else gaps
    median = step_distribution(recording).in_units_of(1e6).percentile(50)
    assert median is not None
    return median


def by_length(
    recordings: Sequence[Recording], classes: Sequence[Class]
) -> list[dict[str, float | int | None]]:
    """What the requests of each class met with, over all trials."""
    lengths = np.concatenate([r.requests.output_tokens for r in recordings])
    figures = {
        "queue_ms": np.concatenate([queue_ms(r) for r in recordings]),
        "ttft_ms": np.concatenate([ttft_ms(r) for r in recordings]),
        "e2el_ms": np.concatenate([e2el_ms(r) for r in recordings]),
        "slowdown": np.concatenate([slowdown(r) for r in recordings]),
    }
    rows: list[dict[str, float | int | None]] = []
    for low, high in classes:
        members = (low <= lengths) & (lengths <= high)
        row: dict[str, float | int | None] = {
            "min_output_tokens": low,
            "max_output_tokens": high,
            "requests": int(members.sum()),
        }
        for name, values in figures.items():
            found = Distribution.of(values[members])
            row |= {f"mean_{name}": found.mean(), f"p99_{name}": found.percentile(99)}
        rows.append(row)
    return rows
