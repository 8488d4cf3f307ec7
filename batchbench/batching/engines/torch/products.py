"""A decode step's matrix products alone: what is left of it when all else costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from batchbench.batching.engines.torch.cache import kv_token_bytes
from batchbench.batching.engines.torch.linear import Linear, make_linear
from batchbench.batching.engines.torch.stopwatch import Work, median_s
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.roofline import Reading


def reading_of(model: LoadedModel) -> Reading:
    """What a decode step reads."""
    return Reading(
        dtype=model.dtype_name,
        weight_bytes=model.weight_bytes,
        step_weight_bytes=model.weight_bytes - _looked_up_bytes(model.module),
        kv_token_bytes=kv_token_bytes(model.module.config, model.dtype),
    )


@torch.inference_mode()
def measure_products(model: LoadedModel, rows: int, *, turns: int = 15) -> float:
    """Seconds that the matrix products of a decode step of ``rows`` requests take alone."""
    return median_s(products(model, rows), model.device, turns)


def products(
    model: LoadedModel,
    rows: int,
    make: Callable[[torch.Tensor, torch.Tensor | None], Linear] = make_linear,
) -> Work:
    """All matrix products of one decode step and nothing else, weights laid out as served.

    Args:
        make: a linear layer from its weight, ``[outputs, inputs]``, and its bias, ``[outputs]``.
    """
    layers: list[tuple[Linear, torch.Tensor]] = []
    inputs: dict[int, torch.Tensor] = {}
    numbers = torch.Generator().manual_seed(0)
    for module in model.module.modules():
        if isinstance(module, Conv1D):  # transformers' holds its weight as [inputs, outputs]
            weight = module.weight.t()
        elif isinstance(module, nn.Linear):
            weight = module.weight
        else:
            continue
        width = weight.shape[1]
        if width not in inputs:
            drawn = torch.randn(rows, width, generator=numbers)
            inputs[width] = drawn.to(device=model.device, dtype=model.dtype)
        layers.append((make(weight, module.bias), inputs[width]))

    def once() -> None:
        for layer, x in layers:
            layer(x)

    return once


def _looked_up_bytes(module: nn.Module) -> int:
    """Bytes of embeddings of which a step reads a row a request: those tied to no product."""
    multiplied = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    tables = {
        id(m.weight): m.weight.numel() * m.weight.element_size()
        for m in module.modules()
        if isinstance(m, nn.Embedding) and id(m.weight) not in multiplied
    }
    return sum(tables.values())
