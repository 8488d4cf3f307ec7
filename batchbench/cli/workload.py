"""The commands workload list, show and save."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchbench import settings
from batchbench.batching.experiment import ServingSpec, make_experiment
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import PRESETS, Basis
from batchbench.cli.options import folder_setting, with_options
from batchbench.cli.output import echo, make_console
from batchbench.errors import UsageError, shown
from batchbench.files import check_files, claimed, write_file
from batchbench.settings import setting
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.workloads.generate import Outline

app = typer.Typer(
    help="List presets, inspect a workload without running it, or save it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@dataclass(frozen=True)
class SavingSpec:
    """The option to replace existing files."""

    overwrite: bool = setting(False, "Replace files that exist.", "Output")


@dataclass(frozen=True)
class PictureSpec(SavingSpec):
    """The folder of the picture."""

    output: Path | None = folder_setting("workload.png and workload.svg", "no picture")


_SPECS = (Basis, WorkloadSpec, ServingSpec, ModelSpec)

_OMIT = (
    *(name for name in ServingSpec.__dataclass_fields__ if name != "batch_size"),
    *(name for name in ModelSpec.__dataclass_fields__ if name not in ("model", "revision")),
)
"""Options of serving and model on which a workload does not depend."""

SHOW_HELP = """Show the lengths and arrival times of a workload, as numbers and histograms.

Example: batchbench workload show chat --request-rate 2"""

LIST_HELP = """List the presets, with the source of their numbers.

Example: batchbench workload list"""

SAVE_HELP = """Save a workload as JSON lines, which --trace reads again without loss.

Example: batchbench workload save chat.jsonl --preset chat"""


def _settings_of(name: str) -> Mapping[str, Any]:
    """Return the option for a preset, a workload file or a trace file."""
    if name in PRESETS:
        return {"preset": name}
    if os.path.isfile(name):
        return {"workload" if name.endswith(".toml") else "trace": Path(name)}
    raise UsageError(f"{shown(name)}: no such preset or file; the presets are {', '.join(PRESETS)}")


@app.command("list", help=LIST_HELP)
def list_presets() -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(pad_edge=False, show_lines=True)
    grid.add_column("Preset", style="bold", no_wrap=True)
    grid.add_column("Meaning, options and source", overflow="fold")
    for name, preset in PRESETS.items():
        words = [shlex.join((settings.option_name(n), str(v))) for n, v in preset.settings.items()]
        options = "".join(f"{word}\n" for word in words)
        grid.add_row(
            name, Text.assemble(f"{preset.about}\n", (options, "cyan"), (preset.source, "dim"))
        )
    make_console().print(grid)


@app.command("show", help=SHOW_HELP)
@with_options(_SPECS, omit=_OMIT)
def show(
    given: Mapping[str, Any],
    picture: PictureSpec,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Preset, workload file (TOML) or trace file.",
            show_default=False,
            autocompletion=lambda incomplete: [n for n in PRESETS if n.startswith(incomplete)],
        ),
    ] = None,
) -> None:
    files = ("workload.png", "workload.svg")
    if picture.output is not None:
        check_files(picture.output, files, overwrite=picture.overwrite)
    outline, _ = _outline({**given, **(_settings_of(name) if name is not None else {})})
    from batchbench.reports.workload_profile import render  # imports NumPy and scipy

    console = make_console()
    console.print(render(outline))
    if picture.output is not None:
        from batchbench.reports.figures import figure_bytes
        from batchbench.reports.workload_profile import draw_portrait

        figure = draw_portrait(outline)
        with claimed(picture.output, f"--output {picture.output}"):
            for file in files:
                write_file(picture.output / file, figure_bytes(figure, file.rpartition(".")[2]))
        console.print(f"\nFiles: {shlex.quote(str(picture.output))}/ with {', '.join(files)}")


@app.command("save", help=SAVE_HELP)
@with_options(_SPECS, omit=_OMIT)
def save(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="File to write.", show_default=False)
    ],
    given: Mapping[str, Any],
    saving: SavingSpec,
) -> None:
    with claimed(file, str(file)):
        check_files(file.parent, [file.name], overwrite=saving.overwrite)
        outline, vocab_size = _outline(given)
        from batchbench.workloads.traces import write_workload

        made = outline.workload(vocab_size)
        write_file(file, (line.encode() for line in write_workload(made)))
    echo(f"{file}: {len(made):,} requests, digest {made.digest}")
    echo(f"Run it: batchbench run --trace {shlex.quote(str(file))}")


def _outline(given: Mapping[str, Any]) -> tuple[Outline, int]:
    """Return the outline of the workload, and the size of the model's vocabulary."""
    experiment = make_experiment(given, simulated=False)
    from batchbench.batching.models import encoder, find_model, find_tokenizer
    from batchbench.workloads.generate import make_outline

    source = find_model(experiment.model, weights=False)
    outline = make_outline(
        experiment.workload,
        batch_size=experiment.serving.batch_size,
        encode=encoder(find_tokenizer(source.place), chat=experiment.workload.chat_template),
        context=source.context,
        note=lambda line: echo(line, err=True),
    )
    total = outline.prompt_tokens + outline.output_tokens
    if source.context is not None and (long := int((total > source.context).sum())):
        echo(
            f"{long:,} of {len(total):,} requests exceed the context of {source.name}, "
            f"{source.context:,} tokens; give --overlong clip, scale or skip",
            err=True,
        )
    return outline, source.vocab_size
