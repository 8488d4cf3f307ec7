"""Trace files that people have: read row by row, a wrong row named by its place."""

from batchbench.workloads.traces.reading import Trace, read_trace

__all__ = ["Trace", "read_trace"]
