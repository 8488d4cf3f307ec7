"""Laws of the GPU path that need no GPU: waits, launches, streams, memory and devices, counted.

They hold on the stand-in for CUDA, which counts what a GPU would do.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.cuda_stand_in import StandIn
from support.models import LLAMA

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch import build
from batchbench.batching.engines.torch.attention import SlotCache
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.graphs import Capture
from batchbench.batching.engines.torch.hardware import torch_environment
from batchbench.batching.engines.torch.reference import TeacherForced, _copied
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.models.loading import LoadedModel, free_bytes, resolve_device
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Watch
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import MakeModel

pytestmark = pytest.mark.usefixtures("cuda_stand_in")

LENGTHS, OUTPUT_TOKENS = (5, 1, 20, 7, 3, 9, 2, 11), (4, 12, 1, 7, 24, 2, 5, 9)

WORKLOAD = Workload.of(
    "eight requests",
    [np.random.default_rng(i).integers(1, 300, n).tolist() for i, n in enumerate(LENGTHS)],
    OUTPUT_TOKENS,
)

SLOTS = 3


def engine_of(model: LoadedModel, execution: str = "auto") -> SlotsEngine:
    made, _ = make_engine("slots", model, SLOTS, WORKLOAD.max_total_tokens, execution)
    assert isinstance(made, SlotsEngine)
    return made


class Passes(Watch):
    """The waits and launches of each call of the engine, by the kind of its pass."""

    def __init__(self, gpu: StandIn) -> None:
        self._gpu = gpu
        self.calls: list[tuple[str, int, Counter[Any], Counter[str]]] = []

    @contextmanager
    def on(self, engine: SlotsEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
        run = engine.run

        def counted(plan: Plan) -> int:
            self._gpu.waits.clear()
            self._gpu.launches.clear()
            steps = run(plan)
            kind = "prefill" if plan.chunks else "decode"
            waits = Counter(
                {
                    wait: n
                    for wait, n in self._gpu.waits.items()
                    if wait.what != "waits for an event"
                }
            )
            self.calls.append((kind, steps, waits, Counter(self._gpu.launches)))
            return steps

        with monkeypatch.context() as patch:
            patch.setattr(engine, "run", counted)
            yield self


# Waits


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("execution", ["graph", "eager"])
def test_a_decode_pass_waits_for_nothing_and_a_prefill_pass_at_most_once(
    execution: str,
    family: str,
    prefill: str,
    make_model: MakeModel,
    cuda_stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launching must run ahead of the device; only the end of an earlier run is waited for."""
    config = {} if family == "gpt2" else LLAMA
    model = make_model(**({"config": config} if config else {}), device="cuda:0")
    engine = engine_of(model, execution)
    batcher = Batcher("continuous", engine, SLOTS, prefill=prefill, max_batched_tokens=8)
    with Passes(cuda_stand_in).on(engine, monkeypatch) as passes:
        batcher.serve(WORKLOAD, Watch())
    kinds = Counter(kind for kind, *_ in passes.calls)
    assert kinds["decode"] > 0
    assert kinds["prefill"] > 1
    for kind, _, waits, _ in passes.calls:
        assert waits.total() <= (0 if kind == "decode" else 1), (kind, waits)


def test_a_trial_waits_at_most_ten_times_beside_its_runs(
    make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    batcher = Batcher("continuous", engine_of(make_model(device="cuda:0")), SLOTS)
    batcher.serve(WORKLOAD, Watch())
    cuda_stand_in.waits.clear()
    batcher.serve(WORKLOAD, Watch())
    others = {w: n for w, n in cuda_stand_in.waits.items() if w.what != "waits for an event"}
    assert sum(others.values()) <= 10, others


def test_the_counter_of_waits_tells_the_line(make_model: MakeModel, cuda_stand_in: StandIn) -> None:
    engine = engine_of(make_model(device="cuda:0"))
    cuda_stand_in.waits.clear()
    engine.begin(WORKLOAD)
    engine.wait()
    assert {wait.what for wait in cuda_stand_in.waits} == {"synchronizes the device"}
    assert all(
        wait.where.startswith("batching/engines/torch/base.py:") for wait in cuda_stand_in.waits
    )


# Launches


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_captured_decode_pass_launches_at_most_twelve_a_layer_and_fifteen(
    family: str, make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    """Each launch costs a microsecond and more between dependent kernels of a graph."""
    counts = []
    for layers in (2, 4):
        cuda_stand_in.graphs.clear()
        engine_of(make_model(device="cuda:0", n_layer=layers, dtype="bfloat16"))
        launches = cuda_stand_in.graphs[-1].launches
        counts.append(launches.total())
        assert launches.total() <= 12 * layers + 15, launches
    assert (counts[1] - counts[0]) / 2 <= 12


def test_rows_of_a_mask_are_aligned(make_model: MakeModel, cuda_stand_in: StandIn) -> None:
    """Attention would copy a mask of 51 columns in each layer of each step."""
    model = make_model(device="cuda:0")
    lengths = {WORKLOAD.max_total_tokens % 8}
    assert lengths != {0}
    for execution in ("graph", "eager"):
        engine = engine_of(model, execution)
        Batcher("continuous", engine, SLOTS).serve(WORKLOAD, Watch())
        assert all(block.keys.shape[2] % 16 == 0 for block in engine._cache.blocks)
    recorded = sum((graph.launches for graph in cuda_stand_in.graphs), Counter[str]())
    assert (recorded + cuda_stand_in.launches)["padding of a mask"] == 0


def test_a_mask_that_is_not_aligned_is_padded_by_the_stand_in(cuda_stand_in: StandIn) -> None:
    states = torch.zeros(2, 2, 16, 8, device="cuda:0")
    for columns, launches in ((16, 0), (15, 2)):
        cuda_stand_in.launches.clear()
        mask = torch.zeros(2, columns, device="cuda:0")[:, None, None]
        part = states[:, :, :columns]
        torch.nn.functional.scaled_dot_product_attention(states[:, :, :1], part, part, mask)
        assert cuda_stand_in.launches["padding of a mask"] == launches


def test_a_slot_is_erased_in_one_launch(make_model: MakeModel, cuda_stand_in: StandIn) -> None:
    engine = engine_of(make_model(device="cuda:0", n_layer=6), "eager")
    for block in engine._cache.blocks:
        block.block.fill_(1.0)
    cuda_stand_in.launches.clear()
    engine._cache.erase(1, 3, 7)
    assert cuda_stand_in.launches.total() == 1
    for block in engine._cache.blocks:
        assert float(block.keys[1, :, 3:7].abs().sum() + block.values[1, :, 3:7].abs().sum()) == 0
        assert float(block.block.sum()) == block.block.numel() - 2 * 4 * 4 * 8


# cuDNN


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_shape_needs_a_plan_of_cudnn(
    dtype: str, make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)  # as when the program starts
    model = make_model(device="cuda:0", dtype=dtype)
    for name in ("slots", "notebook"):
        engine, _ = make_engine(name, model, SLOTS, WORKLOAD.max_total_tokens)
        recording = Batcher("continuous", engine, SLOTS).serve(WORKLOAD, Watch())
        verify(WORKLOAD, [recording], TeacherForced(model))
    assert cuda_stand_in.attention_shapes == set()


def test_the_stand_in_counts_plans_of_cudnn(make_model: MakeModel, cuda_stand_in: StandIn) -> None:
    states = torch.zeros(1, 2, 3, 8, device="cuda:0", dtype=torch.bfloat16)
    make_model(device="cuda:0")
    assert "decode efficient_attention" in torch_environment("cuda:0")["gpu_attention"]
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.nn.functional.scaled_dot_product_attention(states, states, states)
    assert len(cuda_stand_in.attention_shapes) == 1
    environment = torch_environment("cuda:0")
    assert environment["gpu_attention"] == "decode cudnn_attention, prompts cudnn_attention"
    assert environment["cudnn"] == 92000
    assert environment["float32_products"] == "highest"


# Streams and devices


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_graphs_are_recorded_on_one_stream_of_the_models_device(
    device: str, make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    """Torch keeps 32 MiB for each stream, and records nothing of another device's kernels."""
    model = make_model(device=device)
    engine = engine_of(model, "graph")
    assert len(cuda_stand_in.streams) <= 1
    assert [str(stream.device) for stream in cuda_stand_in.streams] == [device]
    assert all(graph.works for graph in cuda_stand_in.graphs)
    recording = Batcher("continuous", engine, SLOTS).serve(WORKLOAD, Watch())
    assert verify(WORKLOAD, [recording], TeacherForced(model)).identical == len(WORKLOAD)
    assert cuda_stand_in.current == 0  # what was current before


def test_an_engine_makes_its_device_current(
    make_model: MakeModel, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, whatever its arguments are on."""
    seen: list[int] = []
    for name in ("_forward", "_begin"):
        own = getattr(SlotsEngine, name)

        def noting(*args: Any, own: Any = own) -> Any:
            seen.append(torch.cuda.current_device())
            return own(*args)

        monkeypatch.setattr(SlotsEngine, name, noting)
    engine = engine_of(make_model(device="cuda:1"), "eager")
    Batcher("continuous", engine, SLOTS).serve(WORKLOAD, Watch())
    assert set(seen) == {1}


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_the_device_that_is_taken_has_its_number(name: str, cuda_stand_in: StandIn) -> None:
    """The same machine is the same device in results, whatever the option was."""
    assert str(resolve_device(name)) == "cuda:0"
    with torch.cuda.device(1):
        assert str(resolve_device(name)) == "cuda:1"


# Failed captures


def test_a_failed_capture_leaves_the_stream_as_it_was(cuda_stand_in: StandIn) -> None:
    x = torch.zeros(3, device="cuda:0")
    before = torch.cuda.current_stream()
    calls = [0]

    def waits_at_last() -> None:
        calls[0] += 1
        x.add_(1)
        if calls[0] > 3:
            x.tolist()

    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        Capture(torch.device("cuda:0"))(waits_at_last)
    assert torch.cuda.current_stream() is before
    assert "not permitted when stream is capturing" in str(caught.value.__context__)


def test_auto_falls_back_with_one_cache_and_its_reason(
    make_model: MakeModel, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[SlotCache]] = []
    alive: list[int] = []
    made = SlotCache.__init__

    def noted(self: SlotCache, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(cache() is not None for cache in caches))
        made(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    model = make_model(device="cuda:0")
    forward = build.make_forward(model)
    choose = forward.choose

    def waits(logits: torch.Tensor) -> torch.Tensor:
        logits.sum().item()
        return choose(logits)

    monkeypatch.setattr(forward, "choose", waits, raising=False)
    monkeypatch.setattr(SlotCache, "__init__", noted)
    gc.collect()
    free = free_bytes(model.device)
    engine, _ = make_engine("slots", model, SLOTS, 40, forward=forward)
    assert alive == [0, 0]
    assert engine.execution == "eager"
    assert engine.execution_note is not None
    assert "auto is eager: graph failed" in engine.execution_note
    assert "reads a number" in engine.execution_note
    size = sum(block.block.nbytes for block in engine._cache.blocks)  # type: ignore[attr-defined]
    assert free - free_bytes(model.device) < 1.5 * size
    with pytest.raises(UsageError, match=r"--execution graph: .*reads a number.*--execution eager"):
        make_engine("slots", model, SLOTS, 40, "graph", forward)


def test_a_trial_that_runs_out_of_memory_says_what_to_lower(
    make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    engine = engine_of(make_model(device="cuda:0"), "eager")
    batcher = Batcher("continuous", engine, SLOTS)
    batcher.serve(WORKLOAD, Watch())
    cuda_stand_in.memory_bytes = cuda_stand_in.allocated(0) + 64
    with pytest.raises(UsageError, match=r"--batch-size 3: cuda:0 has no memory left .*lower it"):
        batcher.serve(WORKLOAD, Watch())


# Copies to the device


def test_only_cuda_copies_without_a_wait(
    make_model: MakeModel, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPS reads the array later, when it may be gone."""
    asked: list[bool] = []
    to = torch.Tensor.to

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs.get("non_blocking", False))
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", noting)
        for device, expected in (("cuda:0", True), ("cpu", False)):
            engine = engine_of(make_model(device=device), "eager")
            asked.clear()
            engine._tensor([1, 2])
            assert asked == [expected]


# The reference


def test_the_precise_copy_takes_its_own_size_only(
    make_model: MakeModel, cuda_stand_in: StandIn
) -> None:
    model = make_model(device="cuda:0", dtype="bfloat16", n_embd=64)
    gc.collect()
    before = cuda_stand_in.allocated(0)
    cuda_stand_in.reset_peak(0)
    copied = _copied(model.module, model.device, torch.float32)
    expected = 2 * model.weight_bytes
    assert expected <= cuda_stand_in.peak(0) - before <= 1.1 * expected
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert all(p.dtype is torch.bfloat16 for p in model.module.parameters())


def test_a_device_without_room_for_the_precise_copy_leaves_it_to_the_host(
    make_model: MakeModel, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(device="cuda:0", dtype="bfloat16")
    module = "batchbench.batching.engines.torch.reference.free_bytes"
    monkeypatch.setattr(module, lambda device: 2**40)  # it was gone when it was taken
    cuda_stand_in.memory_bytes = cuda_stand_in.allocated(0) + 100
    precise = TeacherForced(model)._more_precise()
    assert next(precise.parameters()).device.type == "cpu"


def test_a_gpu_is_asked_for_its_number_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", _refuse)
    with pytest.raises(UsageError, match=r"--device cuda: not on this machine; it has cpu$"):
        resolve_device("cuda")


def _refuse() -> int:
    raise AssertionError("Torch not compiled with CUDA enabled")
