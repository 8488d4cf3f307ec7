"""The choice of Triton's kernels: only where they compile and compute what torch computes.

Triton comes with torch for CUDA. Where it is missing, cannot compile (it needs a C compiler) or
gives other results than torch, batchbench uses torch's own operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from batchbench.batching.engines.torch.architecture import (
    Architecture,
    Norm,
    Rotary,
    Rotation,
    Weights,
    architecture_of,
    rotate,
)
from batchbench.batching.engines.torch.attention import kv_shape
from batchbench.batching.models.loading import LoadedModel

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.triton.forward import TritonForward
    from batchbench.batching.engines.torch.triton.ops import SlotAttention

_LEAST_CAPABILITY = (8, 0)  # Ampere, the first with bfloat16
_KEYS = 300  # positions of the cache that the check fills: more than one program reads


def triton_ops(model: LoadedModel) -> ModuleType | None:
    """Return ``triton.ops`` if its kernels are right for this model; None if not."""
    if why_no_triton(model) is not None:
        return None
    from batchbench.batching.engines.torch.triton import ops

    return ops


def triton_forward(model: LoadedModel, weights: Weights) -> TritonForward | None:
    """Return a described model's forward pass with Triton's kernels, if they compute it."""
    if why_no_triton(model) is not None:
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
    of = architecture_of(model.module.config)
    return _fault(model.device, model.dtype, (config.num_attention_heads, kv_heads, size), of)


def supports_triton(device: torch.device) -> bool:
    """Return True if Triton is installed and has code for this device."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def _fault(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], of: Architecture | None
) -> str | None:
    """Compare each kernel with torch for a model's shape; return what is wrong, or None.

    ``shape`` is heads, key-value heads and head size; ``of`` is the model's architecture, None for
    transformers' modules with Triton's attention.
    """
    try:
        with warnings.catch_warnings(), torch.inference_mode(), torch.cuda.device(device):
            warnings.simplefilter("ignore")  # Triton warns of its own defaults
            for what, seen, expected, within in _compared(device, dtype, shape, of):
                if not torch.allclose(seen.float(), expected.float(), atol=within, rtol=within):
                    return f"{what} of Triton and of torch differ"
    except Exception as error:  # from Triton, its compiler or the driver
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


def _compared(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], of: Architecture | None
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield the name of a result, Triton's and torch's from small inputs, and their tolerance."""
    from batchbench.batching.engines.torch.triton import ops

    numbers = torch.Generator().manual_seed(0)
    within = 1e-4 if dtype is torch.float32 else 0.05

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers).to(device, dtype)

    rotation = None
    if of is not None and of.rotary:
        inverse = 10_000.0 ** -torch.linspace(0, 1, of.head_dim // 2, device=device)
        head_norms = [Norm(normal(of.head_dim), None, 1e-5) for _ in range(2 * of.head_norms)]
        rotation = Rotation(Rotary(inverse, 1.0), head_norms)
    heads, kv_heads, size = shape
    block, q = normal(2, 1, kv_heads, _KEYS, size), normal(1, heads, size)
    k, v = normal(2, 1, kv_heads, size).unbind(0)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    last = zero + (_KEYS - 1)
    attention = ops.SlotAttention(device, heads, _KEYS, 1, size)
    tiles = torch.stack([zero, zero + 1, zero, zero, last], 1)
    expected = _attended(q, k, v, block, last, rotation)
    for seen in (
        attention.decode(q, k, v, block, zero, last, rotation=rotation),
        attention.tiled(q, k, v, block, tiles, 16, rotation=rotation),
    ):
        yield "attention", seen, expected, within
    logits = seen.flatten(1)
    yield "tokens", ops.best_token(logits), logits.max(-1).indices, 0.0
    if of is None:
        return
    weight, bias, added = normal(3, of.width)
    tokens, places, y = normal(3, 1, of.width)
    norm = Norm(weight, None if of.rotary else bias, 1e-5)
    exact = Norm(weight.float(), None if of.rotary else bias.float(), 1e-5)
    x, seen = ops.embed_norm(zero, zero, tokens, None if of.rotary else places, norm)
    total = tokens.float() + (0 if of.rotary else places.float())
    yield "norms", seen, exact(total), 2 * within
    for plus, rows in [(added, None)] + [(None, None), (None, zero)] * of.rotary:
        seen = ops.add_norm(x, y, plus, norm, rows)
        total = total + y.float() + (0 if plus is None else plus.float())
        yield "norms", seen, exact(total), 2 * within
    if of.gated:
        product = normal(1, 2 * of.inner)
        gate, up = product.float().chunk(2, -1)
        yield "SwiGLU", ops.swiglu(product), silu(gate) * up, within


def _attended(
    q: Tensor, k: Tensor, v: Tensor, block: Tensor, last: Tensor, rotation: Rotation | None
) -> Tensor:
    """Return the attention of a token at the ``last`` position of a slot, in torch."""
    turned = [q.float(), k.float()]
    if rotation is not None:
        for i, norm in enumerate(rotation.norms):
            turned[i] = norm(turned[i])
        angles = rotation.rotary.angles(last, q.dtype).float()
        turned = [rotate(x, angles) for x in turned]
    keys, values = (
        torch.cat([cached[0, :, : _KEYS - 1].float(), own.float().transpose(0, 1)], 1)
        for cached, own in zip(block, (turned[1], v), strict=True)
    )
    grouped = q.shape[1] != k.shape[1]
    queries = turned[0].transpose(0, 1)[None]
    seen = scaled_dot_product_attention(queries, keys[None], values[None], enable_gqa=grouped)
    return seen[0].transpose(0, 1)
