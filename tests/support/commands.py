"""The commands of the program and their options, for tests that go through all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from batchbench.cli.main import COMMANDS, load_command, spell_usage
from batchbench.errors import BatchbenchError
from batchbench.settings import Setting, about, hints_of, kind_of, option_name

JARGON = (
    "Input should be",
    "unable to parse",
    "Invalid value",
    "valid integer",
    "is not of type",
    "unexpected extra",
    "requires an argument",
    "Missing argument",
    "No such",
    "Error",
    "Traceback",
    "invalid literal",
    "could not convert",
)
"""Words of validators and of Python, which no message to a user may contain."""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return all commands of the program that do something, with the words that call them."""
    for name, command in group.items():
        if hasattr(command, "commands"):
            yield from commands(command.commands, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands({name: load_command(name) for name in COMMANDS}))


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of one command, with the field from which it was derived."""

    path: tuple[str, ...]
    spec: type
    field: dataclasses.Field[Any]

    @property
    def name(self) -> str:
        """The option as it is typed."""
        return option_name(self.field.name)

    @property
    def kind(self) -> type:
        """Type of the field's values."""
        return kind_of(hints_of(self.spec)[self.field.name])

    @property
    def known(self) -> Setting:
        """The bounds, unit and choices."""
        return about(self.field)

    def __str__(self) -> str:
        return f"{' '.join(self.path)} {self.name}"


def options_of(path: tuple[str, ...]) -> list[Option]:
    """Return the options of a command."""
    command = ALL[path]
    fields = getattr(command.callback, "fields", ())
    names = {parameter.name for parameter in command.params}
    return [Option(path, spec, field) for spec, field in fields if field.name in names]


OPTIONS = [option for path in ALL for option in options_of(path)]


def arguments_of(path: tuple[str, ...]) -> list[str]:
    """Return words that stand for the arguments of a command."""
    arguments = [p for p in ALL[path].params if p.param_type_name == "argument" and p.required]
    return [f"no-{argument.name}-here" for argument in arguments]


def call(path: tuple[str, ...], words: Sequence[str]) -> tuple[int, str, str]:
    """Return the exit code of a command, its standard output and its line about an error."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            with ALL[path].make_context(path[-1], list(words)) as context:
                ALL[path].invoke(context)
        except BatchbenchError as error:
            return error.exit_code, out.getvalue(), str(error)
        except typer.TyperException as error:
            return 2, out.getvalue(), spell_usage(error)
        except typer.Exit as done:
            return done.exit_code, out.getvalue(), ""
    return 0, out.getvalue(), ""


def check_refused(option: Option, value: str, words: Sequence[str] = ()) -> str:
    """Return the line that refuses a value, after a check of its form."""
    given = [*arguments_of(option.path), *words, f"{option.name}={value}"]
    code, out, line = call(option.path, given)
    assert (code, out) == (2, ""), (option.path, value, line)
    assert line.startswith(option.name), line
    assert line.isprintable(), line
    assert len(line) < 700, line
    assert value[:85] == value or value[:85] not in line, line
    assert not [word for word in JARGON if word in line], line
    return line
