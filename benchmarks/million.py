"""A million requests simulated on fitted costs: seconds a strategy, pictures apart.

    .venv/bin/python benchmarks/million.py [--requests 1000000] [--slots 256]

Costs are written down here, since only the time to simulate is of interest. Each strategy runs in a
process of its own: processor seconds with the workload and the Recording, and memory.
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
from batchbench.batching.step_cost import StepCost
from batchbench.workloads import Workload

COST = StepCost(8e6, 4e4, 11.3, 3e4, 2e5, host_ns=1.5e5)
"""Like GPT-2's on a small GPU: 8 ms a pass."""


def make(requests: int, rate: float | None, seed: int = 0) -> Workload:
    """Prompts of 32 tokens, exponential outputs of mean 128; Poisson arrivals at ``rate``."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = np.maximum(np.ceil(rng.exponential(128, requests)), 1).astype(np.int64)
    due = np.zeros(requests, np.int64)
    if rate is not None:
        due = np.cumsum(rng.exponential(1e9 / rate, requests)).astype(np.int64)
    return Workload(
        name="a million",
        seed=seed,
        prompt_ids=np.zeros(32 * requests, np.int32),
        prompt_offsets=32 * np.arange(requests + 1),
        output_tokens=lengths,
        due_ns=due,
    )


def simulate(policy: str, slots: int, requests: int, rate: float | None) -> dict:
    """Seconds and MiB of one strategy."""
    gc.disable()  # as in a trial
    began = time.process_time()
    workload = make(requests, rate)
    room = max(2048, 2 * slots)
    engine = SimulatedEngine(COST)
    batcher = Batcher(policy, engine, slots, prefill="mixed", max_batched_tokens=room)
    recording = batcher.serve(workload, Watch())
    return {
        "steps": recording.num_steps,
        "simulated_s": recording.duration_ns / 1e9,
        "seconds": time.process_time() - began,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10**6)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        policy, rate = asked.one
        told = None if rate == "all" else float(rate)
        print(json.dumps(simulate(policy, asked.slots, asked.requests, told)))
        return
    table = Table(title=f"{asked.requests:,} requests, {asked.slots} slots, on fitted costs")
    for name in ("requests/s", "strategy", "steps", "simulated s", "processor s", "MiB"):
        table.add_column(name, justify="right")
    for rate in ("all", "60"):
        for policy in ("static", "continuous"):
            command = [sys.executable, __file__, "--one", policy, rate]
            command += ["--requests", str(asked.requests), "--slots", str(asked.slots)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            values = [f"{found[key]:,.0f}" for key in ("steps", "simulated_s", "seconds", "mib")]
            table.add_row(rate, policy, *values)
    Console().print(table)


if __name__ == "__main__":
    main()
