"""Prepared passes: they compute what passes that are decided anew compute, and fail when broken.

Where there is no GPU a pass is "prepared" by leaving it as it is: it still computes on the fixed
buffers, at the fixed sizes, that a CUDA graph would be recorded on.
"""

from __future__ import annotations

import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch import build, sampling
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.forward import make_forward
from batchbench.batching.engines.torch.graphs import Pass, PreparedDecode, fitting, sizes
from batchbench.batching.engines.torch.linear import Kernels
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.sampling import best_token
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.progress import Watch
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import MakeModel

pytestmark = pytest.mark.machine

some = settings(max_examples=15, deadline=None, derandomize=True, database=None)

PROMPTS = np.random.default_rng(3).integers(1, 300, (4, 70)).tolist()


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    asked = draw(
        st.lists(
            st.tuples(st.sampled_from(PROMPTS), st.integers(1, 70), st.integers(1, 20)),
            min_size=1,
            max_size=8,
        )
    )
    return Workload.of("random", [p[:n] for p, n, _ in asked], [n for _, _, n in asked])


def replaying(
    model: LoadedModel, slots: int, max_len: int, *, every_batch: bool = True
) -> SlotsEngine:
    """A slots engine whose decode passes run on fixed buffers, on torch's attention as on a GPU."""
    engine = SlotsEngine(model, slots, max_len, make_forward(model, Kernels.PACKED))
    args = (engine._pass, engine._cache, engine._last, engine._chooser, lambda run: run, max_len)
    engine._prepared = PreparedDecode(*args, every_batch=every_batch)
    return engine


def outputs(engine: SlotsEngine, workload: Workload, policy: str, **options: Any) -> list[Any]:
    batcher = Batcher(policy, engine, len(engine._last), **options)
    recording = batcher.serve(workload, Watch())
    return [recording.tokens_of(i).tolist() for i in range(len(workload))]


@some
@given(workloads(), st.integers(1, 6), st.sampled_from(["static", "continuous"]), st.booleans())
def test_prepared_passes_give_the_tokens_of_eager_ones(
    tiny: LoadedModel, workload: Workload, slots: int, policy: str, every_batch: bool
) -> None:
    longest = workload.max_total_tokens
    fixed = replaying(tiny, slots, longest, every_batch=every_batch)
    eager = SlotsEngine(tiny, slots, longest)
    for prefill in ("separate", "mixed"):
        options = {"prefill": prefill, "max_batched_tokens": slots + 5}
        said = outputs(fixed, workload, policy, **options)
        assert said == outputs(eager, workload, policy, **options)


def test_prepared_passes_take_the_planned_steps(tiny: LoadedModel) -> None:
    workload = Workload.of(
        "few", [p[:n] for p, n in zip(PROMPTS, (9, 2, 5, 1), strict=True)], [7] * 4
    )
    engine = replaying(tiny, 3, workload.max_total_tokens)
    real = Batcher("continuous", engine, 3, prefill="mixed").serve(workload, Watch())
    planned = Batcher("continuous", SimulatedEngine(), 3, prefill="mixed")
    assert real.num_steps == planned.serve(workload, Watch()).num_steps


def _not_advancing(engine: SlotsEngine) -> None:
    assert engine._prepared is not None
    kept = engine._prepared.aim

    def aim(plan: Any) -> None:
        kept(plan)
        engine._prepared._growing.zero_()  # type: ignore[union-attr]

    engine._prepared.aim = aim  # type: ignore[method-assign]


def _too_short(engine: SlotsEngine) -> None:
    assert engine._prepared is not None
    passes = engine._prepared._passes
    shortest = min(length for _, length in passes)
    for rows, length in list(passes):
        passes[rows, length] = passes[rows, shortest]


@pytest.mark.parametrize("fault", [_not_advancing, _too_short])
def test_a_broken_replay_is_caught(tiny: LoadedModel, fault: Any) -> None:
    workload = Workload.of("long", [p[:70] for p in PROMPTS], [30] * 4)
    engine = replaying(tiny, 2, workload.max_total_tokens)
    batcher = Batcher("continuous", engine, 2)
    whole = verify(workload, [batcher.serve(workload, Watch())], TeacherForced(tiny))
    fault(engine)
    broken = verify(workload, [batcher.serve(workload, Watch())], TeacherForced(tiny))
    assert (whole.wrong, broken.wrong > 0) == (0, True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_passes_give_the_tokens_of_eager_ones(make_model: MakeModel) -> None:
    model = make_model(n_layer=1)
    workload = Workload.of(
        "few", [p[:n] for p, n in zip(PROMPTS, (9, 2, 5, 1), strict=True)], [7] * 4
    )
    counters.clear()
    (engine, memory), codes = run_and_get_code(make_engine, "slots", model, 3, 32, "compile")
    assert (engine.execution, memory["packed_weight_bytes"]) == ("compile", 0)
    assert not counters["graph_break"]  # nothing in a pass makes the compiler stop
    assert isinstance(engine, SlotsEngine)
    block = engine._cache.blocks[0].block
    buffers = re.findall(r"empty_strided\w*\(\(([\d, ]+)\),", "".join(codes))
    sizes_made = [math.prod(int(n) for n in sizes.split(",") if n.strip()) for sizes in buffers]
    assert 0 < max(sizes_made) < block.numel()  # the cache is never copied
    recording = Batcher("continuous", engine, 3).serve(workload, Watch())
    assert verify(workload, [recording], TeacherForced(model)).identical == 4


# Sizes


@given(st.integers(1, 100), st.integers(1, 5000))
def test_every_length_has_a_size_at_most_twice_as_large(smallest: int, largest: int) -> None:
    found = sizes(smallest, largest)
    assert list(found) == sorted(set(found))
    assert found[-1] == largest
    for wanted in range(1, largest + 1, max(1, largest // 50)):
        size = fitting(found, wanted)
        assert wanted <= size <= max(smallest, 2 * wanted)


# What cannot be


@pytest.mark.parametrize("execution", ["graph", "compile"])
def test_the_notebook_computes_eagerly(execution: str) -> None:
    with pytest.raises(UsageError, match=f"--execution {execution}: .* give --execution auto or"):
        ServingSpec(engine="notebook", execution=execution)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"--execution graph: .* is on cpu; use --execution auto"):
        make_engine("slots", tiny, 2, 20, "graph")


def test_auto_computes_eagerly_on_a_cpu(tiny: LoadedModel) -> None:
    assert make_engine("slots", tiny, 2, 20)[0].execution == "eager"


def _refuse(*_: object, **__: object) -> Pass:
    raise ValueError("no kernel for this")


def test_what_cannot_be_compiled_says_what_to_take_instead(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchbench.batching.engines.torch.graphs.torch.compile", _refuse)
    with pytest.raises(UsageError, match=r"--execution compile: .*no kernel.*--execution eager"):
        make_engine("slots", tiny, 2, 20, "compile")


def test_auto_falls_back_where_passes_cannot_be_recorded(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose model waits for the device in the middle of a pass."""
    monkeypatch.setattr("batchbench.batching.engines.torch.graphs.Capture", _refuse)
    on_gpu = build._resolve_execution("auto", torch.device("cuda"))
    assert on_gpu == "graph"
    engine = build._slots_engine(tiny, 2, 20, build.make_forward(tiny), "graph", falls_back=True)
    assert engine.execution == "eager"


# The choice of a token


@given(
    st.integers(1, 5),
    st.sampled_from([1, 255, 256, 257, 511, 512, 513, 1000, 5000]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings(deadline=None, derandomize=True, database=None)
def test_the_best_token_is_the_first_of_the_largest(
    rows: int, vocabulary: int, dtype: torch.dtype, seed: int
) -> None:
    numbers = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (rows, vocabulary), generator=numbers).to(dtype)
    assert best_token(logits).tolist() == logits.float().numpy().argmax(-1).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "native", lambda: None)
        assert best_token(logits).tolist() == logits.float().numpy().argmax(-1).tolist()


def test_a_number_that_is_none_is_found() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, 700] = torch.nan
    assert best_token(logits).tolist() == [700, 0]


def test_a_number_that_is_none_is_found_by_torch_too(torch_kernels: None) -> None:
    test_a_number_that_is_none_is_found()
