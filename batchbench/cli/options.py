"""Options derived from the fields of specs: commands that share a spec cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from batchbench import settings
from batchbench.batching.presets import Basis
from batchbench.settings import setting


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
    price_per_hour: float | None = setting(
        None,
        "Price of the machine an hour: adds the cost of a million output tokens.",
        "Output",
        min=0.0,
    )

    def __post_init__(self) -> None:
        settings.check(self)


def with_options(
    specs: Mapping[str, type],
    defaults: Mapping[str, Any] | None = None,
    omit: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of several specs; it is called with the specs, parsed.

    Where :class:`Basis` is among the specs, a setting is taken from the options if given there,
    else from ``--workload``'s file, else from ``--preset``, else from the defaults. Parameters of
    the command that are no specs (an argument, say) stay as they are.

    Args:
        specs: argument name of the command: dataclass whose fields are made with ``setting``.
        defaults: by field name, where a command's default is not the spec's.
        omit: fields that the command has no use for, and so no option.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(command).parameters.items() if name not in specs]

        @functools.wraps(command)
        def call(context: typer.Context, **values: Any) -> None:
            kept = {parameter.name: values.pop(parameter.name) for parameter in own}
            given = {name: value for name, value in values.items() if _is_given(context, name)}
            layers = settings.make_spec(Basis, given).layers() if Basis in specs.values() else []
            found = settings.layered(specs.values(), defaults or {}, *layers, given)
            command(
                **kept, **{name: settings.make_spec(spec, found) for name, spec in specs.items()}
            )

        parameters = [
            inspect.Parameter(
                "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
            ),
            *(_evaluated(command, parameter) for parameter in own),
            *(
                _parameter(spec, field, (defaults or {}).get(field.name, field.default))
                for spec in specs.values()
                for field in dataclasses.fields(spec)
                if field.name not in omit
            ),
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, even if what was typed is its default."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def _evaluated(command: Callable[..., None], parameter: inspect.Parameter) -> inspect.Parameter:
    """A command's own parameter, its annotation no longer text."""
    hint = typing.get_type_hints(command, include_extras=True)[parameter.name]
    return parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)


_METAVARS: dict[Any, str] = {
    bool: " ",
    int: "N",
    int | None: "N",
    float: "X",
    float | None: "X",
}


def _parameter(spec: type, field: dataclasses.Field[Any], default: Any) -> inspect.Parameter:
    known = settings.about(field)
    hint = typing.get_type_hints(spec)[field.name]
    help = known.help
    if known.choices and not all(choice in help for choice in known.choices):
        help = f"{help.rstrip('.')}: {', '.join(known.choices)}."
    shown: bool | str = known.default_text or (default is not None and hint is not bool)
    option = typer.Option(
        default,
        settings.option_name(field.name),
        help=help,
        rich_help_panel=known.panel,
        metavar=known.metavar or _METAVARS.get(hint, field.name.upper()),
        show_default=shown,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint
    )
