"""Clocks of trials: waits on the host, and the events of a GPU as CUDA reports them, made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from batchbench.batching import engines
from batchbench.batching.batcher import Batcher
from batchbench.batching.engines import VirtualClock, WallClock
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch.base import DRIFT, CudaTimer
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Steps
from batchbench.reports.time_budget import PARTS, time_budget
from batchbench.workloads import Workload

US, MS, S = 1_000, 1_000_000, 1_000_000_000

# The host


class Machine:
    """Time in whole nanoseconds; a sleep ends 80 µs late, and reading the clock takes 50 ns."""

    def __init__(self) -> None:
        self.ns, self.slept = 5 * S, list[float]()

    def perf_counter_ns(self) -> int:
        self.ns += 50
        return self.ns

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.ns += round(seconds * S) + 80 * US


@pytest.mark.parametrize("wait_ns", [0, 1, 150 * US, 201 * US, 5 * MS, 3 * S])
def test_a_wait_is_over_when_it_is_due_although_sleeps_end_late(
    monkeypatch: pytest.MonkeyPatch, wait_ns: int
) -> None:
    machine = Machine()
    monkeypatch.setattr(engines, "time", machine)
    clock = WallClock()
    clock.wait_until(wait_ns)
    assert wait_ns <= machine.ns - clock.zero_ns <= wait_ns + 200
    assert len(machine.slept) == (wait_ns > 200 * US)


# The device


class Device:
    """A GPU whose clock runs faster than the host's; work takes time, and so do host calls."""

    def __init__(self, *, ppm: float, launch_ns: int = 10 * US) -> None:
        self.ns, self.busy_until, self.launch_ns = 0, 0, launch_ns
        self.speed = 1 + ppm / 1e6
        self.waits = 0

    def now(self) -> int:
        return self.ns

    def compute(self, ns: int) -> None:
        """Launch work of so many nanoseconds."""
        self.ns += self.launch_ns
        self.busy_until = max(self.busy_until, self.ns) + ns

    def wait_for(self, t: float) -> None:
        self.waits += 1
        self.ns = max(self.ns, round(t)) + 8 * US

    def synchronize(self, device: object = None) -> None:
        self.wait_for(self.busy_until)


class Event:
    """An event that reports milliseconds in 32 bits, as cudaEventElapsedTime does."""

    device: Device

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.device.ns += US
        self.at = max(self.device.busy_until, self.device.ns)

    def query(self) -> bool:
        return self.at <= self.device.ns

    def synchronize(self) -> None:
        self.device.wait_for(self.at)

    def elapsed_time(self, other: Event) -> float:
        return float(np.float32((other.at - self.at) * self.device.speed / 1e6))


Timer = Callable[[Device], CudaTimer]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """Makes the timer of a device that is not there."""

    def make(device: Device) -> CudaTimer:
        monkeypatch.setattr(torch.cuda, "Event", type("Events", (Event,), {"device": device}))
        monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        clock = WallClock()
        monkeypatch.setattr(clock, "restart", lambda: setattr(clock, "zero_ns", device.ns))
        monkeypatch.setattr(clock, "now", lambda: device.ns - clock.zero_ns)
        return CudaTimer(clock, torch.device("cuda"))

    return make


STEP = 451_037


def launch(made: CudaTimer, device: Device, runs: int, steps: int) -> None:
    for _ in range(runs):
        made.run_begins()
        for _ in range(steps):
            device.compute(STEP)
            made.step_launched()


def test_steps_are_exact_after_ten_minutes(timer: Timer) -> None:
    """As milliseconds since the start, in 32 bits, they would be 62 µs apart."""
    device = Device(ppm=0)
    made = timer(device)
    made.begin()
    launch(made, device, 2, 50)
    device.ns += 600 * S
    launch(made, device, 3, 50)
    made.settle()
    starts, ends = made.times()
    assert len(starts) == 5
    assert len(ends) == 250
    late = np.diff(ends[101:])
    assert abs(late - STEP).max() <= STEP * DRIFT + 2
    assert np.ptp(late) <= 2
    assert (np.diff(ends) > 0).all()
    assert ends[-1] <= device.ns


class OnDevice:
    """An engine that computes nothing, on a device that takes its time."""

    simulated, pads_prompts = False, False

    def __init__(self, timer: CudaTimer, device: Device, step_ns: int) -> None:
        self.clock, self._timer, self._device, self._step_ns = self, timer, device, step_ns

    def restart(self) -> None:
        """The timer begins the trial."""

    def now(self) -> int:
        return self._timer._clock.now()

    def wait_until(self, t: int) -> None:
        self._device.ns = max(self._device.ns, t + self._timer._clock.zero_ns) + 60 * US

    def begin(self, workload: Workload) -> None:
        self._timer.begin()

    def run(self, plan: Plan) -> int:
        self._timer.run_begins()
        for step in range(plan.repeat):
            self._device.compute(self._step_ns)
            self._timer.step_launched()
            if plan.until is not None:
                self._timer.settle()
                if self.now() >= plan.until:
                    return step + 1
        return plan.repeat

    def stopped(self, plan: Plan) -> tuple[int, ...]:
        return ()

    def done(self) -> int:
        return self._timer.done()

    def wait(self) -> None:
        self._timer.settle()

    def collect(self) -> Steps:
        starts, ends = self._timer.times()
        return Steps(starts, ends_ns=ends)


@pytest.mark.parametrize("ppm", [-20, 0, 20])
@pytest.mark.parametrize("step_ns", [400 * US, 3 * S])
@pytest.mark.parametrize("gap_steps", [None, 0.4, 7])
@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_no_part_of_the_time_is_negative_where_two_clocks_drift_apart(
    timer: Timer, ppm: float, step_ns: int, gap_steps: float | None, policy: str
) -> None:
    """With steps of 3 s a trial takes longer than ten minutes, and the clocks part by 12 ms."""
    device = Device(ppm=ppm)
    due = None if gap_steps is None else [round(i * gap_steps * step_ns) for i in range(40)]
    workload = Workload.of("w", [[1] * 5] * 40, [30 + i % 7 for i in range(40)], due_ns=due)
    engine = OnDevice(timer(device), device, step_ns)
    recording = Batcher(policy, engine, 4).serve(workload, Watch())
    budget = time_budget(recording)
    assert min(getattr(budget, part) for part in PARTS) >= 0
    assert budget.residual_s < 1e-3
    took = recording.step_ends_ns - recording.step_starts_ns
    assert abs(took / step_ns - 1).max() < 0.05  # launching, waits, and 100 ppm


def test_the_host_runs_two_runs_ahead_and_knows_what_is_done(timer: Timer) -> None:
    device = Device(ppm=0)
    made = timer(device)
    made.begin()
    waits = device.waits
    for run in range(5):
        made.run_begins()
        assert made.done() == max(0, run - 2) * 10
        assert device.waits == waits + max(0, run - 2)
        for _ in range(10):
            device.compute(STEP)
            made.step_launched()
    made.settle()
    assert made.done() == 50
    launch(made, device, 1, 1)
    assert made.done() == 50
    device.ns += S
    assert made.done() == 51
    assert device.waits == waits + 3


# A turn of the loop


class Lazy(SimulatedEngine):
    """A device that has done nothing of what was launched until the host waits for it."""

    simulated = False

    def __init__(self, ahead: int) -> None:
        super().__init__(MS)
        self.launched, self._ahead = list[int](), ahead

    def run(self, plan: Plan) -> int:
        self.launched.append(super().run(plan))
        return self.launched[-1]

    def done(self) -> int:
        return sum(self.launched[: -self._ahead or None])


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_turn_holds_a_tenth_of_a_second_of_work_that_is_done(ahead: int) -> None:
    """Launching a thousand steps takes no time; computing them takes a second."""
    engine = Lazy(ahead)
    workload = Workload.of("long", [[1]] * 2, [2000, 2000])
    recording = Batcher("static", engine, 2).serve(workload, Watch())
    assert recording.num_steps == 2000
    assert max(engine.launched) <= 100
    assert engine.launched[: ahead + 1] == [1] * (ahead + 1)


class Instant(VirtualClock):
    """A host for which no time passes while it launches."""


def test_steps_that_are_launched_but_not_done_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Lazy(10**9)
    times: Iterator[int] = iter(range(0, 10**9, US))
    monkeypatch.setattr(engine, "clock", Instant())
    monkeypatch.setattr(engine.clock, "now", lambda: next(times))
    workload = Workload.of("long", [[1]], [300])
    Batcher("static", engine, 1).serve(workload, Watch())
    assert max(engine.launched) == 1


def test_the_real_clock_waits_at_least_as_long_as_asked() -> None:
    clock = WallClock()
    clock.wait_until(2 * MS)
    assert time.perf_counter_ns() - clock.zero_ns >= 2 * MS
