"""The choice of Triton's kernels: only where they compile and compute what torch computes.

Triton comes with torch for CUDA. Where it is missing, cannot compile (it needs a C compiler) or
gives other results than torch, batchbench uses torch's own operators.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from batchbench.batching.engines.torch.architecture import (
    Architecture,
    Norm,
    Rotary,
    Weights,
    describe,
    rotate,
)
from batchbench.batching.engines.torch.attention import Rotation, kv_shape
from batchbench.batching.models.loading import LoadedModel

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.triton.forward import TritonForward
    from batchbench.batching.engines.torch.triton.ops import SlotAttention

_LEAST_CAPABILITY = (8, 0)
"""Ampere, the first with bfloat16."""

_KEYS = 300
"""Positions of the cache that the check fills: more than one program reads."""


def triton_ops(model: LoadedModel) -> ModuleType | None:
    """Return ``triton.ops`` if its kernels are right for this model; None if not."""
    return _ops() if why_no_triton(model) is None else None


def triton_forward(model: LoadedModel, weights: Weights) -> TritonForward | None:
    """Return a described model's forward pass with Triton's kernels, if they compute it."""
    if triton_ops(model) is None:
        return None
    from batchbench.batching.engines.torch.triton.forward import TritonForward

    return TritonForward(weights)


def triton_attention(model: LoadedModel, slots: int, max_len: int) -> SlotAttention:
    """Return Triton's attention over the slot cache of a model that :func:`triton_ops` takes."""
    from batchbench.batching.engines.torch.triton.ops import SlotAttention

    _, _, size = kv_shape(model.module.config)
    heads = model.module.config.get_text_config().num_attention_heads
    return SlotAttention(model.device, heads, max_len, slots, size)


def why_no_triton(model: LoadedModel) -> str | None:
    """Return the reason why a model does without Triton's kernels; None if it has them."""
    if not supports_triton(model.device):
        return "Triton is not installed or has no code for this device"
    config = model.module.config.get_text_config()
    _, kv_heads, size = kv_shape(config)
    described = describe(model.module.config)
    of = None if isinstance(described, str) else described
    return _fault(model.device, model.dtype, config.num_attention_heads, kv_heads, size, of)


def supports_triton(device: torch.device) -> bool:
    """Return True if Triton is installed and has code for this device."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def _ops() -> ModuleType:
    from batchbench.batching.engines.torch.triton import ops as triton_ops

    return triton_ops


@cache
def _fault(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    of: Architecture | None,
) -> str | None:
    """Compare each kernel with torch for a model's shape; return what is wrong, or None.

    ``of`` is the model's architecture, None for transformers' modules with Triton's attention.
    """
    try:
        ops = _ops()
        check = _Check(ops, device, dtype)
        with warnings.catch_warnings(), torch.inference_mode(), torch.cuda.device(device):
            warnings.simplefilter("ignore")  # Triton warns of its own defaults
            attention = check.attention(heads, kv_heads, size, of)
            if not check.alike(attention):
                return "Triton's attention differs from torch's"
            logits = attention[1].flatten(1)
            if not torch.equal(ops.best_token(logits), logits.max(-1).indices):
                return "Triton chooses other tokens than torch"
            if of is not None and not check.alike(check.norms(of), 2):
                return "Triton's norms differ from torch's"
            if of is not None and of.gated and not check.alike(check.swiglu(of.inner)):
                return "Triton's SwiGLU differs from torch's"
    except Exception as error:  # from Triton, its compiler or the driver
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


Pair = tuple[torch.Tensor, torch.Tensor]
"""Results of Triton's kernels and torch's, in float32."""


class _Check:
    """Small inputs for each kernel, with what Triton and torch compute from them."""

    def __init__(self, ops: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
        self._ops, self._device, self._dtype = ops, device, dtype
        self._numbers = torch.Generator().manual_seed(0)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._numbers).to(self._device, self._dtype)

    def alike(self, pair: Pair, times: int = 1) -> bool:
        within = times * (1e-4 if self._dtype is torch.float32 else 0.05)
        return torch.allclose(*pair, atol=within, rtol=within)

    def attention(self, heads: int, kv_heads: int, size: int, of: Architecture | None) -> Pair:
        """Attend for one token with both kernels, ``[2, heads × size]``."""
        block, q = self._normal(2, 1, kv_heads, _KEYS, size), self._normal(1, heads, size)
        k, v = self._normal(2, 1, kv_heads, size).unbind(0)
        at = _KEYS - 1
        slots = torch.zeros(1, dtype=torch.int64, device=self._device)
        tiles = torch.tensor([[0, 1, 0, 0, at]], device=self._device)
        attention = self._ops.SlotAttention(self._device, heads, _KEYS, 1, size)
        rotation = self._rotation(of) if of is not None and of.rotary else None
        seen = [
            attention.decode(q, k, v, block, slots, slots + at, rotation=rotation),
            attention.tiled(q, k, v, block, tiles, 16, rotation=rotation),
        ]
        turned = [q.float(), k.float()]
        if rotation is not None:
            for i, norm in enumerate(rotation.norms):
                turned[i] = norm(turned[i])
            angles = rotation.rotary.angles(slots + at, self._dtype).float()
            turned = [rotate(x, angles) for x in turned]
        keys, values = (
            torch.cat([cached[0, :, :at].float(), own.float().transpose(0, 1)], 1)
            for cached, own in zip(block, (turned[1], v), strict=True)
        )
        queries = turned[0].transpose(0, 1)
        expected = scaled_dot_product_attention(
            queries[None], keys[None], values[None], enable_gqa=heads != kv_heads
        )
        return torch.cat(seen).float().flatten(1), expected.reshape(1, -1).expand(2, -1)

    def _rotation(self, of: Architecture) -> Rotation:
        inverse = 10_000.0 ** -torch.linspace(0, 1, of.head_dim // 2, device=self._device)
        norms = [Norm(self._normal(of.head_dim), None, 1e-5) for _ in range(2 * of.head_norms)]
        return Rotation(Rotary(inverse, 1.0), norms)

    def norms(self, of: Architecture) -> Pair:
        """Compute each kernel that ends in a norm, ``[results, width]``."""
        weight, bias, added = self._normal(3, of.width)
        tokens, places, y = self._normal(3, 1, of.width)
        norm = Norm(weight, None if of.rotary else bias, 1e-5)
        exact = Norm(weight.float(), None if of.rotary else bias.float(), 1e-5)
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        x, first = self._ops.embed_norm(zero, zero, tokens, None if of.rotary else places, norm)
        seen, sums = [first], [tokens.float() + (0 if of.rotary else places.float())]
        for plus, rows in [(added, None)] + [(None, None), (None, zero)] * of.rotary:
            seen.append(self._ops.add_norm(x, y, plus, norm, rows))
            sums.append(sums[-1] + y.float() + (0 if plus is None else plus.float()))
        return torch.cat(seen).float(), exact(torch.cat(sums))

    def swiglu(self, inner: int) -> Pair:
        product = self._normal(1, 2 * inner)
        gate, up = product.float().chunk(2, -1)
        return self._ops.swiglu(product).float(), silu(gate) * up
