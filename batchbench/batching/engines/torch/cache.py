"""The slot cache: one preallocated block a layer, written in place and never copied."""

from __future__ import annotations

import inspect
from typing import Any

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


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[slots, heads, max_len, head_dim]`` each."""

    def __init__(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        super().__init__()
        # Zeros: a row that is computed but not wanted must never read a NaN.
        self.keys: torch.Tensor = like.new_zeros(shape)
        self.values: torch.Tensor = like.new_zeros(shape)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the block is there from the start."""

    def write(
        self, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Put ``[tokens, heads, head_dim]`` into ``slots`` at ``positions``, ``[tokens]`` each."""
        self.keys[slots, :, positions] = keys
        self.values[slots, :, positions] = values

    def erase(self, slot: int, start: int, stop: int) -> None:
        """Put zeros into a slot's positions ``start`` to ``stop`` (excluded)."""
        self.keys[slot, :, start:stop] = 0
        self.values[slot, :, start:stop] = 0

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
        super().__init__(layers=self.blocks)
