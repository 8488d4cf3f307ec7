"""Messages for the errors of Typer: the option or argument, and what to type."""

from __future__ import annotations

import re
from typing import Any

import typer

from batchbench.errors import shown

_LEFT_OVER = re.compile(r" \((?P<words>.*)\)$", re.DOTALL)
_COMMAND = re.compile(r"No such command '(?P<name>.*)'\.", re.DOTALL)


def spell_usage(error: typer.TyperException) -> str:
    """Return the message of a command line that Typer cannot parse; empty if help was shown.

    Typer's classes of errors are private. Their attributes, or else their texts, tell them
    apart.
    """
    context: Any = getattr(error, "ctx", None)
    command: str = context.command_path if context else "batchbench"
    option: str | None = getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):
        near = sorted(error.possibilities or ())
        hint = f"did you mean {near[0]}?" if near else f"{command} --help lists the options"
        return f"{shown(option)}: no such option; {hint}"
    if option is not None:
        if "not take a value" in error.message:
            return f"{shown(option)}: takes no value; give {shown(option)} alone"
        return f"{shown(option)}: needs a value; {command} --help says which"
    if hasattr(error, "param_type"):
        param = getattr(error, "param", None)
        name = getattr(param, "metavar", None) or getattr(param, "name", "an argument")
        return f"{name}: is missing; {command} --help says what to give"
    return _of_text(error.format_message(), command)


def _of_text(message: str, command: str) -> str:
    if unknown := _COMMAND.match(message):
        return f"{shown(unknown['name'])}: no such command; {command} --help lists them"
    if rest := _LEFT_OVER.search(message):
        return f"{shown(rest['words'])}: too many arguments; {command} --help says what it takes"
    return message
