"""What both torch engines share: the loop over equal passes, the last tokens, times, the end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch

from batchbench.batching.engines import WallClock
from batchbench.batching.engines.torch.kernels import native
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Plan
from batchbench.batching.recording import Ints, Steps
from batchbench.workloads import Workload


class Timer(Protocol):
    """Notes the start of each run of steps and the end of each step."""

    def begin(self) -> None:
        """A new trial; sets the clock to 0."""

    def run_begins(self) -> None:
        """The first step of a run is about to be launched."""

    def step_launched(self) -> None:
        """A step was launched."""

    def settle(self) -> None:
        """Return when all steps that were launched are done."""

    def times(self) -> tuple[Ints, Ints]:
        """Starts, one a run, and ends, one a step, in ns since ``begin``; waits for the device."""


class HostTimer:
    """For devices that are done when the call returns, or that are waited for (MPS)."""

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock = clock
        self._wait = torch.mps.synchronize if device.type == "mps" else None

    def begin(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        if self._wait:
            self._wait()
        self._clock.restart()

    def run_begins(self) -> None:
        self._starts.append(self._clock.now())

    def step_launched(self) -> None:
        if self._wait:
            self._wait()
        self._ends.append(self._clock.now())

    def settle(self) -> None:
        """Nothing: they are."""

    def times(self) -> tuple[Ints, Ints]:
        return np.array(self._starts, np.int64), np.array(self._ends, np.int64)


class CudaTimer:
    """Events in the stream: nothing waits for the device while steps are launched.

    The host runs at most :data:`AHEAD` runs of steps ahead, so that progress and Ctrl-C stay
    close to what the device does.
    """

    AHEAD = 2

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock, self._device = clock, device

    def begin(self) -> None:
        self._starts: list[torch.cuda.Event] = []
        self._ends: list[torch.cuda.Event] = []
        self._run_ends: list[torch.cuda.Event] = []
        torch.cuda.synchronize(self._device)
        self._zero = self._event()
        torch.cuda.synchronize(self._device)
        self._clock.restart()

    def run_begins(self) -> None:
        if self._ends:
            self._run_ends.append(self._ends[-1])
            if len(self._run_ends) > self.AHEAD:
                self._run_ends[-self.AHEAD - 1].synchronize()
        self._starts.append(self._event())

    def step_launched(self) -> None:
        self._ends.append(self._event())

    def settle(self) -> None:
        if self._ends:
            self._ends[-1].synchronize()

    def times(self) -> tuple[Ints, Ints]:
        torch.cuda.synchronize(self._device)
        return self._since_zero(self._starts), self._since_zero(self._ends)

    def _since_zero(self, events: list[torch.cuda.Event]) -> Ints:
        return np.array([round(self._zero.elapsed_time(e) * 1e6) for e in events], np.int64)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def make_timer(clock: WallClock, device: torch.device) -> Timer:
    """The timer that fits the device."""
    return CudaTimer(clock, device) if device.type == "cuda" else HostTimer(clock, device)


class TorchEngine:
    """Runs plans on a loaded model; what a pass computes is the subclass's business."""

    simulated = False
    pads_prompts = False
    execution = "eager"

    def __init__(self, model: LoadedModel, slots: int) -> None:
        self.clock = WallClock()
        self._model = model
        self._device = model.device
        self._timer = make_timer(self.clock, model.device)
        self._last = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._log: list[torch.Tensor] = []  # the last tokens of all slots after each step
        self._eos = set(model.source.eos_token_ids)

    def begin(self, workload: Workload) -> None:
        """A new trial."""
        self._workload = workload
        self._log = []
        self._last.zero_()
        self._forget()
        self._computed_before = self._computed
        self._timer.begin()

    @torch.inference_mode()
    def run(self, plan: Plan) -> int:
        """Compute the passes of a plan, up to the first that ends at or after ``plan.until``."""
        self._timer.run_begins()
        self._prepare(plan)
        for step in range(plan.repeat):
            self._advance(plan, step)
            self._log.append(self._last.clone())
            self._timer.step_launched()
            if plan.until is not None:
                # Who has come by the end of this step may join the next: a host that ran ahead
                # would have decided without them.
                self._timer.settle()
                if self.clock.now() >= plan.until:
                    return step + 1
        return plan.repeat

    def stopped(self, plan: Plan) -> Collection[int]:
        """Slots of the plan that yielded an end-of-text token in the last step."""
        last = self._last.tolist()  # waits for the device: the decision needs the value
        return [slot for slot in yielding_slots(plan) if last[slot] in self._eos]

    def wait(self) -> None:
        self._timer.settle()

    def collect(self) -> Steps:
        """Times and tokens of the whole trial."""
        starts, ends = self._timer.times()
        tokens = torch.stack(self._log).to("cpu", torch.int32).numpy()
        computed = self._computed - self._computed_before
        return Steps(starts, ends_ns=ends, tokens=tokens, computed=computed)

    # What a subclass does

    @property
    def _computed(self) -> int:
        """Forward passes that the model has computed so far, counted where it is called."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Nothing is cached any more."""

    def _prepare(self, plan: Plan) -> None:
        """Set up what all passes of the plan share."""
        self._yielding = self._tensor(yielding_slots(plan))

    def _advance(self, plan: Plan, step: int) -> None:
        """One pass: the slots that yield get their next tokens."""
        self._last.index_copy_(0, self._yielding, self._forward(plan, step))

    def _forward(self, plan: Plan, step: int) -> torch.Tensor:
        """One pass; the next token of each yielding slot, ``[yielding]``."""
        raise NotImplementedError

    def _tensor(self, values: Collection[int] | np.ndarray) -> torch.Tensor:
        """Integers on the device."""
        array = np.asarray(values, np.int64)
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def yielding_slots(plan: Plan) -> list[int]:
    """Slots that get a token: those that decode, then those whose prompt ends in this pass."""
    decoding: list[int] = plan.slots.tolist()
    return decoding + [chunk.slot for chunk in plan.chunks if chunk.yields]


_WINDOW = 256


def best_token(logits: torch.Tensor) -> torch.Tensor:
    """The greedy choice, ``[rows, vocabulary]`` to ``[rows]``; the first of equals.

    Not ``argmax``, nor ``max`` with its indices: neither is vectorised on a CPU, and both take
    several times as long as finding the largest value, then its place in the window that has it,
    which is what is done where there is no kernel of our own.
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        own = native()
        if own is not None and own.chooses(logits):
            return own.greedy(logits)
    width = logits.shape[1]
    if logits.device.type != "cpu" or width <= _WINDOW:
        return logits.max(-1).indices
    whole = width // _WINDOW * _WINDOW
    largest = logits[:, :whole].view(len(logits), whole // _WINDOW, _WINDOW).amax(-1)
    if whole < width:
        largest = torch.cat([largest, logits[:, whole:].amax(-1, keepdim=True)], 1)
    start = (largest.max(-1).indices * _WINDOW).clamp_(max=width - _WINDOW)[:, None]
    within = logits.gather(1, start + torch.arange(_WINDOW))
    return within.max(-1).indices + start[:, 0]
