"""The program: commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import Annotated

import typer

import batchbench
from batchbench.cli import breakeven as mapping
from batchbench.cli import capacity as capacities
from batchbench.cli import check as checking
from batchbench.cli import compare as comparing
from batchbench.cli import duet as dueting
from batchbench.cli import ladder as climbing
from batchbench.cli import predict as predicting
from batchbench.cli import reproduce as reproducing
from batchbench.cli import run as running
from batchbench.cli import sweep as sweeping
from batchbench.cli import trend as looking_back
from batchbench.cli import watch as watching
from batchbench.cli import workload
from batchbench.cli.usage import spell_usage
from batchbench.errors import BatchbenchError, one_line

app = typer.Typer(
    name="batchbench",
    help="How much does continuous batching buy over static batching, on your hardware and "
    "workload, and why?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchbench {batchbench.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """How much does continuous batching buy over static batching, and why?"""


app.command("run", help=running.RUN_HELP)(running.run)
app.command("simulate", help=running.SIMULATE_HELP)(running.simulate)
app.command("predict", help=predicting.PREDICT_HELP)(predicting.predict)
app.command("breakeven", help=mapping.BREAKEVEN_HELP)(mapping.breakeven)
app.command("sweep", help=sweeping.SWEEP_HELP)(sweeping.sweep)
app.command("ladder", help=climbing.LADDER_HELP)(climbing.ladder)
app.command("capacity", help=capacities.CAPACITY_HELP)(capacities.capacity)
app.command("report", help=running.REPORT_HELP)(running.report)
app.command("reproduce", help=reproducing.REPRODUCE_HELP)(reproducing.reproduce)
app.command("watch", help=watching.WATCH_HELP)(watching.watch)
app.command("compare", help=comparing.COMPARE_HELP)(comparing.compare)
app.command("duet", help=dueting.DUET_HELP)(dueting.duet)
app.command("check", help=checking.CHECK_HELP)(checking.check)
app.command("trend", help=looking_back.TREND_HELP)(looking_back.trend)
app.add_typer(checking.app, name="baseline")
app.add_typer(workload.app, name="workload")


def main() -> None:
    """Run the program and exit with its code."""
    sys.exit(_guarded())


def _guarded() -> int:
    """The exit code; every error is one line on standard error."""
    try:
        code = app(standalone_mode=False, prog_name="batchbench")
        sys.stdout.flush()
        return int(code or 0)
    except BatchbenchError as error:
        return _say(str(error), error.exit_code)
    except typer.TyperException as error:
        message = spell_usage(error)
        return _say(message, 2) if message else 2  # without: the help has been shown
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except Exception as error:
        return _say(
            f"a fault of batchbench itself: {type(error).__name__}: {error}; please report it with "
            f"the traceback in {_save_traceback()}",
            70,
        )


def _say(message: str, code: int) -> int:
    print(f"batchbench: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return code


def _save_traceback() -> str:
    handle, path = tempfile.mkstemp(prefix="batchbench-crash-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        traceback.print_exc(file=file)
    return path
