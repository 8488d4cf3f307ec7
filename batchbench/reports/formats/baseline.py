"""A baseline on a terminal: what it is, how old, and what it holds."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.studies.gate.baseline import OLD_DAYS, Baseline, speedup


def render(baseline: Baseline) -> RenderableType:
    """Age, machine, the command that made it; then the work, and the ratios with their scatter."""
    data, processes = baseline.data, baseline.processes
    environment, model = data["environment"], data["model"]
    packages = ", ".join(f"{n} {v}" for n, v in environment["packages"].items())
    age = Text(f"Baseline, {baseline.age} ({data['created_at']})", "bold")
    if baseline.age_days > OLD_DAYS:
        age.stylize("bold yellow")
    commit = environment.get("git_commit") or "N/A"
    lines = (
        f"{model['name']} · {model['device']} {model['dtype']} · {baseline.machine}",
        f"batchbench {data['batchbench_version']} · commit {commit} · {packages}",
        f"{len(processes)} fresh processes · {baseline.throughput(baseline.candidate):,.0f} "
        f"tok/s under {baseline.candidate}",
    )
    grid = Table(pad_edge=False)
    grid.add_column("Faster than", overflow="fold")
    for title in ("Ratio", "Scatter", "Processes"):
        grid.add_column(title, justify="right")
    for twin in data["lanes"][1:]:
        scatter = float(np.std([p.ratios[twin] for p in processes], ddof=1))
        grid.add_row(
            twin, f"{speedup(processes, twin):.3f}×", f"{scatter:.1%}", str(len(processes))
        )
    work = Table(pad_edge=False)
    work.add_column("Counted of", overflow="fold")
    for title in ("Forward passes", "Useful slot-steps", "Idle", "Outputs"):
        work.add_column(title, justify="right")
    for name, counts in data["work"].items():
        figures = ("forward_passes", "useful_slot_steps", "idle_slot_steps")
        told = [f"{counts[f]:,}" if f in counts else "N/A" for f in figures]
        work.add_row(name, *told, (counts["output_digest"] or "N/A")[:8])
    return Group(
        age, *map(Text, lines), Text(), grid, Text(), work, Text(f"Again: {data['command']}")
    )
