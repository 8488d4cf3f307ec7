"""Forward passes over the slot cache: GPT-2's own, lean, and one for any causal LM."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import embedding, layer_norm
from transformers import PretrainedConfig

from batchbench.batching.engines.torch.attention import NAME, Layout, attend
from batchbench.batching.engines.torch.cache import cache_argument
from batchbench.batching.engines.torch.packed import PackedLinear, packed_ops
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
    qkv: PackedLinear
    attention_out: PackedLinear
    norm_2: _Norm
    mlp_in: PackedLinear
    mlp_out: PackedLinear


class GPT2Forward:
    """GPT-2 (Radford et al. 2019) with nothing between its products that need not be there.

    On a CPU the weights are packed, unless asked not to, which takes as much memory again: the
    plain ones stay, for the reference that outputs are verified against.
    """

    def __init__(self, model: LoadedModel, *, packed: bool = True) -> None:
        packed = packed and model.device.type == "cpu" and packed_ops(model.dtype) is not None
        body = model.module.transformer
        self._heads = model.module.config.n_head
        self._tokens, self._positions = body.wte.weight, body.wpe.weight
        self._blocks = [
            _Block(
                _norm(block.ln_1),
                _conv1d(block.attn.c_attn, packed),
                _conv1d(block.attn.c_proj, packed),
                _norm(block.ln_2),
                _conv1d(block.mlp.c_fc, packed),
                _conv1d(block.mlp.c_proj, packed),
            )
            for block in body.h
        ]
        self._norm = _norm(body.ln_f)
        self._head = PackedLinear(model.module.lm_head.weight, None, packed=packed)
        self.extra_bytes = model.weight_bytes if packed else 0
        # Single queries take the CPU's attention kernel longer in bfloat16 than in float32,
        # by more than the doubled cache costs (docs/log.md).
        self.cache_dtype = torch.float32 if model.device.type == "cpu" else model.dtype

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        x = embedding(ids, self._tokens) + embedding(layout.positions, self._positions)
        for layer, block in zip(layout.cache.blocks, self._blocks, strict=True):
            qkv = block.qkv(block.norm_1(x)).view(len(x), 3, self._heads, -1)
            qkv = qkv.to(self.cache_dtype)
            seen = attend(layer, qkv[:, 0], qkv[:, 1:], layout).reshape(x.shape).to(x.dtype)
            x = block.attention_out.plus(seen, x)
            x = block.mlp_out.plus(block.mlp_in.gelu(block.norm_2(x)), x)
        if keep is not None:
            x = x[keep]
        return self._head(self._norm(x))


def _norm(module: torch.nn.LayerNorm) -> _Norm:
    return _Norm(module.weight, module.bias, module.eps)


def _conv1d(module: torch.nn.Module, packed: bool) -> PackedLinear:
    """transformers' Conv1D holds its weight as ``[inputs, outputs]``."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    return PackedLinear(weight.t(), bias, packed=packed)


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


def make_forward(model: LoadedModel, *, packed: bool = True) -> Forward:
    """The leanest forward pass that is right for the model."""
    if is_plain_gpt2(model.module.config):
        return GPT2Forward(model, packed=packed)
    return TransformersForward(model)
