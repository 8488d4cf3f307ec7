"""The operations of a GPU's passes that batchbench computes with Triton, one launch each.

Functions take and return tensors of one device. ``kernels.py`` has the kernels.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, language, next_power_of_2

from batchbench.batching.engines.torch.architecture import Norm, Rotation
from batchbench.batching.engines.torch.sampling import smallest_kept
from batchbench.batching.engines.torch.triton import kernels
from batchbench.workloads.sampling import Sampling

SPLIT = 256  # keys of a decoding row that one program reads; more are split over several
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
    angles of a model with rotary positions. Both kinds of passes write keys and values, norm and
    rotate queries and keys first if there is a ``rotation``, and return ``[tokens, heads, size]``
    as ``q`` is; ``k`` and ``v`` are ``[tokens, kv_heads, size]``.
    """

    def __init__(
        self, device: torch.device, heads: int, max_len: int, slots: int, size: int
    ) -> None:
        self._splits = cdiv(max_len, SPLIT)
        shape = (slots, heads, self._splits, size + 2) if self._splits > 1 else (0,)
        self._partial = torch.empty(shape, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(slots, heads, dtype=torch.int32, device=device)
        self._positions = torch.arange(max_len, device=device)
        self._angles: Tensor | None = None

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Tensor,
        slots: Tensor,
        positions: Tensor,
        scale: float | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend for decoding rows: row i to ``slots[i]``, up to its own ``positions[i]``."""
        width = next_power_of_2(q.shape[2])
        return self._attend(
            kernels.decode_attention,
            (len(q), q.shape[1], self._splits),
            (q, k, v, block),
            (scale, rotation),
            *(slots, positions, self._partial, self._arrived),
            WIDTH=width,
            KEYS=min(128, max(16, 4096 // width)),
            SPLIT=SPLIT,
        )

    def tiled(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Tensor,
        tiles: Tensor,
        tokens: int,
        scale: float | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend for rows and chunks in tiles of up to ``tokens``, which ``lay_tiles`` returns."""
        width = max(16, next_power_of_2(q.shape[2]))
        return self._attend(
            kernels.tile_attention,
            (len(tiles), q.shape[1]),
            (q, k, v, block),
            (scale, rotation),
            tiles,
            WIDTH=width,
            KEYS=min(64, max(16, _TILE_BYTES // (width * q.element_size()))),
            TOKENS=tokens,
            DOT=_dot_format(q.dtype),
        )

    def _attend(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        states: tuple[Tensor, Tensor, Tensor, Tensor],
        change: tuple[float | None, Rotation | None],
        *args: Tensor,
        **constants: Any,
    ) -> Tensor:
        """Launch a kernel with the arguments that both have, then ``args`` and ``constants``."""
        *states_of_pass, block = states
        scale, rotation = change
        if any(t.dtype != block.dtype for t in states_of_pass):
            raise ValueError("queries, keys, values and their cache differ in format")
        q, k, v = _side_by_side(*states_of_pass)
        heads, size = q.shape[1:]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if rotation is not None and self._angles is None:
            angles = rotation.rotary.angles(self._positions, q.dtype)
            self._angles = angles.transpose(0, 1).flatten(1)  # [max_len, size]
        norms = rotation.norms if rotation is not None else ()
        launch(
            kernel,
            grid,
            *(q, k, v, block, out, None if rotation is None else self._angles),
            *([norm.weight for norm in norms] or (None, None)),
            norms[0].eps if norms else 0.0,
            *(q.stride(0), k.stride(0), block.shape[3], block.stride(0)),
            (size**-0.5 if scale is None else scale) * _POWERS_OF_TWO,
            *args,
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            **constants,
        )
        return out


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same with the heads of a token side by side, and keys as far apart as values."""
    size = q.shape[2]
    if any(t.stride()[1:] != (size, 1) for t in (q, k, v)) or k.stride(0) != v.stride(0):
        return q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v


def _dot_format(dtype: torch.dtype) -> Any:
    """Return the format in which tiles are multiplied; the interpreter multiplies no bfloat16."""
    formats = {torch.bfloat16: language.bfloat16, torch.float16: language.float16}
    return language.float32 if _INTERPRETED else formats.get(dtype, language.float32)


def embed_norm(
    ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Return the sum of each token's embeddings, and its norm; ``[tokens, width]`` each."""
    x = tokens.new_empty(len(ids), tokens.shape[1])
    return x, _normed(tokens, ids, places, positions, None, x, norm, len(ids))


def add_norm(
    x: Tensor, y: Tensor, added: Tensor | None, norm: Norm, rows: Tensor | None = None
) -> Tensor:
    """Return the norm of ``x + y + added``, and store that sum in ``x``; ``[tokens, width]``.

    With ``rows`` only those tokens are computed, and ``x`` stays as it is.
    """
    total, count = (x, len(x)) if rows is None else (None, len(rows))
    return _normed(x, rows, y, rows, added, total, norm, count)


def _normed(
    x: Tensor,
    x_rows: Tensor | None,
    y: Tensor | None,
    y_rows: Tensor | None,
    added: Tensor | None,
    total: Tensor | None,
    norm: Norm,
    rows: int,
) -> Tensor:
    width = x.shape[1]
    normed = x.new_empty(rows, width)
    launch(
        kernels.add_norm,
        (rows,),
        *(x, x_rows, y, y_rows, added, total, norm.weight, norm.bias, normed, norm.eps),
        WIDTH=width,
        BLOCK=next_power_of_2(width),
    )
    return normed


def swiglu(product: Tensor) -> Tensor:
    """Return silu(gate) × up, ``[tokens, inner]``; ``product`` has the gates, then the ups."""
    tokens, inner = len(product), product.shape[1] // 2
    out = product.new_empty(tokens, inner)
    block = min(_ACTIVATED, next_power_of_2(inner))
    launch(kernels.swiglu, (tokens, cdiv(inner, block)), product, out, INNER=inner, BLOCK=block)
    return out


def best_token(
    logits: Tensor, sampling: Sampling | None = None, keys: Tensor | None = None
) -> Tensor:
    """Return the next token of each row, as :class:`~.sampling.Choose` says.

    Rows may lie apart: ``logits`` may be the first columns of a wider product.
    """
    least = None if sampling is None else smallest_kept(logits.float(), sampling)
    temperature = 0.0 if sampling is None else sampling.temperature
    rows, vocabulary = logits.shape
    parts = cdiv(vocabulary, _PART)
    values = logits.new_empty(rows, parts, dtype=torch.float32)
    tokens, best = (logits.new_empty(shape, dtype=torch.int64) for shape in ((rows, parts), rows))
    noise = (keys, least, temperature)
    sizes = (logits.stride(0), vocabulary)
    launch(kernels.best_of_parts, (rows, parts), logits, values, tokens, *noise, *sizes, PART=_PART)
    block = next_power_of_2(parts)
    launch(kernels.best_of_all, (rows,), values, tokens, best, PARTS=parts, BLOCK=block)
    return best
