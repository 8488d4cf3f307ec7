"""Traces of requests in other tools' formats and in batchbench's own, read row by row."""

from batchbench.workloads.traces.formats import write_workload
from batchbench.workloads.traces.reading import BadRow, Trace, read_trace

__all__ = ["BadRow", "Trace", "read_trace", "write_workload"]
