"""A device that works only while the host waits for it, on a virtual clock.

The host launches in no time, as beside a model of many milliseconds a step. These tests show
what the tenth of a second between two looks at the world, Ctrl-C and settling are on such a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.cuda_stand_in import StandIn, impossible

from batchbench.batching import engines
from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.graphs import Upload
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.verification import verify
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import MakeModel

SLOTS = 2
KERNEL_NS = 100_000
TENTH_NS = 100_000_000


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A lazy device, whose clock is the engine's too."""
    if why := impossible():
        pytest.skip(why)
    gpu = StandIn(lazy=True, kernel_ns=KERNEL_NS)

    class Time:
        perf_counter_ns = staticmethod(gpu.now_ns)

        @staticmethod
        def sleep(seconds: float) -> None:
            gpu.sleep(seconds)

    monkeypatch.setattr(engines, "time", Time)
    monkeypatch.setattr(engines, "_SPIN_NS", 0)  # virtual time passes in sleeps only
    with gpu:
        yield gpu


def long_workload(output_tokens: int = 110) -> Workload:
    prompts = [np.random.default_rng(i).integers(1, 300, 5).tolist() for i in range(SLOTS)]
    return Workload.of("long", prompts, [output_tokens] * SLOTS)


def batcher_on(model: object, workload: Workload, **options: object) -> Batcher:
    engine, _ = make_engine("slots", model, SLOTS, workload.max_total_tokens)  # type: ignore[arg-type]
    return Batcher("continuous", engine, SLOTS, **options)  # type: ignore[arg-type]


def step_ns(gpu: StandIn) -> int:
    """The device's time of a decode step of the full batch, with the copy of its tokens."""
    return max((len(graph.works) + 1) * gpu.kernel_ns for graph in gpu.graphs)


@pytest.mark.usefixtures("lazy")
def test_tokens_of_a_lazy_device_are_the_models_own(make_model: MakeModel) -> None:
    """Nothing is read before it is computed, and no source changes before it is copied."""
    model, workload = make_model(device="cuda:0"), long_workload(40)
    recording = batcher_on(model, workload).serve(workload, Watch())
    assert verify(workload, [recording], TeacherForced(model)).identical == SLOTS


@pytest.mark.usefixtures("lazy")
def test_a_source_that_changes_too_early_would_be_noticed() -> None:
    target = torch.zeros(2, device="cuda:0")
    pinned = torch.ones(2).pin_memory()
    target.copy_(pinned, non_blocking=True)
    pinned.fill_(7)
    pageable = torch.ones(2)
    other = torch.zeros(2, device="cuda:0")
    other.copy_(pageable, non_blocking=True)
    pageable.fill_(7)
    assert (target.tolist(), other.tolist()) == ([7, 7], [1, 1])


@pytest.mark.usefixtures("lazy")
def test_an_upload_waits_for_a_buffer_that_is_in_use() -> None:
    """With more copies under way than buffers, none of them may change what is copied."""
    target = torch.zeros(4, dtype=torch.int64, device="cuda:0")
    upload, seen = Upload(target), []
    for i in range(3 * Upload.BUFFERS):
        upload(np.full(4, i))
        seen.append(target.clone())
    assert [kept.tolist() for kept in seen] == [[i] * 4 for i in range(3 * Upload.BUFFERS)]


def test_steps_take_the_devices_time(lazy: StandIn, make_model: MakeModel) -> None:
    workload = long_workload()
    batcher = batcher_on(make_model(device="cuda:0"), workload)
    recording = batcher.serve(workload, Watch())
    gaps = np.diff(recording.step_ends_ns)[5:-5]
    assert np.median(gaps) == pytest.approx(step_ns(lazy), rel=0.05)


class Looks(Watch):
    """The times at which the display could be drawn and Ctrl-C be noticed."""

    def __init__(self, gpu: StandIn, interrupt_at: int | None = None) -> None:
        self._gpu, self._interrupt_at = gpu, interrupt_at
        self.times: list[int] = []
        self.queued: list[int] = []

    def progressed(self, progress: Progress) -> None:
        self.times.append(self._gpu.now_ns())
        self.queued.append(sum(work.kernels for work in self._gpu.queue) * self._gpu.kernel_ns)
        if self._interrupt_at is not None and self.times[-1] >= self._interrupt_at:
            raise KeyboardInterrupt


def test_the_host_is_a_few_tenths_of_a_second_ahead_at_most(
    lazy: StandIn, make_model: MakeModel
) -> None:
    """Three calls of the engine may be queued, each for about a tenth of a second."""
    lazy.kernel_ns = 500_000  # 20 ms a step: all 110 take more than 2 s
    workload = long_workload()
    looks = Looks(lazy)
    batcher_on(make_model(device="cuda:0"), workload).serve(workload, looks)
    assert looks.times[-1] > 10 * TENTH_NS
    assert max(np.diff(looks.times)) <= 3.5 * TENTH_NS
    assert max(looks.queued) <= 4 * TENTH_NS


def test_ctrl_c_is_noticed_at_the_next_look_and_the_engine_serves_on(
    lazy: StandIn, make_model: MakeModel
) -> None:
    lazy.kernel_ns = 500_000
    model, workload = make_model(device="cuda:0"), long_workload()
    batcher = batcher_on(model, workload)
    began = lazy.now_ns()
    asked = began + 5 * TENTH_NS
    with pytest.raises(KeyboardInterrupt):
        batcher.serve(workload, Looks(lazy, asked))
    assert lazy.now_ns() - asked <= 3 * TENTH_NS
    recording = batcher.serve(workload, Watch())  # what was queued is done before
    assert recording.step_starts_ns[0] >= 0
    assert verify(workload, [recording], TeacherForced(model)).identical == SLOTS


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
def test_a_request_that_comes_during_a_pass_joins_the_next_one(
    prefill: str, lazy: StandIn, make_model: MakeModel
) -> None:
    """With arrivals to come the host settles each pass, prefills too, before it plans on."""
    lazy.kernel_ns = 1_000_000
    prompts = [np.random.default_rng(i).integers(1, 300, 6).tolist() for i in range(4)]
    due = [0, 20_000_000, 40_000_000, 300_000_000]
    workload = Workload.of("arrivals", prompts, [5] * 4, due_ns=due)
    engine, _ = make_engine("slots", make_model(device="cuda:0"), 4, workload.max_total_tokens)
    batcher = Batcher("continuous", engine, 4, prefill=prefill)
    recording = batcher.serve(workload, Watch())
    for request, admitted in enumerate(recording.requests.admitted.tolist()):
        # The first pass that begins when the request is due, or later, is the one that admits it.
        assert admitted == int(np.searchsorted(recording.step_starts_ns, due[request])), request
