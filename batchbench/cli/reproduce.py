"""The command reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.output import echo, echo_json, interruptible, output_folder
from batchbench.settings import setting

REPRODUCE_HELP = """Run the experiment of a result again and compare the two results.

Workload, weights and counters must be the same. So must outputs on the same kind of machine;
elsewhere they may differ by numerical ties. Times are compared by their intervals. Exit code 0: all
exact checks agree, even if times differ; 1: one differs; 2: it cannot be run here.

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
    json: bool = setting(
        False, "Print the comparison as JSON on standard output, and nothing else.", "Output"
    )
    quiet: bool = setting(False, "Show no progress, and only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"study": ReproduceSpec})
def reproduce(
    folder: Annotated[
        Path, typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False)
    ],
    study: ReproduceSpec,
) -> None:
    from rich.console import Console

    from batchbench.cli.progress import make_display
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import load_result
    from batchbench.studies import reproduce as reproducing

    output, lost = study.output, "nothing was compared"
    recorded = load_result(folder)
    trials = len(recorded.recordings[recorded.names[0]])
    with (
        output_folder(output, overwrite=study.overwrite, lost=lost)
        if output
        else interruptible(lost)
    ):
        with make_display(tuple(recorded.names), trials, quiet=study.quiet) as display:
            reproduction = reproducing.reproduce(recorded, display)
        if output and reproduction.again is not None:
            write_folder(output, reproduction.again)
        if study.json:
            echo_json(json.dumps(reproduction.as_data(), indent=2, ensure_ascii=False) + "\n")
        elif study.quiet:
            echo(reproduction.sentence)
        else:
            console = Console(highlight=False, markup=False, emoji=False)
            console.print(reproducing.render(reproduction))
    if not reproduction.agrees:
        raise typer.Exit(1)
