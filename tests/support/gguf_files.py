"""Tiny GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_gguf(
    file: Path,
    model: LoadedModel,
    kind: str = "F32",
    *,
    tokenizer: Path | None = None,
    template: str | None = None,
    **settings: int,
) -> Path:
    """Write a model of the Llama or GPT-2 type, its matrices in a format such as Q8_0.

    The weights of ``model`` become those that a reader of the file gets. ``tokenizer`` is a
    tokenizer.json; ``settings`` are more numbers.
    """
    import gguf

    config = model.module.config
    arch = gguf.MODEL_ARCH.GPT2 if config.model_type == "gpt2" else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _write_shape(writer, config)
    _write_tokenizer(writer, tokenizer, template)
    for name, value in settings.items():
        writer.add_uint32(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.module.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = _as_converted(name, parameter.detach().numpy(), config)
        stored, stored_as = values, gguf.GGMLQuantizationType.F32
        if values.ndim > 1:
            stored_as = gguf.GGMLQuantizationType[kind]
            stored = gguf.quants.quantize(np.ascontiguousarray(values), stored_as)
            _round(parameter, name, gguf.quants.dequantize(stored, stored_as), config)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", stored, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_shape(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Path | None, template: str | None) -> None:
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    if tokenizer is None:
        return
    made: Mapping[str, Any] = json.loads(tokenizer.read_text())
    tokens = sorted(made["model"]["vocab"], key=made["model"]["vocab"].__getitem__)
    special = {token["content"] for token in made["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])


def _as_converted(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Return a matrix as llama.cpp stores it: GPT-2's transposed, Llama's rotary rows apart."""
    if config.model_type == "gpt2":
        return values.T if ".attn.c_" in name or ".mlp.c_" in name else values
    heads = _rotary_heads(name, config)
    if not heads:
        return values
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _round(parameter: Any, name: str, values: np.ndarray, config: Any) -> None:
    """Give a matrix the values that its quantised ones stand for."""
    import torch

    if config.model_type == "gpt2":
        values = _as_converted(name, values, config)
    elif heads := _rotary_heads(name, config):
        split = values.reshape(heads, -1, 2, values.shape[1])
        values = split.swapaxes(1, 2).reshape(values.shape)
    parameter.data = torch.from_numpy(np.array(values, np.float32))


def _rotary_heads(name: str, config: Any) -> int:
    if "q_proj" in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in name else 0
