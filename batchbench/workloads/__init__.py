"""Requests to serve: their lengths, prompts, arrivals and traces; nothing about serving."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchbench.workloads.arrivals import Arrivals
    from batchbench.workloads.generate import make_workload
    from batchbench.workloads.request import Request, Workload
    from batchbench.workloads.spec import WorkloadSpec

__all__ = ["Arrivals", "Request", "Workload", "WorkloadSpec", "make_workload"]

_HOMES = {
    "Arrivals": "arrivals",
    "Request": "request",
    "Workload": "request",
    "WorkloadSpec": "spec",
    "make_workload": "generate",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``--help`` needs the spec and not NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
