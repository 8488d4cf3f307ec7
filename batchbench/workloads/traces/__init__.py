"""Traces of requests in the formats of others and our own, read row by row."""

from batchbench.workloads.traces.formats import write_workload
from batchbench.workloads.traces.reading import Trace, read_trace
from batchbench.workloads.traces.rows import BadRow

__all__ = ["BadRow", "Trace", "read_trace", "write_workload"]
