"""Decode steps: those that compute one token a row and no piece of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.batching.roofline import Reading


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
