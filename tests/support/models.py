"""The tiny model of the tests: its configuration, its sentences, and the types of its fixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

TINY: Mapping[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 300,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Another family: rotary positions, and two heads of keys to four of queries."""

QWEN2: Mapping[str, Any] = {**LLAMA, "model_type": "qwen2"}
QWEN3: Mapping[str, Any] = {**LLAMA, "model_type": "qwen3", "head_dim": 12}
"""The same family, with biases, and with norms of heads that are not as wide together as the
model."""

SENTENCES = (
    "The quick brown fox jumped over the lazy dog.",
    "A request is written into its slot and leaves by being forgotten.",
    "Static batching waits for the longest request; continuous batching does not.",
    "What the comparison shows is two decisions alone, and not two loops.",
)

MakeModel = Callable[..., "LoadedModel"]
Alone = Callable[["LoadedModel", Sequence[int], int], list[int]]
