"""The Triton kernels against float64, in Triton's interpreter or on a GPU where there is one.

Everything that a kernel must not read is NaN: positions beyond a row's end, slots that no request
has written, padded logits. Everything that it must not write is compared bit by bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from batchbench.batching.engines.torch.architecture import Norm, Rotary, Rotation
from batchbench.batching.engines.torch.graphs import lay_tiles, most_tiles, tile_size
from batchbench.batching.engines.torch.triton import ops
from batchbench.batching.engines.torch.triton.ops import SlotAttention

DEVICE = "cpu" if ops._INTERPRETED else "cuda"

SHAPES = [(4, 4, 8), (4, 2, 16), (3, 3, 5), (2, 2, 128), (8, 1, 64), (12, 12, 64), (25, 25, 64)]
"""Query heads, key-value heads and head size: toys, GPT-2 and its largest, grouped queries."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.016, torch.float16: 2e-3}
"""Largest error, relative above 1 and absolute below. Triton's interpreter cuts off bfloat16."""

some = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    within = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=within, atol=within)


def bits(block: torch.Tensor) -> torch.Tensor:
    """Return a copy as integers, in which a NaN equals itself."""
    return block.view(torch.int32 if block.dtype is torch.float32 else torch.int16).clone()


def made_up_cache(
    slots: int, kv_heads: int, max_len: int, size: int, written: dict[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return a block that is NaN except for the first positions of the slots that are written."""
    block = torch.full((2, slots, kv_heads, max_len, size), torch.nan, dtype=dtype, device=DEVICE)
    for slot, length in written.items():
        block[:, slot, :, :length] = numbers(2, kv_heads, length, size, dtype=dtype, seed=slot)
    return block


def states(
    tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values as views of one product, as a pass has them."""
    qkv = numbers(tokens, heads + 2 * kv_heads, size, dtype=dtype, seed=99)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    return q, k, v


def rotation_of(size: int, dtype: torch.dtype, *, normed: bool) -> Rotation:
    """Return rotary positions that turn a quarter of each head by radians a position."""
    inverse = torch.logspace(0.3, -4, size // 2, device=DEVICE)
    norms = [Norm(numbers(size, dtype=dtype, seed=i) + 1, None, 1e-3) for i in (5, 6)]
    return Rotation(Rotary(inverse, 1.25), norms if normed else ())


def turned(
    x: torch.Tensor, positions: object, rotation: Rotation | None, which: int
) -> torch.Tensor:
    """Return queries (0) or keys (1), ``[tokens, heads, size]``, as a rotation changes them."""
    if rotation is None:
        return x
    at = torch.as_tensor(np.asarray(positions), device=DEVICE)
    cos, sin = rotation.rotary.angles(at, x.dtype).double()[:, :, None]
    x = x.double()
    if rotation.norms:
        norm = rotation.norms[which]
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    return torch.cat([pairs.real, pairs.imag], -1)


def assert_written(
    block: torch.Tensor, before: torch.Tensor, places: list[object], k: torch.Tensor, v: object
) -> None:
    """Assert that a pass wrote keys and values to slots and positions, and nothing else."""
    slots, positions = places
    expected = before.clone()
    keys = block[0, slots, :, positions]
    if k.dtype is block.dtype:
        assert torch.equal(keys, k)
    else:
        assert_close(keys, k, block.dtype)
    expected[0, slots, :, positions], expected[1, slots, :, positions] = keys, v
    assert torch.equal(bits(block), bits(expected))


def attended(q: torch.Tensor, block: torch.Tensor, slot: int, position: int) -> torch.Tensor:
    """Return the attention of one token in float64; its key is in the block. ``[heads, size]``."""
    k, v = block[:, slot, :, : position + 1].double()
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = ((q.double()[:, None] * k).sum(-1) * q.shape[1] ** -0.5).softmax(-1)
    return (weights[..., None] * v).sum(1)


def check_decode(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    max_len: int,
    positions: list[int],
    rotation: Rotation | None = None,
) -> None:
    """Decode one row at each position, in shuffled slots, twice; compare all with float64."""
    heads, kv_heads, size = shape
    rows = len(positions)
    slots = np.random.default_rng(rows).permutation(rows + 2)[:rows].tolist()
    block = made_up_cache(
        rows + 2, kv_heads, max_len, size, dict(zip(slots, positions, strict=True)), dtype
    )
    q, k, v = states(rows, heads, kv_heads, size, dtype)
    before = block.clone()
    attention = SlotAttention(block.device, heads, max_len, rows + 2, size)
    place = [torch.from_numpy(np.asarray(a, np.int64)).to(DEVICE) for a in (slots, positions)]
    once = attention.decode(q, k, v, block, *place, rotation=rotation)
    assert_written(block, before, [slots, positions], turned(k, positions, rotation, 1), v)
    assert not attention._arrived.any()
    q = turned(q, positions, rotation, 0)
    wanted = torch.stack(
        [
            attended(q[i], block, *place_)
            for i, place_ in enumerate(zip(slots, positions, strict=True))
        ]
    )
    assert_close(once, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_attends_to_what_its_slot_holds(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check_decode(shape, dtype, 300, [0, 1, 127, 255, 256, 299] if shape[0] <= 4 else [17, 270])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 255, 256, 257, 511, 512, 513, 700])
def test_keys_of_any_length_are_split_and_combined(length: int) -> None:
    check_decode((2, 2, 16), torch.float32, max(length, 2), [length - 1, 0])


def test_a_second_pass_gives_the_same_bits() -> None:
    """Parts are combined in one order, and nothing of one pass reaches the next."""
    q, k, v = states(2, 2, 1, 8, torch.float32)
    block = made_up_cache(2, 1, 600, 8, {0: 599, 1: 300}, torch.float32)
    attention = SlotAttention(block.device, 2, 600, 2, 8)
    slots, positions = torch.tensor([[0, 1], [599, 300]], device=DEVICE)
    once, twice = (attention.decode(q, k, v, block, slots, positions) for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 64])
def test_a_batch_of_any_size_decodes(rows: int) -> None:
    check_decode((2, 1, 8), torch.bfloat16, 40, [(7 * i) % 40 for i in range(rows)])


@some
@given(
    st.sampled_from(SHAPES[:3]),
    st.sampled_from(DTYPES),
    st.integers(1, 600),
    st.data(),
)
def test_any_rows_decode(
    shape: tuple[int, int, int], dtype: torch.dtype, max_len: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, max_len - 1), min_size=1, max_size=3))
    check_decode(shape, dtype, max_len, positions)


# Passes with chunks of prompts


def check_tiles(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    pieces: list[tuple[int, int]],
    tile: int,
    rotation: Rotation | None = None,
    *,
    padding: int = 3,
) -> None:
    """Attend for pieces, (position, tokens) each, with unused tiles and tokens at the end."""
    heads, kv_heads, size = shape
    starts, counts = np.array(pieces, np.int64).T
    slots = np.random.default_rng(len(pieces)).permutation(len(pieces) + 1)[:-1]
    written = dict(zip(slots.tolist(), starts.tolist(), strict=True))
    max_len = int((starts + counts).max()) + 2
    block = made_up_cache(len(pieces) + 1, kv_heads, max_len, size, written, dtype)
    total = int(counts.sum())
    q, k, v = states(total + padding, heads, kv_heads, size, dtype)
    q[total:], k[total:], v[total:] = torch.nan, torch.nan, torch.nan
    slot_of, start_of = np.repeat(slots, counts), np.repeat(starts, counts)
    position_of = start_of + np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    before = block.clone()
    laid = lay_tiles(counts, slots, starts, tile)
    laid = np.concatenate([laid, np.zeros((2, 5), np.int64)])
    attention = SlotAttention(block.device, heads, max_len, 1, size)
    seen = attention.tiled(
        q, k, v, block, torch.from_numpy(laid).to(DEVICE), tile, rotation=rotation
    )
    keys = turned(k[:total], position_of, rotation, 1)
    assert_written(block, before, [slot_of, position_of], keys, v[:total])
    q = turned(q[:total], position_of, rotation, 0)
    for i in range(total):
        wanted = attended(q[i], block, slot_of[i], position_of[i])
        assert_close(seen[i], wanted, dtype)


MIXED = [(40, 1), (0, 1), (0, 37), (16, 16), (130, 20), (1, 1), (65, 2)]
"""Decoding rows, a first chunk and later ones, of one tile and of several."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 8), (2, 2, 64), (2, 1, 128), (3, 3, 5)], ids=str)
def test_rows_and_chunks_attend_in_one_launch(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check_tiles(shape, dtype, MIXED, 16)


def test_long_prompts_attend_in_large_tiles() -> None:
    check_tiles((2, 1, 16), torch.float32, [(0, 150), (70, 65), (3, 1)], 64)


TURNED = [(4, 2, 16), (3, 1, 6), (2, 1, 128)]
"""Shapes of models with rotary positions; SmolLM2 has three heads of queries to one of keys."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["rotary", "rotary and norms"])
@pytest.mark.parametrize("shape", TURNED, ids=str)
def test_queries_and_keys_are_normed_and_rotated(
    shape: tuple[int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    rotation = rotation_of(shape[2], dtype, normed=normed)
    check_decode(shape, dtype, 300, [0, 270], rotation)
    check_tiles(shape, dtype, [(40, 1), (0, 19), (16, 4)], 16, rotation)


def test_rotated_keys_of_long_prompts_lie_in_several_tiles() -> None:
    rotation = rotation_of(16, torch.float32, normed=True)
    check_tiles((2, 1, 16), torch.float32, [(0, 150), (70, 65), (3, 1)], 64, rotation)


@some
@given(
    st.sampled_from(SHAPES[:3]),
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), min_size=1, max_size=3),
)
def test_any_pieces_attend(
    shape: tuple[int, int, int], dtype: torch.dtype, pieces: list[tuple[int, int]]
) -> None:
    check_tiles(shape, dtype, pieces, 16)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.sampled_from([16, 64]))
def test_tiles_cover_each_token_once(counts: list[int], size: int) -> None:
    many = np.array(counts, np.int64)
    slots, starts = np.arange(len(many)) * 3, np.arange(len(many)) * 7
    laid = lay_tiles(many, slots, starts, size)
    if size == tile_size(int(many.sum())):
        assert len(laid) <= most_tiles(int(many.sum()), len(many))
    covered = [t for token, count, *_ in laid for t in range(token, token + count)]
    assert covered == list(range(int(many.sum())))
    assert laid[:, 1].min() >= 1
    assert laid[:, 1].max() <= size
    firsts = np.cumsum(many) - many
    piece = np.searchsorted(firsts, laid[:, 0], side="right") - 1
    assert np.array_equal(laid[:, 2:], np.stack([firsts, slots, starts], 1)[piece])
    assert (laid[:, 0] + laid[:, 1] <= (firsts + many)[piece]).all()


def test_a_cache_of_another_format_is_refused() -> None:
    block = made_up_cache(1, 2, 4, 8, {}, torch.float32)
    attention = SlotAttention(block.device, 2, 4, 1, 8)
    q, k, v = states(1, 2, 2, 8, torch.float32)
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="differ in format"):
        attention.decode(q, k, v, block.half(), at, at)


def test_heads_that_do_not_lie_side_by_side_attend_alike() -> None:
    q, k, v = states(3, 2, 1, 8, torch.float32)
    spread = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    at = torch.tensor([0, 1, 2], device=DEVICE)
    seen = []
    for arguments in ((q, k, v), spread, (q, k, v.contiguous())):
        block = made_up_cache(3, 1, 4, 8, {0: 0, 1: 1, 2: 2}, torch.float32)
        seen.append(SlotAttention(block.device, 2, 4, 3, 8).decode(*arguments, block, at, at))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


# Norms and embeddings


def norm_of(width: int, dtype: torch.dtype, *, rms: bool) -> Norm:
    bias = None if rms else numbers(width, dtype=dtype, seed=2)
    return Norm(numbers(width, dtype=dtype, seed=1), bias, 1e-5)


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    x = x.double()
    if norm.bias is None:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight.double() + norm.bias.double()


WIDTHS = [5, 32, 768, 1024, 1600]


KINDS = [False, True]
"""Layer norms with biases of products, as in GPT-2; norms by the root mean square without."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rms", KINDS, ids=["layer norm", "rms"])
def test_a_product_is_added_and_normed(rms: bool, width: int, dtype: torch.dtype) -> None:
    x = numbers(4, width, dtype=dtype, seed=3) * 3 + 1
    y = numbers(4, width, dtype=dtype, seed=4)
    added = None if rms else numbers(width, dtype=dtype, seed=5)
    norm = norm_of(width, dtype, rms=rms)
    total = x.double() + y.double() + (0 if added is None else added.double())
    rows = torch.tensor([2, 0], device=DEVICE)
    before = x.clone()
    some_rows = ops.add_norm(x, y, added, norm, rows)
    assert torch.equal(x, before)
    every = ops.add_norm(x, y, added, norm)
    assert torch.equal(some_rows, every[rows])
    assert_close(x, total, dtype)
    assert_close(every, normed(total, norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rms", KINDS, ids=["layer norm", "rms"])
def test_tokens_and_positions_are_embedded_and_normed(
    rms: bool, width: int, dtype: torch.dtype
) -> None:
    tokens = numbers(11, width, dtype=dtype)
    places = None if rms else numbers(7, width, dtype=dtype, seed=8)
    ids = torch.tensor([10, 0, 3, 3], device=DEVICE)
    positions = torch.tensor([0, 6, 2, 5], device=DEVICE)
    norm = norm_of(width, dtype, rms=rms)
    x, first = ops.embed_norm(ids, positions, tokens, places, norm)
    total = tokens[ids].double() + (0 if places is None else places[positions].double())
    assert_close(x, total, dtype)
    assert_close(first, normed(total, norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [5, 96, 1024, 1536])
def test_gates_are_applied(inner: int, dtype: torch.dtype) -> None:
    product = numbers(3, 2 * inner, dtype=dtype) * 4
    product[0, :5] = torch.tensor([200.0, -200.0, 0.0, 88.5, -88.5])
    gate, up = product.double().chunk(2, -1)
    assert_close(ops.swiglu(product), gate * gate.sigmoid() * up, dtype)


# The choice of a token


@pytest.mark.parametrize("vocabulary", [1, 300, 2048, 2049, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_the_largest_is_chosen_and_never_a_padded_one(
    vocabulary: int, dtype: torch.dtype
) -> None:
    numbers = torch.Generator().manual_seed(vocabulary)
    wide = torch.randint(-3, 4, (3, vocabulary + 128), generator=numbers).to(dtype).to(DEVICE)
    wide[:, vocabulary:] = torch.tensor([9.0, torch.nan, torch.inf])[:, None]
    logits = wide[:, :vocabulary]
    expected = logits.float().cpu().numpy().argmax(-1).tolist()
    assert ops.best_token(logits).tolist() == expected


def test_a_logit_that_is_no_number_is_chosen() -> None:
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, 4700], logits[1, 17], logits[2] = torch.nan, torch.inf, -torch.inf
    assert ops.best_token(logits).tolist() == [4700, 17, 0, 0]


# The compiler


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability: int, tmp_path: Path) -> None:
    """The interpreter runs what the compiler refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_targets", str(capability), "bfloat16"],
        capture_output=True,
        encoding="utf-8",
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stderr
    compiled = {line.split(":")[0] for line in done.stdout.splitlines()}
    launched = {name for name, f in vars(ops.kernels).items() if hasattr(f, "fn")}
    assert compiled == {name for name in launched if not name.startswith("_")}
