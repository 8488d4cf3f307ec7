"""The operations of a GPU's passes that batchbench computes with Triton, one launch each.

Functions take and return tensors of one device. ``kernels.py`` has the kernels.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from triton import cdiv, language, next_power_of_2

from batchbench.batching.engines.torch.triton import kernels

SPLIT = 256
"""Keys of one decoding row that one program reads. More are split over several programs."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_POWERS_OF_TWO = math.log2(math.e)
_PART = 2048  # logits that one program compares
_TILE_BYTES = 8192  # of the keys that a tile multiplies at once: registers are few


class Norm(NamedTuple):
    """The weights of a layer norm, ``[width]`` each."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors; every launch of batchbench's kernels."""
    kernel[grid](*args, **options)


class SlotAttention:
    """Attention over blocks of the slot cache, ``[2, slots, kv_heads, max_len, size]`` each.

    It holds the parts of decoding rows whose keys are split, for one layer at a time.
    """

    def __init__(
        self, device: torch.device, heads: int, max_len: int, slots: int, size: int
    ) -> None:
        self._splits = cdiv(max_len, SPLIT)
        shape = (slots, heads, self._splits, size + 2) if self._splits > 1 else (0,)
        self._partial = torch.empty(shape, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(slots, heads, dtype=torch.int32, device=device)

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Write keys and values of decoding rows, and attend; ``[rows, heads, size]``.

        ``q`` is ``[rows, heads, size]``, ``k`` and ``v`` are ``[rows, kv_heads, size]``. Row i
        is at ``positions[i]`` of slot ``slots[i]`` and attends to that slot up to there.
        """
        q, k, v = _side_by_side(q, k, v)
        rows, heads, size = q.shape
        out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
        width = next_power_of_2(size)
        launch(
            kernels.decode_attention,
            (rows, heads, self._splits),
            *(q, k, v, block, slots, positions, out, self._partial, self._arrived),
            *_places(q, k, v, block),
            *(_scale(scale, size), self._splits),
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            WIDTH=width,
            KEYS=min(128, max(16, 4096 // width)),
            SPLIT=SPLIT,
        )
        return out

    @staticmethod
    def tiled(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: torch.Tensor,
        tiles: torch.Tensor,
        tokens: int,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Write keys and values of rows and chunks, and attend; ``[tokens, heads, size]``.

        ``tiles`` are those of ``mixed.lay_tiles``, of up to ``tokens`` tokens each. The result of a
        token that is in no tile is undefined.
        """
        q, k, v = _side_by_side(q, k, v)
        total, heads, size = q.shape
        out = torch.empty(total, heads, size, dtype=q.dtype, device=q.device)
        width = max(16, next_power_of_2(size))
        launch(
            kernels.tile_attention,
            (len(tiles), heads),
            *(q, k, v, block, tiles, out),
            *_places(q, k, v, block),
            _scale(scale, size),
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            WIDTH=width,
            TOKENS=tokens,
            KEYS=min(64, max(16, _TILE_BYTES // (width * q.element_size()))),
            DOT=_dot_format(q.dtype),
        )
        return out


def _places(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: torch.Tensor
) -> tuple[int, int, int, int, int]:
    """Return strides and sizes that both attention kernels take."""
    if not q.dtype == k.dtype == v.dtype == block.dtype:
        raise ValueError("queries, keys, values and their cache differ in format")
    return q.stride(0), k.stride(0), k.shape[1], block.shape[3], block.stride(0)


def _side_by_side(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same with the heads of a token side by side, and keys as far apart as values."""
    size = q.shape[2]
    if any(t.stride()[1:] != (size, 1) for t in (q, k, v)) or k.stride(0) != v.stride(0):
        return q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v


def _scale(scale: float | None, size: int) -> float:
    return (size**-0.5 if scale is None else scale) * _POWERS_OF_TWO


def _dot_format(dtype: torch.dtype) -> Any:
    """Return the format in which tiles are multiplied; the interpreter multiplies no bfloat16."""
    formats = {torch.bfloat16: language.bfloat16, torch.float16: language.float16}
    return language.float32 if _INTERPRETED else formats.get(dtype, language.float32)


def embed_norm(
    ids: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    norm: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of both embeddings of each token, and its norm; ``[tokens, width]`` each."""
    width = tokens.shape[1]
    x = torch.empty(len(ids), width, dtype=tokens.dtype, device=tokens.device)
    normed = torch.empty_like(x)
    launch(
        kernels.embed_norm,
        (len(ids),),
        *(ids, positions, tokens, places, norm.weight, norm.bias, x, normed, norm.eps),
        WIDTH=width,
        BLOCK=next_power_of_2(width),
    )
    return x, normed


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    added: torch.Tensor,
    norm: Norm,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the norm of ``x + y + added``, and store that sum in ``x``; ``[tokens, width]``.

    ``rows`` are the tokens to compute, None for all; with it, ``x`` stays as it is.
    """
    width = x.shape[1]
    count = len(x) if rows is None else len(rows)
    normed = torch.empty(count, width, dtype=x.dtype, device=x.device)
    launch(
        kernels.add_norm,
        (count,),
        *(x, y, added, norm.weight, norm.bias, normed, x if rows is None else rows, norm.eps),
        GATHER=rows is not None,
        WIDTH=width,
        BLOCK=next_power_of_2(width),
    )
    return normed


def best_token(logits: torch.Tensor) -> torch.Tensor:
    """Return the greedy choice, ``[rows, vocabulary]`` to ``[rows]``; the first of equals.

    Rows may lie apart: ``logits`` may be the first columns of a wider product.
    """
    rows, vocabulary = logits.shape
    parts = cdiv(vocabulary, _PART)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    launch(
        kernels.best_of_parts,
        (rows, parts),
        *(logits, values, tokens, logits.stride(0), vocabulary),
        PART=_PART,
        PARTS=parts,
    )
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        kernels.best_of_all,
        (rows,),
        *(values, tokens, best),
        PARTS=parts,
        BLOCK=next_power_of_2(parts),
    )
    return best
