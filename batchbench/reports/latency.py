"""Latencies of requests: functions of one Recording, an entry a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Recording
from batchbench.reports.gaps import gaps_ms
from batchbench.reports.statistics import Distribution, Floats


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
