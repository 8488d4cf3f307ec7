"""Times within a span: the Recording alone derives them, and spans may be cut anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from costs import costs, run, with_listed_ends
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Config, configs, law, workloads

from batchbench.batching import recording as module
from batchbench.batching.cost import StepCost
from batchbench.workloads import Workload

POLICIES = ("static", "static-fixed", "static-bucketed", "static-oracle", "continuous")

some = settings(law, max_examples=60)


@pytest.mark.parametrize("measured", [False, True])
@given(workload=workloads(), config=configs(policies=POLICIES), cost=costs, part=st.floats(0, 1.1))
@some
def test_steps_at_times_are_those_that_a_list_of_all_steps_shows(
    measured: bool, workload: Workload, config: Config, cost: StepCost, part: float
) -> None:
    recording = run(workload, config, cost)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    recording = with_listed_ends(recording) if measured else recording
    near = np.concatenate([starts, ends, ends - 1, ends + 1, [int(part * ends[-1])]])
    times = near[near >= 0]
    assert recording.step_at(times).tolist() == [int((ends <= t).sum()) for t in times]
    free = []
    for t in times.tolist():
        under_way = np.flatnonzero((starts < t) & (t < ends))
        free.append(int(ends[under_way[0]]) if len(under_way) else t)
    assert recording.free_from(times).tolist() == free


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@given(workload=workloads(), config=configs(policies=POLICIES), cost=costs, skip=st.integers(0, 2))
@some
def test_step_times_are_those_of_each_step(
    measured: bool, block: int, workload: Workload, config: Config, cost: StepCost, skip: int
) -> None:
    recording = run(workload, config, cost)
    took = recording.step_ends_ns - recording.step_starts_ns
    recording = with_listed_ends(recording) if measured else recording
    chosen = np.arange(0, len(recording.spans.steps), 2)
    expected = {
        step: (span, took[step])
        for span in chosen.tolist()
        for step in range(
            int(recording.first_steps[span]) + skip,
            int(recording.first_steps[span] + recording.spans.steps[span]),
        )
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        for part in recording.step_times(chosen, skip):
            rows = zip(
                *(c.tolist() for c in (part.span, part.step, part.count, part.ns)), strict=True
            )
            for span, first, count, ns in rows:
                for step in range(first, first + count):
                    assert step not in found
                    found[step] = (span, ns)
    assert found == expected
