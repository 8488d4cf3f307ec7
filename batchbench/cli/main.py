"""The program: commands, and the one place where errors become exit codes."""

from __future__ import annotations

import _thread
import errno
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from batchbench.cli import capacity as capacities
from batchbench.cli import gate as checking
from batchbench.cli import gate as comparing
from batchbench.cli import gate as dueting
from batchbench.cli import ladder as climbing
from batchbench.cli import predict as mapping
from batchbench.cli import predict as predicting
from batchbench.cli import reproduce as reproducing
from batchbench.cli import run as running
from batchbench.cli import streams, workload
from batchbench.cli import sweep as sweeping
from batchbench.cli import trend as looking_back
from batchbench.cli import watch as watching
from batchbench.cli.streams import echo
from batchbench.cli.usage import spell_usage
from batchbench.errors import BatchbenchError, ClosedPipe, UsageError, one_line
from batchbench.files import STOPPING, reason_of
from batchbench.version import __version__

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
        echo(f"batchbench {__version__}")
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
    streams.prepare()
    # matplotlib warns if its cache of fonts cannot be written; it works without one.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    received = _interrupt_on_signals()
    try:
        code = _guarded()
    except KeyboardInterrupt:  # while another error was being printed
        code = 130
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if received and code not in _ANSWERS:
        code = 128 + received[0]
    if code > 128:
        # After Ctrl-C within an import, the interpreter would end itself with the signal instead.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_ANSWERS = (0, 1, 3)
"""Exit codes of a command that was not interrupted."""


def _interrupt_on_signals() -> Sequence[int]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does; return those that arrive, as they arrive.

    An ignored signal, such as SIGHUP under ``nohup``, stays ignored.
    """
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)
    sys.unraisablehook = _interrupt_again
    return received


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Interrupt again if Python dropped the exception, as it does in a finalizer."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)


def _guarded() -> int:
    """Return the exit code; every error is one line on standard error."""
    try:
        _check_current_folder()
        code = app(standalone_mode=False, prog_name="batchbench")
        sys.stdout.flush()
        if code == 130:  # Ctrl-C that typer has caught
            return _say("interrupted", 130)
        return int(code or 0)
    except ClosedPipe as error:
        return error.exit_code
    except BatchbenchError as error:
        return _say(str(error), error.exit_code)
    except typer.TyperException as error:
        message = spell_usage(error)
        return _say(message, 2) if message else 2  # an empty one: the help has been shown
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and (refusal := _of_the_system(error)):
            return _say(refusal, 2)
        return _say(
            f"a fault of batchbench itself: {type(error).__name__}: {error}; please report it with "
            f"the traceback {_save_traceback()}",
            70,
        )


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError("the current folder was deleted; change to one that exists") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _of_the_system(error: OSError) -> str | None:
    """Return the line for an error of the system; None if the fault may be ours."""
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason_of(error)}"
    return f"a file cannot be written: {reason_of(error)}" if error.errno in _FULL else None


def _say(message: str, code: int) -> int:
    streams.echo(f"batchbench: {one_line(message)}", err=True)
    return code


def _save_traceback() -> str:
    """Save the traceback to a file, or print it if that fails; return words for the place."""
    try:
        handle, path = tempfile.mkstemp(prefix="batchbench-crash-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
    except OSError:
        traceback.print_exc()
        return "above"
    return f"in {path}"
