"""oneDNN's products on weights that are laid out once in the order in which they are read.

With the few rows of a decode step a product is bound by reading its weights, and a plain
``F.linear`` reorders them at each call. The operators are those that torch's own inductor emits
for CPU inference; their names begin with an underscore, so all that batchbench knows of them is in
this file, they are tried once and checked, and where they are missing ``F.linear`` takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import gelu, linear


class OneDNN(NamedTuple):
    """The operators."""

    reorder: Callable[..., torch.Tensor]
    product: Callable[..., torch.Tensor]
    product_and_sum: Callable[..., torch.Tensor]


@cache
def onednn(dtype: torch.dtype) -> OneDNN | None:
    """The operators, if this build of torch has them and they compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16) or not _has_onednn():
        return None
    try:
        names = torch.ops.mkldnn
        if dtype is torch.bfloat16 and not names._is_mkldnn_bf16_supported():
            return None
        ops = OneDNN(
            names._reorder_linear_weight.default,
            names._linear_pointwise.default,
            names._linear_pointwise.binary,
        )
        return ops if _right(ops, dtype) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.no_grad()
def _right(ops: OneDNN, dtype: torch.dtype) -> bool:
    """Whether all three agree with plain arithmetic on a small product."""
    numbers = torch.Generator().manual_seed(0)
    shapes = ((48, 32), (48,), (3, 32), (3, 48))
    w, b, x, y = (torch.randn(*shape, generator=numbers).to(dtype) for shape in shapes)
    packed = ops.reorder(w, None)
    plain = linear(x.float(), w.float(), b.float())
    pairs = (
        (ops.product(x, packed, b, "none", [], ""), plain),
        (ops.product(x, packed, b, "gelu", [], "tanh"), gelu(plain, approximate="tanh")),
        (ops.product_and_sum(x, y, packed, b, "add"), plain + y.float()),
    )
    within = 1e-4 if dtype is torch.float32 else 0.15
    return all(
        got.dtype is dtype and torch.allclose(got.float(), want, atol=within, rtol=0)
        for got, want in pairs
    )
