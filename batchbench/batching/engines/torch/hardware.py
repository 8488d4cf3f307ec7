"""Measurements of this machine: memory bandwidth, matrix products, time within the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.pytorch_utils import Conv1D

from batchbench.batching.engines.torch.architecture import Matrix, weights_of
from batchbench.batching.engines.torch.attention import Layout, kv_token_bytes
from batchbench.batching.engines.torch.forward import Forward, TransformersForward
from batchbench.batching.engines.torch.graphs import Capture
from batchbench.batching.engines.torch.kernels import native
from batchbench.batching.engines.torch.linear import Linear, make_linear
from batchbench.batching.machine import gpu_driver, last_level_cache_bytes
from batchbench.batching.models.loading import LoadedModel, free_bytes
from batchbench.batching.step_cost import TIMES_THE_CACHE, Bandwidth, Reading

_WARM_UPS = 2  # turns that do not count: they touch memory and prepare kernels


def median_s(function: Callable[[], object], device: torch.device, turns: int) -> float:
    """Return the median seconds that ``function`` takes over several turns."""
    seconds = [_seconds(function, device) for _ in range(_WARM_UPS + turns)]
    return statistics.median(seconds[_WARM_UPS:])


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        function()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    function()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


GRAPH_RUNS = 10  # in one CUDA graph, whose own start is then a small part of its time


def device_median_s(
    function: Callable[[], object], device: torch.device, turns: int, runs: int = GRAPH_RUNS
) -> float:
    """Return the median seconds of one run of ``function``; on CUDA of its replay in a graph.

    There, kernels of microseconds end faster than the host launches them.
    """
    if device.type != "cuda":
        return median_s(function, device, turns)

    def all_runs() -> None:
        for _ in range(runs):
            function()

    return median_s(Capture(device)(all_runs), device, turns) / runs


_LEAST_BYTES = 2**28  # also for a cache that is small or of unknown size
_LEAST_GPU_BYTES = 2**32  # 256 MiB take 0.09 ms on an H100, as long as a few launches
_SHARE_OF_MEMORY = 0.5  # of the free memory, so that no measurement makes the machine swap


@torch.inference_mode()
def measure_bandwidth(device: torch.device, *, turns: int = 7) -> Bandwidth:
    """Read a buffer that is larger than any cache, with all threads, in several ways.

    The fastest way's median counts: a slower way is limited by its arithmetic, not by memory.
    """
    cached = cache_bytes(device)
    rows = max(1, -(-buffer_bytes(device) // (4 * 1024)))
    buffer = torch.ones(rows, 1024, device=device)
    vector, flat = buffer[0].clone(), buffer.view(-1)
    ways: dict[str, Callable[[], object]] = {
        "sum": buffer.sum,
        "matrix × vector": lambda: buffer.mv(vector),
        "dot product with itself": lambda: flat.dot(flat),
    }
    speeds = {name: buffer.nbytes / median_s(way, device, turns) for name, way in ways.items()}
    best = max(speeds, key=speeds.__getitem__)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return Bandwidth(speeds[best], best, buffer.nbytes, cached, turns, threads)


def buffer_bytes(device: torch.device, free: int | None = None) -> int:
    """Return the size of the buffer to read if ``free`` bytes are free; None for as it is now."""
    least = _LEAST_GPU_BYTES if device.type == "cuda" else _LEAST_BYTES
    wanted = max(TIMES_THE_CACHE * (cache_bytes(device) or 0), least)
    return min(wanted, int((free_bytes(device) if free is None else free) * _SHARE_OF_MEMORY))


def cache_bytes(device: torch.device) -> int | None:
    """Return the bytes of the last-level cache; None if the machine does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache_bytes()


def reading_of(model: LoadedModel) -> Reading:
    """Return the bytes that a decode step reads."""
    modules = list(model.module.modules())
    multiplied = {id(m.weight) for m in modules if isinstance(m, nn.Linear)}
    tables = {id(m.weight): m.weight.nbytes for m in modules if isinstance(m, nn.Embedding)}
    # Of an embedding that is not tied to a product, a step reads one row a request.
    looked_up = sum(size for key, size in tables.items() if key not in multiplied)
    return Reading(
        dtype=model.dtype_name,
        weight_bytes=model.weight_bytes,
        step_weight_bytes=model.weight_bytes - looked_up,
        kv_token_bytes=kv_token_bytes(model.module.config, model.dtype),
    )


@torch.inference_mode()
def measure_products(model: LoadedModel, rows: int, *, turns: int = 15) -> float:
    """Return the seconds of only the matrix products of a decode step of ``rows`` requests."""
    return device_median_s(products(model, rows), model.device, turns)


SMALL, _LARGE = 64, 2048  # widths of a product with almost no work, and of one that fills a GPU


@torch.inference_mode()
def measure_launching(model: LoadedModel, rows: int, *, turns: int = 15) -> float | None:
    """Return the seconds of as many products as a step has, with almost no work; None on a CPU."""
    if model.device.type != "cuda":
        return None
    product, count = _product(model, SMALL, rows), sum(1 for _ in _weights(model))
    return device_median_s(lambda: [product() for _ in range(count)], model.device, turns)


@torch.inference_mode()
def measure_arithmetic(model: LoadedModel, rows: int, *, turns: int = 3) -> float | None:
    """Return the seconds of a step's products at the rate of a large product; None on a CPU."""
    if model.device.type != "cuda":
        return None
    seconds = device_median_s(_product(model, _LARGE, _LARGE), model.device, turns, runs=4)
    return seconds * rows * sum(w.numel() for w, _ in _weights(model)) / _LARGE**3


def _product(model: LoadedModel, width: int, rows: int) -> Callable[[], Tensor]:
    weight = torch.zeros(width, width, device=model.device, dtype=model.dtype)
    return partial(make_linear(weight, None), torch.zeros_like(weight)[:rows])


def _weights(model: LoadedModel) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield weight, ``[outputs, inputs]``, and bias of each matrix product of a decode step."""
    weights = weights_of(model.module)
    if not isinstance(weights, str):
        for layer in weights.layers:
            yield from (part for part in layer if isinstance(part, Matrix))
        yield weights.head, None
        return
    for module in model.module.modules():
        if isinstance(module, Conv1D | nn.Linear):
            # transformers' Conv1D has a weight of [inputs, outputs]
            yield module.weight.t() if isinstance(module, Conv1D) else module.weight, module.bias


def products(
    model: LoadedModel, rows: int, make: Callable[[Tensor, Tensor | None], Linear] = make_linear
) -> Callable[[], None]:
    """Return a function that computes all matrix products of one decode step."""
    numbers = torch.Generator().manual_seed(0)

    @cache
    def inputs(width: int) -> Tensor:
        return torch.randn(rows, width, generator=numbers).to(model.device, model.dtype)

    layers = [(make(*matrix), inputs(matrix[0].shape[1])) for matrix in _weights(model)]

    def run() -> None:
        for layer, x in layers:
            layer(x)

    return run


class ModelClock:
    """The time within a model's forward pass, on the host's clock; on a GPU it is of no use."""

    def __init__(self) -> None:
        self.ns = 0

    def timed(self, forward: Forward) -> Forward:
        """Return the forward pass, timed; :meth:`on` times one that calls the module already."""
        return forward if isinstance(forward, TransformersForward) else _Timed(forward, self)

    @contextmanager
    def on(self, module: torch.nn.Module) -> Iterator[ModelClock]:
        """Time every call of the module, from 0, in whichever thread."""
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
    """A forward pass that does not call the module."""

    def __init__(self, forward: Forward, clock: ModelClock) -> None:
        self._forward, self._clock = forward, clock
        self.cache_dtype, self.extra_bytes = forward.cache_dtype, forward.extra_bytes
        self.triton, self.choose = forward.triton, forward.choose

    def __call__(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        began = time.perf_counter_ns()
        logits = self._forward(ids, layout, keep)
        self._clock.ns += time.perf_counter_ns() - began
        return logits


def _attention_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernels that torch's attention takes: for decoding, with a mask, and prompts."""
    rows = torch.zeros(4, 4, 16, 64, dtype=dtype, device=device)
    mask = torch.zeros(4, 1, 1, 16, dtype=dtype, device=device)
    decode = torch._fused_sdp_choice(rows[:, :, :1], rows, rows, mask)
    prompts = torch._fused_sdp_choice(rows, rows, rows, None, 0.0, True)
    names = [SDPBackend(chosen).name.lower() for chosen in (decode, prompts)]
    return "decode {}, prompts {}".format(*names)


def torch_environment(device_name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the facts about torch's device; a trial reads the clocks, which an idle GPU lowers."""
    gpu = ("gpu", "gpu_uuid", "gpu_memory_bytes", "gpu_driver", "gpu_clock_mhz")
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "cpu_kernels": None}
    facts |= {**dict.fromkeys(gpu), "cuda": torch.version.cuda}
    if device_name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device_name)
        facts |= {
            "gpu": properties.name,
            "gpu_uuid": str(properties.uuid),
            "gpu_memory_bytes": properties.total_memory,
            "gpu_driver": gpu_driver(str(properties.uuid)),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "gpu_attention": _attention_kernels(torch.device(device_name), dtype),
            "float32_products": torch.get_float32_matmul_precision(),
        }
    elif device_name == "cpu":
        facts["cpu_kernels"] = "torch's" if native() is None else "batchbench's"
    return facts
