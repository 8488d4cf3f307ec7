"""Engines: whatever the batch does, each request gets what the model says to it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines import Engine
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch import linear as layers
from batchbench.batching.engines.torch import linear as onednn_file
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.linear import Kernels, make_linear
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Plan
from batchbench.batching.policies import ORDERS, make_policy
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.scheduler import Scheduler
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Arrivals, Workload

if TYPE_CHECKING:
    from support.models import Alone, MakeModel

pytestmark = pytest.mark.machine

POLICIES = ("static", "continuous")
ENGINES = ("slots", "notebook")

SHAPE: Mapping[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

LLAMA: Mapping[str, Any] = {
    **SHAPE,
    "model_type": "llama",
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
"""Rotary positions, and two heads of queries to one of keys."""

GPT2: Mapping[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 12},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {**SHAPE, "model_type": "gpt_neox"},
    "opt": {**SHAPE, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2, untied": {**GPT2, "tie_word_embeddings": False},
    "gpt2, another width": {**GPT2, "n_inner": 40, "n_head": 8, "layer_norm_epsilon": 0.1},
    "gpt2, tanh": {**GPT2, "activation_function": "gelu_pytorch_tanh"},
    "gpt2, relu": {**GPT2, "activation_function": "relu"},
    "gpt2, scaled by layer": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt2, not scaled": {**GPT2, "scale_attn_weights": False},
}

OTHERS: Mapping[str, Mapping[str, Any]] = {
    "falcon": {**SHAPE, "model_type": "falcon"},
    "stablelm": {**LLAMA, "model_type": "stablelm"},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 2},
    "deepseek_v3": {**SHAPE, "model_type": "deepseek_v3"},
    "bloom": {"model_type": "bloom", "vocab_size": 300, "hidden_size": 32, "n_head": 4},
}
"""Attention of their own, which the slot cache does not reach, or experts."""

PROMPTS = np.random.default_rng(0).integers(1, 300, (3, 20)).tolist()
"""Prompts of random requests begin one of these, so that what they give alone is found once."""

MOST = 12  # output tokens


@dataclass(frozen=True)
class Asked:
    """A random workload, and how it is served."""

    workload: Workload
    slots: int
    order: str
    max_batched_tokens: int


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    requests = draw(
        st.lists(
            st.tuples(st.sampled_from(PROMPTS), st.integers(1, 20), st.integers(1, MOST)),
            min_size=1,
            max_size=8,
        )
    )
    slots = draw(st.integers(1, 6))
    return Asked(
        Workload.of("random", [p[:n] for p, n, _ in requests], [n for _, _, n in requests]),
        slots,
        draw(st.sampled_from(sorted(ORDERS))),
        slots + draw(st.integers(1, 9)),
    )


some = settings(max_examples=20, deadline=None, derandomize=True, database=None)


Greedy = Callable[[LoadedModel, Workload], list[list[int]]]


@pytest.fixture(scope="module")
def greedy(alone: Alone) -> Greedy:
    """Return the tokens that the stock model gives each request of a workload alone."""
    known: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    models = []  # kept, so that no two ever have the same id

    def each(model: LoadedModel, workload: Workload) -> list[list[int]]:
        models.append(model)
        outputs = []
        for request in workload:
            prompt = tuple(workload.prompt(request.index).tolist())
            if (id(model), prompt) not in known:
                known[id(model), prompt] = alone(model, prompt, MOST)
            outputs.append(known[id(model), prompt][: request.output_tokens])
        return outputs

    return each


@pytest.fixture(scope="module")
def llama(make_model: MakeModel) -> LoadedModel:
    return make_model(LLAMA)


def slots_engine(model: LoadedModel, slots: int, max_len: int) -> SlotsEngine:
    engine, _ = make_engine("slots", model, slots, max_len)
    assert isinstance(engine, SlotsEngine)
    return engine


def engine_for(name: str, model: LoadedModel, workload: Workload, slots: int) -> Engine:
    return make_engine(name, model, slots, workload.max_total_tokens)[0]


def serve(
    name: str, model: LoadedModel, workload: Workload, policy: str, slots: int, **options: Any
) -> Recording:
    engine = engine_for(name, model, workload, slots)
    return Batcher(policy, engine, slots, **options).serve(workload, Watch())


def outputs(recording: Recording) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(recording.requests.slot))]


def per_step(recording: Recording) -> dict[str, NDArray[np.int64]]:
    """Return the facts about steps and slots that do not depend on the cut into spans."""
    spans = recording.spans
    logged = {f"chunk {name}": column for name, column in vars(recording.chunks).items()}
    logged |= {f"request {name}": column for name, column in vars(recording.requests).items()}
    for name in ("decoding", "waiting", "chunks"):
        logged[f"step {name}"] = np.repeat(getattr(spans, name), spans.steps)
    return logged


def assert_same_steps(one: Recording, other: Recording) -> None:
    logged = per_step(other)
    for name, column in per_step(one).items():
        assert np.array_equal(column, logged[name]), name


def prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths."""
    return [PROMPTS[i % 3][:length] for i, length in enumerate(lengths)]


MIXTURE = Workload.of("mixture", prompts(5, 1, 20, 7, 3, 9, 2), [4, 12, 1, 7, 12, 2, 5])


# The law


@some
@given(asked())
def test_slots_give_each_request_its_own_tokens_and_the_planned_steps(
    tiny: LoadedModel, greedy: Greedy, asked: Asked
) -> None:
    check("slots", tiny, greedy, asked, prefill="separate")


@some
@given(asked())
def test_mixed_prefill_gives_each_request_its_own_tokens_and_the_planned_steps(
    tiny: LoadedModel, greedy: Greedy, asked: Asked
) -> None:
    options = {"prefill": "mixed", "max_batched_tokens": asked.max_batched_tokens}
    check("slots", tiny, greedy, asked, **options)


@some
@given(asked())
def test_the_notebook_gives_each_request_its_own_tokens_and_the_planned_steps(
    tiny: LoadedModel, greedy: Greedy, asked: Asked
) -> None:
    check("notebook", tiny, greedy, asked, prefill="separate")


@some
@given(asked())
def test_mixed_prefill_gives_each_request_its_own_tokens_on_any_model(
    llama: LoadedModel, greedy: Greedy, asked: Asked
) -> None:
    options = {"prefill": "mixed", "max_batched_tokens": asked.max_batched_tokens}
    check("slots", llama, greedy, asked, **options)


def check(
    name: str,
    model: LoadedModel,
    greedy: Greedy,
    asked: Asked,
    **options: Any,
) -> None:
    """One engine serves under every policy, one after the other."""
    workload, slots = asked.workload, asked.slots
    engine = engine_for(name, model, workload, slots)
    for policy in POLICIES:
        batcher = Batcher(policy, engine, slots, order=asked.order, **options)
        recording = batcher.serve(workload, Watch())
        assert outputs(recording) == greedy(model, workload)
        simulated = replace(batcher, engine=SimulatedEngine()).serve(workload, Watch())
        assert_same_steps(recording, simulated)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ENGINES)
def test_passes_decided_one_by_one_give_the_same_steps_and_tokens(
    name: str, policy: str, tiny: LoadedModel
) -> None:
    at_once = serve(name, tiny, MIXTURE, policy, 3)
    one_by_one = serve(name, tiny, MIXTURE, policy, 3, max_repeat=1)
    assert outputs(one_by_one) == outputs(at_once)
    assert_same_steps(one_by_one, at_once)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ENGINES)
def test_requests_that_come_later_get_their_own_tokens(
    name: str,
    policy: str,
    tiny: LoadedModel,
    greedy: Greedy,
) -> None:
    due = [0, 0, 1, 2_000_000, 2_000_000, 30_000_000, 31_000_000]
    timed = replace(MIXTURE, due_ns=np.array(due, np.int64))
    recording = serve(name, tiny, timed, policy, 3)
    assert outputs(recording) == greedy(tiny, timed)
    assert (recording.step_starts_ns[recording.requests.admitted] >= timed.due_ns).all()


def test_a_mixed_pass_computes_no_more_tokens_than_it_may(
    tiny: LoadedModel, greedy: Greedy
) -> None:
    recording = serve(
        "slots", tiny, MIXTURE, "continuous", 3, prefill="mixed", max_batched_tokens=8
    )
    spans, chunks = recording.spans, recording.chunks
    span = np.repeat(np.arange(len(spans.steps)), spans.chunks)
    computed = spans.decoding + np.bincount(span, chunks.stop - chunks.start, len(spans.steps))
    assert computed.max() == 8
    assert len(chunks.start) > len(MIXTURE)  # some prompt came in pieces
    assert outputs(recording) == greedy(tiny, MIXTURE)


# Corners


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("lengths", "output_tokens", "slots"),
    [
        ([5], [6], 1),
        ([5, 3, 8], [6, 2, 4], 1),
        ([5, 3], [6, 2], 6),
        ([5, 3, 8, 2], [1, 1, 1, 1], 2),
        ([1, 1, 1], [1, 12, 1], 2),
        ([4, 4, 4, 4], [5, 5, 5, 5], 2),
    ],
    ids=["one", "a batch of 1", "empty slots", "one token", "one among many", "all alike"],
)
def test_corners_of_batching(
    lengths: list[int],
    output_tokens: list[int],
    slots: int,
    name: str,
    policy: str,
    tiny: LoadedModel,
    greedy: Greedy,
) -> None:
    workload = Workload.of("corner", prompts(*lengths), output_tokens)
    assert outputs(serve(name, tiny, workload, policy, slots)) == greedy(tiny, workload)


@pytest.mark.parametrize("name", ENGINES)
def test_a_request_may_fill_the_context(name: str, tiny: LoadedModel, alone: Alone) -> None:
    workload = Workload.of("full", [[5] * 100, [7] * 3], [28, 125])
    recording = serve(name, tiny, workload, "continuous", 2)
    assert outputs(recording) == [alone(tiny, [5] * 100, 28), alone(tiny, [7] * 3, 125)]


# Texts that end by themselves


def with_eos(model: LoadedModel, *eos: int) -> LoadedModel:
    config = {**model.source.config, "eos_token_id": list(eos)}
    return replace(model, source=replace(model.source, config=config))


def cut(tokens: Sequence[int], eos: set[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return list(tokens[: ends[0] + 1] if ends else tokens)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "prefill"), [("slots", "separate"), ("slots", "mixed"), ("notebook", "separate")]
)
def test_a_text_ends_with_the_token_that_ends_it(
    name: str,
    prefill: str,
    policy: str,
    tiny: LoadedModel,
    greedy: Greedy,
) -> None:
    workload = replace(
        MIXTURE, output_tokens=np.full(len(MIXTURE), MOST, np.int64), stop_at_eos=True
    )
    whole = greedy(tiny, workload)
    eos = {whole[0][0], whole[1][3], whole[3][6], whole[6][MOST - 1]}
    expected = [cut(tokens, eos) for tokens in whole]
    assert {1, MOST} < {len(tokens) for tokens in expected}  # some end at once, some never
    options = {"prefill": prefill, "max_batched_tokens": 8}
    recording = serve(name, with_eos(tiny, *eos), workload, policy, 3, **options)
    assert outputs(recording) == expected
    assert recording.requests.output_tokens.tolist() == [len(tokens) for tokens in expected]


def test_no_text_ends_early_unless_asked_to(tiny: LoadedModel, greedy: Greedy) -> None:
    whole = greedy(tiny, MIXTURE)
    recording = serve("slots", with_eos(tiny, whole[1][3]), MIXTURE, "continuous", 3)
    assert outputs(recording) == whole


# An engine is used again


@pytest.mark.parametrize("name", ENGINES)
def test_a_second_trial_gives_the_same_tokens(name: str, tiny: LoadedModel) -> None:
    engine = engine_for(name, tiny, MIXTURE, 3)
    batcher = Batcher("continuous", engine, 3)
    first, second = (batcher.serve(MIXTURE, Watch()) for _ in range(2))
    assert outputs(first) == outputs(second)
    assert_same_steps(first, second)


@pytest.mark.parametrize("name", ENGINES)
def test_a_trial_that_was_broken_off_leaves_nothing_behind(
    name: str, tiny: LoadedModel, greedy: Greedy
) -> None:
    class BreaksOff(Watch):
        def progressed(self, progress: object) -> None:
            raise KeyboardInterrupt

    engine = engine_for(name, tiny, MIXTURE, 3)
    batcher = Batcher("continuous", engine, 3)
    with pytest.raises(KeyboardInterrupt):
        batcher.serve(MIXTURE, BreaksOff())
    assert outputs(batcher.serve(MIXTURE, Watch())) == greedy(tiny, MIXTURE)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "before",
    [[(8, 6), (20, 12)], [(20, 12), (2, 2), (20, 1)]],
    ids=["in its text", "in its prompt"],
)
def test_a_request_that_overflows_does_not_spoil_others(
    before: list[tuple[int, int]], name: str, make_model: MakeModel, alone: Alone
) -> None:
    """Numbers overflow in float16; the next request in the slot must not see them."""
    model = make_model()
    model.module.transformer.wpe.weight[10:20] = float("nan")
    innocent = [(PROMPTS[1][:3], 6), (PROMPTS[2][:2], 7)]
    asked = [*((PROMPTS[0][:length], count) for length, count in before), *innocent]
    workload = Workload.of("overflow", [prompt for prompt, _ in asked], [n for _, n in asked])
    recording = serve(name, model, workload, "continuous", 2)
    expected = [alone(model, prompt, n) for prompt, n in innocent]
    assert outputs(recording)[len(before) :] == expected


@pytest.mark.parametrize("left_behind", [1e4, float("nan")])
def test_what_an_earlier_trial_left_in_the_cache_does_not_matter(
    left_behind: float, tiny: LoadedModel, greedy: Greedy
) -> None:
    """Not even the NaN of a model that overflows: its trial is wrong, the next one is not."""
    engine = slots_engine(tiny, 3, MIXTURE.max_total_tokens)
    for layer in engine._cache.layers:
        layer.keys.fill_(left_behind)
        layer.values.fill_(left_behind)
    recording = Batcher("continuous", engine, 3).serve(MIXTURE, Watch())
    assert outputs(recording) == greedy(tiny, MIXTURE)


# Memory of the slots engine


class LargestMade(TorchDispatchMode):
    """Size of the largest tensor made by any operation, views of older ones aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        for tensor in tensors(out):
            if storage(tensor) not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


class AttendedKeys(TorchFunctionMode):
    """Rows and positions of the keys in each call of the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            rows, _, positions, _ = args[1].shape
            self.shapes.append((rows, positions))
        return func(*args, **(kwargs or {}))


def storage(tensor: torch.Tensor) -> int:
    """Return the address that views of one tensor share; packed weights have none."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_cache_stays_where_it_is(policy: str, prefill: str, tiny: LoadedModel) -> None:
    engine = slots_engine(tiny, 3, 128)
    blocks = [block for layer in engine._cache.layers for block in (layer.keys, layer.values)]
    before = [(block.data_ptr(), block.shape) for block in blocks]
    Batcher(policy, engine, 3, prefill=prefill, max_batched_tokens=8).serve(MIXTURE, Watch())
    layers = engine._cache.layers
    after = [(b.data_ptr(), b.shape) for layer in layers for b in (layer.keys, layer.values)]
    assert after == before
    assert before[0][1] == (3, 4, 128, 8)  # slots, heads, max_len, head_dim


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_cache_is_never_copied(policy: str, prefill: str, tiny: LoadedModel) -> None:
    slots, max_len = 3, 120
    workload = Workload.of("long", [[5] * 6, [6] * 3, [7] * 9, [8] * 2], [40, 20, 30, 25])
    engine = slots_engine(tiny, slots, max_len)
    batcher = Batcher(policy, engine, slots, prefill=prefill, max_batched_tokens=8)
    with LargestMade() as made:
        batcher.serve(workload, Watch())
    one_slot = engine._cache.layers[0].keys[0].numel()
    assert 0 < made.elements < one_slot


def test_a_step_reads_no_more_of_the_cache_than_the_longest_request_needs(
    tiny: LoadedModel, torch_kernels: None
) -> None:
    engine = slots_engine(tiny, 4, 128)
    workload = Workload.of("two of four slots", prompts(5, 8), [3, 5])
    with AttendedKeys() as attended:
        Batcher("continuous", engine, 4).serve(workload, Watch())
    decodes = [(2, 9), (2, 10), (1, 11), (1, 12)]  # slots and positions
    layers = 2
    assert attended.shapes[-len(decodes) * layers :] == [d for d in decodes for _ in range(layers)]


# Other formats and other families


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_runs_and_nothing_is_wrong(
    dtype: str, name: str, policy: str, make_model: MakeModel
) -> None:
    model = make_model(dtype=dtype)
    recording = serve(name, model, MIXTURE, policy, 3)
    found = verify(MIXTURE, [recording], TeacherForced(model))
    assert found.wrong == 0, found.findings
    assert found.identical > 0


@pytest.mark.parametrize(
    ("name", "prefill", "policy"),
    [
        ("slots", "separate", "static"),
        ("slots", "mixed", "continuous"),
        ("notebook", "separate", "continuous"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_get_the_right_tokens(
    family: str, name: str, prefill: str, policy: str, make_model: MakeModel, alone: Alone
) -> None:
    model = make_model(FAMILIES[family])
    expected = [alone(model, MIXTURE.prompt(r.index).tolist(), r.output_tokens) for r in MIXTURE]
    options = {"prefill": prefill, "max_batched_tokens": 8}
    assert outputs(serve(name, model, MIXTURE, policy, 3, **options)) == expected
    assert len({token for tokens in expected for token in tokens}) > 15


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", OTHERS)
def test_a_model_is_served_right_or_refused(
    family: str, name: str, make_model: MakeModel, alone: Alone
) -> None:
    try:
        model = make_model(OTHERS[family])
        recording = serve(name, model, MIXTURE, "continuous", 3)
    except UsageError:
        return
    expected = [alone(model, MIXTURE.prompt(r.index).tolist(), r.output_tokens) for r in MIXTURE]
    assert outputs(recording) == expected


# Weights laid out anew


@pytest.mark.parametrize("most", Kernels)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_layer_is_the_product(dtype: torch.dtype, rows: int, most: Kernels) -> None:
    numbers = torch.Generator().manual_seed(1)
    weight, bias, x, y = (
        torch.randn(*shape, generator=numbers).to(dtype)
        for shape in ((6, 9), (6,), (rows, 9), (rows, 6))
    )
    layer = make_linear(weight.t().contiguous().t(), bias, most)  # strides as those of a Conv1D
    product = torch.nn.functional.linear(x, weight, bias).float()
    close = {"atol": 0.1 if dtype.itemsize == 2 else 1e-5, "rtol": 0.0}
    assert torch.allclose(layer(x).float(), product, **close)
    assert torch.allclose(layer.plus(x, y).float(), product + y.float(), **close)
    bent = torch.nn.functional.gelu(product, approximate="tanh")
    assert torch.allclose(layer.activated(x).float(), bent, **close)
    assert not torch.allclose(bent, torch.nn.functional.gelu(product), atol=1e-6)


@pytest.mark.skipif(not onednn_file._has_onednn(), reason="this build of torch has no oneDNN")
def test_a_torch_with_onednn_packs() -> None:
    """Its operators' names are private: were they lost, all would go on working, slower."""
    assert onednn_file.onednn(torch.float32) is not None


@pytest.mark.parametrize("part", ["product", "product_and_sum"])
def test_operators_that_compute_something_else_are_not_taken(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = onednn_file.onednn(torch.float32)
    assert ops is not None
    changed = ops._replace(**{part: lambda *args: getattr(ops, part)(*args) + 1e-3})
    assert not onednn_file._right(changed, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_that_cannot_pack_gives_the_right_tokens(
    dtype: str, make_model: MakeModel, torch_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "onednn", lambda dtype: None)
    model = make_model(dtype=dtype)
    engine, memory = make_engine("slots", model, 3, MIXTURE.max_total_tokens)
    recording = Batcher("continuous", engine, 3).serve(MIXTURE, Watch())
    assert verify(MIXTURE, [recording], TeacherForced(model)).passed
    assert memory["packed_weight_bytes"] == 0


# What does not work says so


def test_a_sliding_window_is_refused_by_the_slots(make_model: MakeModel) -> None:
    model = make_model(LLAMA | {"model_type": "mistral", "sliding_window": 8})
    with pytest.raises(UsageError, match=r"--engine slots: .*sliding window.*--engine notebook"):
        engine_for("slots", model, MIXTURE, 3)


def test_the_notebook_refuses_mixed_prefill(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match="--prefill mixed"):
        serve("notebook", tiny, MIXTURE, "continuous", 2, prefill="mixed", max_batched_tokens=8)


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_that_does_not_fit_names_the_largest_that_does(
    name: str, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = "batchbench.batching.engines.torch.build.free_bytes"
    monkeypatch.setattr(making, lambda device: 2**20)
    with pytest.raises(UsageError, match=r"--batch-size 1000: .*largest that fits is \d+$") as no:
        make_engine(name, tiny, 1000, 128)
    fits = int(str(no.value).rsplit(" ", 1)[1])
    make_engine(name, tiny, fits, 128)
    with pytest.raises(UsageError, match=f"is {fits}$"):
        make_engine(name, tiny, fits + 1, 128)
    monkeypatch.setattr(making, lambda device: 1000)
    with pytest.raises(UsageError, match="not even one slot fits"):
        make_engine(name, tiny, 1, 128)


@pytest.mark.parametrize("name", ENGINES)
def test_memory_that_was_gone_when_it_was_taken_is_a_usage_error(
    name: str, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = "batchbench.batching.engines.torch.build.free_bytes"
    monkeypatch.setattr(making, lambda device: 2**80)
    with pytest.raises(UsageError, match=f"--batch-size {2**45}: "):
        make_engine(name, tiny, 2**45, 128)  # more than there are addresses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_takes_the_memory_that_was_told(dtype: str, make_model: MakeModel) -> None:
    model = make_model(dtype=dtype)
    engine, memory = make_engine("slots", model, 3, 100)
    assert isinstance(engine, SlotsEngine)
    blocks = [block for layer in engine._cache.layers for block in (layer.keys, layer.values)]
    assert memory["kv_cache_bytes"] == sum(b.numel() * b.element_size() for b in blocks)
    assert memory["weight_bytes"] == model.weight_bytes


# Times


@pytest.mark.parametrize("name", ENGINES)
def test_passes_are_repeated_until_a_decision_is_due(name: str, tiny: LoadedModel) -> None:
    workload = Workload.of("one", prompts(5), [9])
    engine = engine_for(name, tiny, workload, 2)
    scheduler = Scheduler(Arrivals(workload), make_policy("continuous"), 2)
    engine.begin(workload)
    prefill = scheduler.plan(0)
    assert isinstance(prefill, Plan)
    scheduler.apply(prefill, engine.run(prefill))
    decode = scheduler.plan(engine.clock.now())
    assert isinstance(decode, Plan)
    assert decode.repeat == 8
    assert engine.run(replace(decode, until=engine.clock.now())) == 1
    assert engine.run(replace(decode, until=engine.clock.now() + 10**12, repeat=3)) == 3
    assert len(engine.collect().ends_ns) == 1 + 1 + 3


@pytest.mark.parametrize("name", ENGINES)
def test_steps_follow_one_another(name: str, tiny: LoadedModel) -> None:
    recording = serve(name, tiny, MIXTURE, "continuous", 3)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    assert starts[0] >= 0
    assert (starts < ends).all()
    assert (ends[:-1] <= starts[1:]).all()
