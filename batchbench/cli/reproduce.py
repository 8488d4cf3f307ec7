"""The command reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.output import echo, echo_json, interruptible, make_console, output_folder
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
class ReproduceSpec:
    """Output of ``reproduce``."""

    output: Path | None = setting(
        None,
        "Folder for the result of the second run.",
        "Output",
        metavar="DIR",
        default_text="it is not kept",
    )
    overwrite: bool = setting(False, "Replace a result in the folder.", "Output")
    json: bool = setting(False, "Print only the comparison, as JSON.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options()
def reproduce(
    folder: Annotated[
        Path, typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False)
    ],
    study: ReproduceSpec,
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import load_result
    from batchbench.studies import reproduce as reproducing

    output, lost = study.output, "nothing was compared"
    recorded = load_result(folder)
    with (
        output_folder(output, overwrite=study.overwrite, lost=lost)
        if output
        else interruptible(lost)
    ):
        with make_display(quiet=study.quiet, strategies=len(recorded.names)) as display:
            reproduction = reproducing.reproduce(recorded, display)
        if output and reproduction.again is not None:
            write_folder(output, reproduction.again)
        if study.json:
            echo_json(json.dumps(reproduction.as_data(), indent=2, ensure_ascii=False) + "\n")
        elif study.quiet:
            echo(reproduction.sentence)
        else:
            make_console().print(render(reproduction))
    if not reproduction.agrees:
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
    style = "bold" if reproduction.agrees else "bold red"
    parts = [_environment(reproduction), Text(), Text(reproduction.sentence, style), Text(), grid]
    again = reproduction.again
    if again is not None and (reasons := again.data["validity"]["reasons"]):
        parts.append(Text(f"The second run is suspect: {'; '.join(reasons)}.", "yellow"))
    return Group(*parts)


def _environment(reproduction: Reproduction) -> RenderableType:
    if not reproduction.differences:
        return "Environment differences: none."
    grid = Table(title="Environment differences", pad_edge=False, title_style="bold", box=None)
    for title in ("", "recorded", "here"):
        grid.add_column(title, overflow="fold", header_style="dim")
    for name, *values in reproduction.differences:
        spelled = [f"{v:,}" if type(v) is int else str("–" if v is None else v) for v in values]
        grid.add_row(name, *spelled)
    return grid
