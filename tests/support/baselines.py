"""Made-up baselines and processes, as ``check`` measures them."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.studies.gate.check import Process
from batchbench.studies.gate.duet import Cut
from batchbench.studies.gate.processes import ProcessReport

COUNTS = {
    "forward_passes": 130,
    "useful_slot_steps": 680,
    "idle_slot_steps": 360,
    "computed_passes": 130,
    "output_digest": "a" * 64,
}
WORK = {
    "continuous": COUNTS,
    "static": {**COUNTS, "forward_passes": 400, "computed_passes": 400},
    "notebook/continuous": {**COUNTS, "forward_passes": 132, "computed_passes": 132},
}
ENVIRONMENT = {
    "cpu": "a cpu",
    "cpu_cores": 2,
    "threads": 1,
    "gpu": None,
    "python": "3.12.1",
    "packages": {"torch": "2.13.0", "transformers": "5.24.0", "numpy": "2.4.0"},
    "git_commit": "c0ffee000000",
}
MODEL = {
    "name": "toy-gpt2",
    "device": "cpu",
    "dtype": "float32",
    "execution": "eager",
    "load_format": "dummy",
    "weights_digest": "b" * 64,
}
CUT = Cut(8, 1, 2)


def process(
    chance: random.Random, loss: float = 0.0, *, sd: float = 0.02, busy: float = 0.0
) -> Process:
    """One whose candidate is slower by a log ratio than usual."""
    ratios = {"static": -1.1, "notebook/continuous": -0.35}
    return Process(
        ratios={name: value + loss + chance.gauss(0, sd) for name, value in ratios.items()},
        step_ns={"continuous": 5e6 * (1 + loss), "static": 5e6, "notebook/continuous": 8e6},
        passes={"continuous": 130, "static": 400, "notebook/continuous": 132},
        busy=busy,
        seconds=10.0,
    )


def measured(made: Process, work: Any = WORK, **changes: Any) -> tuple[Process, ProcessReport]:
    """The measurements of a fresh process, and its report."""
    told = {
        "workload": {"digest": "d" * 64, "closed": True, "total_output_tokens": 680},
        "environment": ENVIRONMENT,
        "model": MODEL,
        "also": {},
        **changes,
    }
    hello = {"version": "1", "file": "here"}
    return made, ProcessReport(hello, told, {"work": work, "varied": {}})


def baseline_data(days: float = 1.0, **changes: Any) -> dict[str, Any]:
    """The data of a baseline."""
    chance = random.Random(7)
    return {
        "schema_version": 1,
        "kind": "baseline",
        "batchbench_version": "1",
        "created_at": (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds"),
        "command": "batchbench baseline save --preset ci",
        "config": Experiment.of(preset="ci").config(),
        "environment": ENVIRONMENT,
        "model": MODEL,
        "workload": {"digest": "d" * 64, "closed": True, "total_output_tokens": 680},
        "work": WORK,
        "cut": {"pieces": CUT.pieces, "times": CUT.times, "cycles": CUT.cycles},
        "lanes": list(WORK),
        "processes": [vars(process(chance)) for _ in range(12)],
        **changes,
    }


def write_baseline(file: Path, **changes: Any) -> Path:
    """Put one into a file."""
    file.write_text(json.dumps(baseline_data(**changes)), encoding="utf-8")
    return file
