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
from batchbench.batching.engines.torch.kernels import Native, native
from batchbench.batching.engines.torch.linear import Kernels, Linear, make_linear
from batchbench.batching.models.loading import LoadedModel


class Forward(Protocol):
    """The model's forward pass over tokens that lie end to end."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are cached in."""

    @property
    def extra_bytes(self) -> int:
        """What it holds beside the model's own weights."""

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits ``[kept, vocabulary]`` of ``ids``, ``[tokens]``; ``keep`` of them, or all."""


class CountedForward:
    """A forward pass that knows how often it was computed."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.cache_dtype, self.extra_bytes = forward.cache_dtype, forward.extra_bytes
        self.calls = 0

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls += 1
        return self._forward(ids, layout, keep)


class TransformersForward:
    """Any causal LM of transformers, through its cache and attention interfaces."""

    extra_bytes = 0

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module
        self._cache_argument = cache_argument(model.module)
        self.cache_dtype = model.dtype

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
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
    """GPT-2 (Radford et al. 2019) with nothing between its products that need not be there.

    On a CPU the weights are laid out anew for the kernels, which takes as much memory again: the
    plain ones stay, for the reference that outputs are verified against.
    """

    def __init__(self, model: LoadedModel, most: Kernels = Kernels.OWN) -> None:
        config, body = model.module.config, model.module.transformer
        self._heads = config.n_head
        self._tokens, self._positions = body.wte.weight, body.wpe.weight
        self._blocks = [
            _Block(
                _norm(block.ln_1),
                _conv1d(block.attn.c_attn, most),
                _conv1d(block.attn.c_proj, most),
                _norm(block.ln_2),
                _conv1d(block.mlp.c_fc, most),
                _conv1d(block.mlp.c_proj, most),
            )
            for block in body.h
        ]
        self._norm = _norm(body.ln_f)
        self._head = make_linear(model.module.lm_head.weight, None, most)
        layers = [self._head]
        for b in self._blocks:
            layers += [b.qkv, b.attention_out, b.mlp_in, b.mlp_out]
        self.extra_bytes = sum(layer.extra_bytes for layer in layers)
        self._own = own_attention(config, model.device, model.dtype, most)
        self.cache_dtype = cache_dtype(config, model.device, model.dtype, most)

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        x = embedding(ids, self._tokens) + embedding(layout.positions, self._positions)
        tokens = x.shape[0]
        for layer, block in zip(layout.cache.blocks, self._blocks, strict=True):
            qkv = block.qkv(block.norm_1(x)).view(tokens, 3, self._heads, -1)
            if self._own is not None:
                seen = attend_natively(self._own, layer, qkv, layout)
            else:
                qkv = qkv.to(self.cache_dtype)
                seen = attend(layer, qkv[:, 0], qkv[:, 1:], layout)
            x = block.attention_out.plus(seen.reshape(x.shape).to(x.dtype), x)
            x = block.mlp_out.plus(block.mlp_in.gelu(block.norm_2(x)), x)
        if keep is not None:
            x = x[keep]
        return self._head(self._norm(x))


def own_attention(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, most: Kernels = Kernels.OWN
) -> Native | None:
    """batchbench's attention over the slot cache, where it can compute what GPT-2 asks."""
    own = native() if most >= Kernels.OWN and device.type == "cpu" else None
    size = config.hidden_size // config.num_attention_heads
    return own if own is not None and own.attends(size, dtype) else None


def cache_dtype(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, most: Kernels = Kernels.OWN
) -> torch.dtype:
    """What :class:`GPT2Forward` caches keys and values in.

    Single queries take torch's attention kernel on the CPU longer in bfloat16 than in float32, by
    more than the doubled cache costs (docs/log.md).
    """
    if device.type != "cpu" or own_attention(config, device, dtype, most) is not None:
        return dtype
    return torch.float32


def _norm(module: torch.nn.LayerNorm) -> _Norm:
    return _Norm(module.weight, module.bias, module.eps)


def _conv1d(module: torch.nn.Module, most: Kernels) -> Linear:
    """transformers' Conv1D holds its weight as ``[inputs, outputs]``."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    return make_linear(weight.t(), bias, most)


def is_plain_gpt2(config: PretrainedConfig) -> bool:
    """Whether :class:`GPT2Forward` computes what this configuration says."""
    return bool(
        config.model_type == "gpt2"
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.reorder_and_upcast_attn
        and not config.add_cross_attention
    )


def make_forward(model: LoadedModel, most: Kernels = Kernels.OWN) -> Forward:
    """The leanest forward pass that is right for the model."""
    if is_plain_gpt2(model.module.config):
        return GPT2Forward(model, most)
    return TransformersForward(model)
