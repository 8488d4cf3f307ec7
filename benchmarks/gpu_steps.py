"""Steps of gpu_first_run.py that measure a GPU directly; each runs in a process of its own.

    python benchmarks/gpu_steps.py facts | kernels MODEL | anatomy MODEL ROWS LENGTH

A step prints its figures as one line of JSON. Times are of CUDA events around replays of a graph
that holds many calls, so that launching is not in them, unless the name says *eager*.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from batchbench.batching.models import ModelSpec, find_model

Work = Callable[[], object]

BACKENDS = {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""The names of what ``torch._fused_sdp_choice`` returns."""

QUICK = "GPU_STEPS_QUICK" in os.environ
"""True to do everything a few times only, to try the script where times mean nothing."""

TABLES = 2 if QUICK else 24
"""Copies of a weight that are read in turn: together they exceed the L2 cache."""

TURNS = 1 if QUICK else 9

STEPS_IN_A_RUN = 4 if QUICK else 50

BUFFERS = (2**20,) if QUICK else (2**28, 2**32)
"""Bytes of the buffers whose reading shows the bandwidth."""

ROUNDING = 3


def graph_us(work: Work, calls: int = 50) -> float:
    """Return the microseconds of one call, replayed from a graph of many calls."""
    calls = 1 if QUICK else calls
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            work()
    graph.replay()
    times = []
    for _ in range(TURNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls * 1e3)
    return round(statistics.median(times), ROUNDING)


def eager_us(work: Work, calls: int = 50) -> float:
    """Return the microseconds of one call that the host launches, device time included."""
    calls = 1 if QUICK else calls
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    torch.cuda.synchronize()
    return round((time.perf_counter() - began) / calls * 1e6, ROUNDING)


def gb_per_s(size: int, us: float) -> int:
    return round(size / us / 1e3) if us else 0


def facts() -> dict[str, Any]:
    """Return versions, the GPU, and the attention kernel that torch chooses for each shape."""
    card = torch.cuda.get_device_properties(0)
    settings = ("TF32", "CUDNN", "CUBLAS", "TRITON")
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "gpu": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "l2_bytes": card.L2_cache_size,
        "uuid": str(card.uuid),
        "free_and_total_bytes": torch.cuda.mem_get_info(),
        "environment": {k: v for k, v in os.environ.items() if any(s in k for s in settings)},
        "tools": [tool for tool in ("gcc", "g++", "nvcc") if shutil.which(tool)],
    }
    chosen, first = {}, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, length in ((8, 64), (8, 112), (8, 111), (1, 64), (64, 1024)):
            name = f"{str(dtype).removeprefix('torch.')} {rows}x{length}"
            query = torch.randn(rows, 12, 1, 64, device="cuda", dtype=dtype)
            key, value = torch.randn(2, rows, 12, length, 64, device="cuda", dtype=dtype)
            mask = torch.zeros(rows, 1, 1, length, device="cuda", dtype=dtype)
            choice = torch._fused_sdp_choice(query, key, value, attn_mask=mask)
            chosen[name] = BACKENDS.get(int(choice), str(choice))
            torch.cuda.synchronize()
            began = time.perf_counter()
            scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.cuda.synchronize()
            first[name] = round((time.perf_counter() - began) * 1e3, ROUNDING)
    return {**found, "sdpa_choice": chosen, "sdpa_first_call_ms": first}


def kernels(model: str) -> dict[str, Any]:
    """Return the microseconds of each operation of a decode step alone."""
    config = find_model(ModelSpec(model=model, load_format="dummy", device="cuda")).config
    width, heads = int(config["n_embd"]), int(config["n_head"])
    times: dict[str, Any] = {}
    for rows in (1, 8, 32):
        times |= products(width, rows)
    times |= small_operations(width, int(config["vocab_size"]))
    for length in (64, 112, 128, min(1024, int(config["n_positions"]))):
        times |= attention(heads, width // heads, length)
    return times | device_limits()


def products(width: int, rows: int) -> dict[str, Any]:
    """Return the microseconds of each matrix product of a layer, and its GB/s."""
    times: dict[str, Any] = {}
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "fc": (width, 4 * width),
        "proj": (4 * width, width),
    }
    for part, (inputs, outputs) in shapes.items():
        made = {"device": "cuda", "dtype": torch.bfloat16}
        weights = [torch.randn(inputs, outputs, **made) * 0.02 for _ in range(TABLES)]  # type: ignore[arg-type]
        bias = torch.zeros(outputs, **made)  # type: ignore[arg-type]
        x = torch.randn(rows, inputs, **made)  # type: ignore[arg-type]

        def timed(one: Callable[[torch.Tensor], object], tables: list[torch.Tensor]) -> float:
            return round(graph_us(lambda: [one(w) for w in tables], calls=4) / TABLES, ROUNDING)

        size, name = inputs * outputs * 2, f"{part} rows={rows}"
        us = timed(lambda w, x=x, b=bias: linear(x, w.t(), b), weights)  # type: ignore[misc]
        times[f"{name} [in, out]"] = {"us": us, "gb_per_s": gb_per_s(size, us)}
        turned = [w.t().contiguous() for w in weights]
        us = timed(lambda w, x=x, b=bias: linear(x, w, b), turned)  # type: ignore[misc]
        times[f"{name} [out, in]"] = {"us": us, "gb_per_s": gb_per_s(size, us)}
        if part == "fc":
            us = timed(
                lambda w, x=x, b=bias: torch._addmm_activation(b, x, w, use_gelu=True),  # type: ignore[misc]
                weights,
            )
            times[f"{name} with GELU in the product"] = {"us": us}
            us = timed(
                lambda w, x=x, b=bias: gelu(linear(x, w.t(), b), approximate="tanh"),  # type: ignore[misc]
                weights,
            )
            times[f"{name} then GELU"] = {"us": us}
    return times


def small_operations(width: int, vocabulary: int) -> dict[str, Any]:
    """Return the microseconds of norms, sums, the last product and the greedy choice."""
    x = torch.randn(8, width, device="cuda", dtype=torch.bfloat16)
    gain = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    times: dict[str, Any] = {
        "layer norm": {"us": graph_us(lambda: layer_norm(x, (width,), gain, gain))},
        "sum": {"us": graph_us(lambda: x + x)},
    }
    for size in sorted({vocabulary, -(-vocabulary // 128) * 128}):
        weight = torch.randn(size, width, device="cuda", dtype=torch.bfloat16)
        us = graph_us(lambda w=weight: linear(x, w), calls=8)  # type: ignore[misc]
        times[f"last product, {size} words"] = {
            "us": us,
            "gb_per_s": gb_per_s(size * width * 2, us),
        }
    logits = torch.randn(8, vocabulary, device="cuda", dtype=torch.bfloat16)
    times["max"] = {"us": graph_us(lambda: logits.max(-1).indices)}
    times["argmax"] = {"us": graph_us(lambda: logits.argmax(-1))}
    return times


def attention(heads: int, dim: int, length: int) -> dict[str, Any]:
    """Return the microseconds of torch's masked decode attention by backend."""
    query = torch.randn(8, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 8, heads, max(1024, length), dim, device="cuda", dtype=torch.bfloat16)
    key, value = cache[0][:, :, :length], cache[1][:, :, :length]
    mask = torch.zeros(8, 1, 1, length, device="cuda", dtype=torch.bfloat16)
    times: dict[str, Any] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        name = f"torch's attention, 8 rows, {length} keys, {backend.name.lower()}"
        try:
            with sdpa_kernel(backend):
                us = graph_us(
                    lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask)
                )
            times[name] = {"us": us}
        except RuntimeError as error:
            times[name] = {"error": str(error).splitlines()[0][:120]}
    return times


def device_limits() -> dict[str, Any]:
    """Return the time of the smallest kernel, and the bandwidth of reading and copying."""
    one = torch.zeros(1, device="cuda")
    times: dict[str, Any] = {
        "smallest kernel": {"us": graph_us(lambda: one.add_(1), calls=400)},
        "smallest kernel, eager": {"us": eager_us(lambda: one.add_(1), calls=400)},
    }
    free, _ = torch.cuda.mem_get_info()
    for size in sorted({min(size, int(free) // 4) for size in BUFFERS}):
        buffer = torch.ones(size // 4, device="cuda")
        us = graph_us(buffer.sum, calls=3)
        times[f"read {size // 2**20} MiB"] = {"us": us, "gb_per_s": gb_per_s(size, us)}
        other = torch.empty_like(buffer)
        us = graph_us(lambda b=buffer, o=other: o.copy_(b), calls=3)  # type: ignore[misc]
        times[f"copy {size // 2**20} MiB"] = {"us": us, "gb_per_s": gb_per_s(2 * size, us)}
        del buffer, other
    return times


def anatomy(model: str, rows: str, length: str) -> dict[str, Any]:
    """Return the time of a decode step, its kernels by name, its floor and its memory."""
    # Late, because facts and kernels must work even where an engine does not load.
    from batchbench.batching.engines.torch.hardware import (
        measure_bandwidth,
        measure_products,
        reading_of,
    )
    from batchbench.batching.models.loading import load_model

    spec = ModelSpec(model=model, load_format="dummy", device="cuda")
    loaded = load_model(find_model(spec), spec, 0)
    slots, tokens = int(rows), int(length)
    found = {kind: step_of(loaded, slots, tokens, kind) for kind in ("eager", "graph")}
    reading, bandwidth = reading_of(loaded), measure_bandwidth(loaded.device)
    size = reading.step_bytes(slots * tokens)
    return {
        "step": found,
        "step_bytes": size,
        "bytes_per_s": round(bandwidth.bytes_per_s),
        "floor_us": round(size / bandwidth.bytes_per_s * 1e6, ROUNDING),
        "products_us": round(measure_products(loaded, slots) * 1e6, ROUNDING),
    }


def step_of(loaded: Any, rows: int, length: int, execution: str) -> dict[str, Any]:
    """Return the time of a decode step under an execution, and its kernels."""
    import numpy as np
    from torch.profiler import profile, supported_activities

    from batchbench.batching.engines.torch.build import make_engine
    from batchbench.batching.plan import Plan
    from batchbench.workloads import Workload

    torch.cuda.empty_cache()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    engine, memory = make_engine("slots", loaded, rows, max(128, length + 8), execution)
    built = time.perf_counter() - began
    workload = Workload.of("one token each", [[1]] * rows, [1] * rows)
    at, still = np.full(rows, length - 1), np.zeros(rows, np.int64)
    plan = Plan((), np.arange(rows), at, still, (), STEPS_IN_A_RUN, None)
    times = []
    for _ in range(5):
        engine.begin(workload)
        engine.run(plan)
        times.append(float(np.median(np.diff(engine.collect().ends_ns))) / 1e3)
    engine.begin(workload)
    with profile(activities=supported_activities()) as profiler:
        engine.run(plan)
        engine.collect()
    ran = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]  # type: ignore[union-attr]
    by_name: dict[str, tuple[int, float]] = {}
    for event in ran:
        count, spent = by_name.get(event.name[:70], (0, 0.0))
        by_name[event.name[:70]] = (count + 1, spent + event.device_time)
    largest = sorted(by_name.items(), key=lambda item: -item[1][1])[:25]
    return {
        "built_s": round(built, 2),
        "step_us": round(statistics.median(times), 1),
        "kernels": round(len(ran) / STEPS_IN_A_RUN, 1),
        "kernels_us": round(sum(e.device_time for e in ran) / STEPS_IN_A_RUN, 1),
        "allocated_mib": round((torch.cuda.memory_allocated() - before) / 2**20),
        "cache_mib": round(memory["kv_cache_bytes"] / 2**20),
        "by_kernel": {
            name: {"calls": round(n / STEPS_IN_A_RUN, 1), "us": round(us / STEPS_IN_A_RUN, 2)}
            for name, (n, us) in largest
        },
    }


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": facts,
    "kernels": kernels,
    "anatomy": anatomy,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in STEPS:
        sys.exit(__doc__)
    with torch.inference_mode():
        print("RESULT " + json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))


if __name__ == "__main__":
    main()
