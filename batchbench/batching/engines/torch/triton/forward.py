"""The forward pass of described models on a GPU with Triton: seven or eight launches in a layer.

A layer computes the products of queries, keys and values; attention; its product; sum, bias and
norm 2; the first product of the MLP; its activation, which for GPT-2 is part of the product; the
second; and sum, bias and the norm that follows. Outside the layers are the embeddings with the
first norm, the product with the vocabulary, and two launches that choose a token.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

from batchbench.batching.engines.torch.architecture import Matrix, Rotation, Weights
from batchbench.batching.engines.torch.attention import Layout, attend_on_device
from batchbench.batching.engines.torch.linear import padded_bytes, padded_rows
from batchbench.batching.engines.torch.sampling import Choose
from batchbench.batching.engines.torch.triton import ops


class TritonForward:
    """Norms, attention, SwiGLU and the choice of a token in Triton, products in cuBLAS."""

    triton = True
    choose: Choose = staticmethod(ops.best_token)

    def __init__(self, weights: Weights) -> None:
        self._weights, head = weights, weights.head
        self.cache_dtype = head.dtype
        self._norms = [layer.norm_1 for layer in weights.layers[1:]] + [weights.norm]
        self._fused_gelu = product_has_gelu(head.device, head.dtype)
        self._head = head
        self.extra_bytes = padded_bytes(len(head), head.shape[1], head.dtype)
        if self.extra_bytes:
            self._head = head.new_zeros(padded_rows(len(head)), head.shape[1])
            self._head[: len(head)] = head

    def __call__(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        weights, of = self._weights, self._weights.of
        first, last = weights.layers[0], weights.layers[-1]
        places = (layout.positions, weights.tokens, weights.positions)
        x, normed = ops.embed_norm(ids, *places, first.norm_1)
        parts = [of.heads, of.kv_heads, of.kv_heads]
        layers = zip(layout.cache.blocks, weights.layers, self._norms, strict=True)
        for cached, layer, norm_after in layers:
            heads = _product(normed, layer.qkv).view(len(x), -1, of.head_dim)
            q, k, v = torch.split(heads, parts, 1)
            rotation = weights.rotary and Rotation(weights.rotary, layer.head_norms)
            seen = attend_on_device(cached, q, k, v, layout, rotation=rotation)
            out = torch.mm(seen.flatten(1), layer.attention_out.weight.t())
            normed = ops.add_norm(x, out, layer.attention_out.bias, layer.norm_2)
            out = torch.mm(self._activated(normed, layer.mlp_in), layer.mlp_out.weight.t())
            rows = keep if layer is last else None
            normed = ops.add_norm(x, out, layer.mlp_out.bias, norm_after, rows)
        return torch.mm(normed, self._head.t())[:, : len(weights.head)]

    def _activated(self, x: Tensor, layer: Matrix) -> Tensor:
        if self._weights.of.gated:
            return ops.swiglu(_product(x, layer))
        if self._fused_gelu and layer.bias is not None:
            return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
        return gelu(_product(x, layer), approximate="tanh")


def _product(x: Tensor, layer: Matrix) -> Tensor:
    weight = layer.weight.t()
    return torch.mm(x, weight) if layer.bias is None else torch.addmm(layer.bias, x, weight)


@cache
def product_has_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if torch's product with GELU applies the tanh form, as cublasLt's does."""
    x = torch.linspace(-4, 4, 512, device=device).to(dtype).reshape(-1, 8)
    one, none = torch.eye(8, device=device, dtype=dtype), x.new_zeros(8)
    try:
        got = torch._addmm_activation(none, x, one, use_gelu=True).double()
    except (AttributeError, RuntimeError, TypeError):  # a private operator
        return False
    tanh, exact = (gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    return bool((got - tanh).abs().mean() < (got - exact).abs().mean())
