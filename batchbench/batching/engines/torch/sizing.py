"""How large a model and its cache would be, and how long its matrix products take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchbench.batching.engines.torch.cache import kv_token_bytes
from batchbench.batching.engines.torch.forward import cache_dtype, is_plain_gpt2
from batchbench.batching.engines.torch.linear import Kernels, make_linear
from batchbench.batching.engines.torch.stopwatch import median_s
from batchbench.batching.experiment import Experiment
from batchbench.batching.models.loading import (
    count_parameters,
    model_config,
    resolve_device,
    resolve_dtype,
    set_threads,
)
from batchbench.batching.models.source import Source


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights and cache, and seconds that a step's matrix products take."""

    device: str
    weight_bytes: int
    kv_cache_bytes: int
    step_s: float


def size_up(experiment: Experiment, source: Source, max_len: int) -> Sizes:
    """Sizes from the model's shape; time from one product timed here and now."""
    set_threads(experiment.model)
    device = resolve_device(experiment.model.device)
    dtype = resolve_dtype(experiment.model.dtype, device)
    config, slots = model_config(source), experiment.serving.batch_size
    lean = experiment.serving.engine == "slots" and is_plain_gpt2(config)
    cached = cache_dtype(config, device, dtype) if lean else dtype
    matrix = torch.rand(2**26 // config.hidden_size, config.hidden_size, device=device).to(dtype)
    product = make_linear(matrix, None, Kernels.OWN if lean else Kernels.PLAIN)
    weight_bytes = count_parameters(source) * dtype.itemsize
    x = torch.rand(slots, config.hidden_size, device=device).to(dtype)
    per_byte = median_s(lambda: product(x), device, 7) / (matrix.numel() * dtype.itemsize)
    return Sizes(
        device=str(device),
        weight_bytes=weight_bytes * (2 if product.extra_bytes else 1),
        kv_cache_bytes=slots * max_len * kv_token_bytes(config, cached),
        step_s=weight_bytes * per_byte,
    )
