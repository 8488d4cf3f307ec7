"""The command sweep."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from batchbench import settings
from batchbench.cli.options import typed_command, with_options
from batchbench.cli.output import echo, output_folder, show
from batchbench.errors import UsageError
from batchbench.reports.slo import GoalsSpec
from batchbench.settings import setting
from batchbench.studies.executors.spec import ExecutorSpec, clients_of, make_executor
from batchbench.studies.sweep.grid import SWEPT, Grid

SWEEP_HELP = (
    "Run a grid of experiments: any option of run may have many values.\n\n"
    "Give numbers as lists or as ranges that include their stop (--batch-size 1,2,4,8 --queue-size "
    "16:64:16), flags as --flag --no-flag, and repeat other options (--dtype float32 --dtype "
    "bfloat16). --strategy names the strategies that run side by side in each cell. Finished cells "
    "are kept, so the same command continues where it stopped.\n\n"
    "Example: batchbench sweep --batch-size 1,2,4,8,16,32 --long-every 8 --simulated"
)


@dataclass(frozen=True)
class SweepSpec:
    """Options of ``sweep`` itself."""

    simulated: bool = setting(
        False, "Serve on a virtual clock, as simulate does, with one trial per cell.", "Sweep"
    )
    retry_failed: bool = setting(
        False, "Retry cells that failed, such as a batch that did not fit.", "Sweep"
    )
    dry_run: bool = setting(
        False, "List the cells with their forward passes; run nothing.", "Sweep"
    )
    output: Path | None = setting(
        None,
        "Folder for sweep.csv, sweep.json, pictures and the finished cells.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/sweep-<digest of the grid>",
    )
    json: bool = setting(False, "Print only sweep.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"goals": GoalsSpec, "study": SweepSpec, "machines": ExecutorSpec}, swept=SWEPT)
def sweep(
    axes: Mapping[str, tuple[Any, ...]], goals: GoalsSpec, study: SweepSpec, machines: ExecutorSpec
) -> None:
    from batchbench.batching.session import conduct
    from batchbench.cli.progress import make_sweep_display
    from batchbench.studies.sweep.run import Store, ask_servers, lines_of, run_cells

    grid = Grid(axes, study.simulated)
    if study.dry_run:
        for line in lines_of(grid):
            echo(line)
        return
    grid = replace(grid, servers=ask_servers(grid))
    place = study.output or Path("batchbench-results") / f"sweep-{grid.digest}"
    lost = "the same command continues from the cells that are kept"
    with output_folder(place, lost=lost) as folder:
        store = Store(folder)
        for cell in grid.cells if study.retry_failed else ():
            store.forget_failure(cell)
        price = goals.price_per_hour
        with make_sweep_display(grid, quiet=study.quiet, price_per_hour=price) as display:
            asked = store.unfinished(grid)
            kept = store.machine(grid) if asked and machines.executor != "local" else None
            if any(e.target is not None and e.target.clients > 1 for e in asked):
                with clients_of(machines, asked, folder, display) as start:
                    run_cells(grid, store, display, partial(conduct, start=start))
            else:
                with closing(make_executor(machines, asked, folder, display, kept)) as executor:
                    run_cells(grid, store, display, executor=executor)
        from batchbench.studies.sweep import report  # pandas and matplotlib, only now

        swept = report.read_sweep(grid, store, goals)
        command = typed_command(keep=["output"])
        files, text, not_drawn = report.write_sweep(folder, swept, command)
        cells = report.cells_of(swept)
        show(
            study,
            lambda: text,
            lambda: report.sentence(swept, cells),
            lambda: report.render(swept, cells, not_drawn),
            command,
            files,
        )
        if not swept.served:
            raise UsageError(f"no cell could be served: {swept.failed[0].reason}")
        if swept.failed or swept.wrong or swept.broken:
            raise typer.Exit(1)
