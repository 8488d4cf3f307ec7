"""How fast this machine reads memory, measured on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from batchbench.batching.engines.torch.attention import Layout, kv_token_bytes
from batchbench.batching.engines.torch.forward import Forward, TransformersForward
from batchbench.batching.engines.torch.linear import Linear, make_linear
from batchbench.batching.machine import last_level_cache_bytes
from batchbench.batching.models.loading import LoadedModel, free_bytes
from batchbench.batching.step_cost import TIMES_THE_CACHE, Bandwidth, Reading

Work = Callable[[], object]

_SETTLING = 2
"""Turns that do not count: the first touches memory and makes kernels ready."""


def median_s(work: Work, device: torch.device, turns: int) -> float:
    """Seconds that ``work`` takes: the median of several turns."""
    once = _by_events if device.type == "cuda" else _by_the_host
    return statistics.median([once(work, device) for _ in range(_SETTLING + turns)][_SETTLING:])


def _by_the_host(work: Work, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


def _by_events(work: Work, device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in "be")  # type: ignore[no-untyped-call]
    begins.record(stream)
    work()
    ends.record(stream)
    ends.synchronize()
    return float(begins.elapsed_time(ends)) / 1e3


_LEAST_BYTES = 2**28  # also where the cache is small or its size is not told

_SHARE_OF_MEMORY = 0.5  # of what is free: no measurement is worth swapping for

_WIDTH = 1024


@torch.inference_mode()
def measure_bandwidth(device: torch.device, *, turns: int = 7) -> Bandwidth:
    """Read a buffer that no cache holds, with all threads, in several ways.

    Each way's figure is the median of its turns, and the fastest way's is taken: a slow one tells
    of its own arithmetic and not of the memory.
    """
    cache = cache_bytes(device)
    rows = max(1, -(-buffer_bytes(device) // (4 * _WIDTH)))
    buffer = torch.ones(rows, _WIDTH, device=device)
    vector, flat = torch.ones(_WIDTH, device=device), buffer.view(-1)
    ways: dict[str, Work] = {
        "sum": buffer.sum,
        "matrix × vector": lambda: buffer.mv(vector),
        "dot product with itself": lambda: flat.dot(flat),
    }
    size = buffer.numel() * buffer.element_size()
    speeds = {name: size / median_s(way, device, turns) for name, way in ways.items()}
    best = max(speeds, key=lambda name: speeds[name])
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return Bandwidth(speeds[best], best, size, cache, turns, threads)


def buffer_bytes(device: torch.device) -> int:
    """Return the size of the buffer that is read."""
    wanted = max(TIMES_THE_CACHE * (cache_bytes(device) or 0), _LEAST_BYTES)
    return min(wanted, int(free_bytes(device) * _SHARE_OF_MEMORY))


def cache_bytes(device: torch.device) -> int | None:
    """Of the last level; None where the machine does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache_bytes()


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


class ModelClock:
    """Adds up the time within a model's forward pass: ids in, logits out.

    On a device that computes while the host goes on, the host's clock tells only what launching
    takes; there it is of no use.
    """

    def __init__(self) -> None:
        self.ns = 0

    def timed(self, forward: Forward) -> Forward:
        """The same forward pass, timed; one that calls the module is timed there already."""
        return forward if isinstance(forward, TransformersForward) else _Timed(forward, self)

    @contextmanager
    def on(self, module: torch.nn.Module) -> Iterator[ModelClock]:
        """Time every call of the module, from 0, whoever makes it and in whichever thread."""
        self.ns = 0
        began: list[int] = []

        def begins(*_: Any) -> None:
            began.append(time.perf_counter_ns())

        def ends(*_: Any) -> None:
            self.ns += time.perf_counter_ns() - began.pop()

        hooks = (module.register_forward_pre_hook(begins), module.register_forward_hook(ends))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


class _Timed:
    """A forward pass that is not made by calling the module."""

    def __init__(self, forward: Forward, clock: ModelClock) -> None:
        self._forward, self._clock = forward, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        began = time.perf_counter_ns()
        logits = self._forward(ids, layout, keep)
        self._clock.ns += time.perf_counter_ns() - began
        return logits
