"""Metrics: pure functions of Recordings. docs/metrics.md has definitions and formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.batching.step_cost import Reading
from batchbench.reports.latency import Latencies, within
from batchbench.reports.occupancy import SlotKinds, prompt_tokens_of_spans
from batchbench.reports.result_data import Counters, DecodeStep, Summary
from batchbench.reports.statistics import Distribution
from batchbench.reports.time_budget import arrival_lag_ms, arrival_rate

PERCENTILES = (90.0, 99.0, 99.9)

ENOUGH_FOR_P999 = 1000
"""Minimum number of values for a 99.9th percentile; with fewer it is close to the maximum."""

NO_LIMITS: Mapping[str, float] = {}

# Decode steps


@dataclass(frozen=True, eq=False)
class DecodeSteps:
    """One row per step that computes no piece of a prompt, ``[steps]`` each."""

    took_ns: Ints  # from the end of the previous step to its own, so time in between counts
    rows: Ints

    @property
    def full_rows(self) -> int:
        """Largest number of rows in a decode step; 0 if there is none."""
        return int(self.rows.max(initial=0))

    @property
    def full_ms(self) -> float | None:
        """Median time of a step with that many rows; None if there is none."""
        if not len(self.rows):
            return None
        return float(np.median(self.took_ns[self.rows == self.full_rows])) / 1e6


def decode_steps(recording: Recording) -> DecodeSteps:
    """Return a trial's decode steps; a trial without steps needs the times of its tokens."""
    if recording.token_ends_ns is not None:
        return _steps_of_tokens(recording, recording.token_ends_ns)
    rows = _decoding_rows(recording)
    took = np.diff(recording.step_ends_ns, prepend=0)
    return DecodeSteps(took[rows > 0], rows[rows > 0])


def _decoding_rows(recording: Recording) -> Ints:
    """Return rows, ``[steps]``; 0 for a step that computes a piece of a prompt as well."""
    spans = recording.spans
    return np.repeat(np.where(spans.chunks == 0, spans.decoding, 0), spans.steps)


def _steps_of_tokens(recording: Recording, times: Ints) -> DecodeSteps:
    """Group tokens into steps: tokens of a step are far closer than the shortest gap of a request.

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
    pure = np.add.reduceat(firsts[order].astype(np.int64), begins) == 0
    return DecodeSteps(np.diff(ends, prepend=0)[pure], rows[pure])


def full_kv_tokens(recording: Recording) -> float | None:
    """Return the median of cached tokens that a decode step with the most rows reads."""
    rows = _decoding_rows(recording)
    if not rows.any():
        return None
    return float(np.median(kv_tokens_read(recording)[rows == rows.max()]))


def decode_floor(recordings: Sequence[Recording]) -> DecodeStep | None:
    """Return the decode steps with the most rows beside the time that memory bandwidth allows.

    The floor is (weights + KV read) / bandwidth, as measured before the trial; its share of the
    time is 1 if a step only reads. Medians over the trials whose bandwidth and steps are known;
    None if there are none.
    """
    found = []
    for recording in recordings:
        memory = recording.header.about.get("memory")
        if memory is None or not recording.has_steps:
            continue
        cached, steps = full_kv_tokens(recording), decode_steps(recording)
        if cached is not None and steps.full_ms:
            read, speed = Reading(**memory["reading"]).step_bytes(cached), memory["bytes_per_s"]
            floor_ms = read / speed * 1e3
            share = floor_ms / steps.full_ms
            found.append((steps.full_rows, steps.full_ms, floor_ms, share, read, speed))
    if not found:
        return None
    _, took, floor, share, read, speed = np.median(found, axis=0).tolist()
    return {
        "rows": found[0][0],
        "took_ms": took,
        "floor_ms": floor,
        "floor_share": share,
        "read_bytes": read,
        "bytes_per_s": speed,
    }


def kv_tokens_read(recording: Recording) -> Ints:
    """Return the cached tokens that each step's decoding rows attend to, ``[steps]``.

    A request whose n-th output token a step yields attends to its prompt and n − 1 of its outputs;
    one that is done and held recomputes its last position.
    """
    r, steps = recording.requests, recording.num_steps
    decodes = np.repeat(recording.spans.decoding > 0, recording.spans.steps)
    count = np.cumsum(decodes)  # decode steps up to and including each

    def between(start: Ints, stop: Ints, values: Ints | int) -> Ints:
        """Return the sum of the values of requests with start ≤ step < stop."""
        change = np.zeros(steps + 1, np.int64)
        np.add.at(change, start, values)
        np.subtract.at(change, stop, values)
        return np.cumsum(change)[:steps]

    running = between(r.first + 1, r.last + 1, r.prompt_tokens - count[r.first])
    running += count * between(r.first + 1, r.last + 1, 1)
    held = between(r.last + 1, r.released, r.prompt_tokens + r.output_tokens - 1)
    return np.where(decodes, running + held, 0)


# Summary


def typical_trial(trials: Sequence[Recording]) -> Recording:
    """Return the trial of median duration; of an even number the shorter of the middle two."""
    ranked = sorted(trials, key=lambda trial: trial.duration_ns)
    return ranked[(len(ranked) - 1) // 2]


def summary(recordings: Sequence[Recording], limits_ms: Mapping[str, float] = NO_LIMITS) -> Summary:
    """Return the median duration over all trials, and the pooled latencies of all requests.

    The names are those of the serving benchmarks. The energy is None if some trial's was not
    measured, and the arrivals are None if all requests are there at the start.
    """
    duration = float(np.median([r.duration_ns for r in recordings])) / 1e9
    requests = recordings[0].requests
    inputs, outputs = int(requests.prompt_tokens.sum()), int(requests.output_tokens.sum())
    stepped = recordings[0].has_steps
    completed = int((requests.last >= 0).sum()) if stepped else len(requests.last)
    good = np.concatenate([within(r, limits_ms) for r in recordings])
    measured: list[Any] = [r.header.about.get("energy_joules") for r in recordings]
    joules = None if None in measured else float(np.median(measured))
    floor = decode_floor(recordings)
    rates = [rate for r in recordings if (rate := arrival_rate(r)) is not None]
    lags = [lag for r in recordings if (lag := arrival_lag_ms(r)) is not None]
    late = Distribution.of(np.concatenate([np.zeros(0), *lags]))
    latencies: dict[str, float | None] = {}
    for name, values in vars(Latencies.of(*recordings)).items():
        latencies |= statistics_of(name, values)
    return {
        "duration": duration,
        "completed": completed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": completed / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "energy_joules": joules,
        "joules_per_output_token": None if joules is None else joules / outputs,
        "floor_share": floor and floor["floor_share"],
        "request_goodput": int(good.sum()) / len(recordings) / duration if limits_ms else None,
        "slo_attainment": float(good.mean()) if limits_ms else None,
        **cast("Summary", latencies),  # the part of it that has the latencies
        "arrival_rate": float(np.median(rates)) if rates else None,
        "mean_arrival_lag_ms": late.mean(),
        "p99_arrival_lag_ms": late.percentile(99),
        "max_arrival_lag_ms": late.max,
    }


def statistics_of(name: str, values: Distribution) -> dict[str, float | None]:
    """Return the statistics of a latency as a summary names them."""
    figures = {
        f"mean_{name}_ms": values.mean(),
        f"median_{name}_ms": values.percentile(50),
        f"std_{name}_ms": values.std(),
    }
    for q in PERCENTILES:
        enough = q < 99.9 or values.count >= ENOUGH_FOR_P999
        figures[f"p{q:g}_{name}_ms"] = values.percentile(q) if enough else None
    return figures


# Counters


def counters(recording: Recording) -> Counters:
    """Return exact counts of the work, from the plans alone, of a recording that has steps.

    In each step each slot is exactly one of useful, prompt, finished, empty, stalled.
    """
    r, s, c = recording.requests, recording.spans, recording.chunks
    steps, slots = recording.num_steps, recording.header.slots
    with_chunks, decodes = s.chunks > 0, s.decoding > 0
    prompts, padded = prompt_tokens_of_spans(recording)
    useful, held = int(r.output_tokens.sum()), int((r.released - r.admitted).sum())
    prompt = int((c.stop != r.prompt_tokens[c.request]).sum())
    finished, empty = int((r.released - r.last - 1).sum()), steps * slots - held
    return {
        "forward_passes": steps,
        "prefill_passes": int((with_chunks & ~decodes).sum()),
        "mixed_passes": int((with_chunks & decodes).sum()),
        "decode_passes": int(s.steps[~with_chunks].sum()),
        "prefill_tokens": int(prompts.sum()),
        "padded_prefill_tokens": int(padded.sum()),
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
    """Return the largest sum of cached tokens of held slots, after any step.

    A request holds its prompt as far as it is computed and all its output tokens but the last,
    until its slot is released.
    """
    r, s = recording.requests, recording.spans
    # Every decode of a running request adds one token; a finished one that is held adds none.
    grown = SlotKinds.of(recording).useful * s.steps + prompt_tokens_of_spans(recording)[0]
    order = np.argsort(r.released)
    final = np.cumsum((r.prompt_tokens + r.output_tokens - 1)[order])
    gone = np.searchsorted(r.released[order], recording.first_steps + s.steps - 1, side="right")
    freed = np.concatenate([[0], final])[gone]
    return int((np.cumsum(grown) - freed).max())
