"""The command predict."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError, shown
from batchbench.settings import setting
from batchbench.studies.numbers import parse_numbers

if TYPE_CHECKING:
    from rich.table import Table

    from batchbench.studies.predict.batch_sizes import Curve

PREDICT_HELP = """Say from a result where more slots stop paying: other batch sizes, predicted.

The steps of the run teach what a step costs; its requests are then served with each number of
slots by the same scheduler on a virtual clock.

Example: batchbench predict batchbench-results/my-run --batch-size 1:64"""


@dataclass(frozen=True)
class SlotsSpec:
    """Which batch sizes are predicted."""

    batch_size: str = setting(
        "1:64",
        "Batch sizes to predict: numbers, lists and ranges, such as 1,2,4 or 1:64 or 8:64:8.",
        "Prediction",
        metavar="N,…",
    )
    queue_size: int | None = setting(
        None,
        "Requests to serve, taken in turn from the result's own.",
        "Prediction",
        min=1,
        max=10**8,
        default_text="the result's, or 8 of the largest batch if that is more",
    )
    output: Path | None = setting(
        None,
        "Folder for predict.json, predict.csv and the picture.",
        "Output",
        metavar="DIR",
        default_text="predict in the result's folder, which is replaced",
    )
    overwrite: bool = setting(False, "Replace a prediction that --output holds.", "Output")
    json: bool = setting(
        False, "Print predict.json on standard output, and nothing else.", "Output"
    )
    quiet: bool = setting(False, "Show only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


MOST_ROWS = 14
"""Batch sizes that the terminal shows; predict.csv has all."""


@with_options({"study": SlotsSpec})
def predict(
    study: SlotsSpec,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a result.", show_default=False)
    ],
) -> None:
    """Predict, write, show."""
    sizes = sorted({int(n) for n in parse_numbers(study.batch_size, int, "--batch-size")})
    if sizes[0] < 1:
        raise UsageError(f"--batch-size {shown(study.batch_size)}: must be at least 1")
    from batchbench.cli.output import output_folder
    from batchbench.studies.predict.batch_sizes import predict_slots
    from batchbench.studies.predict.teacher import read_teacher

    teacher = read_teacher(folder, "predict")
    place = study.output or Path(teacher.known.source) / "predict"
    overwrite = study.overwrite or study.output is None
    with output_folder(place, overwrite=overwrite, marker="predict.json") as output:
        curve = predict_slots(teacher, sizes, study.queue_size)
        _write_and_show(curve, output, study)


def _write_and_show(curve: Curve, output: Path, study: SlotsSpec) -> None:
    from rich.console import Console

    from batchbench.files import write_whole
    from batchbench.reports.figures import render
    from batchbench.reports.figures.slots import draw_slots
    from batchbench.studies.predict.batch_sizes import headline, sentence, table_of, to_json

    words = settings.words_of(study, SlotsSpec(), always=["batch_size"])
    command = shlex.join(["batchbench", "predict", curve.teacher.known.source, *words])
    frame, text = table_of(curve), to_json(curve, command)
    enough = {name: curve.enough(name).batch_size for name in curve.strategies}
    measured = curve.teacher.result.data["config"]["serving"]["batch_size"]
    said = sentence(curve)
    figure = draw_slots(frame, enough, headline(curve), curve.title, measured)
    contents: dict[str, bytes | str] = {"predict.json": text}
    contents["predict.csv"] = frame.to_csv(index=False)
    contents |= {f"slots.{format}": render(figure, format) for format in ("png", "svg")}
    files = write_whole(output, contents)
    if study.json:
        echo_json(text)
        return
    if study.quiet:
        echo(said)
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(said, markup=False, style="bold")
    console.print()
    console.print(_table(curve, measured))
    held = curve.teacher.quality
    console.print(
        f"\nThe fit: {held.steps:,} steps, held out in turn; a step is off by "
        f"{held.median_error:.1%} (median), all together by {held.total_error:+.1%}.",
    )
    console.print(f"\nAgain: {command}", markup=False, soft_wrap=True)
    names = ", ".join(file.name for file in files)
    console.print(f"Files: {shlex.quote(str(output))}/ with {names}", markup=False, soft_wrap=True)


def _table(curve: Curve, measured: int) -> Table:
    """Batch sizes down, strategies side by side."""
    from rich.table import Table

    from batchbench.reports.text import number

    grid = Table(
        title=curve.title,
        caption="* the fit saw no such steps; > the batch size that was run; = 95 % of the best",
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
    )
    grid.add_column("batch\nsize", justify="right")
    names = curve.strategies
    for label in ("tok/s", "TTFT ms", "TPOT ms"):
        for name in names:
            grid.add_column(f"{label}\n{name}", justify="right", overflow="fold")
    points = {name: {p.batch_size: p for p in curve.of(name)} for name in names}
    enough = {curve.enough(name).batch_size for name in names}
    for size in shown_sizes(sorted(points[names[0]]), {measured, *enough}):
        here = [points[name][size] for name in names]
        mark = ">" * (size == measured) + "=" * (size in enough)
        mark += "*" * (not all(p.seen for p in here))
        row = [f"{mark} {size:,}".strip()]
        for metric in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms"):
            row += [number(getattr(p, metric)) for p in here]
        grid.add_row(*row)
    return grid


def shown_sizes(sizes: list[int], always: set[int]) -> list[int]:
    """All sizes if they are few; else about evenly by ratio, and those that matter."""
    if len(sizes) <= MOST_ROWS:
        return sizes
    ratio = (sizes[-1] / sizes[0]) ** (1 / (MOST_ROWS - 3))
    kept, last = {sizes[0], sizes[-1]}, sizes[0]
    for size in sizes:
        if size >= last * ratio:
            kept.add(size)
            last = size
    return sorted(kept | (always & set(sizes)))
