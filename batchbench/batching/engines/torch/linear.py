"""Linear layers: three ways to compute one product, and the choice for a machine."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import gelu, linear

from batchbench.batching.engines.torch.kernels import Native, native


class OneDNN(NamedTuple):
    """oneDNN's operators in torch."""

    reorder: Callable[..., torch.Tensor]
    product: Callable[..., torch.Tensor]
    product_and_sum: Callable[..., torch.Tensor]


@cache
def onednn(dtype: torch.dtype) -> OneDNN | None:
    """Return the operators if this build of torch has them and their results are right."""
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
    """Return True if all three agree with plain arithmetic on a small product."""
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


class Kernels(IntEnum):
    """The kernels that a forward pass may use; each may fall back on those before it."""

    PLAIN = 0
    """torch's, on the weights as they are."""
    PACKED = 1
    """oneDNN's, on weights packed for it."""
    OWN = 2
    """batchbench's, compiled on this machine, on weights packed for them."""


class Linear(Protocol):
    """``x @ weight.T + bias``, fused with the next operation of GPT-2 where a kernel does that."""

    @property
    def extra_bytes(self) -> int:
        """Bytes held in addition to the weight."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product: ``[rows, inputs]`` to ``[rows, outputs]``."""

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Return GPT-2's GELU (its tanh form) of the product."""

    def plus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the product plus ``y``, ``[rows, outputs]``."""


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, most: Kernels = Kernels.OWN
) -> Linear:
    """Return the fastest layer for this weight, on its device and in its number format.

    Args:
        weight: ``[outputs, inputs]``; any strides.
        bias: ``[outputs]``, or None.
        most: the best kernels that may be used.
    """
    if weight.device.type == "cpu":
        own = native() if most >= Kernels.OWN else None
        if own is not None and own.multiplies(weight):
            return OwnLinear(own, weight, bias)
        ops = onednn(weight.dtype) if most >= Kernels.PACKED else None
        if ops is not None:
            return PackedLinear(ops, weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear:
    """torch's product, on the weight as it is."""

    extra_bytes = 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weight, self._bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(self(x), approximate="tanh")

    def plus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self(x)


class PackedLinear:
    """oneDNN's product, on the weight packed for it."""

    def __init__(self, ops: OneDNN, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._ops, self._bias = ops, bias
        # Packed for no particular number of rows: packed for one, it would be slow for eight.
        self._weight = ops.reorder(weight.contiguous(), None)
        self.extra_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.product(x, self._weight, self._bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.product(x, self._weight, self._bias, "gelu", [], "tanh")

    def plus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._ops.product_and_sum(x, y, self._weight, self._bias, "add")


class OwnLinear:
    """batchbench's product, on the weight packed in panels."""

    def __init__(self, own: Native, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = own.pack(weight)
        self._product = partial(own.product, packed=self._weight, outputs=len(weight), bias=bias)
        self.extra_bytes = self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, through_gelu=True)

    def plus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._product(x, add=y)
