"""An engine with a virtual clock: no model runs; a step costs one unit, or a fitted time."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np

from batchbench.batching.engines import VirtualClock
from batchbench.batching.plan import Plan
from batchbench.batching.recording import GrowthLog, Steps
from batchbench.batching.step_cost import PS, StepCost
from batchbench.workloads import Workload

UNIT_NS = 1_000_000
"""Cost of a simulated step without a fitted cost: one unit, shown as a millisecond."""


class SimulatedEngine:
    """Advance a virtual clock by the ``cost`` of each step: fixed, in ns, or by its work."""

    simulated = True
    looks_late = False
    pads_prompts = False

    def __init__(self, cost: int | StepCost = UNIT_NS) -> None:
        self.clock = VirtualClock()
        self._cost = StepCost(cost) if isinstance(cost, int) else cost
        self._host_ns = round(self._cost.host_ns)

    def begin(self, workload: Workload) -> None:
        self.clock.restart()
        self._starts = array("q")
        self._spans = array("q")  # beyond, first, growth of each call, in ps
        self._ended, self._beyond_ps = 0, 0  # the clock counts whole nanoseconds
        self._steps = 0
        self._growing = self._chunks = -1  # of the last call

    def run(self, plan: Plan) -> int:
        start = self.clock.now()
        beyond = self._beyond_ps if start == self._ended else 0
        if self._host_ns and self._batch_changes(plan):
            start += self._host_ns
        passes = self._cost.of_plan(plan)
        steps = min(plan.repeat, passes.alike)
        if plan.until is not None:  # up to the first step that ends at or after it
            steps = min(steps, passes.until_ps((plan.until - start) * PS - beyond))
        self._starts.append(start)
        self._spans.extend((beyond, passes.first_ps, passes.growth_ps))
        spent, self._beyond_ps = divmod(beyond + passes.total_ps(steps), PS)
        self._ended = start + spent
        self.clock.wait_until(self._ended)
        self._steps += steps
        return steps

    def _batch_changes(self, plan: Plan) -> bool:
        """Return True if requests join or finish, so that the host decides something.

        Several calls for one unchanged batch cost no host time, however many they are.
        """
        chunks, self._chunks = self._chunks, len(plan.chunks)
        if plan.chunks:
            return True
        growing, self._growing = self._growing, int(plan.growing.sum())
        return bool(chunks or plan.released) or growing != self._growing

    def stopped(self, plan: Plan, *, late: bool = False) -> Collection[int]:
        return ()  # without a model no text ends

    def done(self) -> int:
        return self._steps

    def wait(self) -> None:
        """Return at once."""

    def collect(self) -> Steps:
        starts = np.array(self._starts, np.int64)
        beyond, first, growth = np.array(self._spans, np.int64).reshape(-1, 3).T.copy()
        whole = beyond.any() or growth.any() or (first % PS).any()
        log = GrowthLog(beyond, first % PS, growth) if whole else None
        return Steps(starts, step_ns=first // PS, growth=log)
