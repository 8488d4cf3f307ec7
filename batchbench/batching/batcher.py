"""Strategies: whatever serves a workload and tells how it went."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from batchbench.batching.engines import Engine
from batchbench.batching.plan import Plan, Wait
from batchbench.batching.policies import Policy, make_policy
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recorder import Recorder
from batchbench.batching.recording import Header, Recording
from batchbench.batching.scheduler import Scheduler
from batchbench.workloads import Workload, make_arrivals

_TURN_NS = 100_000_000
"""On a real clock no call of the engine is longer, for the display and for Ctrl-C."""


class Strategy(Protocol):
    """A way of serving."""

    @property
    def name(self) -> str:
        """As in results."""

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Serve every request of the workload once."""


@dataclass(frozen=True)
class Batcher:
    """Our scheduler under one policy, on one engine."""

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
    """One that is made already, where the name does not tell which."""

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Plan, run, apply, until all is done."""
        paced = self.paced(workload, watch, trial=trial)
        try:
            while True:
                next(paced)
        except StopIteration as done:
            recording: Recording = done.value
            return recording

    def paced(
        self, workload: Workload, watch: Watch, *, trial: int = 0
    ) -> Generator[int, int | None, Recording]:
        """As :meth:`serve`, at the caller's pace.

        Yields how many steps were launched so far: first 0, then after each call of the engine.
        What is sent is the most steps that the next call may take; None leaves it to the plan.
        """
        engine, clock = self.engine, self.engine.clock
        arrivals = make_arrivals(workload)
        scheduler = Scheduler(
            arrivals,
            self.policy or make_policy(self.name, max_wait_ns=self.max_wait_ns),
            self.slots,
            order=self.order,
            prefill=self.prefill,
            max_batched_tokens=self.max_batched_tokens,
            lengths_known=not workload.stop_at_eos,
        )
        recorder = Recorder(workload)
        progress = Progress(self.name, trial, self.slots, len(workload))
        engine.begin(workload)
        most = yield 0
        while (plan := scheduler.plan(clock.now())) is not None:
            if isinstance(plan, Wait):
                began = clock.now()
                progress.idle(began, plan.until)
                watch.idles(progress)
                clock.wait_until(plan.until)
                recorder.waited(began, plan.until, clock.now(), scheduler.num_waiting)
                continue
            launched = engine.run(
                self._shortened(plan, recorder.steps, clock.now() - recorder.waited_ns, most)
            )
            recorder.launched(plan, launched, scheduler.num_waiting)
            stopped = engine.stopped(plan) if workload.stop_at_eos else ()
            finished = scheduler.apply(plan, launched, stopped)
            all_done = progress.done + len(finished) == len(workload)
            if finished and (arrivals.closed_loop or all_done):
                engine.wait()  # whoever comes next is due at the end of this step
            ended = clock.now()
            for _, request in finished:
                recorder.finished(request)
                arrivals.finished(request, ended)
            progress.advance(plan, launched, len(finished), ended)
            watch.progressed(progress)
            most = yield recorder.steps
        ran = engine.collect()
        header = Header(
            strategy=self.name,
            trial=trial,
            slots=self.slots,
            simulated=engine.simulated,
            workload={"name": workload.name, "seed": workload.seed, "digest": workload.digest},
            about={
                **self.about,
                "pads_prompts": engine.pads_prompts,
                "wall_ns": progress.now_ns,
                "computed_passes": ran.computed,
            },
        )
        return recorder.recording(header, ran)

    def _shortened(self, plan: Plan, steps: int, spent_ns: int, most: int | None) -> Plan:
        """The plan with ``most`` passes, and no more than fit a turn by the mean step so far."""
        limits = [limit for limit in (self.max_repeat, most) if limit is not None]
        if not self.engine.simulated and plan.repeat > 1:
            limits.append(max(1, _TURN_NS * steps // max(spent_ns, 1)) if steps else 1)
        repeat = min([plan.repeat, *limits])
        return plan if repeat == plan.repeat else replace(plan, repeat=repeat)
