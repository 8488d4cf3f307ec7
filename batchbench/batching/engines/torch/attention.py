"""Attention of one pass over the slot cache: decoding rows and chunks of prompts side by side.

All tokens of a pass lie end to end in one row, ``[1, tokens]``, so the model's matrix products
compute no padding; only attention needs to know which request a token belongs to.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from batchbench.batching.engines.torch.architecture import Rotation
from batchbench.batching.plan import Chunk

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.triton.ops import SlotAttention  # Triton may be missing


def cache_argument(module: PreTrainedModel) -> str:
    """Return the name of the cache in a model's ``forward``; transformers 5.2x renamed it."""
    parameters = inspect.signature(module.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return layers, key-value heads and head size of any causal LM's configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size


def kv_token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one cached token, in all layers together."""
    layers, heads, size = kv_shape(config)
    return 2 * layers * heads * size * dtype.itemsize


def aligned(length: int, device: torch.device) -> int:
    """Return ``length``, rounded up on CUDA, which would copy masks that are not aligned."""
    return -(-length // 16) * 16 if device.type == "cuda" else length


FEW_TOKENS = 64
"""Maximum number of tokens whose keys and values are written in one operation. An operation of this
size wakes no other threads; rows of more tokens are spread over the threads (docs/log.md)."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[slots, heads, max_len, head_dim]`` each.

    Both are views of one block, ``[2, slots, heads, max_len, head_dim]``, so a pass writes once.
    They are made when they are used: a compiled pass copies tensors that share memory.
    """

    def __init__(self, block: Tensor) -> None:
        self.block = block  # super().__init__() would set keys and values
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        return self.block[0]

    @property
    def values(self) -> Tensor:
        return self.block[1]

    # The interface of transformers. The attention below reads the block itself.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class SlotCache(Cache):
    """The blocks of all layers, behind transformers' cache interface.

    ``attention`` is a GPU's own; None for torch's. With ``together`` all blocks are parts of one
    tensor, so that a slot is erased in one operation; the compiler would copy it for each block.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        slots: int,
        max_len: int,
        like: Tensor,
        attention: SlotAttention | None = None,
        *,
        together: bool = True,
    ) -> None:
        self.attention = attention
        layers, heads, size = kv_shape(config)
        shape = (2, slots, heads, max_len, size)
        # Zeros: a row whose result is unused must never read a NaN.
        if together:
            self._parts = [like.new_zeros((layers, *shape))]
        else:
            self._parts = [like.new_zeros((1, *shape)) for _ in range(layers)]
        self.blocks = [SlotLayer(block) for part in self._parts for block in part]
        which, head = np.indices((2, heads)).reshape(2, -1)
        first_rows = torch.from_numpy((which * slots * heads + head) * max_len)
        self.first_rows = first_rows.to(like.device)  # of slot 0, in a block of rows of numbers
        super().__init__(layers=self.blocks)

    def clear(self) -> None:
        for part in self._parts:
            part.zero_()

    def erase(self, slot: int, start: int, stop: int) -> None:
        """Zero these positions of a slot in all layers."""
        for part in self._parts:
            part[:, :, slot, :, start:stop] = 0


NAME = "batchbench_slots"  # of the attention in transformers' registry


@dataclass(frozen=True, eq=False)
class Prompts:
    """First chunks of prompts, of similar length; each attends to itself only."""

    gather: Tensor  # [pieces, longest]: token of the pass; the last one again as padding
    valid: Tensor  # [tokens of these pieces]: their places in the flattened ``gather``
    at: Tensor  # [tokens of these pieces]: their places in the pass


@dataclass(eq=False)
class Layout:
    """The assignment of the tokens of a pass to requests.

    Decoding rows come first in the pass, then the chunks. ``slots`` and ``positions``, ``[tokens]``
    each, are where a token's keys and values are written. Decoding rows attend to the slots ``low``
    to ``high`` (excluded) of the cache, its first ``length`` positions, each up to its own;
    ``rows`` places them in that range, None when they fill it.
    """

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    decoding: int
    low: int = 0
    high: int = 0
    length: int = 0
    rows: Tensor | None = None
    fresh: Sequence[Prompts] = ()
    continued: Sequence[tuple[int, Chunk, Tensor]] = ()  # first token, chunk, mask
    tiles: Tensor | None = None  # of a pass with chunks, if the cache has a GPU's attention
    tile: int = 0  # tokens of a tile
    _places: Tensor | None = field(default=None, init=False)
    _mask: Tensor | None = field(default=None, init=False)

    # Not cached_property: up to Python 3.11 it takes a lock, which torch.compile cannot trace.

    @property
    def places(self) -> Tensor:
        """Return the rows of a block for the tokens' keys and values, ``[tokens × 2 × heads]``."""
        if self._places is None:
            heads, max_len = self.cache.blocks[0].keys.shape[1:3]
            starts = torch.add(self.positions, self.slots, alpha=heads * max_len)
            self._places = (starts[:, None] + self.cache.first_rows).flatten()
        return self._places

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask of the decoding rows, ``[high - low, 1, 1, length]``: 0 or −∞, to add."""
        if self._mask is None:
            positions = self.positions[: self.decoding]
            if self.rows is not None:
                span = positions.new_zeros(self.high - self.low)
                positions = span.index_copy_(0, self.rows, positions)
            at = torch.arange(self.length, device=positions.device)
            # Numbers, since attention would convert a boolean mask again in each layer.
            mask = torch.zeros(len(positions), self.length, dtype=dtype, device=positions.device)
            mask.masked_fill_(at > positions[:, None], float("-inf"))
            self._mask = mask[:, None, None, :]
        return self._mask


def attend(
    block: SlotLayer, q: Tensor, kv: Tensor, layout: Layout, *, scale: float | None = None
) -> Tensor:
    """Write keys and values, and attend in one layer; ``[tokens, heads, head_dim]`` in and out.

    ``kv`` is ``[tokens, 2, heads, head_dim]``; ``scale`` is 1 / √head_dim if None.
    """
    if len(q) > FEW_TOKENS and q.device.type == "cpu":
        slots, positions = layout.slots, layout.positions
        block.keys[slots, :, positions], block.values[slots, :, positions] = kv.unbind(1)
    else:
        rows = block.block.view(-1, block.block.shape[-1])
        rows.index_copy_(0, layout.places, kv.reshape(-1, kv.shape[-1]))
    n = layout.decoding
    if n and n == len(q):
        return _decode(q, block, layout, scale)
    out = torch.empty_like(q)
    if n:
        out[:n] = _decode(q[:n], block, layout, scale)
    attend_prompts(q, kv, block, layout, out, scale)
    return out


def attend_on_device(
    block: SlotLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Attend as :func:`attend` does, in one launch of a GPU's own kernels."""
    attention = layout.cache.attention
    assert attention is not None
    states = (q, k, v, block.block)
    if layout.tiles is None:
        return attention.decode(*states, layout.slots, layout.positions, scale, rotation)
    return attention.tiled(*states, layout.tiles, layout.tile, scale, rotation)


def attend_prompts(
    q: Tensor, kv: Tensor, block: SlotLayer, layout: Layout, out: Tensor, scale: float | None = None
) -> None:
    """Attend for the chunks, whose keys and values are in the cache; write to ``out``."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != kv.shape[2]}
    k, v = kv.unbind(1)
    for prompts in layout.fresh:
        pq, pk, pv = (states[prompts.gather].transpose(1, 2) for states in (q, k, v))
        seen = scaled_dot_product_attention(pq, pk, pv, is_causal=True, **options)
        out[prompts.at] = seen.transpose(1, 2).flatten(0, 1)[prompts.valid]
    for first, chunk, mask in layout.continued:
        piece = slice(first, first + chunk.stop - chunk.start)
        seen = scaled_dot_product_attention(
            q[piece].transpose(0, 1)[None],
            block.keys[chunk.slot, None, :, : chunk.stop],
            block.values[chunk.slot, None, :, : chunk.stop],
            attn_mask=mask,
            **options,
        )
        out[piece] = seen[0].transpose(0, 1)


def attend_for_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapt :func:`attend` to transformers, which passes ``[1, heads, tokens, head_dim]``."""
    index = module.layer_idx
    assert isinstance(index, int)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    block = layout.cache.blocks[index]
    if layout.cache.attention is not None:
        seen = attend_on_device(block, q, k, v, layout, scaling)
    else:
        seen = attend(block, q, torch.stack([k, v], 1), layout, scale=scaling)
    return seen.unsqueeze(0), None


def _decode(q: Tensor, block: SlotLayer, layout: Layout, scale: float | None) -> Tensor:
    """Attend for the decoding rows, ``[rows, heads, head_dim]`` in and out.

    Queries are spread over a range of slots, since gathering slots would copy the cache. Heads that
    share keys and values stand where the tokens of a query would, so that none is repeated.
    """
    low, high, length = layout.low, layout.high, layout.length
    if layout.rows is not None:
        q = q.new_zeros(high - low, *q.shape[1:]).index_copy_(0, layout.rows, q)
    seen = scaled_dot_product_attention(
        q.view(len(q), block.keys.shape[1], -1, q.shape[-1]),
        block.keys[low:high, :, :length],
        block.values[low:high, :, :length],
        attn_mask=layout.mask(block.keys.dtype),
        scale=scale,
    ).flatten(1, 2)
    return seen if layout.rows is None else seen[layout.rows]


AttentionInterface.register(NAME, attend_for_transformers)
