"""Traces of a million rows: rows a second, and memory beyond the columns that are kept.

    python benchmarks/trace_memory.py [ROWS]

Each format is written to a temporary folder and read in a process of its own. "Beyond" is the
growth of the peak resident memory over what it was before reading, less the columns: what a row
took while it was read is gone with it. (Mooncake's include how many blocks each row names, which
become their offsets.)
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Lines = Callable[[random.Random, int], Iterator[str]]


def azure(rng: random.Random, rows: int) -> Iterator[str]:
    """As in AzureLLMInferenceTrace_conv.csv."""
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for i in range(rows):
        second = i // 4
        clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
        day = 1 + second // 86_400
        yield (
            f"2023-11-{day:02} {clock}.{i % 4}905900,"
            f"{rng.randint(1, 4000)},{rng.randint(1, 1000)}\n"
        )


def burstgpt(rng: random.Random, rows: int) -> Iterator[str]:
    """As in BurstGPT_without_fails_1.csv."""
    yield "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    for i in range(rows):
        asked, answered = rng.randint(1, 4000), rng.randint(1, 1000)
        yield f"{i // 3}.0,ChatGPT,{asked},{answered},{asked + answered},Conversation log\n"


def mooncake(rng: random.Random, rows: int) -> Iterator[str]:
    """Yield rows like those of conversation_trace.jsonl; all prompts begin with the same block."""
    for i in range(rows):
        asked = rng.randint(1, 4000)
        row = {
            "timestamp": i * 300,
            "input_length": asked,
            "output_length": rng.randint(1, 1000),
            "hash_ids": [0, *range(8 * i + 1, 8 * i + (asked + 511) // 512)],
        }
        yield json.dumps(row) + "\n"


def sharegpt(rng: random.Random, rows: int) -> Iterator[str]:
    """As in ShareGPT_V3_unfiltered_cleaned_split.json, with short texts."""
    for i in range(rows):
        turns = [
            {"from": "human", "value": "Why? " * rng.randint(1, 4)},
            {"from": "gpt", "value": "Therefore. " * rng.randint(1, 8)},
        ]
        yield ("[" if i == 0 else ",\n") + json.dumps({"id": str(i), "conversations": turns})
    yield "]\n"


def batchbench(rng: random.Random, rows: int) -> Iterator[str]:
    """As workload save writes them."""
    for i in range(rows):
        ids = [rng.randint(0, 50_256) for _ in range(rng.randint(1, 8))]
        yield (
            json.dumps(
                {"due_ns": i * 10**6, "output_tokens": rng.randint(1, 1000), "prompt_ids": ids}
            )
            + "\n"
        )


FORMATS: dict[str, Lines] = {
    "azure": azure,
    "burstgpt": burstgpt,
    "mooncake": mooncake,
    "sharegpt": sharegpt,
    "batchbench": batchbench,
}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read(file: Path) -> None:
    """Read a trace and print what it took, as JSON."""
    import numpy as np

    from batchbench.workloads.prompts import byte_tokens
    from batchbench.workloads.traces import read_trace

    before, began = peak_bytes(), time.perf_counter()
    trace = read_trace(file, byte_tokens)
    spent = time.perf_counter() - began
    columns: list[np.ndarray] = [trace.prompt_tokens, trace.output_tokens]
    columns += [] if trace.due_ns is None else [trace.due_ns]
    for ragged in (trace.prompts, trace.blocks):
        columns += [] if ragged is None else [ragged.values, ragged.offsets]
    kept = sum(column.nbytes for column in columns)
    rows = len(trace.output_tokens)
    print(json.dumps({"rows": rows, "s": spent, "kept": kept, "grown": peak_bytes() - before}))


def main(rows: int) -> None:
    """Write, read and tell, format by format."""
    print("format          rows   file MiB   rows/s   columns MiB   peak beyond them MiB")
    for name, lines in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace"
            with file.open("w") as out:
                out.writelines(lines(random.Random(0), rows))
            done = subprocess.run(
                [sys.executable, __file__, "--read", str(file)],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ,
            )
            told = json.loads(done.stdout)
            size = file.stat().st_size
        beyond = told["grown"] - told["kept"]
        print(
            f"{name:<10} {told['rows']:>9,} {size / 2**20:>10.0f} {told['rows'] / told['s']:>8,.0f}"
            f" {told['kept'] / 2**20:>13.1f} {beyond / 2**20:>22.1f}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
