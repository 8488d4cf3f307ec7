"""Prediction: what one strategy's steps say of another, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import GENERATE_BATCH, ServingSpec
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import Outcome, make_batcher
from batchbench.batching.step_cost import KnownCost
from batchbench.errors import UsageError
from batchbench.reports.fitting import beyond, known_cost, small_batches_of
from batchbench.reports.latency import ttft_ms
from batchbench.workloads import Workload


def predict_outcome(outcome: Outcome) -> dict[str, Any] | None:
    """What the first strategy's trials predict of every strategy; for ``result.json``.

    None of a simulation, where texts end as the model likes, and where too few steps were timed.
    """
    if outcome.experiment.simulated or outcome.workload.stop_at_eos:
        return None
    teacher, trials = next(iter(outcome.recordings.items()))
    try:
        small = small_batches_of(outcome.small_batches)
        known, quality = known_cost(teacher, trials, small)
    except UsageError:
        return None
    told = predict(known, outcome.experiment.serving, outcome.workload)
    return {
        "fitted_on": teacher,
        "cost": known.as_dict(),
        "held_out": quality.as_dict(),
        "strategies": [
            _beside(known, recording, outcome.recordings[recording.header.strategy])
            for recording in told
            if recording.header.strategy in outcome.recordings
        ],
    }


def predict(known: KnownCost, serving: ServingSpec, workload: Workload) -> list[Recording]:
    """A recording a strategy: the workload under the same scheduler, on a virtual clock.

    Not of a strategy that schedules for itself, which no simulation knows.
    """
    engine = SimulatedEngine(known.cost)
    about = {"cost": known.as_dict()}
    return [
        make_batcher(name, serving, engine, about).serve(workload, Watch())
        for name in serving.strategies
        if name != GENERATE_BATCH
    ]


def _beside(known: KnownCost, told: Recording, trials: Sequence[Recording]) -> dict[str, Any]:
    duration = told.duration_ns / 1e9
    measured = float(np.median([trial.duration_ns for trial in trials])) / 1e9
    ttft = np.mean([ttft_ms(trial).mean() for trial in trials])
    return {
        "strategy": told.header.strategy,
        "duration": duration,
        "measured_duration": measured,
        "error": duration / measured - 1,
        "output_throughput": int(told.requests.output_tokens.sum()) / duration,
        "mean_ttft_ms": float(ttft_ms(told).mean()),
        "measured_mean_ttft_ms": float(ttft),
        "extrapolates": beyond(known, [told]),
    }
