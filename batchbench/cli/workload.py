"""The commands workload list, show and save."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import PRESETS, Basis, Preset
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo
from batchbench.files import claimed, write_file, write_files
from batchbench.settings import setting
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.workloads.generate import Outline

app = typer.Typer(
    help="Look at workloads without serving them: the presets, lengths and arrivals, and files.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@dataclass(frozen=True)
class PictureSpec:
    """Where the picture goes."""

    output: Path | None = setting(
        None,
        "Folder for workload.png and workload.svg.",
        "Output",
        metavar="DIR",
        default_text="no picture",
    )
    overwrite: bool = setting(False, "Replace files that are there.", "Output")


@dataclass(frozen=True)
class SavingSpec:
    """How a file is written."""

    overwrite: bool = setting(False, "Replace the file if it is there.", "Output")


_SPECS = {"basis": Basis, "workload": WorkloadSpec, "serving": ServingSpec, "model": ModelSpec}

_OMIT = (
    *(name for name in ServingSpec.__dataclass_fields__ if name != "batch_size"),
    *(name for name in ModelSpec.__dataclass_fields__ if name not in ("model", "revision")),
)
"""Of serving and model only what a workload depends on."""

SHOW_HELP = """Show how long prompts and outputs are and when requests come, in numbers and bars.

Example: batchbench workload show --preset chat --request-rate 2"""

LIST_HELP = """List the presets, and where their figures come from.

Example: batchbench workload list"""

SAVE_HELP = """Save the workload as JSON lines, which --trace reads again without loss.

Example: batchbench workload save chat.jsonl --preset chat"""


@app.command("list", help=LIST_HELP)
def list_presets() -> None:
    """Name, what it is, its options, its source."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(pad_edge=False, show_lines=True)
    grid.add_column("Preset", style="bold", no_wrap=True)
    grid.add_column("What is asked, as options, and where its figures come from", overflow="fold")
    for name, preset in PRESETS.items():
        options = f"{_options(preset)}\n" if preset.settings else ""
        told = Text.assemble(f"{preset.about}\n", (options, "cyan"), (preset.source, "dim"))
        grid.add_row(name, told)
    Console(highlight=False, markup=False, emoji=False).print(grid)


def _options(preset: Preset) -> str:
    words = [(settings.option_name(name), str(value)) for name, value in preset.settings.items()]
    return "\n".join(map(shlex.join, words))


@app.command("show", help=SHOW_HELP)
@with_options({**_SPECS, "picture": PictureSpec}, omit=_OMIT)
def show(
    basis: Basis,
    workload: WorkloadSpec,
    serving: ServingSpec,
    model: ModelSpec,
    picture: PictureSpec,
) -> None:
    """Numbers and bars; a picture where asked."""
    from rich.console import Console

    from batchbench.files import check_files

    names = [f"workload.{format}" for format in ("png", "svg")]
    if picture.output is not None:
        check_files(picture.output, names, overwrite=picture.overwrite)
    outline, _ = _outline(workload, serving, model)
    from batchbench.reports.workload_profile import render  # NumPy and scipy, only now

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(render(outline))
    if picture.output is not None:
        from batchbench.reports.figures import figure_bytes
        from batchbench.reports.workload_profile import draw_portrait

        figure = draw_portrait(outline)
        files = {name: figure_bytes(figure, name.partition(".")[2]) for name in names}
        with claimed(picture.output, f"--output {picture.output}"):
            write_files(picture.output, files)
        folder = shlex.quote(str(picture.output))
        console.print(f"\nFiles: {folder}/ with {', '.join(names)}", markup=False, soft_wrap=True)


@app.command("save", help=SAVE_HELP)
@with_options({**_SPECS, "saving": SavingSpec}, omit=_OMIT)
def save(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="Where to.", show_default=False)
    ],
    basis: Basis,
    workload: WorkloadSpec,
    serving: ServingSpec,
    model: ModelSpec,
    saving: SavingSpec,
) -> None:
    """A line a request, with its token ids."""
    from batchbench.files import check_files

    with claimed(file, str(file)):
        check_files(file.parent, [file.name], overwrite=saving.overwrite)
        outline, vocab_size = _outline(workload, serving, model)
        from batchbench.workloads.traces import write_workload

        made = outline.workload(vocab_size)
        write_file(file, (line.encode() for line in write_workload(made)))
    echo(f"{file}: {len(made):,} requests, digest {made.digest}")
    echo(f"Serve it: batchbench run --trace {shlex.quote(str(file))}")


def _outline(workload: WorkloadSpec, serving: ServingSpec, model: ModelSpec) -> tuple[Outline, int]:
    """The workload's outline for the model, and the size of the model's vocabulary."""
    from batchbench.batching.models import find_model, find_tokenizer
    from batchbench.workloads.generate import make_outline

    source = find_model(model, weights=False)
    tokenizer = find_tokenizer(source.folder)
    outline = make_outline(
        workload,
        batch_size=serving.batch_size,
        encode=tokenizer.encode if tokenizer else None,
        context=source.context,
        note=lambda line: echo(line, err=True),
    )
    for line in outline.beyond(source.context, source.name):
        echo(line, err=True)
    return outline, source.vocab_size
