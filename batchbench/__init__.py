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

_NAMES = {
    "api": ("Result", "load", "run", "simulate"),
    "batching.experiment": ("Experiment", "ServingSpec", "TrialsSpec"),
    "batching.models.source": ("ModelSpec",),
    "batching.policies": ("Policy", "View"),
    "batching.progress": ("Watch",),
    "batching.recording": ("Recording",),
    "batching.session": ("Outcome", "conduct"),
    "errors": ("BatchbenchError", "UsageError"),
    "workloads.request": ("Request", "Workload"),
    "workloads.spec": ("WorkloadSpec",),
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
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
