"""Options derived from the fields of specs, so that commands share them; and their help."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
import shlex
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.models.source import KNOWN, MADE_UP, ModelSpec
from batchbench.batching.presets import Basis
from batchbench.batching.strategies import listing
from batchbench.cli.output import echo
from batchbench.errors import UsageError
from batchbench.settings import setting
from batchbench.studies.ladder.rungs import ALL as ALL_RUNGS
from batchbench.studies.ladder.rungs import RUNGS
from batchbench.studies.sweep.grid import parse_numbers
from batchbench.workloads.spec import WorkloadSpec

TRACE_HELP = (
    "Write a timeline of requests and slots for ui.perfetto.dev or chrome://tracing; a name that "
    "ends in .gz is compressed."
)

DOCUMENTS = {
    "html": "report.html",
    "markdown": "report.md",
    "github-bigger": "github-bigger.json",
    "github-smaller": "github-smaller.json",
    "bencher": "bencher.json",
    "pytest-benchmark": "pytest-benchmark.json",
    "llmd": "llmd.json",
}
"""Report formats that are written to a file, with the default name of the file."""

SHORT = {"batch_size": "-b", "queue_size": "-n", "output": "-o", "quiet": "-q", "verbose": "-v"}
"""Options with a one-letter form, which is the same in every command."""

ALIASES = {
    "--max-num-seqs": "--batch-size",
    "--num-prompts": "--queue-size",
    "--num-requests": "--queue-size",
    "--input-len": "--prompt-tokens",
    "--random-input-len": "--prompt-tokens",
    "--output-len": "--output-tokens",
    "--random-output-len": "--output-tokens",
    "--max-num-batched-tokens": "--max-batched-tokens",
    "--output": "--file",
    "-o": "--file",
    "--base-url": "--target",
}
"""Other names of options, most from ``vllm bench``; a command's own option comes first."""

RARE = (
    *("workload", "max_wait", "order", "engine", "prefill", "max_batched_tokens", "execution"),
    *("long_every", "long_tokens", "short_tokens", "shared_prefix_tokens", "overlong"),
    *("stop_at_eos", "seed", "burstiness", "arrivals", "max_concurrency", "speed", "top_p"),
    *("trace_format", "trace_block_size", "trace_time_unit", "on_bad_row", "top_k"),
    *("load_format", "revision", "dtype", "threads", "verify", "price_per_hour", "trace_out"),
    *("endpoint", "tokenizer", "api_key", "extra_body", "timeout", "insecure", "verify_model"),
    *("ray_address", "slurm_partition", "slurm_time", "slurm_gpus", "parallel"),
    *("same_hardware", "any_hardware", "clients", "executor", "chat_template", "temperature"),
    *("mean_tokens", "batches", "precision", "max_trials", "floor", "margin", "junit", "github"),
)
"""Options that the short help leaves out."""

LONG_HELP = 20
"""Commands with more options than this have a short help and ``--help-all``."""


@dataclass(frozen=True)
class Spec:
    """A spec whose bounds and choices are checked."""

    def __post_init__(self) -> None:
        settings.check(self)


def folder_setting(content: str, default_text: str) -> Any:
    """Return the field of ``--output``, the folder for some content."""
    help = f"Folder for {content}."
    return setting(None, help, "Output", metavar="DIR", default_text=default_text)


@dataclass(frozen=True)
class OutputSpec(Spec):
    """The output of a run."""

    output: Path | None = folder_setting(
        "the result: result.json, report.html, recordings, tables and pictures",
        "batchbench-results/<time>-<model>",
    )
    overwrite: bool = setting(False, "Replace the result in the output folder.", "Output")
    trace_out: Path | None = setting(None, TRACE_HELP, "Output", metavar="FILE")
    json: bool = setting(False, "Print only result.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")
    verbose: bool = setting(False, "Print all tables, not only the main one.", "Output")
    dry_run: bool = setting(False, "Estimate steps, memory and time; run nothing.", "Output")


@dataclass(frozen=True)
class ReportSpec(Spec):
    """The format of a report and where it goes."""

    format: str | None = setting(
        None,
        "terminal: tables on standard output; html: one self-contained page; markdown: for a pull "
        "request; json: result.json. JSON for dashboards: github-bigger and github-smaller for "
        "github-action-benchmark, bencher for bencher.dev, pytest-benchmark. llmd: llm-d's "
        "benchmark report, schema 0.2, one file per strategy.",
        "Output",
        choices=("terminal", "json", *DOCUMENTS),
        metavar="FORMAT",
        default_text="from the ending of --file, else terminal",
    )
    file: Path | None = setting(
        None,
        "File for the report; - prints it on standard output.",
        "Output",
        metavar="FILE",
        default_text="report.html, report.md, bencher.json, … in RESULT, or in the current folder "
        "for several results",
    )
    trace_out: Path | None = setting(None, TRACE_HELP, "Output", metavar="FILE")
    json: bool = setting(False, "Print only result.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary.", "Output")
    verbose: bool = setting(False, "Print all tables, not only the main one.", "Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen in ("terminal", "json") and self.file is not None:
            raise UsageError(
                f"--file {self.file}: needs a format; use the ending .html or .md, or --format html"
            )
        if self.json and self.format not in (None, "json"):
            raise UsageError(f"--json and --format {self.format}: give one of them")

    @property
    def chosen(self) -> str:
        """The format as given, or else from the ending of the output file."""
        if self.format is not None or self.json:
            return self.format or "json"
        endings = {".html": "html", ".htm": "html", ".md": "markdown"}
        return endings.get(self.file.suffix if self.file else "", "terminal")

    def destination(self, folders: Sequence[Path]) -> Path | None:
        """Return the file for the document; None for standard output."""
        if self.file is not None:
            return None if str(self.file) == "-" else self.file
        name = DOCUMENTS[self.chosen]
        return folders[0] / name if len(folders) == 1 else Path(name)


EXPERIMENT = (Basis, ServingSpec, WorkloadSpec, ModelSpec)
"""Specs of the options that all commands with an experiment have."""

ResultFolder = Annotated[
    Path, typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False)
]

Field = tuple[type, dataclasses.Field[Any]]
"""A spec and one of its fields."""

Function = Callable[..., None]


def with_options(
    raw: Iterable[type] = (),
    *,
    swept: Iterable[type] = (),
    omit: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Derive the options of a command from its parameters, and call it with parsed values.

    A parameter that is a spec, a dataclass whose fields are made with ``setting``, gives the
    options of its fields. Two names are special, and all other parameters stay as they are.

    Args:
        raw: specs of the parameter ``given``, which gets the settings that were typed, by field
            name; :func:`~batchbench.batching.experiment.make_experiment` takes them.
        swept: specs of the parameter ``axes``, whose options may have many values: it gets the
            values by field name of each option given. Numbers are lists and ranges, a flag is
            ``--flag --no-flag``, other options are repeated. An option that ``run`` takes several
            times is one value.
        omit: fields that do not become options.
        defaults: by field name, where the default of the command differs from that of the spec.
    """

    def decorate(command: Function) -> Function:
        hints = typing.get_type_hints(command, include_extras=True)
        homes = _homes(hints, {"given": raw, "axes": swept}, omit)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name not in homes:
                parameters.append(parameter.replace(annotation=hints[name], kind=_KEYWORD))
            for spec, field in homes.get(name, ()):
                if name == "axes":
                    parameters += _swept_parameters(spec, field)
                else:
                    default = (defaults or {}).get(field.name, field.default)
                    parameters.append(_parameter(spec, field, default))

        @functools.wraps(command)
        def call(context: typer.Context, help_all: bool = False, **values: Any) -> None:
            typed = _typed(context, values, homes)
            passed = {name: value for name, value in values.items() if name in hints}
            for name, fields in homes.items():
                own = {f.name: typed[f.name] for _, f in fields if f.name in typed}
                if name == "axes":
                    passed[name] = _axes(fields, typed)
                else:
                    passed[name] = own if name == "given" else hints[name](**own)
            command(**passed)

        return _signed(call, parameters, [pair for fields in homes.values() for pair in fields])

    return decorate


def _homes(
    hints: Mapping[str, Any], special: Mapping[str, Iterable[type]], omit: Collection[str]
) -> dict[str, list[Field]]:
    """Return the fields that become options, by the parameter that gets their values."""
    homes: dict[str, list[Field]] = {}
    for name, hint in hints.items():
        specs = special.get(name, [hint])
        if all(map(dataclasses.is_dataclass, specs)):
            pairs = ((spec, field) for spec in specs for field in dataclasses.fields(spec))
            homes[name] = [(spec, field) for spec, field in pairs if field.name not in omit]
    return homes


def _signed(
    call: Function, parameters: Sequence[inspect.Parameter], fields: Sequence[Field]
) -> Function:
    """Set the signature from which Typer makes the options, and remember their fields."""
    every = [inspect.Parameter("context", _KEYWORD, annotation=typer.Context), *parameters]
    if len(fields) > LONG_HELP:
        option = typer.Option(
            False,
            "--help-all",
            is_eager=True,
            callback=_show_all,
            show_default=False,
            help=f"Show all {len(fields)} options and exit.",
        )
        every.append(_keyword("help_all", bool, option))
    call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    call.fields = fields  # type: ignore[attr-defined]
    return call


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _keyword(name: str, hint: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, _KEYWORD, default=option, annotation=hint)


def _typed(
    context: typer.Context, values: Mapping[str, Any], homes: Mapping[str, Sequence[Field]]
) -> dict[str, Any]:
    """Return the options that were given, even if a value equals the default.

    Typer passes texts, which are parsed here, so that errors have batchbench's own texts. Those of
    swept options are parsed later.
    """
    known = {f.name: (home, spec, f) for home, fields in homes.items() for spec, f in fields}
    typed: dict[str, Any] = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT"):
            continue
        typed[name] = value
        if name not in known or isinstance(value, bool):
            continue
        home, spec, field = known[name]
        if variable := settings.about(field).variable:  # no spec, file or message gets it
            os.environ[variable] = settings.parse(spec, field, typed.pop(name))
        elif home != "axes":
            several = isinstance(value, list)  # an option that may be repeated
            parsed = [settings.parse(spec, field, text) for text in (value if several else [value])]
            typed[name] = tuple(parsed) if several else parsed[0]
    return typed


def _axes(fields: Sequence[Field], typed: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values of each swept option, without repetitions."""
    axes: dict[str, tuple[Any, ...]] = {}
    for spec, field in fields:
        hint = settings.hints_of(spec)[field.name]
        given = [name for name in (field.name, f"no_{field.name}") if name in typed]
        if not given:
            continue
        if hint is bool:
            axes[field.name] = tuple(name == field.name for name in given)
            continue
        texts, kind = typed[field.name], settings.kind_of(hint)
        values: list[Any]
        if kind is tuple:
            values = [tuple(texts)]
        elif kind in (int, float):
            option = settings.option_name(field.name)
            values = [number for text in texts for number in parse_numbers(text, kind, option)]
            for number in values:
                settings.check_value(field, number, f"{option} {number}")
        else:
            values = [settings.parse(spec, field, text) for text in texts]
        axes[field.name] = tuple(dict.fromkeys(values))
    return axes


def _swept_parameters(spec: type, field: dataclasses.Field[Any]) -> Iterator[inspect.Parameter]:
    """Yield the option for many values of a setting; for a flag also its opposite."""
    yield _parameter(spec, field, field.default, swept=True)
    if settings.hints_of(spec)[field.name] is bool:
        name = settings.option_name(field.name)
        option = typer.Option(
            False,
            settings.option_name(f"no_{field.name}"),
            help=f"Turn {name} off; give both to run with and without it.",
            rich_help_panel=settings.about(field).panel,
            show_default=False,
        )
        yield _keyword(f"no_{field.name}", bool, option)


def _parameter(
    spec: type, field: dataclasses.Field[Any], default: Any, *, swept: bool = False
) -> inspect.Parameter:
    """Return the parameter of an option. A swept option has no default, to tell what was given."""
    known = settings.about(field)
    kind = settings.kind_of(settings.hints_of(spec)[field.name])
    metavar = known.metavar or {int: "N", float: "X"}.get(kind, field.name.upper())
    hint: Any = bool if kind is bool else str | None  # _typed parses the text
    if kind is tuple:  # repeated once per value
        hint, default = list[str], list(default)
    help = known.help
    if known.choices and not all(choice in help for choice in known.choices):
        help = f"{help.rstrip('.')}: {', '.join(known.choices)}."
    shown: bool | str = known.default_text or (default not in (None, []) and kind is not bool)
    if swept and known.variable is None:
        shown = str(default) if shown is True else shown
        if kind is not bool:
            metavar = f"{metavar},…" if kind in (int, float) else metavar
            hint, default = list[str] | None, None
    elif kind not in (bool, tuple) and default is not None:
        default = str(default)
    names = [settings.option_name(field.name)]
    if field.name in SHORT:
        names.append(SHORT[field.name])
    option = typer.Option(
        default,
        *names,
        help=help,
        rich_help_panel=known.panel,
        metavar=metavar if kind is not bool else None,
        show_default=shown,
        autocompletion=_completion(field),
    )
    return _keyword(field.name, hint, option)


def _completion(field: dataclasses.Field[Any]) -> Callable[[str], list[str]]:
    """Return what completes a value of an option in a shell, also within a list with commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        values = settings.about(field).choices or _values().get(field.name, ())
        return [f"{before}{comma}{value}" for value in values if value.startswith(last)]

    return complete


def _values() -> Mapping[str, Iterable[str]]:
    """Return usual values of options that have no choices, by field name."""
    names = [line.split()[0] for line in listing()]
    return {
        "strategy": [name for name in names if ":" not in name] + ["help"],
        "model": [*KNOWN, *MADE_UP],
        "device": ("auto", "cpu", "cuda", "mps"),
        "rungs": [ALL_RUNGS, *(rung.name for rung in RUNGS)],
        "slo": ("ttft:", "tpot:", "e2el:"),
        "verify": ("all", "none"),
    }


# Help and the command line as it was typed


_ALL = "batchbench.help_all"

_TYPED: ContextVar[tuple[str, list[str], dict[str, Any]]] = ContextVar("typed")
"""The command, the words after it, and its parameters by the names of their options."""

_NOT_SAVED = (
    *("api_key", "output", "overwrite", "trace_out", "json", "quiet", "verbose", "dry_run"),
)


class Command(TyperCommand):
    """A command with a short and a full help, which also takes the names of :data:`ALIASES`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {option: param for param in self.params for option in param.opts}
        words: list[str] = []
        for index, word in enumerate(args):
            if word == "--":
                words += args[index:]
                break
            name, equals, value = word.partition("=")
            ours = ALIASES.get(name)
            words.append(f"{ours}{equals}{value}" if ours in own and name not in own else word)
            asks = words[-2:] == ["--strategy", "help"] or words[-1] == "--strategy=help"
            if asks and "--strategy" in own and not ctx.resilient_parsing:
                for line in listing():
                    echo(line)
                raise typer.Exit
        target, count = own.get("--target"), sum(w.split("=")[0] == "--target" for w in words)
        if target and not target.multiple and count > 1:
            raise UsageError(
                "--target: there are several; give one, or compare them with batchbench sweep"
            )
        _TYPED.set((ctx.command_path, list(words), own))  # the parser empties its list
        return super().parse_args(ctx, words)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if ctx.meta.get(_ALL) or not any(param.name == "help_all" for param in self.params):
            super().format_help(ctx, formatter)
            return
        brief = copy.copy(self)
        brief.params = [_brief(param) for param in self.params if param.name not in RARE]
        TyperCommand.format_help(brief, ctx, formatter)


def _show_all(context: typer.Context, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta[_ALL] = True
        context.command.format_help(context, context.make_formatter())
        raise typer.Exit


def _brief(param: Any) -> Any:
    """Return a parameter for the short help: in one panel, with the first clause of its text."""
    brief = copy.copy(param)
    brief.rich_help_panel = None
    brief.help = f"{re.split('[.:;] ', param.help or '')[0].rstrip('.')}."
    if isinstance(brief.show_default, str) and len(brief.show_default) > 15:
        brief.show_default = False
    return brief


def typed_command(keep: Collection[str] = ()) -> str:
    """Return the command line as it was typed, without secrets and options about the output.

    ``keep`` has fields of the output whose options stay.
    """
    command, words, own = _TYPED.get()
    left, rest = command.split(), iter(words)
    for word in rest:
        param = own.get(word.partition("=")[0])
        if param is None or param.name in keep or param.name not in _NOT_SAVED:
            left.append(word)
        elif "=" not in word and not param.is_flag:
            next(rest, None)
    return shlex.join(left)
