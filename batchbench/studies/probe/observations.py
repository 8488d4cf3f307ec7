"""Observations of a server: when each request was sent and when its tokens arrived.

All times are integer nanoseconds on one clock. Nothing here knows HTTP; the judge works on these
values alone, whether they come from a server or from a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BUFFERED_SHARE = 0.02
"""Streams whose tokens all arrive within this share of the latency show no steps."""

BUFFERED_GAP_NS = 1_000_000  # gaps below 1 ms are shorter than what a client can separate


class Role(StrEnum):
    """The part that a request plays in a round."""

    ALONE = "alone"
    LONG = "long"
    SHORT = "short"
    BURST = "burst"
    PAIR = "pair"


@dataclass(frozen=True)
class Stream:
    """A request and its tokens."""

    role: Role
    asked: int  # output tokens
    sent_ns: int
    times_ns: tuple[int, ...] = ()  # arrival of each token; those of one chunk share a time
    refused: bool = False  # the server said that it has no room (HTTP 429 or 503)
    failure: str = ""  # why it failed otherwise
    hidden: int = 0  # tokens that the server counted and did not show, such as half a character

    @property
    def answered(self) -> bool:
        return bool(self.times_ns) and not self.refused and not self.failure

    @property
    def lack(self) -> str:
        """Why it has no tokens to look at, in a few words; empty if it has some."""
        if self.answered:
            return ""
        return "refused" if self.refused else "no token shown" if self.hidden else "failed"

    @property
    def first_ns(self) -> int:
        return self.times_ns[0]

    @property
    def last_ns(self) -> int:
        return self.times_ns[-1]

    @property
    def e2e_ns(self) -> int:
        return self.last_ns - self.sent_ns

    @cached_property
    def chunks(self) -> tuple[Ints, Ints]:
        """The time of each chunk and its number of tokens, ``[chunks]`` each."""
        return np.unique(np.array(self.times_ns, np.int64), return_counts=True)

    @property
    def arrivals_ns(self) -> Ints:
        """The times at which a chunk arrived, each once, ``[chunks]``."""
        return self.chunks[0]

    @cached_property
    def steps_ns(self) -> Floats:
        """The time of each token's step after the first chunk, ``[tokens after it]``.

        A server that sends every k-th step has sent nothing in between: those steps are put at
        equal distances.
        """
        times, counts = self.chunks
        parts = [
            start + (stop - start) * np.arange(1, count + 1) / count
            for start, stop, count in zip(times[:-1], times[1:], counts[1:], strict=True)
        ]
        return np.concatenate([times[:1].astype(np.float64), *parts])


@dataclass(frozen=True)
class Round:
    """Requests that were sent together, in the order in which they were sent."""

    streams: Sequence[Stream]

    def of(self, role: Role) -> list[Stream]:
        return [stream for stream in self.streams if stream.role is role]


@dataclass(frozen=True)
class Server:
    """The server's own statements about itself; None where it makes none."""

    slots: int | None = None  # requests that it serves at once
    others: int | None = None  # requests of others that it had before the probe, or during it
    passes: int | None = None  # forward passes that it counted during the probe
    tokens: int | None = None  # output tokens that the probe received meanwhile
    context: int | None = None  # the largest number of tokens of one request


@dataclass(frozen=True)
class Observations:
    """Everything that a probe saw."""

    rounds: Sequence[Round]
    server: Server = Server()
    lag_ns: int = 0  # of the client itself (p99); 0 where the system stamps arrivals
    ended: str = ""  # why the probe ended before it had seen enough

    @property
    def streams(self) -> list[Stream]:
        return [stream for round in self.rounds for stream in round.streams]

    def of(self, role: Role) -> list[Round]:
        """Return the rounds that have requests of a role."""
        return [round for round in self.rounds if round.of(role)]

    @cached_property
    def alone(self) -> list[Stream]:
        """The requests that were served alone, without the first, which warms the server up."""
        alone = [stream for stream in self.streams if stream.role is Role.ALONE]
        return [stream for stream in alone[1:] or alone if stream.answered]


@dataclass(frozen=True)
class Pace:
    """A request that is served alone, by medians."""

    ttft_ns: float  # of a buffered server, what a request takes beyond its steps
    gap_ns: float  # time of a token
    chunk: int  # output tokens that arrive together
    buffered: bool  # all tokens of a request arrive together at its end

    def e2e_ns(self, tokens: int) -> float:
        """Return the expected time of a request of so many tokens."""
        return self.ttft_ns + max(tokens - 1, 0) * self.gap_ns

    def begin_ns(self, stream: Stream, share: float = 1.0) -> float:
        """Return when a request had its first token.

        A buffered server does not show it; it is estimated with a share of the time of its steps.
        """
        steps_ns = share * (len(stream.times_ns) - 1) * self.gap_ns
        return stream.last_ns - steps_ns if self.buffered else float(stream.first_ns)


def pace_of(answered: Sequence[Stream]) -> Pace | None:
    """Return the pace of requests that were served alone and answered; None if there are none."""
    if not answered:
        return None
    several = [s for s in answered if len(s.times_ns) > 1]
    buffered = bool(several) and all(map(_is_buffered, several))
    gap = _slope(answered) if buffered else median_gap(several)
    waits = [
        s.e2e_ns - (len(s.times_ns) - 1) * gap if buffered else s.first_ns - s.sent_ns
        for s in answered
    ]
    # Of the chunks between the first and the last, if there are any.
    sizes = [s.chunks[1] for s in several if len(s.arrivals_ns) > 1]
    sizes = [counts[1:-1] if len(counts) > 2 else counts[1:] for counts in sizes]
    chunk = np.median([np.median(size) for size in sizes]) if sizes else 1
    return Pace(max(float(np.median(waits)), 0.0), gap, max(1, round(float(chunk))), buffered)


def _is_buffered(stream: Stream) -> bool:
    span = stream.last_ns - stream.first_ns
    count = len(stream.times_ns) - 1
    return span / count < BUFFERED_GAP_NS and span < BUFFERED_SHARE * stream.e2e_ns


def median_gap(streams: Sequence[Stream]) -> float:
    """Return the median time of a token after the first chunk."""
    gaps = [np.diff(s.steps_ns) for s in streams if len(s.arrivals_ns) > 1]
    return float(np.median(np.concatenate(gaps))) if gaps else 0.0


def _slope(streams: Sequence[Stream]) -> float:
    """Return the time of a token from requests of different lengths."""
    fastest: dict[int, int] = {}
    for stream in streams:
        tokens = len(stream.times_ns)
        fastest[tokens] = min(stream.e2e_ns, fastest.get(tokens, stream.e2e_ns))
    low, high = min(fastest), max(fastest)
    if low == high:
        return fastest[low] / low
    return max(0.0, (fastest[high] - fastest[low]) / (high - low))
