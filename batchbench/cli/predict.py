"""The command predict."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.batching.experiment import PREFILLS, Experiment
from batchbench.batching.models import ModelSpec
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError, shown
from batchbench.reports.slo import GoalsSpec
from batchbench.settings import setting
from batchbench.studies.sweep.grid import parse_numbers

if TYPE_CHECKING:
    from rich.table import Table

    from batchbench.batching.progress import Watch
    from batchbench.studies.predict.batch_sizes import Curve
    from batchbench.studies.predict.breakeven import BreakEven, MapSpec
    from batchbench.studies.predict.teacher import Teacher
    from batchbench.studies.sweep.store import Store


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
    from batchbench.reports.figures import figure_bytes
    from batchbench.studies.predict.batch_sizes import (
        draw_slots,
        headline,
        sentence,
        table_of,
        to_json,
    )

    words = settings.words_of(study, SlotsSpec(), always=["batch_size"])
    command = shlex.join(["batchbench", "predict", curve.teacher.known.source, *words])
    frame, text = table_of(curve), to_json(curve, command)
    enough = {name: curve.enough(name).batch_size for name in curve.strategies}
    measured = curve.teacher.result.data["config"]["serving"]["batch_size"]
    said = sentence(curve)
    figure = draw_slots(frame, enough, headline(curve), curve.title, measured)
    contents: dict[str, bytes | str] = {"predict.json": text}
    contents["predict.csv"] = frame.to_csv(index=False)
    contents |= {f"slots.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
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


BREAKEVEN_HELP = """Map where continuous batching wins, where static does, and the border between.

Batch size × spread of output lengths × load, on throughput, TTFT and goodput: simulated on the
step costs of a run (--cost, or a run made for it now); a few cells, drawn with the seed, are then
run for real.

Example: batchbench breakeven --model toy-gpt2 --batch-size 2,4,8 --measure 3"""

_PANEL = "Map"


@dataclass(frozen=True)
class BreakevenSpec:
    """The axes of the map, and where it goes."""

    cost: Path | None = setting(
        None,
        "Folder of a result that batchbench run wrote, whose steps teach what a step costs; the "
        "model is the result's.",
        _PANEL,
        metavar="RESULT",
        default_text="a run is made now, at the largest batch size",
    )
    batch_size: str = setting("2,4,8,16", "Batch sizes (slots).", _PANEL, metavar="N,…")
    spread: str = setting(
        "0,0.25,0.5,1,2",
        "Standard deviation of output lengths over their mean; 0: all are equally long.",
        _PANEL,
        metavar="X,…",
    )
    load: str = setting(
        "0.5,0.9,all",
        "Requests offered over what continuous batching can serve; all: everything is there at "
        "the start.",
        _PANEL,
        metavar="X,…|all",
    )
    mean_tokens: int = setting(48, "Mean of output lengths.", _PANEL, min=2, max=10**6)
    prompt_tokens: int = setting(16, "Tokens of each prompt.", _PANEL, min=1, max=10**6)
    batches: int = setting(
        8, "Requests of a cell: so many times its batch size.", _PANEL, min=2, max=10**6
    )
    engine: str = setting(
        "slots", "Engine of the run made now.", _PANEL, choices=("slots", "notebook")
    )
    prefill: str = setting(
        "auto",
        "As of run. With separate, every admission stalls the others for a pass: the more static "
        "wins.",
        _PANEL,
        choices=PREFILLS,
    )
    seed: int = setting(
        0,
        "Seed of lengths, prompts, arrivals, dummy weights and of the cells that are run.",
        _PANEL,
        min=0,
        max=2**63 - 1,
    )
    measure: int = setting(
        3, "Cells, drawn at random, that are also run for real.", "Measuring", min=0, max=10_000
    )
    trials: int = setting(2, "Trials of each cell that is run.", "Measuring", min=1, max=10_000)
    output: Path | None = setting(
        None,
        "Folder for breakeven.json, breakeven.csv, the picture and the finished cells.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/<time>-breakeven",
    )
    overwrite: bool = setting(
        False, "Replace a map that the folder holds; its finished cells are used again.", "Output"
    )
    json: bool = setting(
        False, "Print breakeven.json on standard output, and nothing else.", "Output"
    )
    quiet: bool = setting(False, "No progress, and of the report only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)
        if min(self.sizes) < 1:
            raise UsageError(f"--batch-size {shown(self.batch_size)}: must be at least 1")
        if not all(0 <= spread <= 10 for spread in self.spreads):
            raise UsageError(f"--spread {shown(self.spread)}: must be at least 0 and at most 10")
        _ = self.loads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes, rising."""
        return tuple(sorted({int(n) for n in _numbers(self.batch_size, int, "--batch-size")}))

    @property
    def spreads(self) -> tuple[float, ...]:
        """Spreads, rising."""
        return tuple(sorted({float(n) for n in _numbers(self.spread, float, "--spread")}))

    @property
    def loads(self) -> tuple[str, ...]:
        """Loads as texts, rising, and ``all`` last."""
        parts = [part.strip() for part in self.load.split(",")]
        numbers = ",".join(part for part in parts if part != "all")
        found = {float(n) for n in _numbers(numbers, float, "--load")} if numbers else set()
        if any(not 0.01 <= load <= 100 for load in found):
            raise UsageError(
                f"--load {shown(self.load)}: must be all, or from 0.01 to 100, such as 0.9"
            )
        return (*(f"{load:g}" for load in sorted(found)), *["all"] * ("all" in parts))


def _numbers(text: str, kind: type[int] | type[float], option: str) -> list[int | float]:
    return parse_numbers(text, kind, option)


@with_options({"study": BreakevenSpec, "model": ModelSpec, "goals": GoalsSpec})
def breakeven(study: BreakevenSpec, model: ModelSpec, goals: GoalsSpec) -> None:
    """Teach, simulate, measure, write, show."""
    from batchbench.cli.output import output_folder
    from batchbench.files import default_folders
    from batchbench.studies.sweep.store import Store

    if study.cost is not None and model != ModelSpec():
        raise UsageError("--cost: the model is that of the result; drop --model and its options")
    defaults = default_folders("breakeven")
    lost = "the same command with the same --output continues from the cells that are kept"
    with output_folder(
        study.output, defaults, overwrite=study.overwrite, marker="breakeven.json", lost=lost
    ) as folder:
        found = _map(study, model, goals, Store(folder))
        _write_and_show_map(found, folder, study, model, goals)


def _map(study: BreakevenSpec, model: ModelSpec, goals: GoalsSpec, store: Store) -> BreakEven:
    from batchbench.cli.progress import make_sweep_display
    from batchbench.studies.predict.breakeven import Chosen, make_map, measure, usual_limits

    with make_sweep_display(Chosen(()), quiet=study.quiet) as display:
        teacher = _teacher(study, model, store.folder, display)
        spec = _spec(study, teacher)
        limits = goals.limits_ms or usual_limits(teacher.known.cost, spec)
        found = make_map(spec, teacher, limits, store, display)
        return measure(found, study.measure, study.trials, store, display)


def _context(study: BreakevenSpec, model: ModelSpec) -> int | None:
    """Return the context of the model.

    Raises:
        UsageError: a request of mean length does not fit.
    """
    from batchbench.batching.models import find_model

    source = find_model(model, weights=False)
    if source.context is not None and study.prompt_tokens + study.mean_tokens > source.context:
        raise UsageError(
            f"--mean-tokens {study.mean_tokens}: with --prompt-tokens {study.prompt_tokens} "
            f"exceeds the {source.context} tokens that {source.name} takes; lower one of them"
        )
    return source.context


def _spec(study: BreakevenSpec, teacher: Teacher) -> MapSpec:
    from batchbench.studies.predict.breakeven import MapSpec

    return MapSpec(
        batch_sizes=study.sizes,
        spreads=study.spreads,
        loads=study.loads,
        mean_tokens=study.mean_tokens,
        prompt_tokens=study.prompt_tokens,
        batches=study.batches,
        seed=study.seed,
        engine=teacher.engine,
        prefill=study.prefill,
        model=teacher.model,
        context=_context(study, teacher.model),
    )


def _teacher(study: BreakevenSpec, model: ModelSpec, folder: Path, watch: Watch) -> Teacher:
    """The result that teaches: the one that was given, or a run made now and kept."""
    from batchbench.batching.session import conduct
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import make_result
    from batchbench.studies.predict.teacher import read_teacher

    if study.cost is not None:
        return read_teacher(study.cost, "--cost")
    _context(study, model)
    own = folder / "teacher"
    if not (own / "result.json").exists():
        largest = max(study.sizes)
        asked = Experiment.of(
            {
                "batch_size": largest,
                "queue_size": 4 * largest,
                "output_tokens": f"uniform:min=1,max={2 * study.mean_tokens}",
                "prompt_tokens": str(study.prompt_tokens),
                "overlong": "clip",
                "engine": study.engine,
                "prefill": study.prefill,
                "seed": study.seed,
                "trials": 3,
                "verify": "none",
            }
        )
        watch.note(f"no --cost: a run at batch size {largest} teaches what a step costs")
        write_folder(own, make_result(conduct(replace(asked, model=model), watch)))
    return read_teacher(own, "--output")


def _write_and_show_map(
    found: BreakEven, folder: Path, study: BreakevenSpec, model: ModelSpec, goals: GoalsSpec
) -> None:
    import pandas as pd
    from rich.console import Console

    from batchbench.files import write_whole
    from batchbench.reports.figures import figure_bytes
    from batchbench.studies.predict import breakeven_report as border
    from batchbench.studies.predict.breakeven import rows_of
    from batchbench.studies.predict.breakeven_report import draw_breakeven

    words = [
        *settings.words_of(study, BreakevenSpec()),
        *settings.words_of(model, ModelSpec()),
        *settings.words_of(goals, GoalsSpec()),
    ]
    command = shlex.join(["batchbench", "breakeven", *words])
    frame, text = pd.DataFrame(list(rows_of(found))), border.to_json(found, command)
    title, notes = border.title(found), border.notes(found)
    figure = draw_breakeven(frame, border.headline(found), title, notes)
    contents: dict[str, bytes | str] = {"breakeven.json": text}
    contents["breakeven.csv"] = frame.to_csv(index=False)
    contents |= {f"breakeven.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    files = write_whole(folder, contents)
    if study.json:
        echo_json(text)
        return
    if study.quiet:
        echo(border.sentence(found))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(border.render(found))
    console.print(f"\nAgain: {command}", markup=False, soft_wrap=True)
    names = ", ".join(file.name for file in files)
    console.print(
        f"Files: {shlex.quote(str(folder))}/ with {names} …", markup=False, soft_wrap=True
    )
