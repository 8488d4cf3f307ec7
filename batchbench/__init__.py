"""Measure how much continuous batching gains over static batching on your hardware and workload.

    import batchbench
    r = batchbench.run(batch_size=8, queue_size=32)
    r.summary, r.requests, r.plot.timeline()

Names are imported on first use, so that ``import batchbench`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from batchbench.version import __version__

if TYPE_CHECKING:
    from batchbench.api import Result, load, run, simulate
    from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
    from batchbench.batching.models.source import ModelSpec
    from batchbench.batching.policies import Policy, View
    from batchbench.batching.progress import Watch
    from batchbench.batching.recording import Recording
    from batchbench.batching.session import Outcome, conduct
    from batchbench.errors import BatchbenchError, UsageError
    from batchbench.workloads.request import Request, Workload
    from batchbench.workloads.spec import WorkloadSpec

__distribution__ = "batchbench-llm"  # tells our package from another project's of the same name

_HOMES = {
    "BatchbenchError": "errors",
    "Experiment": "batching.experiment",
    "ModelSpec": "batching.models.source",
    "Outcome": "batching.session",
    "Policy": "batching.policies",
    "Recording": "batching.recording",
    "Request": "workloads.request",
    "Result": "api",
    "ServingSpec": "batching.experiment",
    "TrialsSpec": "batching.experiment",
    "UsageError": "errors",
    "View": "batching.policies",
    "Watch": "batching.progress",
    "Workload": "workloads.request",
    "WorkloadSpec": "workloads.spec",
    "conduct": "batching.session",
    "load": "api",
    "run": "api",
    "simulate": "api",
}

__all__ = [
    "BatchbenchError",
    "Experiment",
    "ModelSpec",
    "Outcome",
    "Policy",
    "Recording",
    "Request",
    "Result",
    "ServingSpec",
    "TrialsSpec",
    "UsageError",
    "View",
    "Watch",
    "Workload",
    "WorkloadSpec",
    "__version__",
    "conduct",
    "load",
    "run",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
