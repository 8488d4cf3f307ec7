"""Static over continuous steps for exponential output lengths, against the harmonic number.

    .venv/bin/python benchmarks/harmonic.py [--requests 1000000] [--mean 128] [--slots 8 32 256]

A static batch of B requests takes as many steps as its longest, B exponential lengths have a
longest of H_B = 1 + 1/2 + … + 1/B times their mean, and continuous batching takes the mean. So much
for mixed prefill; with separate prefill every admission stalls the others for a step. Each
strategy is scheduled in a process of its own, whose time and peak memory are printed too.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.workloads import Workload


def exponential_workload(requests: int, mean: float, seed: int = 0) -> Workload:
    """All there at the start, prompts of one token, lengths of at least one."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = np.ceil(rng.exponential(mean, requests)).astype(np.int64)
    return Workload(
        name=f"exponential, mean {mean:g}",
        seed=seed,
        prompt_ids=np.zeros(requests, np.int32),
        prompt_offsets=np.arange(requests + 1),
        output_tokens=np.maximum(lengths, 1),
        due_ns=np.zeros(requests, np.int64),
    )


def schedule(policy: str, slots: int, prefill: str, requests: int, mean: float) -> dict:
    """Steps, seconds and MiB of one strategy, workload and Recording included."""
    workload = exponential_workload(requests, mean)
    gc.disable()  # as in a trial
    began = time.process_time()
    room = max(2048, 2 * slots)
    batcher = Batcher(policy, SimulatedEngine(), slots, prefill=prefill, max_batched_tokens=room)
    recording = batcher.serve(workload, Watch())
    return {
        "steps": recording.num_steps,
        "seconds": time.process_time() - began,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(*words: object) -> dict:
    """Return the result of :func:`schedule` in a new process."""
    command = [sys.executable, __file__, "--one", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10**6)
    parser.add_argument("--mean", type=float, default=128)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        policy, slots, prefill, requests, mean = asked.one
        print(json.dumps(schedule(policy, int(slots), prefill, int(requests), float(mean))))
        return
    table = Table(title=f"{asked.requests:,} requests, exponential lengths of mean {asked.mean:g}")
    for name in ("slots", "prefill", "static / continuous", "H_B"):
        table.add_column(name, justify="right")
    for policy in ("static", "continuous"):
        table.add_column(f"{policy}\nsteps", justify="right")
        table.add_column("s", justify="right")
        table.add_column("MiB", justify="right")
    for slots in asked.slots:
        harmonic = sum(1 / k for k in range(1, slots + 1))
        for prefill in ("mixed", "separate"):
            static, continuous = (
                in_a_process(policy, slots, prefill, asked.requests, asked.mean)
                for policy in ("static", "continuous")
            )
            cells = [f"{slots}", prefill, f"{static['steps'] / continuous['steps']:.3f}"]
            cells.append(f"{harmonic:.3f}")
            for found in (static, continuous):
                cells += [f"{found['steps']:,}", f"{found['seconds']:.0f}", f"{found['mib']:.0f}"]
            table.add_row(*cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
