"""The command reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.settings import setting

REPRODUCE_HELP = """Run the experiment of a result again, and say what agrees.

The workload, the weights and the counters must be the same, the outputs too where the environment
is alike (elsewhere numerical ties may be), and times lie within their intervals. Exit code 0: all
that is exact agrees; 1: something does not; 2: it cannot be run here.

Example: batchbench reproduce batchbench-results/my-run"""


@dataclass(frozen=True)
class ReproduceSpec:
    """The output of ``reproduce``: the second run and the receipt."""

    output: Path | None = setting(
        None,
        "Folder for the result of the second run.",
        "Output",
        metavar="DIR",
        default_text="it is not kept",
    )
    overwrite: bool = setting(False, "Replace a result that the folder holds.", "Output")
    json: bool = setting(
        False, "Print the receipt as JSON on standard output, and nothing else.", "Output"
    )
    quiet: bool = setting(False, "No progress, and only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"asked": ReproduceSpec})
def reproduce(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False),
    ],
    asked: ReproduceSpec,
) -> None:
    """Hold a result against the same experiment, run again."""
    from batchbench.cli.output import interruptible, output_folder
    from batchbench.cli.progress import make_display
    from batchbench.reports.result import load_result
    from batchbench.studies import reproduce as receipts
    from batchbench.studies.reproduce import reproduce as run_again

    output = asked.output
    recorded = load_result(folder)
    trials = len(recorded.recordings[recorded.names[0]])
    lost = "nothing was compared"
    with (
        output_folder(output, overwrite=asked.overwrite, lost=lost)
        if output
        else interruptible(lost)
    ):
        with make_display(tuple(recorded.names), trials, quiet=asked.quiet) as display:
            receipt = run_again(recorded, display)
        if output and receipt.again is not None:
            from batchbench.reports.output import write_folder

            write_folder(output, receipt.again)
        if asked.json:
            echo_json(json.dumps(receipt.as_data(), indent=2, ensure_ascii=False) + "\n")
        elif asked.quiet:
            echo(receipt.sentence)
        else:
            from rich.console import Console

            Console(highlight=False, markup=False, emoji=False).print(receipts.render(receipt))
    if not receipt.agrees:
        raise typer.Exit(1)
