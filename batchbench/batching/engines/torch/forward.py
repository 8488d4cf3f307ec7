"""Forward passes over the slot cache: GPT-2's own, lean, and one for any causal LM."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import embedding, layer_norm
from transformers import PretrainedConfig

from batchbench.batching.engines.torch.attention import (
    NAME,
    Layout,
    attend,
    attend_natively,
    cache_argument,
)
from batchbench.batching.engines.torch.base import best_token
from batchbench.batching.engines.torch.kernels import Native, native
from batchbench.batching.engines.torch.linear import Kernels, Linear, make_linear
from batchbench.batching.engines.torch.triton.choice import triton_forward, triton_ops
from batchbench.batching.models.loading import LoadedModel


class Forward(Protocol):
    """The model's forward pass over tokens that lie end to end."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """The number format of cached keys and values."""

    @property
    def extra_bytes(self) -> int:
        """Bytes held in addition to the model's own weights."""

    @property
    def triton(self) -> bool:
        """True if attention is computed with Triton, so the engine prepares no masks."""

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Return logits ``[kept, vocabulary]`` of ``ids``, ``[tokens]``; of all if None is kept."""

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the greedy choice, ``[rows, vocabulary]`` to ``[rows]``; the first of equals."""


class TransformersForward:
    """Any causal LM of transformers, through its cache and attention interfaces."""

    extra_bytes = 0

    def __init__(self, model: LoadedModel, most: Kernels = Kernels.PLAIN) -> None:
        ops = triton_ops(model) if most >= Kernels.OWN else None
        self.triton = ops is not None
        self.choose = best_token if ops is None else ops.best_token
        self._module = model.module
        self._cache_argument = cache_argument(model.module)
        self.cache_dtype = model.dtype

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        if self._module.config._attn_implementation != NAME:
            self._module.set_attn_implementation(NAME)
        logits: torch.Tensor = self._module(
            input_ids=ids.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            use_cache=True,
            logits_to_keep=0 if keep is None else keep,
            layout=layout,
            **{self._cache_argument: layout.cache},
        ).logits[0]
        return logits


class _Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: torch.nn.LayerNorm) -> _Norm:
        return cls(module.weight, module.bias, module.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _Block(NamedTuple):
    norm_1: _Norm
    qkv: Linear
    attention_out: Linear
    norm_2: _Norm
    mlp_in: Linear
    mlp_out: Linear


class GPT2Forward:
    """GPT-2 (Radford et al. 2019) with only the necessary operations between its products.

    On a CPU the weights are packed for the kernels, which takes as much memory again: the plain
    ones stay for the reference that verifies outputs.
    """

    triton = False
    choose = staticmethod(best_token)

    def __init__(self, model: LoadedModel, most: Kernels = Kernels.OWN) -> None:
        config, body = model.module.config, model.module.transformer
        self._heads = config.n_head
        self._tokens, self._positions = body.wte.weight, body.wpe.weight
        self._blocks = [
            _Block(
                _Norm.of(block.ln_1),
                _conv1d(block.attn.c_attn, most),
                _conv1d(block.attn.c_proj, most),
                _Norm.of(block.ln_2),
                _conv1d(block.mlp.c_fc, most),
                _conv1d(block.mlp.c_proj, most),
            )
            for block in body.h
        ]
        self._norm = _Norm.of(body.ln_f)
        self._head = make_linear(model.module.lm_head.weight, None, most)
        layers = [self._head]
        for b in self._blocks:
            layers += [b.qkv, b.attention_out, b.mlp_in, b.mlp_out]
        self.extra_bytes = sum(layer.extra_bytes for layer in layers)
        self._kernels = _attention_kernels(config, model.device, model.dtype, most)
        self.cache_dtype = cache_dtype(config, model.device, model.dtype, most)

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        x = embedding(ids, self._tokens) + embedding(layout.positions, self._positions)
        tokens = x.shape[0]
        for layer, block in zip(layout.cache.blocks, self._blocks, strict=True):
            qkv = block.qkv(block.norm_1(x)).view(tokens, 3, self._heads, -1)
            if self._kernels is not None:
                seen = attend_natively(self._kernels, layer, qkv, layout)
            else:
                qkv = qkv.to(self.cache_dtype)
                seen = attend(layer, qkv[:, 0], qkv[:, 1:], layout)
            x = block.attention_out.plus(seen.reshape(x.shape).to(x.dtype), x)
            x = block.mlp_out.plus(block.mlp_in.gelu(block.norm_2(x)), x)
        if keep is not None:
            x = x[keep]
        return self._head(self._norm(x))


def _attention_kernels(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, most: Kernels
) -> Native | None:
    """Return batchbench's attention kernels if they can compute what GPT-2 needs."""
    kernels = native() if most >= Kernels.OWN and device.type == "cpu" else None
    size = config.hidden_size // config.num_attention_heads
    return kernels if kernels is not None and kernels.attends(size, dtype) else None


def cache_dtype(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, most: Kernels = Kernels.OWN
) -> torch.dtype:
    """Return the number format in which :class:`GPT2Forward` caches keys and values.

    On a CPU torch's attention kernel is slower for single queries in bfloat16 than in float32, by
    more than the doubled cache costs (docs/log.md).
    """
    if device.type != "cpu" or _attention_kernels(config, device, dtype, most) is not None:
        return dtype
    return torch.float32


def _conv1d(module: torch.nn.Module, most: Kernels) -> Linear:
    """Return the layer of a transformers Conv1D, whose weight is ``[inputs, outputs]``."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    return make_linear(weight.t(), bias, most)


def is_plain_gpt2(config: PretrainedConfig) -> bool:
    """Return True if :class:`GPT2Forward` computes this configuration."""
    return bool(
        config.model_type == "gpt2"
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.reorder_and_upcast_attn
        and not config.add_cross_attention
    )


def make_forward(model: LoadedModel, most: Kernels = Kernels.OWN) -> Forward:
    """Return the leanest forward pass that is right for the model."""
    if is_plain_gpt2(model.module.config):
        fused = triton_forward(model) if most >= Kernels.OWN else None
        return fused or GPT2Forward(model, most)
    return TransformersForward(model, most)
