"""Prediction of other batch sizes: one workload served with each number of slots, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.reports import metrics
from batchbench.reports.prediction import beyond, predict
from batchbench.studies.predict.fitted import FittedRun
from batchbench.workloads import Workload

NEARLY_ALL = 0.95
"""Share of the best throughput with which a batch size suffices."""

STILL_GAINS = 0.10
"""Gain of the last doubling of slots above which the best lies at the edge of the range."""

BATCHES = 8
"""Batches of requests at the largest batch size, at least, if all are there at the start.

With fewer, most of the time would be the beginning and the end.
"""


@dataclass(frozen=True)
class Point:
    """Prediction of one strategy with one number of slots."""

    strategy: str
    batch_size: int
    duration: float
    output_throughput: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float | None
    p99_e2el_ms: float
    seen: bool  # no step goes beyond the fitted ones
    measured: bool  # the batch size of the run itself
    beyond: tuple[str, ...]  # in which respects a step does


@dataclass(frozen=True, eq=False)
class Curve:
    """Predictions for all batch sizes."""

    fitted: FittedRun
    points: Sequence[Point]
    requests: int
    closed: bool

    @property
    def strategies(self) -> list[str]:
        """Names, the baseline first."""
        return list(dict.fromkeys(p.strategy for p in self.points))

    @property
    def title(self) -> str:
        return f"{self.fitted.place} · {self.requests:,} requests · predicted"

    @property
    def measured(self) -> int:
        """The batch size of the run that the costs are from."""
        return int(self.fitted.result.data["config"]["serving"]["batch_size"])

    def of(self, strategy: str) -> list[Point]:
        """Return the points of a strategy, by batch size."""
        return sorted(
            (p for p in self.points if p.strategy == strategy), key=lambda p: p.batch_size
        )

    def sufficient(self, strategy: str) -> int:
        """Return the fewest slots with nearly all of the best throughput."""
        points = self.of(strategy)
        most = max(p.output_throughput for p in points)
        return next(p.batch_size for p in points if p.output_throughput >= NEARLY_ALL * most)

    def last_doubling(self, strategy: str) -> tuple[int, int, float] | None:
        """Return the last doubling of slots and the throughput that it adds, as a share."""
        points = self.of(strategy)
        last = points[-1]
        half = [p for p in points if 2 * p.batch_size <= last.batch_size]
        if not half:
            return None
        gain = last.output_throughput / half[-1].output_throughput - 1
        return half[-1].batch_size, last.batch_size, gain

    def is_at_edge(self, strategy: str) -> bool:
        """Return True if the last doubling still gains, so that the best lies at the edge."""
        doubling = self.last_doubling(strategy)
        return doubling is not None and doubling[2] > STILL_GAINS


def predict_slots(fitted: FittedRun, sizes: Sequence[int], queue_size: int | None) -> Curve:
    """Serve the result's workload with each number of slots.

    Raises:
        UsageError: the other settings exclude a batch size, or texts end early.
    """
    config = fitted.result.data["config"]
    if config["workload"]["stop_at_eos"]:
        raise UsageError(
            f"{fitted.known.source}: its texts end where the model ends them (--stop-at-eos), "
            "which cannot be predicted; give a result without --stop-at-eos"
        )
    serving = settings.from_json(ServingSpec, config["serving"], drop_unknown=True)
    workload = recorded_workload(fitted, queue_size, BATCHES * max(sizes))
    points = [
        _point(recording, size, fitted, serving.batch_size)
        for size in sizes
        for recording in predict(fitted.known, replace(serving, batch_size=size), workload)
    ]
    return Curve(fitted, points, len(workload), workload.closed)


def _point(recording: Recording, size: int, fitted: FittedRun, measured: int) -> Point:
    summary = metrics.summary([recording])
    outside = tuple(beyond(fitted.known, [recording]))
    names = ("duration", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
    values: dict[str, Any] = {name: summary[name] for name in (*names, "p99_e2el_ms")}
    return Point(
        strategy=recording.header.strategy,
        batch_size=size,
        seen=not outside,
        measured=size == measured,
        beyond=outside,
        **values,
    )


def recorded_workload(fitted: FittedRun, queue_size: int | None, at_least: int) -> Workload:
    """Return the requests of a result, repeated in turn until there are enough.

    Prompts are not in a recording; their lengths and times are, which is all that step costs
    depend on. Requests that came over time are not repeated, since later arrivals are unknown.
    """
    first = next(iter(fitted.result.recordings.values()))[0].requests
    data = fitted.result.data
    loop = data["config"]["workload"].get("max_concurrency")
    closed = data["workload"]["closed"] or loop is not None
    count = len(first.due_ns)
    if closed:
        count = queue_size or max(count, at_least)
    elif queue_size is not None:
        count = min(count, queue_size)
    which = np.arange(count) % len(first.due_ns)
    prompts = first.prompt_tokens[which]
    return Workload(
        name=data["workload"]["name"],
        seed=data["workload"]["seed"],
        prompt_ids=np.zeros(int(prompts.sum()), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(prompts)]),
        output_tokens=first.output_tokens[which],
        due_ns=np.zeros(count, np.int64) if closed else first.due_ns[which],
        max_concurrency=loop,
    )
