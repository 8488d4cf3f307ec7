"""Options derived from the fields of specs: commands that share a spec cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from batchbench import settings
from batchbench.settings import setting
from batchbench.studies.numbers import parse_numbers


@dataclass(frozen=True)
class OutputSpec:
    """What is shown and what is written."""

    output: Path | None = setting(
        None,
        "Folder for result.json, recordings, frames and pictures.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/<time>-<model>",
    )
    overwrite: bool = setting(False, "Replace a result that the folder holds.", "Output")
    json: bool = setting(False, "Print result.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "No progress, and of the report only the sentence.", "Output")
    dry_run: bool = setting(
        False, "Say how many steps, how much memory and time it would take, and stop.", "Output"
    )

    def __post_init__(self) -> None:
        settings.check(self)


def with_options(
    specs: Mapping[str, type], defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of several specs; it is called with the specs, parsed.

    Args:
        specs: argument name of the command: dataclass whose fields are made with ``setting``.
        defaults: by field name, where a command's default is not the spec's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            command(**_parsed(specs, values))

        return _signed(call, _parameters(specs, defaults))

    return decorate


def _parameters(
    specs: Mapping[str, type], defaults: Mapping[str, Any] | None = None
) -> list[inspect.Parameter]:
    return [
        _parameter(spec, field, (defaults or {}).get(field.name, field.default))
        for spec in specs.values()
        for field in dataclasses.fields(spec)
    ]


def _signed(
    call: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """The function with the signature from which Typer makes its options."""
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _parsed(specs: Mapping[str, type], values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: spec(**{f.name: _frozen(values[f.name]) for f in dataclasses.fields(spec)})
        for name, spec in specs.items()
    }


def _frozen(value: Any) -> Any:
    """An option that may be repeated comes as a list."""
    return tuple(value) if isinstance(value, list) else value


def with_grid(
    swept: Mapping[str, type], specs: Mapping[str, type]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of several specs, each of which may have many values.

    It is called with ``axes``: the values of each option that was given, by field name; an option
    that is given once has one. Numbers come as lists and ranges, a flag as ``--flag --no-flag``,
    other options are repeated; an option that ``run`` too takes several times is one value.

    Args:
        swept: specs whose fields may have many values.
        specs: argument name of the command: specs of its own, parsed as by :func:`with_options`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = [(spec, field) for spec in swept.values() for field in dataclasses.fields(spec)]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            axes = {
                field.name: _axis(spec, field, values[field.name])
                for spec, field in fields
                if values[field.name]
            }
            command(axes=axes, **_parsed(specs, values))

        parameters = [_parameter(spec, field, field.default, swept=True) for spec, field in fields]
        return _signed(call, [*parameters, *_parameters(specs)])

    return decorate


def _axis(spec: type, field: dataclasses.Field[Any], given: list[Any]) -> tuple[Any, ...]:
    """The values given to a swept option, each once."""
    hint = typing.get_type_hints(spec)[field.name]
    if hint == tuple[str, ...]:
        return (tuple(given),)
    kind = _number(hint)
    if kind is None:
        return tuple(dict.fromkeys(Path(v) if hint == Path | None else v for v in given))
    option = settings.option_name(field.name)
    found = [number for text in given for number in parse_numbers(text, kind, option)]
    return tuple(dict.fromkeys(found))


def _number(hint: Any) -> type[int] | type[float] | None:
    """The kind of number that a field holds, if it does."""
    if hint in (int, int | None):
        return int
    return float if hint in (float, float | None) else None


_METAVARS: dict[Any, str] = {
    bool: " ",
    int: "N",
    int | None: "N",
    float: "X",
    float | None: "X",
}


def _parameter(
    spec: type, field: dataclasses.Field[Any], default: Any, *, swept: bool = False
) -> inspect.Parameter:
    """An option; ``swept`` ones have no default of their own, so that it shows which were given."""
    known = settings.about(field)
    hint = typing.get_type_hints(spec)[field.name]
    name, metavar = settings.option_name(field.name), known.metavar or _METAVARS.get(hint)
    if hint == tuple[str, ...]:  # given once a value
        hint, default = list[str], list(default)
    help = known.help
    if known.choices and not all(choice in help for choice in known.choices):
        help = f"{help.rstrip('.')}: {', '.join(known.choices)}."
    shown: bool | str = known.default_text or (default not in (None, []) and hint is not bool)
    if swept:
        shown = str(default) if shown is True else shown
        if hint is bool:
            name, hint = f"{name}/{name.replace('--', '--no-', 1)}", list[bool] | None
        elif hint != list[str]:
            metavar = f"{metavar},…" if _number(hint) else metavar
            hint = list[str] | None
        default = None
    option = typer.Option(
        default,
        name,
        help=help,
        rich_help_panel=known.panel,
        metavar=metavar or field.name.upper(),
        show_default=shown,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint
    )
