"""The command sweep."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError
from batchbench.reports.slo import GoalsSpec
from batchbench.settings import setting
from batchbench.studies.sweep.grid import SWEPT, Grid

if TYPE_CHECKING:
    from batchbench.studies.sweep.report import Findings
    from batchbench.studies.sweep.store import Store

SWEEP_HELP = (
    "Run a grid of experiments: any option of run may have many values.\n\n"
    "Numbers are lists and ranges (--batch-size 1,2,4,8 --queue-size 16:64:16, the stop included "
    "where it is hit), a flag is --flag --no-flag, other options are repeated (--dtype float32 "
    "--dtype bfloat16). --strategy names what runs side by side in each cell. Finished cells are "
    "kept: the same command goes on where it was.\n\n"
    "Example: batchbench sweep --batch-size 1,2,4,8,16,32 --long-every 8 --simulated"
)


@dataclass(frozen=True)
class SweepSpec:
    """How a grid is swept, and where to."""

    simulated: bool = setting(
        False, "Serve on a virtual clock, as simulate does, with one trial a cell.", "Sweep"
    )
    retry_failed: bool = setting(
        False, "Try cells again that are kept as failed, such as a batch that did not fit.", "Sweep"
    )
    dry_run: bool = setting(
        False, "List the cells, with the forward passes of each, and stop.", "Sweep"
    )
    output: Path | None = setting(
        None,
        "Folder for sweep.csv, sweep.json, pictures and the finished cells.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/sweep-<digest of the grid>",
    )
    json: bool = setting(False, "Print sweep.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "No progress, and of the report only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"goals": GoalsSpec, "study": SweepSpec}, swept=SWEPT)
def sweep(axes: Mapping[str, tuple[Any, ...]], goals: GoalsSpec, study: SweepSpec) -> None:
    """Serve what is not finished, then show all."""
    grid = Grid(axes, study.simulated)
    if study.dry_run:
        _dry_run(grid)
        return
    from batchbench.cli.output import output_folder
    from batchbench.studies.sweep.store import Store

    place = study.output or Path("batchbench-results") / f"sweep-{grid.digest}"
    with output_folder(
        place, lost="the same command continues from the cells that are kept"
    ) as folder:
        code = _serve_and_write(grid, Store(folder), goals, study)
        if code:
            raise typer.Exit(code)


def _serve_and_write(grid: Grid, store: Store, goals: GoalsSpec, study: SweepSpec) -> int:
    from batchbench.cli.progress import make_sweep_display
    from batchbench.studies.sweep.run import run_cells

    if study.retry_failed:
        for cell in grid.cells:
            store.forget_failure(cell)
    with make_sweep_display(grid, quiet=study.quiet) as display:
        run_cells(grid, store, display)
    from batchbench.studies.sweep.report import read_findings

    findings = read_findings(grid, store, goals)
    _write_and_show(findings, store.folder, study)
    if not findings.served:
        raise UsageError(f"no cell could be served: {findings.failed[0].reason}")
    return 1 if findings.failed or findings.wrong else 0


def _write_and_show(findings: Findings, folder: Path, study: SweepSpec) -> None:
    from rich.console import Console

    from batchbench.studies.sweep import report as screen
    from batchbench.studies.sweep.report import write_sweep

    goals = settings.words_of(findings.goals, GoalsSpec())
    output = ["--output", str(study.output)] if study.output else []
    command = findings.grid.command(*goals, *output)
    written = write_sweep(folder, findings, command)
    if study.json:
        echo_json(written.json)
        return
    if study.quiet:
        echo(screen.sentence(findings, written.cells))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        screen.render_screen(
            findings, written.cells, screen.notes(findings, written.cells, written.not_drawn)
        )
    )
    console.print(f"\nAgain: {command}", markup=False, soft_wrap=True)
    names = [file.name for file in written.files if file.suffix in (".json", ".csv", ".png")]
    console.print(
        f"Files: {shlex.quote(str(folder))}/ with {', '.join(names)} …",
        markup=False,
        soft_wrap=True,
    )


def _dry_run(grid: Grid) -> None:
    from batchbench.studies.sweep.run import lines_of

    for line in lines_of(grid):
        echo(line)
