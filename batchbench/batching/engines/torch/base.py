"""The base of both torch engines: the loop over equal passes, the last tokens, and step times."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchbench.batching.engines import WallClock
from batchbench.batching.engines.torch.sampling import Chooser
from batchbench.batching.models.loading import LoadedModel, current
from batchbench.batching.plan import Plan
from batchbench.batching.recording import Ints, Steps
from batchbench.errors import UsageError
from batchbench.workloads import Workload


class HostTimer:
    """Step times on a CPU, where a call returns when done, and on MPS, after a wait for it."""

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock = clock
        self._wait = torch.mps.synchronize if device.type == "mps" else lambda: None

    def begin(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._wait()
        self._clock.restart()

    def run_begins(self) -> None:
        self._starts.append(self._clock.now())

    def step_launched(self) -> None:
        self._wait()
        self._ends.append(self._clock.now())

    def done(self) -> int:
        return len(self._ends)

    def settle(self) -> None:
        """Return at once: on a CPU a launched step is done."""

    def times(self) -> tuple[Ints, Ints]:
        """Return starts, one a run, and ends, one a step, in ns since ``begin``."""
        return np.array(self._starts, np.int64), np.array(self._ends, np.int64)


class CudaTimer:
    """Step times of a GPU: events in the stream, so launching does not wait for the device."""

    AHEAD = 2  # runs of steps, so that progress and Ctrl-C stay close to the device

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock, self._device = clock, device

    def begin(self) -> None:
        self._events: list[torch.cuda.Event] = []  # the zero of time, then those of the trial
        self._is_end: list[bool] = []  # each event is the start of a run or the end of a step
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()  # ends of runs, steps by then
        self._steps = self._done = self._noted = 0
        self._settled: tuple[int, int] | None = None  # events, and the host's time after the last
        torch.cuda.synchronize(self._device)
        self._record(is_end=False)
        torch.cuda.synchronize(self._device)
        self._clock.restart()

    def run_begins(self) -> None:
        self._note_run()
        while len(self._pending) > self.AHEAD:
            event, steps = self._pending.popleft()
            event.synchronize()
            self._done = steps
        self._record(is_end=False)

    def step_launched(self) -> None:
        self._record(is_end=True)
        self._steps += 1

    def done(self) -> int:
        """Return the number of steps known to be done, without waiting."""
        self._note_run()
        while self._pending and self._pending[0][0].query():  # type: ignore[no-untyped-call]
            self._done = self._pending.popleft()[1]
        return self._done

    def settle(self) -> None:
        """Return when all launched steps are done."""
        if self._steps == 0:
            return
        self._events[-1].synchronize()
        self._settled = len(self._events), self._clock.now()
        self._pending.clear()
        self._done = self._noted = self._steps

    def times(self) -> tuple[Ints, Ints]:
        """Return starts, one a run, and ends, one a step, in ns since ``begin``."""
        torch.cuda.synchronize(self._device)
        if self._settled is None or self._settled[0] < len(self._events):
            self._settled = len(self._events), self._clock.now()
        # CUDA returns the time between two events as float32 milliseconds, which after ten minutes
        # are 62 µs apart. Between neighbours they are exact to the nanosecond.
        steps = [a.elapsed_time(b) for a, b in pairwise(self._events)]
        device_ns = np.cumsum(np.array(steps, np.float64)) * 1e6
        ns, is_end = on_host_clock(device_ns, self._settled[1]), np.array(self._is_end[1:], bool)
        return ns[~is_end], ns[is_end]

    def _note_run(self) -> None:
        if self._steps > self._noted:
            self._pending.append((self._events[-1], self._steps))
            self._noted = self._steps

    def _record(self, *, is_end: bool) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        self._is_end.append(is_end)


DRIFT = 1e-4  # largest difference in speed between the quartzes of a GPU and its host


def on_host_clock(device_ns: NDArray[np.float64], host_ns: int) -> Ints:
    """Return the times of events on the host's clock, in whole nanoseconds.

    The last event was over on the device before ``host_ns``, when the host had waited for it.
    """
    if not len(device_ns):
        return np.zeros(0, np.int64)
    last = float(device_ns[-1])
    speed = min(max(host_ns / last, 1 - DRIFT), 1 + DRIFT) if last > 0 else 1.0
    late = max(last * speed - host_ns, 0.0)  # the host began its clock after the device
    return np.rint(np.maximum(device_ns * speed - late, 0)).astype(np.int64)


class TokensOnHost:
    """The tokens of the last two runs on a GPU, copied to pinned memory behind the passes.

    Reading those of the run before the last waits for that run only.
    """

    def __init__(self, last: Tensor) -> None:
        self._last = last
        self._copies = [torch.zeros(len(last), dtype=last.dtype).pin_memory() for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def send(self) -> None:
        self._turn = 1 - self._turn
        self._copies[self._turn].copy_(self._last, non_blocking=True)
        self._events[self._turn].record(torch.cuda.current_stream(self._last.device))

    def read(self, *, late: bool) -> list[int]:
        """Return the tokens of the last run, or if ``late`` of the one before."""
        turn = 1 - self._turn if late else self._turn
        self._events[turn].synchronize()
        tokens: list[int] = self._copies[turn].tolist()
        return tokens


class TorchEngine:
    """Run plans on a loaded model; a subclass computes the passes and owns the cache."""

    simulated = False
    pads_prompts = False
    execution = "eager"
    execution_note: str | None = None  # why a GPU does less than it could
    triton = False  # True if attention is computed in Triton

    def __init__(self, model: LoadedModel, slots: int) -> None:
        self.clock = WallClock()
        self._model, self._device = model, model.device
        cuda = model.device.type == "cuda"
        self._timer = (CudaTimer if cuda else HostTimer)(self.clock, model.device)
        self._last = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._chooser = Chooser(slots, model.device)
        self._log: list[Tensor] = []  # the last tokens of all slots after each step
        self._eos = set(model.source.eos_token_ids)
        self._on_host = TokensOnHost(self._last) if cuda else None
        self.looks_late = cuda

    def begin(self, workload: Workload) -> None:
        with current(self._device):
            self._begin(workload)

    def _begin(self, workload: Workload) -> None:
        self._workload, self._log = workload, []
        self._last.zero_()
        if workload.sampling != self._chooser.sampling:
            self._chooser.sampling = workload.sampling
            self._sampling_changed()
        self._forget()
        self._computed_before = self._computed
        self._timer.begin()

    @torch.inference_mode()
    def run(self, plan: Plan) -> int:
        """Compute the passes of a plan, up to the first that ends at or after ``plan.until``."""
        with current(self._device):
            try:
                return self._run(plan)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"--batch-size {len(self._last)}: {self._device} has no memory left for a pass "
                    "over the cache; lower it, or --max-batched-tokens"
                ) from error

    def _run(self, plan: Plan) -> int:
        self._timer.run_begins()
        self._chooser.seat(plan.chunks)
        self._prepare(plan)
        for step in range(plan.repeat):
            self._advance(plan, step)
            self._log.append(self._last.clone())
            self._timer.step_launched()
            if plan.until is not None:
                # A request that arrives during this step may join the next one, so the host must
                # not run ahead.
                self._timer.settle()
                if self.clock.now() >= plan.until:
                    break
        if self._on_host is not None and self._workload.stop_at_eos:
            self._on_host.send()
        return step + 1

    def stopped(self, plan: Plan, *, late: bool = False) -> Collection[int]:
        host = self._on_host
        last = self._last.tolist() if host is None else host.read(late=late)
        return [slot for slot in yielding_slots(plan) if last[slot] in self._eos]

    def done(self) -> int:
        return self._timer.done()

    def wait(self) -> None:
        self._timer.settle()

    def collect(self) -> Steps:
        starts, ends = self._timer.times()
        tokens = torch.stack(self._log).to("cpu", torch.int32).numpy()
        computed = self._computed - self._computed_before
        return Steps(starts, ends_ns=ends, tokens=tokens, computed=computed)

    # For subclasses

    @property
    def _computed(self) -> int:
        """The number of forward passes so far, counted where the model is called."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Empty the cache."""

    def _sampling_changed(self) -> None:
        """Prepare again what depends on the way in which tokens are chosen."""

    def _prepare(self, plan: Plan) -> None:
        """Set up what all passes of the plan share."""
        self._yielding = self._tensor(yielding_slots(plan))

    def _advance(self, plan: Plan, step: int) -> None:
        """Compute one pass, and store the next tokens of the slots that yield."""
        self._last.index_copy_(0, self._yielding, self._forward(plan, step))

    def _forward(self, plan: Plan, step: int) -> Tensor:
        """Compute one pass; return the next token of each yielding slot, ``[yielding]``."""
        raise NotImplementedError

    def _tensor(self, values: Collection[int] | np.ndarray) -> Tensor:
        array = np.asarray(values, np.int64)
        # Without a wait only on CUDA: MPS copies later, when the array may be gone.
        return torch.from_numpy(array).to(self._device, non_blocking=self._device.type == "cuda")


def yielding_slots(plan: Plan) -> list[int]:
    """Return the slots that get a token: first those that decode, then those of last chunks."""
    decoding: list[int] = plan.slots.tolist()
    return decoding + [chunk.slot for chunk in plan.chunks if chunk.yields]
