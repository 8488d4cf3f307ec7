"""Engines: what runs a Plan. Each owns its KV cache and the last token of every slot."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from batchbench.batching.clock import Clock
from batchbench.batching.plan import Plan
from batchbench.batching.recorder import Steps
from batchbench.workloads import Workload


class Engine(Protocol):
    """Computes plans and tells when each step ended."""

    @property
    def clock(self) -> Clock:
        """The clock of the trial: the wall's, or a virtual one."""

    @property
    def simulated(self) -> bool:
        """Whether time is virtual and no model runs."""

    @property
    def pads_prompts(self) -> bool:
        """Whether prompts that are computed together are all computed as long as the longest."""

    def begin(self, workload: Workload) -> None:
        """A new trial: forget everything, and set the clock to 0."""

    def run(self, plan: Plan) -> int:
        """Compute up to ``plan.repeat`` passes; the number of steps launched, at least 1."""

    def stopped(self, plan: Plan) -> Collection[int]:
        """Slots of ``plan`` whose last token ends its text; waits for that token."""

    def wait(self) -> None:
        """Return when all that was launched is computed."""

    def collect(self) -> Steps:
        """Wait for all that was launched, and tell times and tokens of the whole trial."""
