"""GPT-2's forward pass on a GPU with Triton: seven launches in a layer, four around the layers.

A layer computes norm 1 and the products of queries, keys and values; attention; its product; sum,
bias and norm 2; the first product of the MLP with its GELU; the second; and sum, bias and the norm
that follows. Outside the layers are the embeddings, the product with the vocabulary, and two
launches that choose a token.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import gelu

from batchbench.batching.engines.torch.attention import Layout, attend_on_device
from batchbench.batching.engines.torch.linear import padded_bytes, padded_rows
from batchbench.batching.engines.torch.triton import ops
from batchbench.batching.engines.torch.triton.ops import Norm
from batchbench.batching.models.loading import LoadedModel


class _Conv1D(NamedTuple):
    weight: torch.Tensor  # [inputs, outputs]
    bias: torch.Tensor

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Conv1D:
        assert isinstance(module.weight, torch.Tensor)
        assert isinstance(module.bias, torch.Tensor)
        return cls(module.weight, module.bias)


class _Block(NamedTuple):
    qkv: _Conv1D
    attention_out: _Conv1D
    norm_2: Norm
    mlp_in: _Conv1D
    mlp_out: _Conv1D
    norm_after: Norm  # the next layer's first norm, or the last of all


class TritonGPT2Forward:
    """GPT-2 with norms, attention and the choice of a token in Triton, products in cuBLAS."""

    triton = True
    choose = staticmethod(ops.best_token)

    def __init__(self, model: LoadedModel) -> None:
        config, body = model.module.config, model.module.transformer
        self.cache_dtype = model.dtype
        self._heads = config.n_head
        self._tokens, self._positions = body.wte.weight, body.wpe.weight
        norms = [_norm(layer.ln_1) for layer in body.h] + [_norm(body.ln_f)]
        self._norm_1 = norms[0]
        self._blocks = [
            _Block(
                _Conv1D.of(layer.attn.c_attn),
                _Conv1D.of(layer.attn.c_proj),
                _norm(layer.ln_2),
                _Conv1D.of(layer.mlp.c_fc),
                _Conv1D.of(layer.mlp.c_proj),
                norm_after,
            )
            for layer, norm_after in zip(body.h, norms[1:], strict=True)
        ]
        self._fused_gelu = product_has_gelu(model.device, model.dtype)
        head = model.module.lm_head.weight
        self._vocabulary = len(head)
        self._head = head
        self.extra_bytes = padded_bytes(len(head), head.shape[1], head.dtype)
        if self.extra_bytes:
            self._head = head.new_zeros(padded_rows(self._vocabulary), head.shape[1])
            self._head[: self._vocabulary] = head

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        x, normed = ops.embed_norm(
            ids, layout.positions, self._tokens, self._positions, self._norm_1
        )
        for cached, block in zip(layout.cache.blocks, self._blocks, strict=True):
            qkv = torch.addmm(block.qkv.bias, normed, block.qkv.weight)
            q, k, v = qkv.view(len(x), 3, self._heads, -1).unbind(1)
            seen = attend_on_device(cached, q, k, v, layout)
            out = torch.mm(seen.view(x.shape), block.attention_out.weight)
            normed = ops.add_norm(x, out, block.attention_out.bias, block.norm_2)
            out = torch.mm(self._activated(normed, block.mlp_in), block.mlp_out.weight)
            rows = keep if block is self._blocks[-1] else None
            normed = ops.add_norm(x, out, block.mlp_out.bias, block.norm_after, rows)
        return torch.mm(normed, self._head.t())[:, : self._vocabulary]

    def _activated(self, x: torch.Tensor, layer: _Conv1D) -> torch.Tensor:
        if self._fused_gelu:
            return torch._addmm_activation(layer.bias, x, layer.weight, use_gelu=True)
        return gelu(torch.addmm(layer.bias, x, layer.weight), approximate="tanh")


def _norm(module: torch.nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


@cache
def product_has_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if torch's product with GELU applies GPT-2's GELU, the tanh form.

    cublasLt's does. Torch's for the CPU applies the exact form, which differs by up to 0.0005.
    """
    x = torch.linspace(-4, 4, 512, device=device).to(dtype).reshape(-1, 8)
    one, none = torch.eye(8, device=device, dtype=dtype), x.new_zeros(8)
    try:
        got = torch._addmm_activation(none, x, one, use_gelu=True).double()
    except (AttributeError, RuntimeError, TypeError):  # a private operator
        return False
    tanh, exact = (gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    return bool((got - tanh).abs().mean() < (got - exact).abs().mean())
