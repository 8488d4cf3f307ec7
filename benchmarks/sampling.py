"""A sampled decode step against a greedy one, and the cost of the choice alone.

    .venv/bin/python benchmarks/sampling.py [--model gpt2] [--rows 8] [--rounds 40] [--torch]

On the CPU, requests 64 tokens long; gpt2 has dummy weights. All ways take turns in one process:
quote the ratios of the fastest turns. ``--torch`` leaves out our kernels.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from batchbench.batching.engines.torch import sampling as module
from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.forward import make_forward
from batchbench.batching.engines.torch.sampling import Chooser
from batchbench.batching.models import ModelSpec, find_model
from batchbench.batching.models.loading import load_model
from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling

LENGTH = 64

WAYS = {
    "greedy": None,
    "temperature 0.8": Sampling(0.8),
    "temperature 0.8, top-k 50": Sampling(0.8, top_k=50),
    "temperature 0.8, top-p 0.95": Sampling(0.8, top_p=0.95),
    "temperature 0.8, top-k 50, top-p 0.95": Sampling(0.8, top_p=0.95, top_k=50),
}


@torch.inference_mode()
def measure(name: str, dtype: str, rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Least milliseconds of a whole step, and of the choice, for each way."""
    kind = "dummy" if name == "gpt2" else "auto"
    spec = ModelSpec(model=name, load_format=kind, device="cpu", dtype=dtype)
    model = load_model(find_model(spec), spec, seed=0)
    forward = make_forward(model)
    like = torch.empty(0, dtype=forward.cache_dtype)
    slots, positions = torch.arange(rows), torch.full((rows,), LENGTH - 1)
    cache = SlotCache(model.module.config, rows, 128, like)
    layout = Layout(cache, slots, positions, rows, low=0, high=rows, length=LENGTH)
    vocabulary = model.module.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, rows))
    logits = forward(ids, replace(layout), None)

    def chooser(sampling: Sampling | None) -> Callable[[torch.Tensor], object]:
        made = Chooser(rows, torch.device("cpu"))
        made.sampling = sampling
        words = [Stream(sampling or Sampling(1.0), row).words for row in range(rows)]
        made.streams.copy_(torch.from_numpy(np.array(words)))
        return lambda logits: made(logits, slots, positions).tolist()

    ways = {way: chooser(sampling) for way, sampling in WAYS.items()}
    steps, choices = ({way: float("inf") for way in ways} for _ in range(2))
    for _ in range(rounds):
        for way, choose in ways.items():
            for least, work in (
                (steps, lambda c=choose: c(forward(ids, replace(layout), None))),
                (choices, lambda c=choose: c(logits)),
            ):
                began = time.perf_counter()
                work()
                least[way] = min(least[way], 1e3 * (time.perf_counter() - began))
    return {way: (steps[way], choices[way]) for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--torch", action="store_true")
    asked = parser.parse_args()
    if asked.torch:
        module.native = lambda: None
    for dtype in ("float32", "bfloat16"):
        table = Table(title=f"{asked.model}, {dtype}, {asked.rows} rows")
        for column in ("choice", "step ms", "÷ greedy step", "choice ms", "share of step"):
            table.add_column(column, justify="left" if column == "choice" else "right")
        found = measure(asked.model, dtype, asked.rows, asked.rounds)
        greedy = found["greedy"][0]
        for way, (step, choice) in found.items():
            cells = (f"{step:.2f}", f"{step / greedy:.3f}", f"{choice:.3f}", f"{choice / step:.1%}")
            table.add_row(way, *cells)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
