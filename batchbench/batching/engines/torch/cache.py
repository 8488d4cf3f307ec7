"""The slot cache: one preallocated block a layer, written in place and never copied."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


def cache_argument(module: PreTrainedModel) -> str:
    """What a model's forward pass calls its cache: renamed in transformers 5.2x."""
    parameters = inspect.signature(module.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their size, of any causal LM's configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size


def kv_token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one cached token takes, all layers together."""
    layers, heads, size = kv_shape(config)
    return 2 * layers * heads * size * dtype.itemsize


FEW_TOKENS = 64
"""Up to so many tokens a pass writes its keys and values row by row in one small operation, which
no thread need be woken for; the rows of more are spread over the threads (docs/log.md)."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[slots, heads, max_len, head_dim]`` each.

    Both lie in one block, ``[2, slots, heads, max_len, head_dim]``, so that a pass writes once.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        super().__init__()
        # Zeros: a row that is computed but not wanted must never read a NaN.
        self.block = like.new_zeros((2, *shape))
        self.keys, self.values = self.block.unbind(0)
        self._rows = self.block.view(-1, shape[-1])
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the block is there from the start."""

    def write(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
        states: torch.Tensor,
    ) -> None:
        """Put keys and values, ``[tokens, 2, heads, head_dim]``, at their places.

        Args:
            slots, positions: ``[tokens]`` each.
            rows: the same places as :meth:`SlotCache.rows` tells them; None where they are many.
        """
        if rows is not None:
            self._rows.index_copy_(0, rows, states.reshape(-1, states.shape[-1]))
            return
        self.keys[slots, :, positions], self.values[slots, :, positions] = states.unbind(1)

    def erase(self, slot: int, start: int, stop: int) -> None:
        """Put zeros into a slot's positions ``start`` to ``stop`` (excluded)."""
        self.block[:, slot, :, start:stop] = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new keys and values on: who attends to them knows where they belong."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the attention makes its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Unused: slots have lengths of their own, which the plan holds."""
        return 0

    def get_max_length(self) -> int:
        """Longest sequence that a slot holds."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class SlotCache(Cache):
    """All layers' blocks, behind transformers' cache interface."""

    def __init__(
        self, config: PretrainedConfig, slots: int, max_len: int, like: torch.Tensor
    ) -> None:
        layers, heads, size = kv_shape(config)
        shape = (slots, heads, max_len, size)
        self.blocks = [SlotLayer(shape, like) for _ in range(layers)]
        which, head = np.indices((2, heads)).reshape(2, -1)
        self._first_rows = torch.from_numpy((which * slots * heads + head) * max_len).to(
            like.device
        )
        self._slot_rows = heads * max_len
        super().__init__(layers=self.blocks)

    def rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Where tokens' keys and values stand among a block's rows, ``[tokens × 2 × heads]``.

        None for more than :data:`FEW_TOKENS` tokens.
        """
        if len(slots) > FEW_TOKENS:
            return None
        return (
            torch.add(positions, slots, alpha=self._slot_rows)[:, None] + self._first_rows
        ).flatten()
