"""Forward passes over the slot cache: a lean one of described models, and one for any causal LM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from batchbench.batching.engines.torch.architecture import (
    Architecture,
    Norm,
    Weights,
    rotate,
    weights_of,
)
from batchbench.batching.engines.torch.attention import (
    NAME,
    Layout,
    SlotLayer,
    attend,
    attend_prompts,
    cache_argument,
)
from batchbench.batching.engines.torch.kernels import Native, native
from batchbench.batching.engines.torch.linear import Kernels, Linear, make_linear
from batchbench.batching.engines.torch.sampling import Choose, choose
from batchbench.batching.engines.torch.triton.choice import triton_forward, triton_ops
from batchbench.batching.models.loading import LoadedModel


class Forward(Protocol):
    """The model's forward pass over tokens that lie end to end."""

    cache_dtype: torch.dtype  # of cached keys and values
    extra_bytes: int  # held in addition to the model's own weights
    triton: bool  # attention is computed with Triton, so the engine prepares no masks
    choose: Choose  # the choice of the next tokens

    def __call__(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """Return logits ``[kept, vocabulary]`` of ``ids``, ``[tokens]``; of all if None is kept."""


class TransformersForward:
    """Any causal LM of transformers; ``why`` is the reason why it has no leaner pass, if known."""

    extra_bytes = 0

    def __init__(
        self, model: LoadedModel, most: Kernels = Kernels.PLAIN, why: str | None = None
    ) -> None:
        self.why = why
        ops = triton_ops(model) if most >= Kernels.OWN else None
        self.triton = ops is not None
        self.choose: Choose = choose if ops is None else ops.best_token
        self._module = model.module
        self._cache_argument = cache_argument(model.module)
        self.cache_dtype = model.dtype

    def __call__(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        if self._module.config._attn_implementation != NAME:
            self._module.set_attn_implementation(NAME)
        logits: Tensor = self._module(
            input_ids=ids.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            use_cache=True,
            logits_to_keep=0 if keep is None else keep,
            layout=layout,
            **{self._cache_argument: layout.cache},
        ).logits[0]
        return logits


class _Block(NamedTuple):
    norm_1: Norm
    qkv: Linear
    head_norms: Sequence[Norm]
    attention_out: Linear
    norm_2: Norm
    mlp_in: Linear
    mlp_out: Linear


class LeanForward:
    """Any described model, with only the necessary operations between its products.

    On a CPU the weights are packed for the kernels, which takes as much memory again: the plain
    ones stay for the reference that verifies outputs.
    """

    triton = False
    choose: Choose = staticmethod(choose)

    def __init__(self, model: LoadedModel, weights: Weights, most: Kernels = Kernels.OWN) -> None:
        self._weights, of = weights, weights.of
        self._kernels = _attention_kernels(of, model.device, model.dtype, most)
        self._blocks = [
            _Block(
                layer.norm_1,
                make_linear(*layer.qkv, most),
                layer.head_norms,
                make_linear(*layer.attention_out, most),
                layer.norm_2,
                make_linear(*layer.mlp_in, most, gated=of.gated),
                make_linear(*layer.mlp_out, most),
            )
            for layer in weights.layers
        ]
        self._table = self._make_table()
        self._head = make_linear(weights.head, None, most)
        products = (part for b in [*self._blocks, (self._head,)] for part in b)
        self.extra_bytes = sum(p.extra_bytes for p in products if isinstance(p, Linear))
        self.cache_dtype = cache_dtype(of, model.device, model.dtype, most)

    def __call__(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        weights, angles = self._weights, None
        x = embedding(ids, weights.tokens)
        if weights.positions is not None:
            x = x + embedding(layout.positions, weights.positions)
        if weights.rotary is not None:
            angles = weights.rotary.angles(layout.positions, x.dtype)
        if self._table is not None and self._kernels is not None and layout.decoding == len(x):
            blocks = [cached.block for cached in layout.cache.blocks]
            places = (layout.slots, layout.positions)
            self._kernels.decode(self._table, weights.of, x, blocks, *places, angles)
        else:
            x = self._compute_layers(x, layout, angles)
        if keep is not None:
            x = x[keep]
        return self._head(weights.norm(x))

    def _compute_layers(self, x: Tensor, layout: Layout, angles: Tensor | None) -> Tensor:
        tokens, of = len(x), self._weights.of
        for cached, block in zip(layout.cache.blocks, self._blocks, strict=True):
            qkv = block.qkv(block.norm_1(x)).view(tokens, -1, of.head_dim)
            seen = self._attend(cached, qkv, block.head_norms, layout, angles)
            x = block.attention_out.plus(seen.reshape(tokens, -1).to(x.dtype), x)
            x = block.mlp_out.plus(block.mlp_in.activated(block.norm_2(x)), x)
        return x

    def _make_table(self) -> Tensor | None:
        """Return the addresses for :meth:`Native.decode`, if all weights are packed for it."""
        rows = []
        for b in self._blocks:
            qkv, out, *mlp = [m.packed for m in (b.qkv, b.attention_out, b.mlp_in, b.mlp_out)]
            if self._kernels is None or () in (qkv, out, *mlp):
                return None
            norms = (norm.weight for norm in b.head_norms) if b.head_norms else (None, None)
            tensors = [*b.norm_1[:2], *qkv, *norms, *out, *b.norm_2[:2], *mlp[0], *mlp[1], None]
            rows.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        return torch.tensor(rows)

    def _attend(
        self,
        cached: SlotLayer,
        qkv: Tensor,
        norms: Sequence[Norm],
        layout: Layout,
        angles: Tensor | None,
    ) -> Tensor:
        """Attend in one layer with ``qkv``, ``[tokens, heads + 2 × kv_heads, head_dim]``."""
        heads, kv_heads = self._weights.of.heads, self._weights.of.kv_heads
        out = None
        if self._kernels is not None:
            plain = [norm.weight for norm in norms]
            places = (cached.block, layout.slots, layout.positions, layout.decoding)
            out = self._kernels.attention(qkv, *places, angles, plain, self._weights.of.eps)
        elif angles is not None:
            qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
            if norms:
                both = torch.split(qk, [heads, kv_heads], 1)
                qk = torch.cat([norm(x) for norm, x in zip(norms, both, strict=True)], 1)
            qkv = torch.cat([rotate(qk, angles), v], 1)
        qkv = qkv.to(self.cache_dtype)
        q, kv = qkv[:, :heads], qkv[:, heads:].view(len(qkv), 2, kv_heads, -1)
        if out is None:
            return attend(cached, q, kv, layout)
        attend_prompts(q, kv, cached, layout, out)
        return out


def _attention_kernels(
    of: Architecture, device: torch.device, dtype: torch.dtype, most: Kernels
) -> Native | None:
    kernels = native() if most >= Kernels.OWN and device.type == "cpu" else None
    return kernels if kernels and kernels.attends(of.head_dim, dtype) else None


def cache_dtype(
    of: Architecture, device: torch.device, dtype: torch.dtype, most: Kernels = Kernels.OWN
) -> torch.dtype:
    """Return the number format in which :class:`LeanForward` caches keys and values.

    On a CPU torch's attention kernel is slower for single queries in bfloat16 than in float32, by
    more than the doubled cache costs (docs/log.md).
    """
    if device.type != "cpu" or _attention_kernels(of, device, dtype, most):
        return dtype
    return torch.float32


def make_forward(model: LoadedModel, most: Kernels = Kernels.OWN) -> Forward:
    """Return the leanest forward pass that is right for the model."""
    weights = weights_of(model.module)
    if isinstance(weights, str):
        return TransformersForward(model, most, weights)
    fused = triton_forward(model, weights) if most >= Kernels.OWN else None
    return fused or LeanForward(model, weights, most)
