"""Options derived from the fields of specs: commands that share a spec cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from batchbench import settings
from batchbench.batching.presets import Basis
from batchbench.errors import UsageError
from batchbench.settings import setting
from batchbench.studies.sweep.grid import parse_numbers

TRACE_HELP = (
    "Write the requests in their slots as trace events, which ui.perfetto.dev and chrome://tracing "
    "open; a name that ends in .gz is compressed."
)

DOCUMENTS = {
    "html": "report.html",
    "markdown": "report.md",
    "github-bigger": "github-bigger.json",
    "github-smaller": "github-smaller.json",
    "bencher": "bencher.json",
    "pytest-benchmark": "pytest-benchmark.json",
}
"""Formats of a report that are files, and what these are called."""


@dataclass(frozen=True)
class OutputSpec:
    """What is shown and what is written."""

    output: Path | None = setting(
        None,
        "Folder for result.json, report.html, recordings, frames and pictures.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/<time>-<model>",
    )
    overwrite: bool = setting(False, "Replace a result that the folder holds.", "Output")
    trace_out: Path | None = setting(None, TRACE_HELP, "Output", metavar="FILE")
    json: bool = setting(False, "Print result.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "No progress, and of the report only the sentence.", "Output")
    dry_run: bool = setting(
        False, "Say how many steps, how much memory and time it would take, and stop.", "Output"
    )

    def __post_init__(self) -> None:
        settings.check(self)


@dataclass(frozen=True)
class ReportSpec:
    """How results are shown again, and where to."""

    format: str | None = setting(
        None,
        "terminal: tables, shown here; html: one page that holds everything; markdown: for a pull "
        "request. For dashboards, as JSON: github-bigger and github-smaller for "
        "github-action-benchmark, bencher for bencher.dev, pytest-benchmark.",
        "Output",
        choices=("terminal", *DOCUMENTS),
        metavar="FORMAT",
        default_text="as the ending of --output says, else terminal",
    )
    output: Path | None = setting(
        None,
        "File for the document; - is standard output.",
        "Output",
        metavar="FILE",
        default_text="report.html, report.md, bencher.json … in RESULT; of several in this folder",
    )
    trace_out: Path | None = setting(None, TRACE_HELP, "Output", metavar="FILE")
    json: bool = setting(False, "Print result.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "Show only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)
        if self.chosen == "terminal" and self.output is not None:
            raise UsageError(
                f"--output {self.output}: tells no format; name it .html or .md, or give --format"
            )
        if self.json and self.chosen != "terminal":
            raise UsageError(f"--json and --format {self.chosen}: give one of them")

    @property
    def chosen(self) -> str:
        """The format: as given, else as the output's name says."""
        if self.format is not None:
            return self.format
        endings = {".html": "html", ".htm": "html", ".md": "markdown"}
        return endings.get(self.output.suffix if self.output else "", "terminal")

    def file(self, folders: Sequence[Path]) -> Path | None:
        """Where the document goes; None for standard output."""
        if self.output is not None:
            return None if str(self.output) == "-" else self.output
        name = DOCUMENTS[self.chosen]
        return folders[0] / name if len(folders) == 1 else Path(name)


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
        fields = [pair for pair in _fields(specs) if pair[1].name not in omit]

        @functools.wraps(command)
        def call(context: typer.Context, **values: Any) -> None:
            kept = {parameter.name: values.pop(parameter.name) for parameter in own}
            given = _given(context, values, fields)
            layers = settings.make_spec(Basis, given).layers() if Basis in specs.values() else []
            found = settings.layered(specs.values(), defaults or {}, *layers, given)
            command(
                **kept, **{name: settings.make_spec(spec, found) for name, spec in specs.items()}
            )

        return _signed(
            call,
            [
                *(_evaluated(command, parameter) for parameter in own),
                *(
                    _parameter(spec, field, (defaults or {}).get(field.name, field.default))
                    for spec, field in fields
                ),
            ],
            fields,
        )

    return decorate


def with_given(
    parts: Mapping[str, type], specs: Mapping[str, type], omit: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options that it puts together itself: it is called with those ``given``.

    Args:
        parts: specs whose options come as they were typed, by field name, and only if they were.
        specs: argument name of the command: specs of its own, parsed as by :func:`with_options`.
        omit: fields of ``parts`` that the command has no use for, and so no option.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = {field.name for _, field in _fields(parts)} - {*omit}
        fields = [*(pair for pair in _fields(parts) if pair[1].name in names), *_fields(specs)]

        @functools.wraps(command)
        def call(context: typer.Context, **values: Any) -> None:
            typed = _given(context, values, fields)
            given = {name: typed.pop(name) for name in names & typed.keys()}
            own = {name: settings.make_spec(spec, typed) for name, spec in specs.items()}
            command(given=given, **own)

        parameters = [_parameter(spec, field, field.default) for spec, field in fields]
        return _signed(call, parameters, fields)

    return decorate


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
        fields, others = _fields(swept), _fields(specs)

        @functools.wraps(command)
        def call(context: typer.Context, **values: Any) -> None:
            given = _given(context, values, others)
            axes = {}
            for spec, field in fields:
                typed = {n: given.pop(n) for n in _spellings(spec, field) if n in given}
                if typed:
                    axes[field.name] = _axis(spec, field, typed)
            own = {name: settings.make_spec(spec, given) for name, spec in specs.items()}
            command(axes=axes, **own)

        parameters = [
            parameter
            for spec, field in fields
            for parameter in (_parameter(spec, field, field.default, swept=True), *_no(spec, field))
        ]
        parameters += [_parameter(spec, field, field.default) for spec, field in others]
        return _signed(call, parameters, [*fields, *others])

    return decorate


Field = tuple[type, dataclasses.Field[Any]]
"""A pair of a spec and one of its fields."""


def _fields(specs: Mapping[str, type]) -> list[Field]:
    return [(spec, field) for spec in specs.values() for field in dataclasses.fields(spec)]


def _signed(
    call: Callable[..., None], parameters: Sequence[inspect.Parameter], fields: Sequence[Field]
) -> Callable[..., None]:
    """Return the function with the signature from which Typer makes its options.

    Its attribute ``fields`` has the fields from which these were derived.
    """
    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    signature = inspect.Signature([context, *parameters])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    call.fields = fields  # type: ignore[attr-defined]
    return call


def _given(
    context: typer.Context, values: Mapping[str, Any], fields: Sequence[Field]
) -> dict[str, Any]:
    """Return the options that were typed, even if what was typed is the default.

    Typer passes texts on, so that messages about wrong numbers and choices are our own.
    """
    homes = {field.name: (spec, field) for spec, field in fields}
    given: dict[str, Any] = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT"):
            continue
        if isinstance(value, list):  # values of an option that may be repeated
            if name in homes:
                value = [settings.parse(*homes[name], text) for text in value]
            given[name] = tuple(value)
        elif isinstance(value, str) and name in homes:
            given[name] = settings.parse(*homes[name], value)
        else:
            given[name] = value
    return given


def _spellings(spec: type, field: dataclasses.Field[Any]) -> list[str]:
    """The parameters that give values to a swept option: a flag has a second, that it is not."""
    flag = settings.hints_of(spec)[field.name] is bool
    return [field.name, f"no_{field.name}"] if flag else [field.name]


def _no(spec: type, field: dataclasses.Field[Any]) -> Iterator[inspect.Parameter]:
    """The second option of a flag."""
    for name in _spellings(spec, field)[1:]:
        option = typer.Option(
            False,
            settings.option_name(name),
            help=f"Cells without {settings.option_name(field.name)}, as well if both are given.",
            rich_help_panel=settings.about(field).panel,
            metavar=" ",
            show_default=False,
        )
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool
        )


def _axis(spec: type, field: dataclasses.Field[Any], typed: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values given to a swept option, each once; ``typed`` is by spelling."""
    hint = settings.hints_of(spec)[field.name]
    if hint is bool:
        return tuple(spelling == field.name for spelling in typed)
    given = typed[field.name]
    if hint == tuple[str, ...]:
        return (given,)
    kind = _number(hint)
    if kind is None:
        return tuple(dict.fromkeys(settings.parse(spec, field, text) for text in given))
    option = settings.option_name(field.name)
    found = [number for text in given for number in parse_numbers(text, kind, option)]
    for number in found:
        settings.check_value(field, number, f"{option} {number}")
    return tuple(dict.fromkeys(found))


def _number(hint: Any) -> type[int] | type[float] | None:
    """The kind of number that a field holds, if it does."""
    kind = settings.kind_of(hint)
    return kind if kind in (int, float) else None


def _evaluated(command: Callable[..., None], parameter: inspect.Parameter) -> inspect.Parameter:
    """A command's own parameter, its annotation no longer text."""
    hint = typing.get_type_hints(command, include_extras=True)[parameter.name]
    return parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)


_METAVARS: Mapping[type, str] = {bool: " ", int: "N", float: "X"}


def _parameter(
    spec: type, field: dataclasses.Field[Any], default: Any, *, swept: bool = False
) -> inspect.Parameter:
    """An option; ``swept`` ones have no default of their own, so that it shows which were given."""
    known = settings.about(field)
    kind: type = settings.kind_of(settings.hints_of(spec)[field.name])
    name, metavar = settings.option_name(field.name), known.metavar or _METAVARS.get(kind)
    hint: Any = bool if kind is bool else str | None  # _given parses the text
    if kind is tuple:  # given once a value
        hint, default = list[str], list(default)
    help = known.help
    if known.choices and not all(choice in help for choice in known.choices):
        help = f"{help.rstrip('.')}: {', '.join(known.choices)}."
    shown: bool | str = known.default_text or (default not in (None, []) and kind is not bool)
    if swept:
        shown = str(default) if shown is True else shown
        if kind is not bool:
            metavar = f"{metavar},…" if kind in (int, float) else metavar
            hint, default = list[str] | None, None
    elif kind not in (bool, tuple) and default is not None:
        default = str(default)
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
