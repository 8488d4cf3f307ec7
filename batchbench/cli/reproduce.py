"""The command reproduce."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from batchbench.errors import Interrupted

REPRODUCE_HELP = """Run the experiment of a result again, and say what agrees.

The workload, the weights and the counters must be the same, the outputs too where the environment
is alike (elsewhere numerical ties may be), and times lie within their intervals. Exit code 0: all
that is exact agrees; 1: something does not; 2: it cannot be run here.

Example: batchbench reproduce batchbench-results/my-run"""


def reproduce(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Write the result of the second run there; else it is not kept.",
            rich_help_panel="Output",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the receipt as JSON on standard output, and nothing else.",
            rich_help_panel="Output",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", help="No progress, and only the sentence.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Hold a result against the same experiment, run again."""
    from batchbench.cli.display import make_display
    from batchbench.reports.destination import check_folder, remove_if_empty
    from batchbench.reports.result import load_result
    from batchbench.studies import receipt as receipts
    from batchbench.studies.reproduce import reproduce as run_again

    recorded = load_result(folder)
    made = check_folder(output, overwrite=False) if output else []
    trials = len(recorded.recordings[recorded.names[0]])
    try:
        with make_display(tuple(recorded.names), trials, quiet=quiet) as display:
            receipt = run_again(recorded, display)
        if output and receipt.again is not None:
            from batchbench.reports.folder import write_folder

            write_folder(output, receipt.again)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing was compared") from error
    finally:
        remove_if_empty(made)
    if json:
        typer.echo(json_format.dumps(receipt.as_data(), indent=2, ensure_ascii=False))
    elif quiet:
        typer.echo(receipt.sentence)
    else:
        from rich.console import Console

        Console(highlight=False).print(receipts.render(receipt))
    if not receipt.agrees:
        raise typer.Exit(1)
