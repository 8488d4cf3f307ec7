"""Time the operations between a step's matrix products, old way and new way side by side.

    .venv/bin/python benchmarks/small_operations.py

GPT-2's shapes, 8 rows, on the CPU. An operation is timed behind a product, as it stands in a step:
what counts is also whether the product's second thread falls asleep meanwhile. Medians of turns.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from batchbench.batching.engines.torch.linear import make_linear
from batchbench.batching.engines.torch.sampling import best_token

SLOTS, HEADS, SIZE, WIDTH = 8, 12, 64, 768
Way = Callable[[], object]


def medians(ways: dict[str, Way], rounds: int = 200) -> dict[str, float]:
    """Microseconds of each way behind a product, less the product's own."""
    product, x = make_linear(torch.randn(WIDTH, WIDTH), None), torch.randn(SLOTS, WIDTH)
    times: dict[str, list[float]] = {name: [] for name in ("", *ways)}
    for _ in range(rounds):
        for name, way in {"": lambda: None, **ways}.items():
            began = time.perf_counter()
            product(x)
            way()
            product(x)
            times[name].append((time.perf_counter() - began) * 1e6)
    found = {name: statistics.median(spent) for name, spent in times.items()}
    return {name: found[name] - found[""] for name in ways}


def writing() -> dict[str, Way]:
    """Keys and values of a pass into the cache of one layer."""
    cache = torch.zeros(2, SLOTS, HEADS, 128, SIZE)
    kv = torch.randn(SLOTS, 2, HEADS, SIZE)
    slots, at = torch.arange(SLOTS), torch.full((SLOTS,), 63)
    part, head = torch.meshgrid(torch.arange(2), torch.arange(HEADS), indexing="ij")
    first = ((part * SLOTS * HEADS + head) * 128).flatten()
    rows = ((slots * HEADS * 128 + at)[:, None] + first).flatten()

    def apart() -> None:
        cache[0][slots, :, at], cache[1][slots, :, at] = kv.unbind(1)

    def at_once() -> None:
        cache.view(-1, SIZE).index_copy_(0, rows, kv.reshape(-1, SIZE))

    return {"keys, then values, by index": apart, "both at once, as rows (kept)": at_once}


def choosing() -> dict[str, Way]:
    """The next token of each row."""
    logits = torch.randn(SLOTS, 50257)
    return {
        "argmax": lambda: logits.argmax(-1),
        "max with its index": lambda: logits.max(-1).indices,
        "as the engines choose": lambda: best_token(logits),
    }


def attending(length: int) -> dict[str, Way]:
    """Attention of one layer, the cache laid out by heads or by tokens."""
    q, mask = torch.randn(SLOTS, HEADS, 1, SIZE), torch.zeros(SLOTS, 1, 1, length)
    by_heads = [torch.zeros(2, SLOTS, HEADS, length, SIZE) for _ in range(6)]
    by_tokens = [torch.zeros(2, SLOTS, length, HEADS, SIZE) for _ in range(6)]

    def heads() -> None:
        for k, v in by_heads:
            scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def tokens() -> None:
        for k, v in by_tokens:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {"six layers by tokens": tokens, "six layers by heads (kept)": heads}


@torch.inference_mode()
def main() -> None:
    for title, ways, rounds in (
        ("writing into the cache", writing(), 200),
        ("the next token", choosing(), 200),
        ("attention, 64 tokens", attending(64), 60),
        ("attention, 1,024 tokens", attending(1024), 20),
    ):
        table = Table(title=f"{title} · 8 rows, {torch.get_num_threads()} threads")
        table.add_column("way")
        table.add_column("µs", justify="right")
        for name, spent in medians(ways, rounds).items():
            table.add_row(name, f"{spent:,.0f}")
        Console().print(table)


if __name__ == "__main__":
    main()
