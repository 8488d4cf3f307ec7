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
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from batchbench.batching.engines.torch.attention import kv_shape
from batchbench.batching.models.loading import LoadedModel

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.triton.forward import TritonGPT2Forward
    from batchbench.batching.engines.torch.triton.ops import SlotAttention

_LEAST_CAPABILITY = (8, 0)
"""Ampere, the first with bfloat16."""

_KEYS = 300
"""Positions of the cache that the check fills: more than one program reads."""


def triton_ops(model: LoadedModel) -> ModuleType | None:
    """Return ``triton.ops`` if its kernels are right for this model; None if not."""
    return _ops() if why_no_triton(model) is None else None


def triton_forward(model: LoadedModel) -> TritonGPT2Forward | None:
    """Return GPT-2's forward pass with Triton's kernels, if they compute this model."""
    if triton_ops(model) is None:
        return None
    from batchbench.batching.engines.torch.triton.forward import TritonGPT2Forward

    return TritonGPT2Forward(model)


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
    heads, width = config.num_attention_heads, config.hidden_size
    return _fault(model.device, model.dtype, heads, kv_heads, size, width)


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
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, width: int
) -> str | None:
    """Compare each kernel with torch for a model's shape; return what is wrong, or None."""
    try:
        ops = _ops()
        with warnings.catch_warnings(), torch.inference_mode(), torch.cuda.device(device):
            warnings.simplefilter("ignore")  # Triton warns of its own defaults
            seen, expected = _attend_twice(ops, device, dtype, heads, kv_heads, size)
            within = 1e-4 if dtype is torch.float32 else 0.05
            if not torch.allclose(seen, expected, atol=within, rtol=within):
                return "Triton's attention differs from torch's"
            logits = expected.flatten(1)
            if not torch.equal(ops.best_token(logits), logits.max(-1).indices):
                return "Triton chooses other tokens than torch"
            seen, expected = _norm_twice(ops, device, dtype, width)
            if not torch.allclose(seen, expected, atol=2 * within, rtol=2 * within):
                return "Triton's norms differ from torch's"
    except Exception as error:  # from Triton, its compiler or the driver
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


def _attend_twice(
    ops: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of both kernels for one token, ``[2, heads × size]``, and torch's."""
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(device, dtype)

    block, q = normal(2, 1, kv_heads, _KEYS, size), normal(1, heads, size)
    k, v = normal(2, 1, kv_heads, size).unbind(0)
    at = _KEYS - 1
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    tiles = torch.tensor([[0, 1, 0, 0, at]], device=device)
    attention = ops.SlotAttention(device, heads, _KEYS, 1, size)
    seen = [
        attention.decode(q, k, v, block, slots, slots + at),
        attention.tiled(q, k, v, block, tiles, 16),
    ]
    keys, values = (
        torch.cat([cached[0, :, :at], own.transpose(0, 1)], 1).float()
        for cached, own in zip(block, (k, v), strict=True)
    )
    expected = scaled_dot_product_attention(
        q.transpose(0, 1)[None].float(), keys[None], values[None], enable_gqa=heads != kv_heads
    )
    return torch.cat(seen).float().flatten(1), expected.reshape(1, -1).expand(2, -1)


def _norm_twice(
    ops: ModuleType, device: torch.device, dtype: torch.dtype, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of both kernels that end in a norm, ``[2, width]``, and torch's."""
    numbers = torch.Generator().manual_seed(0)
    made = torch.randn(5, 1, width, generator=numbers).to(device, dtype)
    weight, bias, added = made[:3, 0]
    norm = ops.Norm(weight, bias, 1e-5)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    x, first = ops.embed_norm(zero, zero, made[3], made[4], norm)
    seen = torch.cat([first, ops.add_norm(x, made[4], added, norm)]).float()
    tokens, places, more = made[3].float(), made[4].float(), added.float()
    sums = torch.cat([tokens + places, tokens + 2 * places + more])
    return seen, layer_norm(sums, (width,), weight.float(), bias.float(), 1e-5)
