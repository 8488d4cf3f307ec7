"""Strategies, and the batcher: the loop that plans, runs and applies until all is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from batchbench.batching.engines import Engine
from batchbench.batching.plan import Plan, Wait
from batchbench.batching.policies import Policy, make_policy
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Header, Recorder, Recording
from batchbench.batching.scheduler import Scheduler
from batchbench.workloads import Arrivals, Request, Workload

_CALL_NS = 100_000_000
"""Maximum duration of an engine call on a real clock, so that the display and Ctrl-C respond."""


class Strategy(Protocol):
    """A way to serve a workload: our batcher, another engine's scheduler, or a remote server."""

    @property
    def name(self) -> str:
        """The name in results."""

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Serve every request of the workload once."""


@dataclass(frozen=True)
class Batcher:
    """Our scheduler on one engine, under ``policy`` or else the policy that ``name`` names."""

    name: str
    engine: Engine
    slots: int
    order: str = "fifo"
    prefill: str = "separate"
    max_batched_tokens: int = 2048
    max_wait_ns: int = 0
    max_repeat: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy | None = None

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        serving = Serving(self, workload, watch, trial=trial)
        while (recording := serving.advance()) is None:
            pass
        return recording


class Serving:
    """One trial under way. Each :meth:`advance` plans, runs and applies once.

    A caller that controls the pace reads ``steps``, the number of steps launched so far.
    """

    def __init__(
        self, batcher: Batcher, workload: Workload, watch: Watch, *, trial: int = 0
    ) -> None:
        self._batcher, self._engine, self._clock = batcher, batcher.engine, batcher.engine.clock
        self._workload, self._watch = workload, watch
        self._arrivals = Arrivals(workload)
        self._scheduler = Scheduler(
            self._arrivals,
            batcher.policy or make_policy(batcher.name, max_wait_ns=batcher.max_wait_ns),
            batcher.slots,
            order=batcher.order,
            prefill=batcher.prefill,
            max_batched_tokens=batcher.max_batched_tokens,
            lengths_known=not workload.stop_at_eos,
        )
        self._recorder = Recorder(workload)
        self._unseen: Plan | None = None  # run, but its tokens were not looked at
        self._progress = Progress(batcher.name, trial, batcher.slots, len(workload))
        self._engine.begin(workload)

    @property
    def steps(self) -> int:
        return self._recorder.steps

    def advance(self, most: int | None = None) -> Recording | None:
        """Run the next plan, at most ``most`` steps of it; return the recording if none is left."""
        plan = self._scheduler.plan(self._clock.now())
        while isinstance(plan, Wait):
            self._wait(plan.until)
            plan = self._scheduler.plan(self._clock.now())
        if plan is None:
            return self._collect()
        launched = self._engine.run(self._shortened(plan, most))
        finished = self._looked_back()
        self._recorder.launched(plan, launched, len(self._scheduler.waiting))
        finished += self._applied(plan, launched)
        all_done = self._progress.done + len(finished) == len(self._workload)
        if finished and (self._arrivals.closed_loop or all_done):
            self._engine.wait()  # the next request of a closed loop is due at the end of this step
        now = self._clock.now()
        for _, request in finished:
            self._arrivals.finished(request, now)
        self._progress.advance(plan, launched, len(finished), now)
        self._watch.progressed(self._progress)
        return None

    def _looked_back(self) -> list[tuple[int, Request]]:
        """Finish the requests whose text ended in the pass before the one just launched.

        A GPU would wait for the host that looks at its tokens. So the host launches the next pass
        first: it holds the slots of these requests, as a batch does that waits for its longest.
        """
        if self._unseen is None:
            return []
        stopped = self._engine.stopped(self._unseen, late=True)
        return self._logged(self._scheduler.stop(stopped))

    def _applied(self, plan: Plan, launched: int) -> list[tuple[int, Request]]:
        """Apply a plan; return (slot, request) for each request that it is known to finish."""
        stopped: Collection[int] = ()
        self._unseen = None
        if self._workload.stop_at_eos:
            # The next request of a closed loop, or one that may arrive, must not wait for a look.
            at_once = self._arrivals.closed_loop or plan.until is not None
            if self._engine.looks_late and not at_once:
                self._unseen = plan
            else:
                stopped = self._engine.stopped(plan)
        return self._logged(self._scheduler.apply(plan, launched, stopped))

    def _logged(self, finished: list[tuple[int, Request]]) -> list[tuple[int, Request]]:
        for _, request in finished:
            self._recorder.finished(request)
        return finished

    def _wait(self, until: int) -> None:
        began = self._clock.now()
        self._progress.idle(began, until)
        self._watch.idles(self._progress)
        self._clock.wait_until(until)
        self._recorder.waited(began, until, self._clock.now(), len(self._scheduler.waiting))

    def _shortened(self, plan: Plan, most: int | None) -> Plan:
        """Limit the plan to ``most`` passes, and to about ``_CALL_NS`` of time."""
        limits = [limit for limit in (self._batcher.max_repeat, most) if limit is not None]
        if not self._engine.simulated and plan.repeat > 1:
            spent = max(self._clock.now() - self._recorder.waited_ns, 1)
            # A GPU's host launches steps long before they are done.
            limits.append(max(1, _CALL_NS * self._engine.done() // spent))
        repeat = min([plan.repeat, *limits])
        return plan if repeat == plan.repeat else replace(plan, repeat=repeat)

    def _collect(self) -> Recording:
        steps, batcher = self._engine.collect(), self._batcher
        about = {
            **batcher.about,
            "pads_prompts": self._engine.pads_prompts,
            "wall_ns": self._progress.now_ns,
            "computed_passes": steps.computed,
        }
        trial, simulated = self._progress.trial, self._engine.simulated
        header = Header.of(
            batcher.name, trial, batcher.slots, self._workload, about, simulated=simulated
        )
        return self._recorder.recording(header, steps)
