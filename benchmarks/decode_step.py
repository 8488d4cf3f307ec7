"""One decode step against its matrix products alone, and against transformers' own.

    .venv/bin/python benchmarks/decode_step.py [--model gpt2] [--rows 8] [--rounds 25]

On the CPU, requests 64 tokens long; gpt2 has dummy weights, a folder its own. All ways take turns
in one process, so that a machine whose speed drifts treats them alike: quote the ratios, of medians
and of the fastest turns. The latter leave out what other processes took. On a busy machine, give
`--cpu-time` and OMP_NUM_THREADS=1: the processor's time is that of this process alone.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from batchbench.batching.engines.torch.attention import Layout, SlotCache, cache_argument
from batchbench.batching.engines.torch.forward import Forward, TransformersForward, make_forward
from batchbench.batching.engines.torch.hardware import products
from batchbench.batching.engines.torch.linear import Kernels, make_linear
from batchbench.batching.engines.torch.sampling import best_token
from batchbench.batching.models import ModelSpec, find_model
from batchbench.batching.models.loading import LoadedModel, load_model

LENGTH = 64


def step(model: LoadedModel, rows: int, forward: Forward) -> Callable[[], object]:
    """One decode step over a slot cache."""
    like = torch.empty(0, dtype=forward.cache_dtype)
    slots = torch.arange(rows)
    layout = Layout(
        SlotCache(model.module.config, rows, 128, like),
        slots,
        torch.full((rows,), LENGTH - 1),
        rows,
        low=0,
        high=rows,
        length=LENGTH,
    )
    vocabulary = model.module.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, rows))
    return lambda: best_token(forward(ids, replace(layout), None)).tolist()  # masks made anew


def eager(model: LoadedModel, rows: int) -> Callable[[], object]:
    """transformers' own forward pass with its growing cache."""
    cache = DynamicCache()
    ids = torch.zeros(rows, LENGTH - 1, dtype=torch.int64)
    held = {cache_argument(model.module): cache}
    model.module(input_ids=ids, use_cache=True, **held)

    def once() -> object:
        model.module.set_attn_implementation("sdpa")
        out = model.module(input_ids=ids[:, :1], use_cache=True, **held)
        cache.crop(-1)
        return best_token(out.logits[:, -1]).tolist()

    return once


@torch.inference_mode()
def measure(
    name: str, dtype: str, rows: int, rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Median and least milliseconds of each way."""
    kind = "dummy" if name == "gpt2" else "auto"
    spec = ModelSpec(model=name, load_format=kind, device="cpu", dtype=dtype)
    model = load_model(find_model(spec), spec, seed=0)

    def through(most: Kernels) -> Callable[[], object]:
        return products(model, rows, lambda w, b: make_linear(w.contiguous(), b, most))

    ways = {
        "matrix products, own kernels": through(Kernels.OWN),
        "matrix products, oneDNN packed": through(Kernels.PACKED),
        "matrix products, F.linear": through(Kernels.PLAIN),
        "step: lean forward, own kernels": step(model, rows, make_forward(model)),
        "step: lean forward, oneDNN packed": step(model, rows, make_forward(model, Kernels.PACKED)),
        "step: slots engine, transformers' forward": step(model, rows, TransformersForward(model)),
        "step: transformers alone": eager(model, rows),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            began = clock()
            way()
            if turn >= 2:
                times[name].append((clock() - began) * 1e3)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    table = Table(title=f"{asked.model}, {asked.rows} rows, {torch.get_num_threads()} threads")
    table.add_column("one decode step")
    found, clock = {}, time.process_time if asked.cpu_time else time.perf_counter
    for dtype in ("float32", "bfloat16"):
        found[dtype] = measure(asked.model, dtype, asked.rows, asked.rounds, clock)
        table.add_column(f"{dtype} ms", justify="right")
        table.add_column("÷ first", justify="right")
        table.add_column("least", justify="right")
    alone = next(iter(found["float32"]))
    for name in found["float32"]:
        cells = []
        for times in found.values():
            median, least = (
                ours / first for ours, first in zip(times[name], times[alone], strict=True)
            )
            cells += [f"{times[name][0]:.1f}", f"{median:.2f}", f"{least:.2f}"]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
