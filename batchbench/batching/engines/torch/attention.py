"""Attention of one pass over the slot cache: decoding rows and pieces of prompts side by side.

All tokens of a pass lie end to end in one row, ``[1, tokens]``, so the matrix products of the
model carry no padding; only here does it matter which request a token belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from batchbench.batching.engines.torch.cache import SlotCache, SlotLayer
from batchbench.batching.engines.torch.kernels import Native
from batchbench.batching.plan import Chunk

NAME = "batchbench_slots"
"""The attention implementation's name in transformers' registry."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Fresh pieces of similar length, that attend to themselves alone."""

    gather: torch.Tensor  # [pieces, longest]: token of the pass; the last one again as padding
    valid: torch.Tensor  # [pieces, longest]: False where padded
    at: torch.Tensor  # [tokens of these pieces]: where they stand in the pass


@dataclass(eq=False)
class Layout:
    """Which request each token of a pass belongs to.

    Decoding rows come first in the pass, then the chunks. ``slots`` and ``positions`` say where
    each token's keys and values are written, ``[tokens]``. Decoding rows attend to the slots
    ``low`` to ``high`` (excluded) of the cache, its first ``length`` positions, each up to its own;
    ``rows`` places them in that range, None when they fill it.
    """

    cache: SlotCache
    slots: torch.Tensor
    positions: torch.Tensor
    decoding: int
    low: int = 0
    high: int = 0
    length: int = 0
    rows: torch.Tensor | None = None
    fresh: Sequence[Prompts] = ()
    continued: Sequence[tuple[int, Chunk, torch.Tensor]] = ()  # first token, chunk, mask
    _rows_of_cache: torch.Tensor | None = field(default=None, init=False)
    _mask: torch.Tensor | None = field(default=None, init=False)

    def moved(self, positions: torch.Tensor, length: int) -> Layout:
        """The same requests in another pass."""
        return replace(self, positions=positions, length=length)

    # No cached_property: up to Python 3.11 it takes a lock, at which torch.compile stops.

    @property
    def rows_of_cache(self) -> torch.Tensor | None:
        """Where the keys and values of this pass are written, as :meth:`SlotCache.rows` tells."""
        if self._rows_of_cache is None:
            self._rows_of_cache = self.cache.rows(self.slots, self.positions)
        return self._rows_of_cache

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What the decoding rows may see, ``[high - low, 1, 1, length]``: 0 or −∞, to be added.

        A slot between them that does not decode sees its first position.
        """
        if self._mask is None:
            positions = self.positions[: self.decoding]
            if self.rows is not None:
                span = positions.new_zeros(self.high - self.low)
                positions = span.index_copy_(0, self.rows, positions)
            self._mask = causal_mask(positions, self.length, dtype)
        return self._mask


def causal_mask(positions: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What each row may see of ``length`` cached positions, ``[rows, 1, 1, length]``: 0 up to its
    own position, −∞ beyond.

    Numbers, not truth values: the attention would make them so again in each layer.
    """
    at = torch.arange(length, device=positions.device)
    mask = torch.zeros(len(positions), length, dtype=dtype, device=positions.device)
    return mask.masked_fill_(at > positions[:, None], float("-inf"))[:, None, None, :]


def attend(
    block: SlotLayer,
    q: torch.Tensor,
    kv: torch.Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of one layer, ``[tokens, heads, head_dim]`` in and out; writes keys and values.

    Args:
        kv: ``[tokens, 2, heads, head_dim]``.
        scale: what scores are multiplied by, 1 / √head_dim if None.
    """
    block.write(layout.slots, layout.positions, layout.rows_of_cache, kv)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != kv.shape[2]}
    n = layout.decoding
    if n and n == len(q):
        return _decode(q, block, layout, options)
    out = torch.empty_like(q)
    if n:
        out[:n] = _decode(q[:n], block, layout, options)
    _attend_prompts(q, kv, block, layout, options, out)
    return out


def attend_natively(
    own: Native, block: SlotLayer, qkv: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """:func:`attend` with the decoding rows in batchbench's own kernel, which reads of each slot
    only what its request has written.

    Args:
        qkv: ``[tokens, 3, heads, head_dim]``.
    """
    out = own.attention(qkv, block.block, layout.slots, layout.positions, layout.decoding)
    if layout.decoding < qkv.shape[0]:
        _attend_prompts(qkv[:, 0], qkv[:, 1:], block, layout, {}, out)
    return out


def _attend_prompts(
    q: torch.Tensor,
    kv: torch.Tensor,
    block: SlotLayer,
    layout: Layout,
    options: dict[str, Any],
    out: torch.Tensor,
) -> None:
    """Attention of the pieces of prompts, whose keys and values are in the cache; into ``out``."""
    k, v = kv.unbind(1)
    for prompts in layout.fresh:
        pq, pk, pv = (states[prompts.gather].transpose(1, 2) for states in (q, k, v))
        seen = scaled_dot_product_attention(pq, pk, pv, is_causal=True, **options)
        out[prompts.at] = seen.transpose(1, 2)[prompts.valid]
    for first, chunk, mask in layout.continued:
        piece = slice(first, first + chunk.stop - chunk.start)
        asked = q[piece].transpose(0, 1)[None]
        held_k = block.keys[chunk.slot, None, :, : chunk.stop]
        held_v = block.values[chunk.slot, None, :, : chunk.stop]
        seen = scaled_dot_product_attention(asked, held_k, held_v, attn_mask=mask, **options)
        out[piece] = seen[0].transpose(0, 1)


def attend_for_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """:func:`attend` as transformers calls it: ``[1, heads, tokens, head_dim]`` in."""
    index = module.layer_idx
    assert isinstance(index, int)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    kv = torch.stack([k, v], 1)
    seen = attend(layout.cache.blocks[index], q, kv, layout, scale=scaling)
    return seen.unsqueeze(0), None


def _decode(
    q: torch.Tensor, block: SlotLayer, layout: Layout, options: dict[str, Any]
) -> torch.Tensor:
    """Attention of the decoding rows, ``[rows, heads, head_dim]`` in and out.

    The cache is read where it lies: rows are spread over a range of slots rather than slots
    gathered, since a token's query is as small as the cache is large.
    """
    low, high, length = layout.low, layout.high, layout.length
    if layout.rows is not None:
        q = q.new_zeros(high - low, *q.shape[1:]).index_copy_(0, layout.rows, q)
    seen = scaled_dot_product_attention(
        q.unsqueeze(2),
        block.keys[low:high, :, :length],
        block.values[low:high, :, :length],
        attn_mask=layout.mask(block.keys.dtype),
        **options,
    ).squeeze(2)
    return seen if layout.rows is None else seen[layout.rows]


AttentionInterface.register(NAME, attend_for_transformers)
