"""Metrics: pure functions of Recordings. Definitions and formulas are in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording

Floats = NDArray[np.float64]
Summary = dict[str, float | int | None]

PERCENTILES = (90.0, 99.0, 99.9)
ENOUGH_FOR_P999 = 1000
"""Fewer values than this do not tell a 99.9th percentile from the maximum."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Values with integer weights: ``weights[i]`` observations of ``values[i]``.

    Exactly what the expanded list would give, without the list: a million requests share their
    gaps between tokens.
    """

    values: Floats
    weights: Ints

    @classmethod
    def of(cls, values: NDArray[Any], weights: NDArray[Any] | None = None) -> Distribution:
        """From unsorted values; without weights each counts once."""
        weights = np.ones(len(values), np.int64) if weights is None else weights
        order = np.argsort(values, kind="stable")
        order = order[weights[order] > 0]
        return cls(values[order].astype(np.float64), weights[order].astype(np.int64))

    @classmethod
    def pooled(cls, parts: Sequence[Distribution]) -> Distribution:
        """All observations of several distributions."""
        return cls.of(
            np.concatenate([p.values for p in parts]), np.concatenate([p.weights for p in parts])
        )

    @cached_property
    def _cumulated(self) -> Ints:
        return np.cumsum(self.weights)

    @property
    def count(self) -> int:
        """Number of observations."""
        return int(self._cumulated[-1]) if len(self.weights) else 0

    def mean(self) -> float | None:
        """Arithmetic mean; None of nothing."""
        return float(np.average(self.values, weights=self.weights)) if self.count else None

    def std(self) -> float | None:
        """Standard deviation of these observations (not an estimate for others)."""
        if not self.count:
            return None
        centre = np.average(self.values, weights=self.weights)
        return float(np.sqrt(np.average((self.values - centre) ** 2, weights=self.weights)))

    def percentile(self, q: float) -> float | None:
        """The q-th percentile, linear between neighbours (NumPy's default)."""
        if not self.count:
            return None
        rank = (self.count - 1) * q / 100
        low = int(rank)
        at = np.searchsorted(self._cumulated, [low, min(low + 1, self.count - 1)], side="right")
        below, above = self.values[at]
        return float(below + (above - below) * (rank - low))


@dataclass(frozen=True, eq=False)
class Latencies:
    """Latencies of one trial in milliseconds, or of several pooled."""

    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution

    @classmethod
    def pooled(cls, parts: Sequence[Latencies]) -> Latencies:
        """All observations of several trials."""
        return cls(
            *(
                Distribution.pooled([getattr(part, name) for part in parts])
                for name in ("ttft", "tpot", "itl", "e2el")
            )
        )


def ttft_ms(recording: Recording) -> Floats:
    """Time from arrival to the first output token, ``[requests]``."""
    r = recording.requests
    first: Floats = (recording.step_ends_ns[r.first] - r.due_ns) / 1e6
    return first


def e2el_ms(recording: Recording) -> Floats:
    """Time from arrival to the last output token, ``[requests]``."""
    r = recording.requests
    last: Floats = (recording.step_ends_ns[r.last] - r.due_ns) / 1e6
    return last


def tpot_ms(recording: Recording) -> Floats:
    """(E2E − TTFT) / (output tokens − 1), ``[requests]``; NaN for outputs of one token."""
    gaps = recording.requests.output_tokens - 1.0
    gaps[gaps == 0] = np.nan
    per_token: Floats = (e2el_ms(recording) - ttft_ms(recording)) / gaps
    return per_token


def itl(recording: Recording) -> Distribution:
    """Each gap between successive tokens of one request, in ms, none averaged away.

    All requests that run get a token at every step that decodes, so a gap from one such step to
    the next belongs to all of them; only the gap after a first token may begin elsewhere.
    """
    r, ends = recording.requests, recording.step_ends_ns
    decoding = np.flatnonzero(np.repeat(recording.spans.decoding > 0, recording.spans.steps))
    several = r.last > r.first
    first, last = r.first[several], r.last[several]
    second = decoding[np.searchsorted(decoding, first, side="right")]
    own = (ends[second] - ends[first]) / 1e6
    # Tokens at each decoding step, less those that are somebody's second.
    begins = np.searchsorted(decoding, second, side="right")
    ceases = np.searchsorted(decoding, last, side="right")
    change = np.bincount(begins, minlength=len(decoding) + 1).astype(np.int64)
    change -= np.bincount(ceases, minlength=len(decoding) + 1)
    shared = np.cumsum(change)[1 : len(decoding)] if len(decoding) else change[:0]
    gaps = np.diff(ends[decoding]) / 1e6
    return Distribution.of(
        np.concatenate([own, gaps]), np.concatenate([np.ones(len(own), np.int64), shared])
    )


def latencies(recording: Recording) -> Latencies:
    """All four latencies of one trial."""
    tpot = tpot_ms(recording)
    return Latencies(
        Distribution.of(ttft_ms(recording)),
        Distribution.of(tpot[~np.isnan(tpot)]),
        itl(recording),
        Distribution.of(e2el_ms(recording)),
    )


def typical_trial(trials: Sequence[Recording]) -> Recording:
    """The trial of median duration; of an even number the shorter of the middle two."""
    ranked = sorted(trials, key=lambda trial: trial.duration_ns)
    return ranked[(len(ranked) - 1) // 2]


def trial_summary(recording: Recording) -> Summary:
    """The summary of one trial, under the serving benchmarks' names."""
    return _summary(recording, recording.duration_ns / 1e9, latencies(recording))


def summary(recordings: Sequence[Recording]) -> Summary:
    """Over all trials: the median duration, and the latencies of all requests pooled."""
    duration = float(np.median([r.duration_ns for r in recordings])) / 1e9
    pooled = Latencies.pooled([latencies(r) for r in recordings])
    return _summary(recordings[0], duration, pooled)


def _summary(recording: Recording, duration_s: float, found: Latencies) -> Summary:
    requests = recording.requests
    inputs, outputs = int(requests.prompt_tokens.sum()), int(requests.output_tokens.sum())
    completed = int((requests.last >= 0).sum())
    figures: Summary = {
        "duration": duration_s,
        "completed": completed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": completed / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        values: Distribution = getattr(found, name)
        figures |= {
            f"mean_{name}_ms": values.mean(),
            f"median_{name}_ms": values.percentile(50),
            f"std_{name}_ms": values.std(),
        }
        for q in PERCENTILES:
            enough = q < 99.9 or values.count >= ENOUGH_FOR_P999
            figures[f"p{q:g}_{name}_ms"] = values.percentile(q) if enough else None
    return figures


def counters(recording: Recording) -> dict[str, int]:
    """Exact counts of the work done, from the plans alone.

    In each step each slot is exactly one of useful, prompt, finished, empty, stalled.
    """
    r, s, c = recording.requests, recording.spans, recording.chunks
    steps, slots = recording.num_steps, recording.header.slots
    with_chunks, decodes = s.chunks > 0, s.decoding > 0
    size = c.stop - c.start
    yields = c.stop == r.prompt_tokens[c.request]
    # Longest chunk of each span that has chunks, for what a rectangular prefill would compute.
    begins = (np.cumsum(s.chunks) - s.chunks)[with_chunks]
    longest = np.maximum.reduceat(size, begins) if len(begins) else size[:0]
    useful = int(r.output_tokens.sum())
    prompt = int((~yields).sum())
    finished = int((r.released - r.last - 1).sum())
    held = int((r.released - r.admitted).sum())
    empty = steps * slots - held
    return {
        "forward_passes": steps,
        "prefill_passes": int((with_chunks & ~decodes).sum()),
        "mixed_passes": int((with_chunks & decodes).sum()),
        "decode_passes": int(s.steps[~with_chunks].sum()),
        "prefill_tokens": int(size.sum()),
        "padded_prefill_tokens": int((s.chunks[with_chunks] * longest).sum()),
        "slot_steps": steps * slots,
        "useful_slot_steps": useful,
        "prompt_slot_steps": prompt,
        "finished_slot_steps": finished,
        "empty_slot_steps": empty,
        "idle_slot_steps": finished + empty,
        "stalled_slot_steps": held - useful - prompt - finished,
        "kv_tokens_peak": kv_tokens_peak(recording),
    }


def kv_tokens_peak(recording: Recording) -> int:
    """Largest sum of cached tokens of held slots, after any step.

    A request holds its prompt as far as it is computed and all its output tokens but the last,
    until its slot is released.
    """
    r, s, c = recording.requests, recording.spans, recording.chunks
    last_steps = recording.first_steps + s.steps - 1
    # Every decode of a running request adds one; a finished one that is held adds none.
    held = np.searchsorted(np.sort(r.last), recording.first_steps) - np.searchsorted(
        np.sort(r.released), recording.first_steps, side="right"
    )
    grown = np.where(s.decoding > 0, s.decoding - held, 0) * s.steps
    of_chunk = np.repeat(np.arange(len(s.chunks)), s.chunks)
    grown = grown + np.bincount(of_chunk, c.stop - c.start, minlength=len(s.steps)).astype(np.int64)
    order = np.argsort(r.released)
    final = np.cumsum((r.prompt_tokens + r.output_tokens - 1)[order])
    gone = np.searchsorted(r.released[order], last_steps, side="right")
    forgotten = np.concatenate([[0], final])[gone]
    return int((np.cumsum(grown) - forgotten).max())


@dataclass(frozen=True, eq=False)
class Occupancy:
    """What the slots do in each step, ``[steps]`` each."""

    start_s: Floats
    end_s: Floats
    running: Ints  # slots whose request is not done
    finished: Ints  # slots held by a request that is done
    waiting: Ints


def occupancy(recording: Recording) -> Occupancy:
    """Slots in use over time."""
    r, steps = recording.requests, recording.num_steps

    def between(start: Ints, stop: Ints) -> Ints:
        change = np.bincount(start, minlength=steps + 1) - np.bincount(stop, minlength=steps + 1)
        return np.cumsum(change)[:steps].astype(np.int64)

    return Occupancy(
        start_s=recording.step_starts_ns / 1e9,
        end_s=recording.step_ends_ns / 1e9,
        running=between(r.admitted, r.last + 1),
        finished=between(r.last + 1, r.released),
        waiting=np.repeat(recording.spans.waiting, recording.spans.steps),
    )


def host_share(recording: Recording) -> float:
    """Share of the trial in which no step was under way: scheduling, logging, display."""
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    between = starts - np.concatenate([[0], ends[:-1]])
    return float(np.maximum(between, 0).sum() / max(recording.duration_ns, 1))


def littles_law(recording: Recording) -> float:
    """L / (λW) − 1: requests in the system as the steps saw them, against what latencies imply.

    The one comes from the numbers waiting and running in each step, the other from each request's
    arrival and end; a log in which they differ is wrong.
    """
    seen, r = occupancy(recording), recording.requests
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    within = ((seen.waiting + seen.running) * (ends - starts).astype(np.float64)).sum()
    # Between two steps are those that were due when the first of them ended, less who was done.
    ended = np.concatenate([[0], ends[:-1]])
    there = np.searchsorted(np.sort(r.due_ns), ended, side="right")
    there = there - np.searchsorted(np.sort(r.last), np.arange(len(ends)))
    between = (there * (starts - ended).astype(np.float64)).sum()
    from_requests = (ends[r.last] - r.due_ns).astype(np.float64).sum()
    return float((within + between) / from_requests - 1)
