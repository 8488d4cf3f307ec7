"""The files of a sweep: one table, one JSON, and the pictures that its grid has axes for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchbench.files import write_whole
from batchbench.reports.cells import Cells
from batchbench.reports.figures import render
from batchbench.reports.text import spell_option
from batchbench.studies.sweep.figures import PICTURES, draw_sweep
from batchbench.studies.sweep.report import Findings, to_json
from batchbench.studies.sweep.table import table_of, to_csv


@dataclass(frozen=True)
class Written:
    """What was written, and what is shown of it."""

    files: Sequence[Path]
    json: str
    cells: Cells | None  # None where no cell could be served
    not_drawn: dict[str, str]  # by picture, why


def write_sweep(folder: Path, findings: Findings, command: str) -> Written:
    """Write ``sweep.json``, ``sweep.csv`` and the pictures; those of an older grid go."""
    cells = cells_of(findings)
    figures, not_drawn = draw_sweep(cells) if cells is not None else ({}, {})
    json = to_json(findings, command, not_drawn)
    contents: dict[str, bytes | str] = {"sweep.json": json}
    contents["sweep.csv"] = to_csv(table_of(findings.rows))
    for name, figure in figures.items():
        for format in ("png", "svg"):
            contents[f"{name}.{format}"] = render(figure, format)
    stale = [f"{name}.{format}" for name in PICTURES for format in ("png", "svg")]
    return Written(write_whole(folder, contents, stale), json, cells, not_drawn)


def cells_of(findings: Findings) -> Cells | None:
    """The table with a title; None where no cell was served."""
    if not findings.rows:
        return None
    frame = table_of(findings.rows)
    columns = {"strategy": "strategies"}
    asked = (columns.get(name, name) for name in findings.grid.varying)
    # Of an option all but one of whose values failed nothing can be drawn.
    varying = tuple(n for n in asked if n in frame and frame[n].nunique(dropna=False) > 1)
    return Cells(frame, varying, findings.grid.simulated, _title(findings))


def _title(findings: Findings) -> str:
    """Model, device, and the options that were given and do not vary."""
    models = [found.data["model"] for found in findings.served if found.data is not None]
    names = list(dict.fromkeys(model["name"] for model in models))
    places = list(
        dict.fromkeys(
            "simulated" if findings.grid.simulated else f"{m['device']} {m['dtype']}"
            for m in models
        )
    )
    parts = [
        names[0] if len(names) == 1 else f"{len(names)} models",
        places[0] if len(places) == 1 else f"{len(places)} devices or number formats",
    ]
    parts += [
        spell_option(name, values[0])
        for name, values in findings.grid.axes.items()
        if len(values) == 1 and name not in ("model", "dtype", "device", "strategy", "trials")
    ]
    return " · ".join(parts)
