"""Metrics: pure functions of Recordings. Definitions and formulas are in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.batching.step_cost import Reading
from batchbench.reports.latency import Latencies, within
from batchbench.reports.statistics import Distribution, Floats
from batchbench.reports.time_budget import arrival_lag_ms, arrival_rate


@dataclass(frozen=True, eq=False)
class DecodeSteps:
    """A row a decode step, ``[steps]`` each."""

    took_ns: Ints  # from the end of the step before it to its own: what passes between counts
    rows: Ints

    @property
    def full_rows(self) -> int:
        """Most rows that a decode step had; 0 without any."""
        return int(self.rows.max()) if len(self.rows) else 0

    @property
    def full_ms(self) -> float | None:
        """What a step with that many rows takes, the median; None without any."""
        if not len(self.rows):
            return None
        return float(np.median(self.took_ns[self.rows == self.full_rows])) / 1e6


def decode_steps(recording: Recording) -> DecodeSteps:
    """Of a trial, also of one that shows no steps but when each token was there."""
    if recording.token_ends_ns is not None:
        return _of_tokens(recording, recording.token_ends_ns)
    rows = _decoding_rows(recording)
    took = np.diff(recording.step_ends_ns, prepend=0)
    return DecodeSteps(took[rows > 0], rows[rows > 0])


def _decoding_rows(recording: Recording) -> Ints:
    """Rows of each step, ``[steps]``; 0 of those that compute a piece of a prompt as well."""
    spans = recording.spans
    return np.repeat(np.where(spans.chunks == 0, spans.decoding, 0), spans.steps)


def full_kv_tokens(recording: Recording) -> float | None:
    """Cached tokens that a decode step with the most rows reads, the median; None without any."""
    rows = _decoding_rows(recording)
    if not rows.any():
        return None
    return float(np.median(kv_tokens_read(recording)[rows == rows.max()]))


@dataclass(frozen=True)
class Beside:
    """A trial's decode steps with the most rows beside what memory allows.

    Attributes:
        rows: requests that each computes a token of.
        took_ms: what one takes, the median.
        floor_ms: (weights + KV read) / bandwidth, as measured before the trial.
        read_bytes: weights and keys and values that it reads.
        bytes_per_s: the bandwidth.
    """

    rows: int
    took_ms: float
    floor_ms: float
    read_bytes: float
    bytes_per_s: float

    @property
    def floor_share(self) -> float:
        """How near it comes: 1 where a step does nothing but read."""
        return self.floor_ms / self.took_ms


def beside_floor(recording: Recording) -> Beside | None:
    """None where memory was not measured (its cache holds what is read), or no step shows."""
    memory: Mapping[str, Any] | None = recording.header.about.get("memory")
    if memory is None or not recording.has_steps:
        return None
    cached, steps = full_kv_tokens(recording), decode_steps(recording)
    if cached is None or not steps.full_ms:
        return None
    read, speed = Reading(**memory["reading"]).step_bytes(cached), memory["bytes_per_s"]
    return Beside(steps.full_rows, steps.full_ms, read / speed * 1e3, read, speed)


def _of_tokens(recording: Recording, times: Ints) -> DecodeSteps:
    """Tokens of one step come together: far closer than the shortest gap within a request.

    A piece of a prompt that yields no token does not show; its step counts among the others.
    """
    firsts = np.zeros(len(times), bool)
    firsts[recording.token_offsets[:-1]] = True
    later = np.flatnonzero(~firsts)
    if not len(later):
        return DecodeSteps(times[:0], times[:0])
    shortest = int((times[later] - times[later - 1]).min())
    order = np.argsort(times, kind="stable")
    begins = np.flatnonzero(np.diff(times[order], prepend=-(2**62)) > shortest / 4)
    ends = np.maximum.reduceat(times[order], begins)
    rows = np.diff(begins, append=len(times))
    newcomers = np.add.reduceat(firsts[order].astype(np.int64), begins)
    pure = newcomers == 0
    return DecodeSteps(np.diff(ends, prepend=0)[pure], rows[pure])


def kv_tokens_read(recording: Recording) -> Ints:
    """Cached tokens that each step's decoding rows attend to, their own among them, ``[steps]``.

    A request whose n-th output token a step yields attends to its prompt and n − 1 of its outputs;
    one that is done and held recomputes its last position.
    """
    r, steps = recording.requests, recording.num_steps
    decodes = np.repeat(recording.spans.decoding > 0, recording.spans.steps)
    count = np.cumsum(decodes)  # decode steps up to and including each
    base = r.prompt_tokens - count[r.first]

    def between(start: Ints, stop: Ints, values: Ints) -> Ints:
        """Sum of the values of those for whom start ≤ step < stop."""
        change = np.zeros(steps + 1, np.int64)
        np.add.at(change, start, values)
        np.subtract.at(change, stop, values)
        return np.cumsum(change)[:steps]

    ones = np.ones(len(base), np.int64)
    running = between(r.first + 1, r.last + 1, base) + count * between(
        r.first + 1, r.last + 1, ones
    )
    held = between(r.last + 1, r.released, r.prompt_tokens + r.output_tokens - 1)
    return np.where(decodes, running + held, 0)


Summary = dict[str, float | int | None]

PERCENTILES = (90.0, 99.0, 99.9)

ENOUGH_FOR_P999 = 1000
"""Fewer values than this do not tell a 99.9th percentile from the maximum."""

NO_LIMITS: Mapping[str, float] = {}


def typical_trial(trials: Sequence[Recording]) -> Recording:
    """The trial of median duration; of an even number the shorter of the middle two."""
    ranked = sorted(trials, key=lambda trial: trial.duration_ns)
    return ranked[(len(ranked) - 1) // 2]


def trial_summary(recording: Recording, limits_ms: Mapping[str, float] = NO_LIMITS) -> Summary:
    """The summary of one trial, under the serving benchmarks' names."""
    return _summary([recording], recording.duration_ns / 1e9, limits_ms)


def summary(recordings: Sequence[Recording], limits_ms: Mapping[str, float] = NO_LIMITS) -> Summary:
    """Over all trials: the median duration, and the latencies of all requests pooled."""
    duration = float(np.median([r.duration_ns for r in recordings])) / 1e9
    return _summary(recordings, duration, limits_ms)


def energy_joules(recordings: Sequence[Recording]) -> float | None:
    """What a trial took, the median of several; None where some trial's was not counted."""
    told = [r.header.about.get("energy_joules") for r in recordings]
    counted = [float(joules) for joules in told if joules is not None]
    return float(np.median(counted)) if len(counted) == len(told) else None


def floor_share(recordings: Sequence[Recording]) -> float | None:
    """How near a full decode step comes to what memory allows, the median over trials."""
    told = [found.floor_share for r in recordings if (found := beside_floor(r)) is not None]
    return float(np.median(told)) if told else None


def _summary(
    recordings: Sequence[Recording], duration_s: float, limits_ms: Mapping[str, float]
) -> Summary:
    requests = recordings[0].requests
    inputs, outputs = int(requests.prompt_tokens.sum()), int(requests.output_tokens.sum())
    stepped = recordings[0].has_steps
    completed = int((requests.last >= 0).sum()) if stepped else len(requests.last)
    joules = energy_joules(recordings)
    figures: Summary = {
        "duration": duration_s,
        "completed": completed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": completed / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "energy_joules": joules,
        "joules_per_output_token": None if joules is None else joules / outputs,
        "floor_share": floor_share(recordings),
        **_goodput(recordings, duration_s, limits_ms),
    }
    found = Latencies.pooled([Latencies.of(r) for r in recordings])
    for name in ("queue", "ttft", "tpot", "itl", "e2el"):
        values: Distribution = getattr(found, name)
        figures |= {
            f"mean_{name}_ms": values.mean(),
            f"median_{name}_ms": values.percentile(50),
            f"std_{name}_ms": values.std(),
        }
        for q in PERCENTILES:
            enough = q < 99.9 or values.count >= ENOUGH_FOR_P999
            figures[f"p{q:g}_{name}_ms"] = values.percentile(q) if enough else None
    return figures | _arrivals(recordings)


def _goodput(
    recordings: Sequence[Recording], duration_s: float, limits_ms: Mapping[str, float]
) -> Summary:
    """Share and rate of the requests that meet all limits; null without any."""
    if not limits_ms:
        return {"request_goodput": None, "slo_attainment": None}
    good = np.concatenate([within(r, limits_ms) for r in recordings])
    count = int(good.sum())
    return {
        "request_goodput": count / len(recordings) / duration_s,
        "slo_attainment": count / len(good),
    }


def _arrivals(recordings: Sequence[Recording]) -> Summary:
    """How requests came in; null where all are there at the start."""
    lags = [lag for r in recordings if (lag := arrival_lag_ms(r)) is not None]
    rates = [rate for r in recordings if (rate := arrival_rate(r)) is not None]
    late = Distribution.of(np.concatenate(lags)) if lags else Distribution.of(np.zeros(0))
    return {
        "arrival_rate": float(np.median(rates)) if rates else None,
        "mean_arrival_lag_ms": late.mean(),
        "p99_arrival_lag_ms": late.percentile(99),
        "max_arrival_lag_ms": late.max,
    }


def counters(recording: Recording) -> dict[str, int]:
    """Exact counts of the work done, from the plans alone, of a recording that has steps.

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
