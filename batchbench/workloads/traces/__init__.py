"""Traces of requests in other tools' formats and in batchbench's own, read row by row."""

from batchbench.workloads.traces.formats import write_workload
from batchbench.workloads.traces.reading import Trace, read_trace
from batchbench.workloads.traces.rows import BadRow

__all__ = ["BadRow", "Trace", "read_trace", "write_workload"]
