"""Linear layers: three ways to compute one product, and the choice for a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from batchbench.batching.engines.torch.kernels import Native, Through, native

MULTIPLE = 128  # of columns of the last product on a GPU: rows of 50,257 are not aligned


def padded_rows(vocabulary: int) -> int:
    """Return the rows of the last product's weight on a GPU."""
    return -(-vocabulary // MULTIPLE) * MULTIPLE


def padded_bytes(vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of the padded copy of that weight; 0 if none is needed."""
    rows = padded_rows(vocabulary)
    return rows * width * dtype.itemsize if rows > vocabulary else 0


class OneDNN(NamedTuple):
    """oneDNN's operators in torch."""

    reorder: Callable[..., Tensor]
    product: Callable[..., Tensor]
    product_and_sum: Callable[..., Tensor]


@cache
def onednn(dtype: torch.dtype) -> OneDNN | None:
    """Return the operators if this build of torch has them and their results are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not _has_onednn():
        return None
    try:
        names = torch.ops.mkldnn
        if dtype is torch.bfloat16 and not names._is_mkldnn_bf16_supported():
            return None
        product = names._linear_pointwise
        ops = OneDNN(names._reorder_linear_weight.default, product.default, product.binary)
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
    within = 1e-4 if dtype is torch.float32 else 0.15
    return all(
        got.dtype is dtype and torch.allclose(got.float(), want, atol=within, rtol=0)
        for got, want in (
            (ops.product(x, packed, b, "none", [], ""), plain),
            (ops.product(x, packed, b, "gelu", [], "tanh"), gelu(plain, approximate="tanh")),
            (ops.product_and_sum(x, y, packed, b, "add"), plain + y.float()),
        )
    )


class Kernels(IntEnum):
    """The kernels that a forward pass may use; each may fall back on those before it."""

    PLAIN = 0  # torch's, on the weights as they are
    PACKED = 1  # oneDNN's, on weights packed for it
    OWN = 2  # batchbench's, compiled on this machine, on weights packed for them


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``, fused with the next operation where a kernel does that.

    ``product`` takes ``[rows, inputs]`` to ``[rows, outputs]``; ``activated`` applies GPT-2's GELU
    (its tanh form) to the product, or SwiGLU in a gated layer, which has no other function;
    ``plus`` adds its second argument, ``[rows, outputs]``. ``extra_bytes`` are held in addition to
    the weight; own kernels have it ``packed``, with the bias as they read it.
    """

    kernels: Kernels
    product: Callable[[Tensor], Tensor]
    activated: Callable[[Tensor], Tensor]
    plus: Callable[[Tensor, Tensor], Tensor]
    extra_bytes: int = 0
    packed: Sequence[Tensor | None] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


def make_linear(
    weight: Tensor, bias: Tensor | None, most: Kernels = Kernels.OWN, *, gated: bool = False
) -> Linear:
    """Return the fastest layer for this weight, ``[outputs, inputs]`` with any strides.

    ``most`` are the best kernels that may be used. In a ``gated`` layer the gate's outputs lead.
    """
    on_cpu = weight.device.type == "cpu"
    own = native() if on_cpu and most >= Kernels.OWN else None
    if own is not None and own.multiplies(weight):
        return _own_layer(own, weight, bias, gated=gated)
    ops = onednn(weight.dtype) if on_cpu and most >= Kernels.PACKED else None
    if ops is not None:
        # Packed without a number of rows: weights packed for one row are slow for eight.
        packed = ops.reorder(weight.contiguous(), None)

        def product(x: Tensor, function: str = "none", form: str = "") -> Tensor:
            return ops.product(x, packed, bias, function, [], form)

        return Linear(
            Kernels.PACKED,
            product,
            lambda x: swiglu(product(x)) if gated else product(x, "gelu", "tanh"),
            lambda x, y: ops.product_and_sum(x, y, packed, bias, "add"),
            weight.nbytes,
        )
    plain = partial(linear, weight=weight, bias=bias)
    activation = swiglu if gated else partial(gelu, approximate="tanh")
    return Linear(Kernels.PLAIN, plain, lambda x: activation(plain(x)), lambda x, y: y + plain(x))


def _own_layer(own: Native, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Linear:
    outputs, through = len(weight), Through.GELU
    if gated:
        outputs, through = outputs // 2, Through.SWIGLU
        weight = own.side_by_side(weight)
        bias = None if bias is None else own.side_by_side(bias)
    packed = own.pack(weight)
    product = partial(own.product, packed=packed, outputs=outputs, bias=bias)
    return Linear(
        Kernels.OWN,
        product,
        partial(product, through=through),
        lambda x, y: product(x, add=y),
        packed.nbytes,
        (packed, bias),
    )


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) × up of ``[rows, 2 × outputs]``, in which the gate's outputs come first."""
    gate, up = x.chunk(2, -1)
    return silu(gate) * up
