"""batchbench's own kernels: what they compute, where there are any, and what happens without."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machine import PROCESSORS
from support.models import LLAMA, TINY, MakeModel
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from batchbench.batching import machine as environments
from batchbench.batching import machine as processor_file
from batchbench.batching.engines.torch import hardware
from batchbench.batching.engines.torch import kernels as compiling
from batchbench.batching.engines.torch import linear as layers
from batchbench.batching.engines.torch.architecture import Norm, Rotary, rotate
from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.forward import LeanForward, make_forward
from batchbench.batching.engines.torch.hardware import torch_environment
from batchbench.batching.engines.torch.kernels import Native, Through, native
from batchbench.batching.engines.torch.linear import OneDNN
from batchbench.batching.machine import Processor

pytestmark = pytest.mark.machine


def compiles() -> bool:
    """Return True if a g++ knows the instructions of the kernels."""
    compiler = compiling.find_compiler()
    if compiler is None:
        return False
    command = [compiler, *compiling._FLAGS, "-x", "c++", "-fsyntax-only", "-"]
    return not subprocess.run(command, input=b"", capture_output=True, check=False).returncode


needs_compiler = pytest.mark.skipif(not compiles(), reason="no g++ here that knows AVX-512")
needs_kernels = pytest.mark.skipif(native() is None, reason="no kernels of our own here")
laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 24}
WAYS = (
    Processor("GenuineIntel", frozenset({"avx512_bf16"})),
    Processor("AuthenticAMD", frozenset({"avx512_bf16"})),
)
"""bfloat16 widened to float32, and by the processor's own instruction."""


@pytest.fixture(params=WAYS, ids=lambda processor: processor.maker)
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Native:
    """This machine's kernels, made to think that another maker made the processor."""
    found = native()
    assert found is not None
    processor: Processor = request.param
    if processor.multiplies_bfloat16 and "avx512_bf16" not in Processor.here().features:
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(found, "processor", processor)
    return found


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within rounding: a unit in the last place of the outcome, and of the terms it sums."""
    last = 2**-8 if dtype is torch.bfloat16 else 2**-18
    return got.dtype is dtype and bool(
        ((got.double() - exact).abs() <= last * (1 + exact.abs())).all()
    )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 21])
def test_a_product_is_the_product(own: Native, rows: int, dtype: torch.dtype) -> None:
    """Test any number of rows, and outputs that fill no panel."""
    for outputs, inputs in ((1, 2), (15, 8), (33, 64), (300, 32), (64, 770)):
        weight = drawn(1, outputs, inputs, dtype=dtype) * inputs**-0.5
        bias, x = drawn(2, outputs, dtype=dtype), drawn(3, rows, inputs, dtype=dtype)
        y, packed = drawn(4, rows, outputs, dtype=dtype), own.pack(weight)
        exact = linear(x.double(), weight.double())
        biased = exact + bias.double()
        assert own.multiplies(weight)
        assert close(own.product(x, packed, outputs, None), exact, dtype)
        assert close(own.product(x, packed, outputs, bias), biased, dtype)
        bent = own.product(x, packed, outputs, bias, through=Through.GELU)
        assert close(bent, gelu(biased, approximate="tanh"), dtype)
        assert close(own.product(x, packed, outputs, bias, add=y), biased + y.double(), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_reads_rows_that_do_not_lie_together(own: Native, dtype: torch.dtype) -> None:
    weight, x = drawn(1, 40, 16, dtype=dtype), drawn(2, 16, 6, dtype=dtype).t()
    y = drawn(3, 40, 6, dtype=dtype).t()
    exact = linear(x.double(), weight.double()) + y.double()
    assert close(own.product(x, own.pack(weight), 40, None, add=y) / 8, exact / 8, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gelu_is_right_far_from_zero_too(own: Native, dtype: torch.dtype) -> None:
    x = torch.tensor(
        [[0.0, 1e-30, -1e-4, 3.0, -3.0, 8.0, -8.0, 50.0, -50.0, 1e30, -1e30, torch.inf]]
    )
    x = x.to(dtype).t().contiguous()
    one = torch.ones(1, 2, dtype=dtype)
    pairs = torch.cat([x, torch.zeros_like(x)], 1)
    bent = own.product(pairs, own.pack(one), 1, None, through=Through.GELU)
    assert close(bent[:-1], gelu(x[:-1].double(), approximate="tanh"), dtype)
    assert bent[-1] == torch.inf


@needs_kernels
def test_what_is_no_number_stays_none(own: Native) -> None:
    """A fault must show, not be rounded away."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = own.pack(torch.eye(16).to(dtype))
        x = torch.zeros(3, 16, dtype=dtype)
        x[1, 5] = torch.nan
        for through in (Through.NOTHING, Through.GELU):
            out = own.product(x, weight, 16, None, through=through)
            assert out[1].isnan().all()
            assert not out[[0, 2]].isnan().any()
        qkv = torch.zeros(1, 3, 16, dtype=dtype)
        qkv[0, 1] = torch.nan
        block = torch.zeros(2, 1, 1, 4, 16, dtype=dtype)
        zero = torch.zeros(1, dtype=torch.int64)
        assert own.attention(qkv, block, zero, zero, 1).isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_swiglu_is_the_gate_times_the_other_half(
    own: Native, rows: int, dtype: torch.dtype
) -> None:
    for results, inputs in ((1, 2), (16, 8), (17, 64), (150, 32)):
        weight = drawn(1, 2 * results, inputs, dtype=dtype) * inputs**-0.5
        bias, x = drawn(2, 2 * results, dtype=dtype), drawn(3, rows, inputs, dtype=dtype)
        packed = own.pack(own.side_by_side(weight))
        for b in (None, bias):
            gate, up = linear(x.double(), weight.double(), b if b is None else b.double()).chunk(
                2, -1
            )
            sided = None if b is None else own.side_by_side(b)
            got = own.product(x, packed, results, sided, through=Through.SWIGLU)
            assert close(got, silu(gate) * up, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, QWEN], ids=["gpt2", "qwen3"])
def test_layers_in_one_call_are_the_layers_in_turn(
    own: Native, config: dict[str, Any], dtype: str, make_model: MakeModel
) -> None:
    """Rows that decode go through one call; the same rows beside prompts go through many."""
    model = make_model(config, dtype=dtype)
    for name, weight in model.module.named_parameters():
        if weight.ndim == 1:
            weight.data.copy_(drawn(len(name), len(weight), dtype=weight.dtype) * 0.3)
    forward = make_forward(model)
    assert isinstance(forward, LeanForward)
    slots, positions = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 70])
    filled = SlotCache(model.module.config, 3, 80, torch.empty(0, dtype=model.dtype))
    for block in filled.blocks:
        block.block.copy_(drawn(7, *block.block.shape, dtype=model.dtype))
    ids, outcomes = torch.tensor([5, 250, 9]), []
    with torch.inference_mode():
        for decodes in (True, False):
            cache = copy.deepcopy(filled)
            layout = Layout(cache, slots, positions, decoding=3, low=0, high=3, length=71)
            if not decodes:
                forward._table = None
            outcomes.append((forward(ids, layout, None), cache.blocks[1].block))
    within = 0.1 if dtype == "bfloat16" else 1e-4
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=within, rtol=within)


@needs_kernels
@laws
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    prompts=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    size=st.sampled_from([1, 8, 16, 20, 64, 80, 128, 256]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_attention_is_attention_up_to_each_rows_own_position(
    lengths: list[int],
    prompts: int,
    kv_heads: int,
    group: int,
    size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Other content of the cache, NaN included, has no effect; only new positions are written."""
    own = native()
    assert own is not None
    rows, max_len, heads = len(lengths), 301, kv_heads * group
    block = drawn(seed, 2, rows + 2, kv_heads, max_len, size, dtype=dtype)
    slots = torch.randperm(rows + 1, generator=torch.Generator().manual_seed(seed))[:rows]
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        block[:, slot, :, length:] = torch.nan
    qkv = drawn(seed + 1, rows + prompts, heads + 2 * kv_heads, size, dtype=dtype)
    places = torch.cat([slots, torch.full((prompts,), rows + 1)])
    positions = torch.tensor([n - 1 for n in lengths] + [*range(prompts)])
    expected = block.clone()
    q, k, v = torch.split(qkv.clone(), [heads, kv_heads, kv_heads], 1)
    expected[0][places, :, positions], expected[1][places, :, positions] = k, v
    out = own.attention(qkv, block, places, positions, rows)
    assert torch.equal(block.nan_to_num(7.0), expected.nan_to_num(7.0))
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths, strict=True)):
        keys, values = expected[:, slot, None, :, :length].double()
        one = q[i].double()[None, :, None]
        exact = scaled_dot_product_attention(one, keys, values, enable_gqa=True)[0, :, 0]
        assert close(out[i], exact, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [2, 24, 64, 128])
def test_queries_and_keys_are_normed_and_rotated_where_keys_are_written(
    size: int, normed: bool, dtype: torch.dtype
) -> None:
    """Prompts' tokens too, whose queries torch's attention reads afterwards."""
    own = native()
    assert own is not None
    heads, kv_heads, tokens = 6, 2, 3
    qkv = drawn(1, tokens, heads + 2 * kv_heads, size, dtype=dtype)
    positions = torch.tensor([0, 5, 9])
    rotary = Rotary(drawn(2, size // 2, dtype=torch.float32), 1.25)
    angles = rotary.angles(positions, dtype)
    weights = [drawn(3, size, dtype=dtype), drawn(4, size, dtype=dtype)] if normed else []
    q, k, v = torch.split(qkv.clone(), [heads, kv_heads, kv_heads], 1)
    if normed:
        q, k = (Norm(w, None, 1e-6)(x) for w, x in zip(weights, (q, k), strict=True))
    q, k = rotate(q, angles), rotate(k, angles)
    block = torch.zeros(2, 3, kv_heads, 10, size, dtype=dtype)
    out = own.attention(qkv, block, torch.arange(3), positions, 1, angles, weights, eps=1e-6)
    assert close(qkv, torch.cat([q, k, v], 1).double(), dtype)
    keys, values = block[:, torch.arange(3), :, positions].transpose(0, 1)
    assert torch.equal(keys, qkv[:, heads:-kv_heads])
    assert torch.equal(values, v)
    assert torch.equal(out[0], v[0].repeat_interleave(3, 0))  # the only position that it sees


@needs_kernels
def test_large_scores_do_not_overflow() -> None:
    own = native()
    assert own is not None
    qkv = torch.full((1, 3, 16), 100.0)
    block = torch.zeros(2, 1, 1, 200, 16)
    block[0, 0, 0, 150] = 90.0
    block[1, 0, 0, 150] = 5.0
    position = torch.tensor([199])
    assert (
        own.attention(qkv, block, torch.tensor([0]), position, 1).flatten().tolist() == [100.0] * 16
    )


# Where there are kernels


def test_a_machine_that_can_have_kernels_has_them() -> None:
    """Were they lost, all would go on working, slower."""
    assert (native() is not None) == (Processor.here().runs_kernels and compiles())


MADE_UP = [*PROCESSORS, "no description"]
WITH_KERNELS = {"skylake", "cooperlake", "sapphirerapids", "zen4"}


@pytest.fixture(params=MADE_UP)
def made_up(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a made-up processor that the code finds on this machine."""
    name: str = request.param
    file = tmp_path / "cpuinfo"
    if name in PROCESSORS:
        file.write_text(PROCESSORS[name], encoding="utf-8")
    monkeypatch.setattr(processor_file, "CPUINFO", file)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    return name


class Library(dict[str, Any]):
    """A compiled file whose functions do nothing."""

    def __missing__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace()


def pretended(processor: Processor) -> Native:
    """Kernels that decide as they would on a processor; they cannot compute."""
    return Native(Library(), processor)  # type: ignore[arg-type]


def test_kernels_are_for_processors_with_avx512_and_a_compiler(
    made_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    monkeypatch.setattr(compiling, "_compiled", Library)
    assert (compiling.native.__wrapped__() is not None) == (made_up in WITH_KERNELS)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert compiling.native.__wrapped__() is None
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    monkeypatch.setattr(compiling, "_compiled", lambda: None)
    assert compiling.native.__wrapped__() is None


@pytest.mark.parametrize("packs", [True, False], ids=["with oneDNN", "without oneDNN"])
@pytest.mark.parametrize("width", [6, 5], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_goes_to_the_kernels_that_suit_the_processor(
    made_up: str, dtype: torch.dtype, width: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our kernels multiply float32, and bfloat16 without AMX; oneDNN does the rest."""
    own = pretended(Processor.here()) if made_up in WITH_KERNELS else None
    ops = OneDNN(lambda weight, rows: weight, _fails, _fails) if packs else None
    monkeypatch.setattr(layers, "native", lambda: own)
    monkeypatch.setattr(layers, "onednn", lambda dtype: ops)
    pairs = dtype is torch.bfloat16 and width % 2 == 0 and made_up != "sapphirerapids"
    ours = own is not None and (dtype is torch.float32 or pairs)
    without = layers.Kernels.PACKED if packs else layers.Kernels.PLAIN
    weight = torch.zeros(4, width, dtype=dtype)
    for most, expected in (
        (layers.Kernels.OWN, layers.Kernels.OWN if ours else without),
        (layers.Kernels.PACKED, without),
        (layers.Kernels.PLAIN, layers.Kernels.PLAIN),
    ):
        assert layers.make_linear(weight, None, most).kernels is expected


def test_the_bfloat16_instruction_is_taken_where_it_is_fast(made_up: str) -> None:
    assert Processor.here().multiplies_bfloat16 == (made_up == "zen4")
    assert Processor.here().has_amx == (made_up == "sapphirerapids")


def test_results_say_whose_kernels_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, name in ((pretended(WAYS[0]), "batchbench's"), (None, "torch's")):
        monkeypatch.setattr(hardware, "native", lambda own=own: own)
        assert torch_environment("cpu")["cpu_kernels"] == name
        assert torch_environment("meta")["cpu_kernels"] is None


def test_the_first_processor_of_the_description_counts(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fma avx512_bf16\n\nflags: amx_bf16\n"
    )
    told.write_text(text, encoding="utf-8")
    assert Processor.here(told).maker == "AuthenticAMD"
    assert Processor.here(told).features >= {"fma"}
    assert not Processor.here(told).has_amx
    assert Processor.here(tmp_path / "none") == Processor("", frozenset())


def test_the_model_of_the_processor_is_named(made_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.sys, "platform", "linux")
    monkeypatch.setattr(environments.platform, "processor", lambda: "")
    monkeypatch.setattr(environments.platform, "machine", lambda: "its architecture")
    described = made_up not in ("arm64", "unknown", "no description")
    assert environments.cpu_name() == ("made up" if described else "its architecture")


def _fails(*_: object, **__: object) -> None:
    raise subprocess.CalledProcessError(1, "g++")


def _nowhere() -> None:
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512."""
    features = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})
    monkeypatch.setattr(Processor, "here", lambda: Processor("GenuineIntel", features))


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    "lacking", ["processor", "compiler", "system", "compiles", "cache", "home"]
)
def test_a_machine_without_kernels_does_without(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if lacking == "processor":
        monkeypatch.setattr(
            Processor, "here", lambda: Processor("GenuineIntel", frozenset({"fma"}))
        )
    elif lacking == "compiler":
        monkeypatch.setattr(processor_file.shutil, "which", lambda name: None)
    elif lacking == "system":
        monkeypatch.setattr(processor_file.sys, "platform", "darwin")
    elif lacking == "compiles":
        monkeypatch.setattr(compiling, "_compile", _fails)
    elif lacking == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiling.Path, "home", _nowhere)
    else:
        (tmp_path / "cache").write_text("a file stands where the folder should be")
    assert compiling.native.__wrapped__() is None


@needs_compiler
@pytest.mark.usefixtures("able")
def test_the_source_is_compiled_once_and_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on any processor, since nothing is computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling.native.__wrapped__() is not None
    (file,) = (tmp_path / "batchbench").iterdir()
    monkeypatch.setattr(compiling, "_compile", _fails)
    assert compiling.native.__wrapped__() is not None  # from the cache
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "changed.cpp")
    (tmp_path / "changed.cpp").write_text("// other kernels")
    assert compiling.native.__wrapped__() is None  # that file is not taken for these
    assert list((tmp_path / "batchbench").iterdir()) == [file]
