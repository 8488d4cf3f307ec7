"""Kill nodes and jobs under sweeps, and measure what executors cost; on this machine alone.

    python benchmarks/clusters.py killed-ray [--times 10] [--seed 0]
    python benchmarks/clusters.py killed-slurm [--times 10] [--seed 0]
    python benchmarks/clusters.py speed [--times 3]
    python benchmarks/clusters.py memory [--cells 1000]

``killed-ray`` sweeps 24 simulated cells on a Ray cluster of two nodes with one core each, and kills
a node at a random moment; ``killed-slurm`` does the same through submitit's local executor, and
kills jobs. Exit code 1 where the table differs from that of an undisturbed sweep in this process, a
finished cell was begun again, or one is missing. ``speed`` compares two nodes with one, and tells
the time that a cell takes beyond the work itself; ``memory`` tells the largest resident memory of
the process that drives a sweep. Each writes ``benchmarks/results/clusters/<name>.json``.

Run it with ``ray`` and ``submitit`` installed: ``pip install -e '.[ray,slurm]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.executors import Logged, grid_of, swept

from batchbench.batching.machine import environment
from batchbench.batching.progress import Watch
from batchbench.studies.executors.jobs import Needs
from batchbench.studies.sweep.run import Store, run_cells
from batchbench.version import __version__

RESULTS = ROOT / "benchmarks" / "results" / "clusters"

NEEDS = Needs({"batchbench": __version__})

CELLS = 24


def write(name: str, result: dict[str, Any]) -> None:
    """Write a result with the machine on which it was measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {k: v for k, v in environment().items() if k != "hostname"}
    text = json.dumps({**result, "environment": facts}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", "utf-8")
    print(json.dumps(result))


def cluster_of(nodes: int) -> Any:
    """Return a Ray cluster on this machine with so many nodes of one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.others = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
    os.environ["RAY_ADDRESS"] = cluster.address
    return cluster


def ray_executor() -> Any:
    """Return the executor on the cluster that runs here."""
    from batchbench.studies.executors.ray_cluster import RayCluster

    return RayCluster("auto", Watch(), NEEDS)


def slurm_executor(folder: Path) -> Any:
    """Return an executor of two jobs at once on this machine."""
    from batchbench.studies.executors.slurm import Slurm

    return Slurm(folder, Watch(), NEEDS, parallel=2, cluster="local", grace_s=0.5)


def judge(table: bytes, alone: bytes, logged: Logged) -> dict[str, Any]:
    """Return what a disturbed sweep did, compared with an undisturbed one."""
    begun = logged.begun()
    return {
        "same_table": table == alone,
        "repeated": logged.repeated(),
        "missing": CELLS - len(set(begun)),
        "begun_again_after_a_loss": len(begun) - len(set(begun)),
    }


def killed_ray(times: int, chance: random.Random, place: Path) -> Iterator[dict[str, Any]]:
    """Kill one of two nodes at a random moment, again and again; yield each outcome."""
    alone = swept(place / "alone", grid_of(CELLS))
    for i in range(times):
        cluster, folder = cluster_of(2), place / f"ray-{i}"
        logged = Logged(place / f"log-{i}", folder, pause_s=0.2)
        after = chance.uniform(0.0, 0.2 * CELLS / 2)

        def kill(cluster: Any = cluster, logged: Logged = logged, after: float = after) -> None:
            while not logged.begun():
                time.sleep(0.01)
            time.sleep(after)
            cluster.remove_node(cluster.others[0], allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        began = time.monotonic()
        with closing(ray_executor()) as executor:
            table = swept(folder, grid_of(CELLS), executor, logged)
        seconds = time.monotonic() - began
        killer.join()
        cluster.shutdown()
        yield {"killed_after_s": after, "seconds": seconds, **judge(table, alone, logged)}


def killed_slurm(times: int, chance: random.Random, place: Path) -> Iterator[dict[str, Any]]:
    """Kill two of the jobs at their beginnings, again and again; yield each outcome."""
    alone = swept(place / "alone", grid_of(CELLS))
    for i in range(times):
        folder = place / f"slurm-{i}"
        kills = tuple(sorted(chance.sample(range(CELLS), 2)))
        logged = Logged(place / f"log-{i}", folder, kills=kills)
        began = time.monotonic()
        with closing(slurm_executor(place / "jobs")) as executor:
            table = swept(folder, grid_of(CELLS), executor, logged)
        seconds = time.monotonic() - began
        yield {"killed": kills, "seconds": seconds, **judge(table, alone, logged)}


def good(trials: list[dict[str, Any]]) -> bool:
    return all(t["same_table"] and not t["repeated"] and not t["missing"] for t in trials)


def speed(turns: int, place: Path) -> dict[str, Any]:
    """Measure two nodes against one, and the time per cell beyond its work."""
    large, small = grid_of(12, 60_000), grid_of(100, 2)
    seconds: dict[str, list[float]] = {}
    for turn in range(turns):
        for nodes in (1, 2):
            cluster = cluster_of(nodes)
            with closing(ray_executor()) as executor:
                while executor.free < nodes:
                    executor.wait()
                # The first cells of a process import and look for the model.
                swept(place / f"warm-{turn}-{nodes}", grid_of(4 * nodes, 1), executor)
                for name, grid in (("large", large), ("small", small)):
                    began = time.monotonic()
                    store = Store(place / f"{name}-{turn}-{nodes}")
                    run_cells(grid, store, executor=executor)
                    seconds.setdefault(f"{name}_{nodes}", []).append(time.monotonic() - began)
            cluster.shutdown()
    for turn in range(turns):
        began = time.monotonic()
        run_cells(small, Store(place / f"local-{turn}"))
        seconds.setdefault("small_local", []).append(time.monotonic() - began)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "load_average": os.getloadavg(),  # of whatever else runs on this machine
        "speedup": best["large_1"] / best["large_2"],
        "overhead_ms_per_cell": 1000 * (best["small_1"] - best["small_local"]) / 100,
        "whole_ms_per_small_cell": 1000 * best["small_1"] / 100,
    }


def memory(cells: int, place: Path) -> dict[str, Any]:
    """Return the memory of a whole ``batchbench sweep`` on a Ray of its own."""
    words = ["sweep", "--simulated", "--queue-size", "12", "--seed", f"1:{cells}", "--quiet"]
    words += ["--executor", "ray", "--output", str(place / "many")]
    began = time.monotonic()
    code = "from batchbench.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return {
        "cells": cells,
        "exit_code": os.waitstatus_to_exitcode(status),
        "driver_peak_mib": usage.ru_maxrss / 1024,
        "seconds": time.monotonic() - began,
    }


def main() -> int:
    """Measure, write, report."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("what", choices=("killed-ray", "killed-slurm", "speed", "memory"))
    asked.add_argument("--times", type=int, default=10)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--cells", type=int, default=1000)
    options = asked.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="batchbench-clusters-") as folder:
        place = Path(folder)
        if options.what == "speed":
            write("speed", speed(options.times, place))
        elif options.what == "memory":
            write("memory", memory(options.cells, place))
        else:
            kill = killed_ray if options.what == "killed-ray" else killed_slurm
            trials: list[dict[str, Any]] = []
            for trial in kill(options.times, chance, place):
                trials.append(trial)
                write(options.what, {"good": good(trials), "trials": trials})
            return 0 if good(trials) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
