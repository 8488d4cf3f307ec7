"""Profile a decode step: time by operator, and the rest, which is Python's.

    .venv/bin/python benchmarks/profile_step.py [--rows 8] [--length 64] [--device cpu]

GPT-2 124M with dummy weights on the slots engine, all slots decoding at one length. A step is
timed as it is, then again under torch's profiler, whose own cost is taken out in proportion: the
shares are of the unprofiled step.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.kernels import Native
from batchbench.batching.models import ModelSpec, find_model
from batchbench.batching.models.loading import load_model, set_threads
from batchbench.batching.plan import Plan
from batchbench.workloads import Workload

PARTS = {
    "matrix products": ("linear", "addmm", "mm", "gemm", "cutlass", "nvjet"),
    "all layers, in one call": ("own layers",),
    "attention": ("attention", "flash", "fmha"),
    "keys and values into the cache": ("index_copy", "index_put"),
    "layer norms": ("layer_norm",),
    "the next token": ("greedy", "amax", "max", "gather", "argmax"),
    "mask and embeddings": ("masked_fill", "embedding", "arange", "gt", "zeros", "fill"),
}
"""Operators by what is in their names; the first part that fits has it."""


@contextmanager
def own_kernels_shown() -> Iterator[None]:
    """Within it the profiler sees batchbench's own kernels, which are no operators of torch."""

    def shown(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(name):
                return kernel(*args, **options)

        return call

    names = {"product": "own linear", "decode": "own layers", "greedy": "greedy"}
    with ExitStack() as patches:
        for method, name in names.items():
            kernel = getattr(Native, method)
            patches.enter_context(mock.patch.object(Native, method, shown(kernel, name)))
        yield


def part_of(name: str) -> str:
    """Return the purpose of an operator."""
    return next((p for p, words in PARTS.items() if any(w in name for w in words)), "views, casts")


def measure(dtype: str, rows: int, length: int, device: str) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and of each part."""
    import numpy as np

    spec = ModelSpec(model="gpt2", load_format="dummy", device=device, dtype=dtype)
    set_threads(spec)
    model = load_model(find_model(spec), spec, seed=0)
    engine, _ = make_engine("slots", model, rows, length + 1)
    workload = Workload.of("none", [[1]] * rows, [1] * rows)
    at = np.full(rows, length - 1)
    plan = Plan((), np.arange(rows), at, np.zeros(rows, np.int64), (), 20, None)

    def step_ms() -> float:
        engine.begin(workload)  # or the log of tokens would grow from one turn to the next
        began = time.perf_counter()
        engine.run(plan)
        engine.wait()
        return (time.perf_counter() - began) / plan.repeat * 1e3

    times = [step_ms() for _ in range(6)][1:]
    cuda = model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with own_kernels_shown(), profile(activities=kinds, acc_events=True) as seen:
        profiled = step_ms()
    parts: dict[str, float] = {}
    for event in seen.key_averages():
        if cuda and event.device_type is not DeviceType.CUDA:
            continue  # an operator's device time is that of its kernels, which are listed too
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = part_of(event.key.lower())
        parts[name] = parts.get(name, 0.0) + spent / plan.repeat / 1e3
    step = statistics.median(times)
    scale = step / max(profiled, sum(parts.values()))
    found = {name: spent * scale for name, spent in sorted(parts.items(), key=lambda p: -p[1])}
    found["Python and launching" if not cuda else "the device waits"] = step - sum(found.values())
    return step, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        step, parts = measure(dtype, asked.rows, asked.length, asked.device)
        table = Table(title=f"gpt2 · {asked.device} {dtype} · {asked.rows} rows of {asked.length}")
        table.add_column("part of a decode step")
        table.add_column("ms", justify="right")
        table.add_column("%", justify="right")
        for name, spent in parts.items():
            table.add_row(name, f"{spent:.2f}", f"{100 * spent / step:.1f}")
        table.add_row("step", f"{step:.2f}", "100", style="bold")
        Console().print(table)


if __name__ == "__main__":
    main()
