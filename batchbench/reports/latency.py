"""Latencies of requests, gaps between their tokens, and stalls: functions of Recordings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.occupancy import prompt_tokens_of_spans
from batchbench.reports.result_data import LengthClass, StallData
from batchbench.reports.statistics import Distribution, Floats, step_distribution
from batchbench.reports.text import plural

MOST_STALLS = 5

STALL = 1.5
"""Smallest ratio to the median gap at which a gap is a stall."""


# Gaps between tokens


@dataclass(frozen=True, eq=False)
class Gaps:
    """Gaps between successive tokens of one request, ``[rows]`` each.

    A gap is the time between the ends of two steps that each yield a token of a request, with no
    such step in between. ``times`` successive gaps of equal length, each one step long, share a
    row.
    """

    ns: Ints
    requests: Ints  # number of requests that share the gap
    times: Ints
    from_step: Ints  # step at which the row's first gap begins
    to_step: Ints


def gaps_ms(recording: Recording) -> Distribution:
    """Return ITL in ms; a recording without steps needs the times of its tokens."""
    if recording.token_ends_ns is None:
        parts = [Distribution.of(g.ns, g.requests * g.times) for g in gaps_of(recording)]
        return Distribution.pooled(parts).in_units_of(1e6)
    # A first token ends no gap.
    later = np.delete(np.arange(len(recording.token_ends_ns)), recording.token_offsets[:-1])
    gaps = recording.token_ends_ns[later] - recording.token_ends_ns[later - 1]
    return Distribution.of(gaps / 1e6)


@dataclass(frozen=True, eq=False)
class Decodes:
    """Numbering of the decode steps from 1, without a list of them; ``[spans that decode]``."""

    span: Ints
    first: Ints  # first step
    steps: Ints
    upto: Ints  # decode steps up to the span's end

    @classmethod
    def of(cls, recording: Recording) -> Decodes:
        decoding = np.flatnonzero(recording.spans.decoding > 0)
        steps = recording.spans.steps[decoding]
        return cls(decoding, recording.first_steps[decoding], steps, np.cumsum(steps))

    def numbered(self, step: Ints) -> Ints:
        """Return the number of decode steps up to each of these steps, itself included."""
        if not len(self.first):
            return np.zeros_like(step)
        span = np.searchsorted(self.first, step, side="right") - 1
        within = np.minimum(step - self.first[span] + 1, self.steps[span])
        numbers = (self.upto - self.steps)[span] + within
        return np.where(span >= 0, numbers, 0)

    def step(self, number: Ints) -> Ints:
        """Return the decode step that follows this many others."""
        span = np.searchsorted(self.upto, number, side="right")
        return self.first[span] + number - (self.upto - self.steps)[span]


def gaps_of(recording: Recording) -> Iterator[Gaps]:
    """Yield all gaps of all requests in blocks, so that memory stays bounded.

    All running requests get a token at every step that decodes, so they share the gap from one
    such step to the next; only the gap after a first token may begin at another step.
    """
    r, decodes = recording.requests, Decodes.of(recording)
    several = r.last > r.first
    # After a first token
    first, shared = np.unique(r.first[several], return_counts=True)
    second = decodes.step(decodes.numbered(first))
    gaps = recording.ends_of(second) - recording.ends_of(first)
    yield Gaps(gaps, shared, np.ones_like(gaps), first, second)
    if not len(decodes.first):
        return
    # A request shares gaps from its second token to its last.
    begins = np.sort(decodes.numbered(r.first[several]) + 1)
    ends = np.sort(decodes.numbered(r.last[several]))

    def sharing(number: Ints) -> Ints:
        begun = np.searchsorted(begins, number, side="right")
        return begun - np.searchsorted(ends, number, side="right")

    # Between spans that decode
    before, after = (decodes.first + decodes.steps - 1)[:-1], decodes.first[1:]
    gaps = recording.ends_of(after) - recording.ends_of(before)
    yield Gaps(gaps, sharing(decodes.upto[:-1]), np.ones_like(gaps), before, after)
    # Within a span, where the same requests share all gaps
    inner = np.zeros(len(recording.spans.steps), np.int64)
    inner[decodes.span] = sharing(decodes.upto - decodes.steps + 1)
    for part in recording.step_times(decodes.span, skip=1):
        yield Gaps(part.ns, inner[part.span], part.count, part.step - 1, part.step)


# Stalls


def stalls(recordings: Sequence[Recording]) -> list[StallData]:
    """Return the longest gaps of at least 1.5 times the median gap, longest first.

    Each names the step that took most of it and the work of that step. A strategy without steps
    has no stalls.
    """
    all_stalls = [
        _stall(trial, recording, gap)
        for trial, recording in enumerate(recordings)
        if recording.has_steps
        for gap in _longest(recording)
    ]
    return sorted(all_stalls, key=lambda stall: -stall["gap_ms"])[:MOST_STALLS]


class _Gap(NamedTuple):
    ns: int
    requests: int
    from_step: int
    to_step: int


def _longest(recording: Recording) -> list[_Gap]:
    median = gaps_ms(recording).percentile(50)
    if median is None:
        return []
    gaps: dict[tuple[int, int], _Gap] = {}
    for part in gaps_of(recording):
        long = np.flatnonzero((part.requests > 0) & (part.ns >= STALL * median * 1e6))
        order = np.lexsort((part.from_step[long], -part.ns[long]))[:MOST_STALLS]
        columns = (part.ns, part.requests, part.times, part.from_step, part.to_step)
        for row in zip(*(column[long[order]].tolist() for column in columns), strict=True):
            ns, requests, times, begin, end = row
            for later in range(min(times, MOST_STALLS)):
                steps = begin + later, end + later
                # Requests with their first token at the step have a row of their own.
                others = gaps[steps].requests if steps in gaps else 0
                gaps[steps] = _Gap(ns, others + requests, *steps)
    return sorted(gaps.values(), key=lambda gap: (-gap.ns, gap.from_step))[:MOST_STALLS]


def _stall(trial: int, recording: Recording, gap: _Gap) -> StallData:
    steps = np.arange(gap.from_step + 1, gap.to_step + 1)
    spent = recording.ends_of(steps) - recording.starts_of(steps)
    longest = int(spent.argmax())
    inside = gap.ns - spent.sum() <= spent[longest]
    step = int(steps[longest]) if inside else None
    return {
        "trial": trial,
        "gap_ms": gap.ns / 1e6,
        "requests": gap.requests,
        "start_ms": int(recording.ends_of(np.array([gap.from_step]))[0]) / 1e6,
        "step": step,
        "cause": "time outside the steps" if step is None else describe_step(recording, step),
    }


def describe_step(recording: Recording, step: int) -> str:
    """Return the work of a step in words: ``prefill of 3 requests, 512 tokens``."""
    span = int(recording.spans_of(np.array([step]))[0])
    decoding, chunks = (int(n[span]) for n in (recording.spans.decoding, recording.spans.chunks))
    parts = []
    if chunks:
        tokens = int(prompt_tokens_of_spans(recording)[0][span])
        parts.append(f"prefill of {plural(chunks, 'request')}, {plural(tokens, 'token')}")
    if decoding:
        parts.append(f"decode of {plural(decoding, 'slot')}")
    return " + ".join(parts)


# Latencies


def queue_ms(recording: Recording) -> Floats:
    """Return the time from arrival to the first step that computes the request, ``[requests]``."""
    return (recording.started_ns - recording.requests.due_ns) / 1e6


def ttft_ms(recording: Recording) -> Floats:
    """Return the time from arrival to the first output token, ``[requests]``."""
    return (recording.first_token_ns - recording.requests.due_ns) / 1e6


def e2el_ms(recording: Recording) -> Floats:
    """Return the time from arrival to the last output token, ``[requests]``."""
    return (recording.last_token_ns - recording.requests.due_ns) / 1e6


def tpot_ms(recording: Recording) -> Floats:
    """Return (E2E − TTFT) / (output tokens produced − 1); NaN for outputs of one token."""
    gaps = recording.requests.output_tokens - 1.0
    gaps[gaps == 0] = np.nan
    return (recording.last_token_ns - recording.first_token_ns) / (gaps * 1e6)


def within(recording: Recording, limits_ms: Mapping[str, float]) -> NDArray[np.bool_]:
    """Return a mask of the requests that meet all limits on ``ttft``, ``tpot`` and ``e2el``.

    A request with one output token has no TPOT and meets any limit on it.
    """
    good = np.ones(len(recording.requests.slot), np.bool_)
    latencies = {"ttft": ttft_ms, "tpot": tpot_ms, "e2el": e2el_ms}
    for name, limit in limits_ms.items():
        good &= ~(latencies[name](recording) > limit)
    return good


@dataclass(frozen=True, eq=False)
class Latencies:
    """Latencies of all requests of some trials, in milliseconds."""

    queue: Distribution
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution

    @classmethod
    def of(cls, *recordings: Recording) -> Latencies:
        queue, ttft, tpot, e2el = (
            _known(np.concatenate([metric(r) for r in recordings]))
            for metric in (queue_ms, ttft_ms, tpot_ms, e2el_ms)
        )
        return cls(queue, ttft, tpot, Distribution.pooled([gaps_ms(r) for r in recordings]), e2el)


def _known(values: Floats) -> Distribution:
    return Distribution.of(values[~np.isnan(values)])


# Latencies by output length

MOST_CLASSES = 4


def length_classes(output_tokens: Ints) -> list[tuple[int, int]]:
    """Return the shortest and longest output of classes: each length if few, else quarters."""
    lengths = np.unique(output_tokens)
    if len(lengths) <= MOST_CLASSES:
        return [(int(length), int(length)) for length in lengths]
    shares = np.arange(1, MOST_CLASSES) / MOST_CLASSES
    inner = np.quantile(output_tokens, shares, method="inverted_cdf")
    tops = np.unique([*inner, lengths[-1]])
    bottoms = [lengths[0], *(lengths[np.searchsorted(lengths, top) + 1] for top in tops[:-1])]
    return [(int(low), int(high)) for low, high in zip(bottoms, tops, strict=True)]


def slowdown(recording: Recording) -> Floats:
    """Return E2E latency / unloaded latency, ``[requests]``.

    The unloaded latency is one median step of the trial for each output token. NaN if it is 0: the
    output came whole, or the clock is too coarse.
    """
    step_ms = median_step_ms(recording) or math.nan
    return e2el_ms(recording) / (recording.requests.output_tokens * step_ms)


def median_step_ms(recording: Recording) -> float:
    """Return the median duration of a step.

    A strategy that reports no steps has gaps instead. A server may send several tokens at once, so
    that most gaps are 0; then it is the median TPOT.
    """
    if not recording.has_steps:
        tpot = tpot_ms(recording)
        other = ttft_ms(recording) if np.isnan(tpot).all() else tpot
        return gaps_ms(recording).percentile(50) or float(np.nanmedian(other))
    median = step_distribution(recording).in_units_of(1e6).percentile(50)
    assert median is not None
    return median


def by_length(
    recordings: Sequence[Recording], classes: Sequence[tuple[int, int]]
) -> list[LengthClass]:
    """Return the latencies of each class of requests, pooled over all trials."""
    lengths = np.concatenate([r.requests.output_tokens for r in recordings])
    metrics = {"queue_ms": queue_ms, "ttft_ms": ttft_ms, "e2el_ms": e2el_ms, "slowdown": slowdown}
    values = {name: np.concatenate([of(r) for r in recordings]) for name, of in metrics.items()}
    rows = []
    for low, high in classes:
        members = (low <= lengths) & (lengths <= high)
        row: dict[str, Any] = {"min_output_tokens": low, "max_output_tokens": high}
        row["requests"] = int(members.sum())
        for name in metrics:
            pooled = _known(values[name][members])
            row |= {f"mean_{name}": pooled.mean(), f"p99_{name}": pooled.percentile(99)}
        rows.append(cast("LengthClass", row))
    return rows
