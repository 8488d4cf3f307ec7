"""The command reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.cli.options import ResultFolder, Spec, folder_setting, with_options
from batchbench.cli.output import output_folder, show
from batchbench.json_file import json_text
from batchbench.settings import setting

if TYPE_CHECKING:
    from batchbench.studies.reproduce import Reproduction

REPRODUCE_HELP = """Run the experiment of a result again and compare the two results.

Workload, weights and counters must be the same. Outputs must be the same on the same kind of
machine; on other machines they may differ by numerical ties. Times are compared by their intervals.
Exit code 0: all exact checks agree, even if times differ; 1: an exact check differs; 2: the
experiment cannot run here.

Example: batchbench reproduce batchbench-results/my-run"""


@dataclass(frozen=True)
class ReproduceSpec(Spec):
    """Output of ``reproduce``."""

    output: Path | None = folder_setting("the result of the second run", "it is not kept")
    overwrite: bool = setting(False, "Replace a result in the folder.", "Output")
    json: bool = setting(False, "Print only the comparison, as JSON.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")


@with_options()
def reproduce(
    folder: ResultFolder,
    study: ReproduceSpec,
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import load_result
    from batchbench.studies import reproduce as reproducing

    recorded, lost = load_result(folder), "nothing was compared"
    with output_folder(study.output, overwrite=study.overwrite, lost=lost):
        with make_display(quiet=study.quiet, strategies=len(recorded.names)) as display:
            again = reproducing.reproduce(recorded, display)
        if study.output and again.again is not None:
            write_folder(study.output, again.again)
        show(study, json_text(again.as_data()), again.sentence, render(again), "", [])
    if not again.agrees:
        raise typer.Exit(1)


_STYLES = {"agrees": "green", "ties": "yellow", "differs": "bold red"}


def render(reproduction: Reproduction) -> RenderableType:
    """Return environment differences, the sentence, and one row per check."""
    grid = Table(pad_edge=False)
    for title in ("Check", "Recorded", "Here"):
        grid.add_column(title, overflow="fold")
    grid.add_column("", no_wrap=True)
    for check in reproduction.checks:
        style = _STYLES.get(check.verdict, "dim")
        if not check.exact and check.verdict != "agrees":
            style = "yellow"
        grid.add_row(check.name, check.recorded, check.here, Text(check.verdict, style))
    parts: list[RenderableType] = ["Environment differences: none."]
    if reproduction.differences:
        changes = Table(
            title="Environment differences", title_style="bold", pad_edge=False, box=None
        )
        for title in ("", "recorded", "here"):
            changes.add_column(title, overflow="fold", header_style="dim")
        for name, *values in reproduction.differences:
            changes.add_row(name, *map(_spelled, values))
        parts = [changes]
    style = "bold" if reproduction.agrees else "bold red"
    parts += [Text(), Text(reproduction.sentence, style), Text(), grid]
    again = reproduction.again
    if again is not None and (reasons := again.data["validity"]["reasons"]):
        parts.append(Text(f"The second run is suspect: {'; '.join(reasons)}.", "yellow"))
    return Group(*parts)


def _spelled(value: object) -> str:
    return f"{value:,}" if type(value) is int else str("–" if value is None else value)
