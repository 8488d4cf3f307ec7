"""An engine with a virtual clock: every step costs the same, and no model runs."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np

from batchbench.batching.clock import VirtualClock
from batchbench.batching.plan import Plan
from batchbench.batching.recording import Steps
from batchbench.workloads import Workload

UNIT_NS = 1_000_000
"""What a step costs in simulation: one unit, shown as a millisecond."""


class SimulatedEngine:
    """Lets time pass as if it computed."""

    simulated = True
    pads_prompts = False

    def __init__(self, step_ns: int = UNIT_NS) -> None:
        self.clock = VirtualClock()
        self._step_ns = step_ns
        self._starts = array("q")

    def begin(self, workload: Workload) -> None:
        self.clock.restart()
        self._starts = array("q")

    def run(self, plan: Plan) -> int:
        now, steps = self.clock.now(), plan.repeat
        if plan.until is not None:  # up to the first step that ends at or after it
            steps = min(steps, max(1, -((now - plan.until) // self._step_ns)))
        self._starts.append(now)
        self.clock.wait_until(now + steps * self._step_ns)
        return steps

    def stopped(self, plan: Plan) -> Collection[int]:
        """Nobody: without a model no text ends."""
        return ()

    def wait(self) -> None:
        """Nothing: what was run is done."""

    def collect(self) -> Steps:
        starts = np.array(self._starts, np.int64)
        return Steps(starts, step_ns=np.full(len(starts), self._step_ns, np.int64))
