"""The pictures of a sweep: those that its grid has axes for, and why the others are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from batchbench.reports.cells import Cells
from batchbench.reports.figures.card import house_style
from batchbench.reports.figures.load import KNOBS, draw_frontier, draw_latency_by_load, load_of
from batchbench.reports.figures.scaling import draw_speedup_by_share, draw_throughput_by_batch

PICTURES: Mapping[str, Callable[[Cells], Figure]] = {
    "throughput": draw_throughput_by_batch,
    "latency": draw_latency_by_load,
    "speedup": draw_speedup_by_share,
    "frontier": draw_frontier,
}


def draw_sweep(cells: Cells) -> tuple[dict[str, Figure], dict[str, str]]:
    """Pictures by name, and for each of the others what the grid would need."""
    missing = _missing(cells)
    with house_style():
        figures = {name: draw(cells) for name, draw in PICTURES.items() if name not in missing}
    return figures, missing


def _missing(cells: Cells) -> dict[str, str]:
    found = {}
    if "batch_size" not in cells.varying:
        found["throughput"] = "needs several batch sizes, such as --batch-size 1,2,4,8"
    if load_of(cells) is None:
        found["latency"] = "needs several loads, such as --request-rate 1:16:5"
    if "long_every" not in cells.varying:
        found["speedup"] = "needs several shares of long requests, such as --long-every 2,4,8"
    elif cells.typical["speedup"].isna().all():
        found["speedup"] = "needs two strategies in a cell, such as --strategy static,continuous"
    if not any(name in KNOBS for name in cells.varying):
        found["frontier"] = "needs several batch sizes or loads"
    return found
