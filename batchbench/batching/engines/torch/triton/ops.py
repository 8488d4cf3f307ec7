"""The operations of a GPU's passes that batchbench computes with Triton, one launch each.

Functions take and return tensors of one device. ``kernels.py`` has the kernels.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from triton import cdiv, language, next_power_of_2

from batchbench.batching.engines.torch.architecture import Norm
from batchbench.batching.engines.torch.attention import Rotation
from batchbench.batching.engines.torch.sampling import smallest_kept
from batchbench.batching.engines.torch.triton import kernels
from batchbench.workloads.sampling import Sampling

SPLIT = 256
"""Keys of one decoding row that one program reads. More are split over several programs."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_POWERS_OF_TWO = math.log2(math.e)
_PART = 2048  # logits that one program compares
_ACTIVATED = 1024  # numbers of an MLP that one program computes
_TILE_BYTES = 8192  # of the keys that a tile multiplies at once: registers are few


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors; every launch of batchbench's kernels."""
    kernel[grid](*args, **options)


class SlotAttention:
    """Attention over blocks of the slot cache, ``[2, slots, kv_heads, max_len, size]`` each.

    It holds the parts of decoding rows whose keys are split, for one layer at a time, and the
    angles of a model with rotary positions.
    """

    def __init__(
        self, device: torch.device, heads: int, max_len: int, slots: int, size: int
    ) -> None:
        self._splits = cdiv(max_len, SPLIT)
        shape = (slots, heads, self._splits, size + 2) if self._splits > 1 else (0,)
        self._partial = torch.empty(shape, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(slots, heads, dtype=torch.int32, device=device)
        self._positions = torch.arange(max_len, device=device)
        self._angles: torch.Tensor | None = None

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        scale: float | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Write keys and values of decoding rows, and attend; ``[rows, heads, size]``.

        ``q`` is ``[rows, heads, size]``, ``k`` and ``v`` are ``[rows, kv_heads, size]``. Row i
        is at ``positions[i]`` of slot ``slots[i]`` and attends to that slot up to there. With a
        ``rotation``, queries and keys are normed and rotated first.
        """
        q, k, v = _side_by_side(q, k, v)
        rows, heads, size = q.shape
        out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
        width = next_power_of_2(size)
        launch(
            kernels.decode_attention,
            (rows, heads, self._splits),
            *(q, k, v, block, slots, positions, out, self._partial, self._arrived),
            *self._turning(q, rotation),
            *_places(q, k, v, block),
            *(_scale(scale, size), self._splits),
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            WIDTH=width,
            KEYS=min(128, max(16, 4096 // width)),
            SPLIT=SPLIT,
            **_turns(rotation),
        )
        return out

    def tiled(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: torch.Tensor,
        tiles: torch.Tensor,
        tokens: int,
        scale: float | None = None,
        rotation: Rotation | None = None,
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
            *self._turning(q, rotation),
            *_places(q, k, v, block),
            _scale(scale, size),
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            WIDTH=width,
            TOKENS=tokens,
            KEYS=min(64, max(16, _TILE_BYTES // (width * q.element_size()))),
            DOT=_dot_format(q.dtype),
            **_turns(rotation),
        )
        return out

    def _turning(
        self, q: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Return angles, ``[max_len, size]``, norms of heads and their epsilon, as far as used."""
        if rotation is None:
            return q, q, q, 0.0
        if self._angles is None:
            angles = rotation.rotary.angles(self._positions, q.dtype)
            self._angles = angles.transpose(0, 1).flatten(1)
        if not rotation.norms:
            return self._angles, q, q, 0.0
        q_norm, k_norm = rotation.norms
        return self._angles, q_norm.weight, k_norm.weight, q_norm.eps


def _turns(rotation: Rotation | None) -> dict[str, bool]:
    return {
        "ROTARY": rotation is not None,
        "NORMED": rotation is not None and len(rotation.norms) > 0,
    }


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
    places: torch.Tensor | None,
    norm: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's embedding, and its norm; ``[tokens, width]`` each.

    ``places`` are embeddings of positions, which are added; None if there are none.
    """
    width = tokens.shape[1]
    x = torch.empty(len(ids), width, dtype=tokens.dtype, device=tokens.device)
    normed = torch.empty_like(x)
    launch(
        kernels.embed_norm,
        (len(ids),),
        *(ids, positions, tokens, tokens if places is None else places, *_weights(norm)),
        *(x, normed, norm.eps),
        PLACES=places is not None,
        RMS=norm.bias is None,
        WIDTH=width,
        BLOCK=next_power_of_2(width),
    )
    return x, normed


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    added: torch.Tensor | None,
    norm: Norm,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the norm of ``x + y + added``, and store that sum in ``x``; ``[tokens, width]``.

    ``added`` is a bias, None for none. ``rows`` are the tokens to compute, None for all; with it,
    ``x`` stays as it is.
    """
    width = x.shape[1]
    count = len(x) if rows is None else len(rows)
    normed = torch.empty(count, width, dtype=x.dtype, device=x.device)
    launch(
        kernels.add_norm,
        (count,),
        *(x, y, x if added is None else added, *_weights(norm), normed),
        *(x if rows is None else rows, norm.eps),
        ADDED=added is not None,
        GATHER=rows is not None,
        RMS=norm.bias is None,
        WIDTH=width,
        BLOCK=next_power_of_2(width),
    )
    return normed


def _weights(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.weight, norm.weight if norm.bias is None else norm.bias


def swiglu(product: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) × up, ``[tokens, inner]``; ``product`` has the gates, then the ups."""
    tokens, inner = len(product), product.shape[1] // 2
    out = torch.empty(tokens, inner, dtype=product.dtype, device=product.device)
    block = min(_ACTIVATED, next_power_of_2(inner))
    launch(kernels.swiglu, (tokens, cdiv(inner, block)), product, out, INNER=inner, BLOCK=block)
    return out


def best_token(
    logits: torch.Tensor, sampling: Sampling | None = None, keys: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the next token of each row, as :class:`~.sampling.Choose` says.

    Rows may lie apart: ``logits`` may be the first columns of a wider product.
    """
    least = None if sampling is None else smallest_kept(logits.float(), sampling)
    rows, vocabulary = logits.shape
    parts = cdiv(vocabulary, _PART)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    launch(
        kernels.best_of_parts,
        (rows, parts),
        *(logits, values, tokens),
        values if keys is None else keys,
        values if least is None else least,
        0.0 if sampling is None else sampling.temperature,
        *(logits.stride(0), vocabulary),
        PART=_PART,
        PARTS=parts,
        DRAWS=keys is not None,
        CUTS=least is not None,
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
