"""The torch engines on a GPU: on a real one, if there is one, and on the stand-in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.cuda_stand_in import StandIn
from support.models import LLAMA

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.models.loading import LoadedModel, resolve_device, resolve_dtype
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import conduct
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Workload
from batchbench.workloads.sampling import Sampling
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from support.models import MakeModel

REAL = torch.cuda.is_available()

PLACES = [("real", pytest.mark.gpu), ("stand-in", ())]

pytestmark = pytest.mark.usefixtures("gpu")

LENGTHS = (5, 1, 20, 7, 3, 9, 2, 11)
OUTPUT_TOKENS = (4, 12, 1, 7, 24, 2, 5, 9)

WORKLOAD = Workload.of(
    "eight requests",
    [np.random.default_rng(i).integers(1, 300, n).tolist() for i, n in enumerate(LENGTHS)],
    OUTPUT_TOKENS,
)

WIDE = {"n_embd": 256, "n_head": 4}  # heads of 64, as those of real models

SERVED = [
    ("slots", "separate", "static"),
    ("slots", "separate", "continuous"),
    ("slots", "mixed", "continuous"),
    ("notebook", "separate", "static"),
    ("notebook", "separate", "continuous"),
]

FORMATS = [
    *(pytest.param("real", dtype, marks=pytest.mark.gpu) for dtype in ("float32", "float16")),
    *(pytest.param(where, "auto", marks=marks) for where, marks in PLACES),
]
"""Where, and in which number format; the stand-in has the CPU's kernels, so one will do."""


@pytest.fixture(params=[pytest.param(where, marks=marks) for where, marks in PLACES])
def gpu(request: pytest.FixtureRequest) -> Iterator[StandIn | None]:
    """A real GPU, for which this is None, or the stand-in."""
    if request.param == "stand-in":
        yield request.getfixturevalue("cuda_stand_in")
        return
    if not REAL:
        pytest.skip("needs a GPU with CUDA")
    yield None
    torch.cuda.empty_cache()  # the memory of one test is free for the next


def batcher_for(
    model: LoadedModel,
    engine: str,
    prefill: str,
    policy: str,
    *,
    slots: int = 3,
    execution: str = "auto",
) -> Batcher:
    made, _ = make_engine(engine, model, slots, WORKLOAD.max_total_tokens, execution)
    return Batcher(policy, made, slots, prefill=prefill, max_batched_tokens=8)


def outputs(recording: Recording) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(WORKLOAD))]


def half(device: str = "cuda") -> str:
    """The half precision that this GPU computes in."""
    return str(resolve_dtype("auto", resolve_device(device))).removeprefix("torch.")


# Tokens


@pytest.mark.parametrize(("engine", "prefill", "policy"), SERVED)
@pytest.mark.parametrize(("gpu", "dtype"), FORMATS, indirect=["gpu"])
def test_outputs_are_verified(
    dtype: str, engine: str, prefill: str, policy: str, make_model: MakeModel
) -> None:
    model = make_model(device="cuda", dtype=dtype, **WIDE)
    assert model.device.type == "cuda"
    recording = batcher_for(model, engine, prefill, policy).serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(model))
    assert found.wrong == 0, found.findings
    assert found.identical > 0
    if dtype == "float32":
        assert found.identical == len(WORKLOAD), found.findings


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9), Sampling(0.8, 0.9, 20)])
@pytest.mark.parametrize(("gpu", "dtype"), FORMATS, indirect=["gpu"])
def test_sampled_outputs_are_verified(
    dtype: str, sampling: Sampling, make_model: MakeModel
) -> None:
    workload = replace(WORKLOAD, sampling=sampling)
    model = make_model(device="cuda", dtype=dtype, **WIDE)
    recording = batcher_for(model, "slots", "mixed", "continuous").serve(workload, Watch())
    found = verify(workload, [recording], TeacherForced(model))
    assert found.wrong == 0, found.findings
    if dtype == "float32":
        assert found.identical == len(workload), found.findings


@pytest.mark.parametrize(("engine", "prefill", "policy"), SERVED)
@pytest.mark.parametrize(("gpu", "dtype"), FORMATS, indirect=["gpu"])
def test_outputs_of_another_family_are_verified(
    dtype: str, engine: str, prefill: str, policy: str, make_model: MakeModel
) -> None:
    """Rotary positions, and two heads of queries to one of keys."""
    model = make_model(LLAMA, device="cuda", dtype=dtype)
    recording = batcher_for(model, engine, prefill, policy).serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(model))
    assert found.wrong == 0, found.findings
    assert found.identical > 0


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_the_gpu_says_what_the_cpu_says(engine: str, make_model: MakeModel) -> None:
    said = [
        outputs(batcher_for(model, engine, "separate", "continuous").serve(WORKLOAD, Watch()))
        for model in (make_model(device=d, dtype="float32") for d in ("cpu", "cuda"))
    ]
    same = sum(one == other for one, other in zip(*said, strict=True))
    assert same >= len(WORKLOAD) - 1  # one may stand on a tie


def test_a_broken_mask_is_caught(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchbench.batching.engines.torch import attention

    decode = attention._decode

    def unmasked(q: torch.Tensor, block: Any, layout: Any, options: Any) -> torch.Tensor:
        hidden = layout.mask(q.dtype)
        layout = replace(layout)
        layout._mask = torch.zeros_like(hidden)
        return decode(q, block, layout, options)

    model = make_model(device="cuda", dtype="float32", **WIDE)
    # A graph was recorded before the fault: it would replay what is right.
    batcher = batcher_for(model, "slots", "separate", "continuous", execution="eager")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_decode", unmasked)
        recording = batcher.serve(WORKLOAD, Watch())
    assert verify(WORKLOAD, [recording], TeacherForced(model)).wrong > 0


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_a_second_trial_gives_the_same_tokens(engine: str, make_model: MakeModel) -> None:
    model = make_model(device="cuda", dtype=half(), **WIDE)
    batcher = batcher_for(model, engine, "separate", "continuous")
    first, second = (batcher.serve(WORKLOAD, Watch()) for _ in range(2))
    assert outputs(first) == outputs(second)


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_a_text_ends_with_the_token_that_ends_it(engine: str, make_model: MakeModel) -> None:
    model = make_model(device="cuda", dtype="float32", **WIDE)
    whole = outputs(batcher_for(model, engine, "separate", "continuous").serve(WORKLOAD, Watch()))
    eos = whole[4][6]
    source = replace(model.source, config={**model.source.config, "eos_token_id": eos})
    ending = replace(WORKLOAD, stop_at_eos=True)
    batcher = batcher_for(replace(model, source=source), engine, "separate", "continuous")
    expected = [said[: said.index(eos) + 1] if eos in said else said for said in whole]
    assert outputs(batcher.serve(ending, Watch())) == expected
    assert len(expected[4]) <= 7


def test_dummy_weights_are_those_of_the_cpu(make_model: MakeModel) -> None:
    cpu, gpu = (make_model(device=d, dtype="float32").module for d in ("cpu", "cuda"))
    for one, other in zip(cpu.parameters(), gpu.parameters(), strict=True):
        assert torch.equal(one, other.cpu())


# Graphs


@pytest.mark.parametrize("execution", ["eager", "graph", "compile"])
@pytest.mark.parametrize("policy", ["static", "continuous"])
@pytest.mark.parametrize("config", [WIDE, LLAMA], ids=["gpt2", "llama"])
def test_each_execution_is_verified(
    execution: str,
    policy: str,
    config: Mapping[str, Any],
    make_model: MakeModel,
    gpu: StandIn | None,
) -> None:
    if execution == "compile" and config is LLAMA:
        pytest.skip("only GPT-2's own forward pass is compiled for certain")
    if execution == "compile" and gpu is not None:
        pytest.skip("inductor compiles for real devices only")
    made = make_model(device="cuda", **WIDE) if config is WIDE else make_model(LLAMA, device="cuda")
    batcher = batcher_for(made, "slots", "mixed", policy, execution=execution)
    recording = batcher.serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(made))
    assert (found.wrong, found.requests_checked) == (0, len(WORKLOAD)), found.findings


def test_graphs_are_what_auto_takes(make_model: MakeModel) -> None:
    engine, _ = make_engine("slots", make_model(device="cuda", **WIDE), 8, 128)
    assert engine.execution == "graph"


def test_graphs_share_their_memory(make_model: MakeModel) -> None:
    """Twelve graphs take little more than the largest of them, and no second cache."""
    model = make_model(device="cuda", dtype="float32", **WIDE)
    torch.cuda.synchronize()
    taken = []
    for execution in ("eager", "graph"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        engine, memory = make_engine("slots", model, 8, 128, execution)
        taken.append(torch.cuda.memory_allocated() - before)
        assert taken[-1] < memory["kv_cache_bytes"] * 1.5 + 2**24
        del engine
    assert taken[1] - taken[0] < 2**24


# Steps and times


@pytest.mark.parametrize(("engine", "prefill", "policy"), SERVED)
def test_steps_are_those_of_a_simulation(
    engine: str, prefill: str, policy: str, make_model: MakeModel
) -> None:
    model = make_model(device="cuda", dtype="float32")
    batcher = batcher_for(model, engine, prefill, policy)
    real = batcher.serve(WORKLOAD, Watch())
    simulated = replace(batcher, engine=SimulatedEngine()).serve(WORKLOAD, Watch())
    assert real.num_steps == simulated.num_steps
    for column in ("slot", "admitted", "started", "first", "last", "released"):
        one, other = getattr(real.requests, column), getattr(simulated.requests, column)
        assert np.array_equal(one, other), column


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_times_ascend_and_lie_within_the_hosts(engine: str, make_model: MakeModel) -> None:
    model = make_model(device="cuda", dtype="float32", **WIDE)
    batcher = batcher_for(model, engine, "separate", "continuous")
    batcher.serve(WORKLOAD, Watch())  # compiles and allocates
    torch.cuda.synchronize()
    began = time.perf_counter_ns()
    recording = batcher.serve(WORKLOAD, Watch())
    took = time.perf_counter_ns() - began
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    assert len(ends) == recording.num_steps
    assert starts[0] >= 0
    assert (np.diff(ends) > 0).all()
    assert (starts <= ends).all()
    assert (ends[:-1] <= starts[1:]).all()
    assert ends[-1] <= took


def test_the_cache_stays_where_it_is(make_model: MakeModel) -> None:
    model = make_model(device="cuda", dtype=half(), **WIDE)
    batcher = batcher_for(model, "slots", "mixed", "continuous")
    engine = batcher.engine
    assert isinstance(engine, SlotsEngine)

    def places() -> list[tuple[int, torch.Size]]:
        blocks = [b for layer in engine._cache.layers for b in (layer.keys, layer.values)]
        assert all(block.device.type == "cuda" and block.dtype == model.dtype for block in blocks)
        return [(block.data_ptr(), block.shape) for block in blocks]

    before = places()
    batcher.serve(WORKLOAD, Watch())
    assert places() == before


# Whole experiments, and memory


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_an_experiment_is_conducted_and_verified(engine: str, checkpoint: Path) -> None:
    outcome = conduct(
        Experiment(
            WorkloadSpec(queue_size=7, long_tokens=30, short_tokens=5, prompt_tokens="1:20"),
            ModelSpec(model=str(checkpoint), device="cuda"),
            ServingSpec(batch_size=3, engine=engine),
            TrialsSpec(trials=2),
        )
    )
    assert outcome.verification.passed, outcome.verification.findings
    assert outcome.verification.requests_checked == 7
    assert outcome.model["device"] == "cuda:0"
    assert outcome.model["dtype"] == half()
    assert outcome.environment["gpu"] == torch.cuda.get_device_name(0)
    assert [len(rs) for rs in outcome.recordings.values()] == [2, 2]


def test_auto_takes_the_gpu() -> None:
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda") == torch.device("cuda:0")


def test_a_gpu_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"--device cuda:99: .*it has cpu.*cuda:0"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_a_batch_that_does_not_fit_names_the_largest_that_does(
    engine: str, make_model: MakeModel
) -> None:
    model = make_model(device="cuda", dtype="float32")
    with pytest.raises(UsageError, match=r"cuda:0 has .*the largest that fits is \d+$"):
        make_engine(engine, model, 2**40, 128)


def test_memory_that_was_gone_when_it_was_taken_is_a_usage_error(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = "batchbench.batching.engines.torch.build.free_bytes"
    monkeypatch.setattr(making, lambda device: 2**80)
    model = make_model(device="cuda", dtype="float32")
    slots = 2**30  # 8 GiB of last tokens, and 16 TiB of keys in each layer
    with pytest.raises(UsageError, match=f"--batch-size {slots}: "):
        make_engine("slots", model, slots, 128)
