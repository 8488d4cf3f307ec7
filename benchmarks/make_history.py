"""A made-up history of results, to see what batchbench trend makes of it: nothing is measured.

    .venv/bin/python benchmarks/make_history.py FOLDER [--results 48] [--change 15:-4]
        [--change 32:3] [--noise 1] [--seed 0]

Every result is a simulation whose step cost is invented: the same for all commits but for
``--change AT:PERCENT``, from which result on a step costs so many percent more (or less), and for
noise, of which each result and each trial has its own. The commits are invented too. Result 24 is
stamped suspect, and from result 40 on continuous batching counts one forward pass more, so that
both can be seen. Only ``result.json`` is written, as ``batchbench trend`` needs no more.
"""

import argparse
import hashlib
import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from batchbench import Experiment, ServingSpec, WorkloadSpec, conduct
from batchbench.batching.step_cost import KnownCost, StepCost
from batchbench.reports.result import make_result

COST = StepCost(step_ns=18e6, row_ns=2.5e6, prompt_ns=0.4e6)
SUSPECT, MORE_WORK = 24, 40
WITHIN = 0.4  # the noise of a trial, as a share of the noise of a result


def outcome_of(factors: list[tuple[float, float]]):
    """Trials of static and continuous batching whose steps cost so many times the usual."""

    def served(factor: float):
        cost = KnownCost("an invented cost", COST.scaled(factor), (1, 8), 512, 512)
        serving, workload = ServingSpec(batch_size=8), WorkloadSpec(queue_size=16)
        return conduct(Experiment(workload=workload, serving=serving, simulated=True, cost=cost))

    pairs = [(served(static), served(continuous)) for static, continuous in factors]
    recordings = {
        name: [pair[i].recordings[name][0] for pair in pairs]
        for i, name in enumerate(("static", "continuous"))
    }
    return replace(pairs[0][0], recordings=recordings)


def write(folder: Path, index: int, factor: float, noise: float, random: np.random.Generator):
    """The result of one invented commit."""
    shared = factor * math.exp(noise * random.standard_normal())
    factors = [tuple(shared * np.exp(WITHIN * noise * random.standard_normal(2))) for _ in range(3)]
    data = dict(make_result(outcome_of(factors)).data)
    commit = hashlib.sha1(f"invented {index}".encode()).hexdigest()[:12]
    created = datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(days=index)
    data["created_at"] = created.isoformat(timespec="seconds")
    data["environment"] = {**data["environment"], "git_commit": commit}
    if index == SUSPECT:
        data["validity"] = {"status": "suspect", "reasons": ["made up to be so"]}
    if index >= MORE_WORK:
        data["strategies"]["continuous"]["counters"]["forward_passes"] += 1
    place = folder / f"{index:03}-{commit}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the history."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=int, default=48)
    parser.add_argument("--change", action="append", metavar="AT:PERCENT")
    parser.add_argument("--noise", type=float, default=1.0, help="sd of a result, percent")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    changes = [
        (int(at), float(percent))
        for at, _, percent in (c.partition(":") for c in asked.change or ["15:-4", "32:3"])
    ]
    random = np.random.default_rng(asked.seed)
    for index in range(asked.results):
        factor = math.prod(1 + percent / 100 for at, percent in changes if index >= at)
        write(asked.folder, index, factor, asked.noise / 100, random)
    print(f"{asked.results} invented results in {asked.folder}")


if __name__ == "__main__":
    main()
