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
    without: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of several specs; it is called with the specs, parsed.

    Args:
        specs: argument name of the command: dataclass whose fields are made with ``setting``.
        defaults: by field name, where a command's default is not the spec's.
        without: names of fields that the command decides itself; they have no option.
    """

    def offered(field: dataclasses.Field[Any]) -> bool:
        return field.name not in without

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            command(
                **{
                    name: spec(
                        **{f.name: values[f.name] for f in dataclasses.fields(spec) if offered(f)}
                    )
                    for name, spec in specs.items()
                }
            )

        parameters = [
            _parameter(spec, field, (defaults or {}).get(field.name, field.default))
            for spec in specs.values()
            for field in dataclasses.fields(spec)
            if offered(field)
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


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
