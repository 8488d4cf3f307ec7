"""The program: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import _thread
import difflib
import errno
import functools
import importlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Collection, Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from batchbench.cli import output
from batchbench.errors import BatchbenchError, ClosedPipe, UsageError, one_line, shown
from batchbench.files import STOPPING, reason_of
from batchbench.version import __version__

COMMANDS = {
    "run": "Run a workload with static and continuous batching, and compare them.",
    "simulate": "Count the steps that run would take; this needs no model and takes seconds.",
    "predict": "Predict the speed at other batch sizes, and find where more slots stop helping.",
    "breakeven": "Map where continuous batching wins and where static batching wins.",
    "sweep": "Run a grid of experiments: any option of run may have many values.",
    "ladder": "Compare engines, from the notebook's loop to the limits of this hardware.",
    "capacity": "Find the highest request rate that each strategy sustains within --slo.",
    "probe": "Find out if a server batches continuously, and how many slots it has.",
    "report": "Show results again: in the terminal, as a web page, as Markdown or as JSON.",
    "reproduce": "Run the experiment of a result again and compare the two results.",
    "watch": "Replay a result: watch slots fill and empty, with the strategies side by side.",
    "compare": "Compare the results of two versions, and show which differences are real.",
    "duet": "Compare another installation of batchbench with this one, in alternating turns.",
    "check": "Check this version against a saved baseline: counts and outputs exactly, speed by "
    "ratios.",
    "trend": "Find the commits at which performance changed, from saved results.",
    "baseline": "Save counts and speed ratios of this version, for later checks.",
    "workload": "List presets, inspect a workload without running it, or save it.",
    "doctor": "Show what this machine offers, what is missing, and the command that fixes it.",
    "help": "Read a page of the documentation, or the options of a command.",
}
"""The purpose of each command, as in its help. A command is imported when it is used."""

MODULES = {
    **dict.fromkeys(("sweep", "capacity", "ladder"), "studies"),
    "watch": "report",
    "simulate": "run",
    "breakeven": "predict",
    **dict.fromkeys(("compare", "duet", "check", "baseline"), "gate"),
    **dict.fromkeys(("doctor", "help"), "about"),
}
"""Modules of commands that are not named after the command."""

GROUPS = ("baseline", "workload")
"""Commands with subcommands: the ``app`` of their module."""


class _Plain:
    """A command whose help does not state the type of a flag or an argument."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = " "
            elif param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: None  # its name says it
        return params


class _Subcommands(_Plain, TyperGroup):
    """A command with commands of its own."""


class _Group(_Subcommands):
    """The program: it lists its commands by name and purpose, and imports the one that is used."""

    def __init__(self, **attributes: Any) -> None:
        listed = {name: TyperCommand(name, help=purpose) for name, purpose in COMMANDS.items()}
        super().__init__(**{**attributes, "commands": listed})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] in COMMANDS:
            return args[0], load_command(args[0]), args[1:]
        return super().resolve_command(ctx, args)


@functools.cache
def load_command(name: str) -> Any:
    """Import a command and return it with its options."""
    from batchbench.cli.options import Command

    class Kind(_Plain, Command):
        """A command with options."""

    module = importlib.import_module(f"batchbench.cli.{MODULES.get(name, name)}")
    if name in GROUPS:
        for info in module.app.registered_commands:
            info.cls = Kind
        module.app.info.cls = _Subcommands
        group = typer.main.get_group(module.app)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    # Lines of a paragraph are joined: the terminal wraps them at its own width.
    help = re.sub(r"(?<!\n)\n(?!\n|Example: )", " ", getattr(module, f"{name.upper()}_HELP"))
    alone.command(name, help=help, cls=Kind)(getattr(module, name))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="batchbench",
    cls=_Group,
    help="Measure how much continuous batching gains over static batching on your hardware and "
    "workload, or on a server, and show why.",
    epilog="Start with: batchbench run. For the terms, run: batchbench help glossary.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.echo(f"batchbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the program and exit with its code."""
    output.prepare()
    # matplotlib warns if its cache of fonts cannot be written; it works without one.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    received = _interrupt_on_signals()
    try:
        code = run_command()
    except KeyboardInterrupt:  # while another error was being printed
        code = 130
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if received and code not in _ANSWERS:
        code = 128 + received[0]
    if code > 128:
        # After Ctrl-C within an import, the interpreter would otherwise end with the signal.
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


def run_command(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every error is one line on standard error.

    Args:
        words: the words after ``batchbench``; those of the process if None.
    """
    try:
        try:
            os.getcwd()
        except OSError as error:
            why = "the current folder was deleted; change to one that exists"
            raise UsageError(why) from error
        code = app(words, standalone_mode=False, prog_name="batchbench")
        sys.stdout.flush()
        if code == 130:  # Ctrl-C that typer has caught
            return _report("interrupted", 130)
        return int(code or 0)
    except SystemExit as done:  # of shell completion
        return int(done.code or 0)
    except ClosedPipe as error:
        return error.exit_code
    except BatchbenchError as error:
        return _report(str(error), error.exit_code)
    except typer.TyperException as error:
        usage = spell_usage(error)
        return _report(usage, 2) if usage else 2  # an empty one: the help was shown
    except (KeyboardInterrupt, typer.Abort):
        return _report("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and (message := _system_message(error)):
            return _report(message, 2)
        return _report(
            f"internal error: {type(error).__name__}: {error}; please report it with the "
            f"traceback {_save_traceback()}",
            70,
        )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _system_message(error: OSError) -> str | None:
    """Return the message for an error of the system; None if it may be a bug of ours."""
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason_of(error)}"
    return f"a file cannot be written: {reason_of(error)}" if error.errno in _FULL else None


def _report(message: str, code: int) -> int:
    output.echo(f"batchbench: {one_line(message)}", err=True)
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


SIMILAR = {
    "--dataset-path": "--trace FILE",
    "--goodput": "--slo METRIC:MS",
    "--num-iters": "--trials",
    "--enforce-eager": "--execution eager",
}
"""Options of ``vllm bench`` that are written differently here; an error names the replacement."""

_LEFT_OVER = re.compile(r" \((?P<words>.*)\)$", re.DOTALL)
_COMMAND = re.compile(
    r"No such command '(?P<name>.*?)'(\.|\. Did you mean '(?P<near>.*?)'.*)$", re.DOTALL
)


def _nearest(option: str, own: Collection[str]) -> str | None:
    """Return the option that was probably meant."""
    from batchbench.cli.options import ALIASES

    names = {*own, "--help", *(alias for alias, name in ALIASES.items() if name in own)}
    return next(iter(difflib.get_close_matches(option, sorted(names), n=1, cutoff=0.85)), None)


def spell_usage(error: typer.TyperException) -> str:
    """Return the message for a command line that Typer cannot parse; empty if help was shown.

    Typer's error classes are private, so their attributes, or else their texts, tell them apart.
    """
    context: Any = getattr(error, "ctx", None)
    command: str = context.command_path if context else "batchbench"
    option: str | None = getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):
        own = {name for param in context.command.params for name in param.opts}
        ours, near = SIMILAR.get(option or "", ""), _nearest(option or "", own)
        hint = f"did you mean {near}?" if near else f"{command} --help lists the options"
        if ours.partition(" ")[0] in own:
            hint = f"use {ours}"
        if option in ("--target", "--base-url"):
            hint = f"{command} measures no server; run, sweep, capacity and probe do"
            hint = f"give the URL alone: {command} URL" if command.endswith(" probe") else hint
        return f"{shown(option)}: no such option; {hint}"
    if option is not None:
        if "not take a value" in error.message:
            return f"{shown(option)}: takes no value; give {shown(option)} alone"
        return f"{shown(option)}: needs a value; {command} --help says which"
    if hasattr(error, "param_type"):
        param = getattr(error, "param", None)
        name = getattr(param, "metavar", None) or getattr(param, "name", "an argument")
        return f"{name}: is missing; {command} --help says what to give"
    message = error.format_message()
    if unknown := _COMMAND.match(message):
        near = unknown["near"]
        hint = f"did you mean {near}?" if near else f"{command} --help lists them"
        return f"{shown(unknown['name'])}: no such command; {hint}"
    if rest := _LEFT_OVER.search(message):
        return f"{shown(rest['words'])}: too many arguments; {command} --help says what it takes"
    return message
