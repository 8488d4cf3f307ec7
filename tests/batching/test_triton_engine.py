"""Engines on Triton's kernels: on the stand-in for CUDA, in Triton's interpreter."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.cuda_stand_in import StandIn
from support.models import LLAMA, QWEN2, QWEN3, TINY

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import verify
from batchbench.reports.metrics import counters
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import MakeModel

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from batchbench.batching.engines.torch import build
from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.build import LLAMA_WITH_TRITON
from batchbench.batching.engines.torch.forward import TransformersForward, make_forward
from batchbench.batching.engines.torch.linear import Kernels
from batchbench.batching.engines.torch.triton import choice as triton_choice
from batchbench.batching.engines.torch.triton import ops
from batchbench.batching.engines.torch.triton.choice import triton_attention
from batchbench.batching.engines.torch.triton.forward import TritonForward, product_has_gelu

pytestmark = pytest.mark.skipif(
    not ops._INTERPRETED, reason="the stand-in needs Triton's interpreter, which is off on a GPU"
)

LENGTHS, OUTPUT_TOKENS = (5, 1, 9, 7), (4, 12, 1, 7)

WORKLOAD = Workload.of(
    "four requests",
    [np.random.default_rng(i).integers(1, 300, n).tolist() for i, n in enumerate(LENGTHS)],
    OUTPUT_TOKENS,
)
ENDING = replace(WORKLOAD, stop_at_eos=True)


def tokens_of(recording: Recording) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(WORKLOAD))]


def engine_for(model: Any, *, slots: int = 3, prompt: int = 9, **options: Any) -> SlotsEngine:
    longest = WORKLOAD.max_total_tokens
    engine, _ = make_engine("slots", model, slots, longest, prompt=prompt, **options)
    assert isinstance(engine, SlotsEngine)
    return engine


MODULES = {**LLAMA, "hidden_act": "gelu"}
"""A model that only transformers' modules compute, with Triton's attention."""


@pytest.mark.parametrize(
    ("config", "prefill", "dtype"),
    [
        (TINY, "separate", "float32"),
        (TINY, "mixed", "float32"),
        (LLAMA, "separate", "float32"),
        (LLAMA, "mixed", "bfloat16"),
        (QWEN2, "mixed", "float32"),
        (QWEN3, "mixed", "float32"),
        (MODULES, "mixed", "float32"),
    ],
    ids=["gpt2-separate", "gpt2", "llama-separate", "llama-bfloat16", "qwen2", "qwen3", "modules"],
)
def test_outputs_are_verified(
    config: Any, prefill: str, dtype: str, triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    one = {} if config is TINY else {"num_hidden_layers": 1}
    model = make_model({**config, **one}, dtype=dtype, device="cuda")
    with torch.no_grad():  # dummy norms are 1 and biases 0, so they could be exchanged
        for i, parameter in enumerate(p for p in model.module.parameters() if p.ndim == 1):
            parameter.add_(0.2 * torch.sin(torch.arange(len(parameter)) + i).to(parameter))
    engine = engine_for(model, slots=2, budget=8, mixes=prefill == "mixed")
    assert isinstance(engine._pass, TransformersForward if config is MODULES else TritonForward)
    assert engine._pass.triton
    batcher = Batcher("continuous", engine, 2, prefill=prefill, max_batched_tokens=8)
    recording = batcher.serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(model))
    assert found.wrong == 0, found.findings
    assert found.identical == len(WORKLOAD) or dtype == "bfloat16", found.findings
    assert engine._mixed is not None
    assert engine._mixed.calls == np.count_nonzero(recording.spans.chunks)
    assert engine._passes == 0  # nothing but graphs ran


# Launches


FAMILIES = [(TINY, "n_layer", build.WITH_TRITON), (QWEN2, "num_hidden_layers", LLAMA_WITH_TRITON)]


@pytest.mark.parametrize(("config", "depth", "budget"), FAMILIES, ids=["gpt2", "qwen2"])
def test_a_decode_pass_launches_seven_or_eight_kernels_a_layer_and_six(
    config: Any,
    depth: str,
    budget: tuple[int, int],
    triton_stand_in: StandIn,
    make_model: MakeModel,
) -> None:
    layers, gpt2 = 3, config is TINY
    model = make_model({**config, depth: layers}, device="cuda", dtype="bfloat16")
    engine = engine_for(model, slots=4, budget=8)
    assert engine._prepared is not None
    assert list(engine._prepared._passes) == [(4, 16), (2, 16), (1, 16)]  # none for a length
    decode = triton_stand_in.graphs[-3:]
    into_mlp = "aten._addmm_activation.default" if gpt2 else "triton.swiglu"  # GELU, SwiGLU
    expected = {
        "aten.addmm.default": layers,  # queries, keys and values, which have biases
        "triton.decode_attention": layers,
        # After attention, out of the MLP, and into a gated one; the vocabulary.
        "aten.mm.default": (2 if gpt2 else 3) * layers + 1,
        "triton.add_norm": 2 * layers + 1,  # also of the embeddings
        into_mlp: layers,
        "triton.best_of_parts": 1,
        "triton.best_of_all": 1,
        "aten.copy_.default": 1,
        "aten.add_.Tensor": 1,  # positions
    }
    of_layer, beside = budget
    assert (of_layer, beside) == (7 if gpt2 else 8, 6)
    for graph in decode:
        assert graph.launches == expected
        assert graph.launches.total() == of_layer * layers + beside


@pytest.mark.parametrize(("config", "depth", "budget"), FAMILIES, ids=["gpt2", "qwen2"])
def test_a_pass_with_prompts_launches_as_few_in_a_layer(
    config: Any,
    depth: str,
    budget: tuple[int, int],
    triton_stand_in: StandIn,
    make_model: MakeModel,
) -> None:
    found = []
    for layers in (1, 2):
        engine_for(make_model({**config, depth: layers}, device="cuda"), slots=2, budget=8)
        found.append(triton_stand_in.graphs[0].launches)
        triton_stand_in.graphs.clear()
    (one, two) = found
    assert sum((two - one).values()) == budget[0]
    assert one["triton.tile_attention"] == 1
    assert not any("decode" in name for name in one)


def test_the_modules_of_transformers_launch_what_an_estimate_counts(
    triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    """A view of a product, ``aten._unsafe_view``, launches nothing."""
    of_layer, beside = build.WITH_TRANSFORMERS
    for layers in (1, 2):
        model = make_model(LLAMA, num_hidden_layers=layers, device="cuda", dtype="bfloat16")
        engine_for(model, slots=2, budget=8, forward=TransformersForward(model, Kernels.OWN))
        for graph in triton_stand_in.graphs[-2:]:  # a decode step of two requests, and of one
            assert graph.launches["triton.decode_attention"] == layers
            assert graph.launches["aten.mm.default"] == 7 * layers + 1
            assert graph.launches.total() == layers * of_layer + beside


# Texts that end by themselves


@pytest.mark.parametrize("engine", ["slots", "notebook"])
@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_the_host_looks_for_the_end_of_a_text_while_the_next_pass_runs(
    engine: str, policy: str, make_model: MakeModel
) -> None:
    with StandIn(lazy=True) as gpu:
        model = make_model(device="cuda")
        made, _ = make_engine(engine, model, 2, WORKLOAD.max_total_tokens)
        said = tokens_of(Batcher(policy, made, 2).serve(WORKLOAD, Watch()))
        eos = said[1][4]
        made._eos = {eos}
        unlaunched: list[int] = []
        read = made._on_host.read

        def reading(*, late: bool) -> list[int]:
            tokens = read(late=late)
            unlaunched.append(len(gpu.queue))
            return tokens

        made._on_host.read = reading
        recording = Batcher(policy, made, 2).serve(ENDING, Watch())
        found = tokens_of(recording)
        assert found == [t[: t.index(eos) + 1] if eos in t else t for t in said]
        assert len(found[1]) == 5
        assert min(unlaunched) > 0  # at each look, the device still has work
        log = recording.requests
        held = log.released - log.last - 1
        assert held[1] == 1 or policy == "static"
        assert held.sum() == counters(recording)["finished_slot_steps"]
        del made, model
        gc.collect()


def test_a_closed_loop_is_told_at_once(cuda_stand_in: StandIn, make_model: MakeModel) -> None:
    model = make_model(device="cuda")
    engine, _ = make_engine("slots", model, 2, WORKLOAD.max_total_tokens)
    said = tokens_of(Batcher("continuous", engine, 2).serve(WORKLOAD, Watch()))
    engine._eos = {said[1][4]}
    recording = Batcher("continuous", engine, 2).serve(replace(ENDING, max_concurrency=2), Watch())
    log = recording.requests
    assert (log.released - log.last)[1] == 1


# The choice of the kernels


@contextmanager
def launching(launch: Any) -> Iterator[None]:
    """Launch kernels in another way, of which nothing was found out before."""
    with pytest.MonkeyPatch.context() as patch:  # undone before the stand-in goes
        patch.setattr(triton_choice, "_fault", triton_choice._fault.__wrapped__)
        patch.setattr(ops, "launch", launch)
        yield


def skipping(*kernels: str) -> Any:
    """Return what launches all kernels but these, whose results stay what they were."""
    launch, skipped = ops.launch, [getattr(ops.kernels, kernel) for kernel in kernels]

    def launch_others(kernel: Any, *args: Any, **options: Any) -> None:
        if kernel not in skipped:
            launch(kernel, *args, **options)

    return launch_others


SAID = {
    "decode_attention": "attention of Triton and of torch differ",
    "tile_attention": "attention of Triton and of torch differ",
    "add_norm": "norms of Triton and of torch differ",
    "best_of_all": "tokens of Triton and of torch differ",
    "swiglu": "SwiGLU of Triton and of torch differ",
}


@pytest.mark.parametrize(
    ("config", "kernel"),
    [(TINY, kernel) for kernel in SAID if kernel != "swiglu"]
    + [(QWEN3, kernel) for kernel in SAID],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_kernels_that_compute_something_else_are_not_used(
    config: Any, kernel: str, triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    """A compiler may have a fault; the engine then serves with torch's operators, and says so."""
    with launching(skipping(kernel)):
        engine, _ = make_engine("slots", make_model(config, device="cuda"), 2, 16, "eager")
    assert not engine.triton
    assert engine.execution_note is not None
    assert SAID[kernel] in engine.execution_note


def test_kernels_that_a_model_does_not_use_are_not_compared(
    triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    """They are not compiled either, which takes seconds."""
    for config, others in ((TINY, ["swiglu"]), (MODULES, ["swiglu", "add_norm"])):
        with launching(skipping(*others)):
            assert triton_choice.why_no_triton(make_model(config, device="cuda")) is None


def test_kernels_that_cannot_be_compiled_are_not_used(
    triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    with launching(failing):
        engine, _ = make_engine("slots", make_model(device="cuda"), 2, 16, "eager")
    assert engine.execution_note == (
        "without Triton's kernels: RuntimeError: Failed to find C compiler. Please specify via CC"
    )


def test_gelu_is_in_the_product_only_in_its_tanh_form(
    cuda_stand_in: StandIn, make_model: MakeModel
) -> None:
    """Torch's product with GELU has the tanh form on CUDA, and the exact form on a CPU."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert product_has_gelu.__wrapped__(torch.device("cuda:0"), dtype)
        assert not product_has_gelu.__wrapped__(torch.device("cpu"), dtype)


@pytest.mark.parametrize("vocabulary", [300, 256])
def test_the_vocabulary_is_padded_and_no_padded_token_is_chosen(
    vocabulary: int, triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    model = make_model(device="cuda", vocab_size=vocabulary)
    model.module.lm_head.weight.data.abs_().neg_()  # so that a padded logit of 0 would be chosen
    forward = make_forward(model)
    rows = 384 if vocabulary == 300 else 256
    assert forward.extra_bytes == (rows * 32 * 4 if rows > vocabulary else 0)
    cache = SlotCache(
        model.module.config, 1, 8, model.module.lm_head.weight, triton_attention(model, 1, 8)
    )
    zero = torch.zeros(1, dtype=torch.int64, device="cuda:0")
    with torch.inference_mode():
        logits = forward(zero, Layout(cache, zero, zero, 1), None)
    assert logits.shape == (1, vocabulary)
    assert forward.choose(logits).tolist() == logits.max(-1).indices.tolist()
