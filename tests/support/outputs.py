"""Recordings as if a model had produced given outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.workloads import Workload


def recording_of(
    workload: Workload, outputs: Sequence[Sequence[int]], strategy: str = "static"
) -> Recording:
    """Return a recording as if these outputs had been produced."""
    simulated = Batcher(strategy, SimulatedEngine(), 2).serve(workload, Watch())
    produced = np.array([len(tokens) for tokens in outputs], np.int64)
    return replace(
        simulated,
        requests=replace(simulated.requests, output_tokens=produced),
        tokens=np.array([token for tokens in outputs for token in tokens], np.int32),
    )
