"""Costs of a step, and simulations with them, for several test files."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import StepCost
from batchbench.workloads import Workload
from support.laws import Config, serve

costs = st.builds(
    StepCost,
    *(st.floats(low, most) for low, most in ((1, 50), (0, 9), (0, 2), (0, 3), (0, 5), (0, 7))),
    bends=st.dictionaries(st.integers(1, 9), st.floats(0, 9), max_size=3).map(
        lambda slopes: tuple(sorted(slopes.items()))
    ),
)
"""Any cost: fractions of a nanosecond, growth with the cache, time of the host."""


def run(workload: Workload, config: Config, cost: StepCost, **how: int | None) -> Recording:
    """Return the recording of a simulation with this cost."""
    return serve(workload, config, engine=SimulatedEngine(cost), **how)


def with_listed_ends(recording: Recording) -> Recording:
    """Return the same trial with the measured end of each step, as a real engine records it."""
    return replace(recording, ends_ns=recording.step_ends_ns, step_ns=None, growth=None)
