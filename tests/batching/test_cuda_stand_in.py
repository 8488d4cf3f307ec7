"""The stand-in for CUDA is as strict as CUDA, and computes what a CPU does."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.cuda_stand_in import StandIn

pytestmark = pytest.mark.usefixtures("cuda_stand_in")

ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


def captured(run: Callable[[], object], **options: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(ONE), **options):
        run()
    return graph


def test_tensors_compute_what_the_host_does() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 5)
    said = torch.softmax(x.to(ONE) @ weight.to(ONE), -1)
    assert said.device == ONE
    assert torch.equal(said.cpu(), torch.softmax(x @ weight, -1))
    assert torch.arange(5, device=ONE)[1:3].tolist() == [1, 2]


@pytest.mark.parametrize("elsewhere", [torch.device("cpu"), OTHER])
def test_devices_do_not_mix(elsewhere: torch.device) -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and"):
        torch.ones(2, device=ONE) + torch.ones(2, device=elsewhere)
    assert (torch.ones(2, device=ONE) + torch.tensor(1.0)).tolist() == [2, 2]  # a number may


def test_a_graph_has_no_effect_until_it_is_replayed() -> None:
    x, y = torch.ones(2, device=ONE), torch.zeros(2, device=ONE)

    def run() -> None:
        y.copy_((x + 1) * 2)
        x.add_(1)

    graph = captured(run)
    assert (x.tolist(), y.tolist()) == ([1, 1], [0, 0])
    graph.replay()
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([3, 3], [6, 6])


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.ones(1).to(ONE),
        lambda x: x.copy_(torch.ones(1), non_blocking=True),  # from pageable memory
    ],
)
def test_a_capture_that_contains_a_wait_fails(forbidden: Callable[[Any], object]) -> None:
    x = torch.ones(1, device=ONE)
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        captured(lambda: forbidden(x))
    assert "not permitted when stream is capturing" in str(caught.value.__context__)


def test_a_graph_holds_nothing_of_another_device() -> None:
    x, other = torch.ones(1, device=ONE), torch.ones(1, device=OTHER)
    graph: Any = captured(lambda: (x.add_(1), other.add_(1)))
    assert graph.launches.total() == 1
    assert (x.item(), other.item()) == (1, 2)


def test_waits_and_launches_are_counted(cuda_stand_in: StandIn) -> None:
    x = torch.ones(4, 4, device=ONE)
    cuda_stand_in.launches.clear()
    cuda_stand_in.waits.clear()
    (x @ x).view(16)[:3].add_(1)  # views launch nothing
    assert cuda_stand_in.launches.total() == 2
    assert not cuda_stand_in.waits
    x.sum().item()
    x.nonzero()
    ((_, where),) = {wait for wait in cuda_stand_in.waits if wait.what == "nonzero"}
    assert where.startswith("test_cuda_stand_in.py:")
    assert cuda_stand_in.waits.total() == 2


def test_the_time_between_events_is_a_float32_of_milliseconds(cuda_stand_in: StandIn) -> None:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    with pytest.raises(RuntimeError, match="device not ready"):
        first.elapsed_time(last)
    last.record()
    elapsed = first.elapsed_time(last)
    assert elapsed == float(np.float32(elapsed)) > 0
    cuda_stand_in.drift = 0.5
    assert first.elapsed_time(last) == pytest.approx(1.5 * elapsed)


def test_memory_is_counted_and_runs_out(cuda_stand_in: StandIn) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(OTHER)
    x = torch.zeros(1000, device=OTHER)
    view = x[10:]
    del x
    assert torch.cuda.memory_allocated(OTHER) == before + 4000
    del view
    assert torch.cuda.memory_allocated(OTHER) == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(cuda_stand_in.memory_bytes, device=OTHER)


def test_modules_move_and_are_copied_with_tied_weights() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    moved = module.to(ONE)
    for some in (moved, copy.deepcopy(moved)):
        assert some[0].weight is some[1].weight
        assert isinstance(some[0].weight, torch.nn.Parameter)
        assert some[0].weight.device == ONE
