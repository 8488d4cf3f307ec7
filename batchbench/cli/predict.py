"""The commands predict and breakeven."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchbench.batching.experiment import PREFILLS, Experiment
from batchbench.batching.machine import facts_of
from batchbench.batching.models import ModelSpec
from batchbench.batching.progress import Watch
from batchbench.cli.options import ResultFolder, Spec, folder_setting, typed_command, with_options
from batchbench.cli.output import output_folder, show
from batchbench.errors import UsageError, shown
from batchbench.files import default_folders, write_whole
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.text import spell_time
from batchbench.settings import setting
from batchbench.studies.executors.jobs import Executor, Job, run_parts
from batchbench.studies.executors.spec import ExecutorSpec, make_executor
from batchbench.studies.sweep.grid import parse_numbers

if TYPE_CHECKING:
    from batchbench.studies.predict.fitted import FittedRun

PREDICT_HELP = """Predict the speed at other batch sizes, and find where more slots stop helping.

Step costs are fitted to the run of a result. The same scheduler then serves its requests on a
virtual clock, once for each number of slots.

Example: batchbench predict batchbench-results/my-run --batch-size 1:64"""

BREAKEVEN_HELP = """Map where continuous batching wins and where static batching wins.

The map covers batch size × spread of output lengths × load, for throughput, TTFT and goodput. It is
simulated with the step costs of a run, which --cost names; without --cost, the command makes such a
run first. --measure N also measures N cells.

Example: batchbench breakeven --model toy-gpt2 --batch-size 2,4,8"""


def _batch_sizes(text: str) -> list[int]:
    """Parse ``--batch-size`` into rising batch sizes."""
    sizes = sorted({int(n) for n in parse_numbers(text, int, "--batch-size")})
    if sizes[0] < 1:
        raise UsageError(f"--batch-size {shown(text)}: must be at least 1")
    return sizes


@dataclass(frozen=True)
class PredictSpec(Spec):
    """Options of ``predict``."""

    batch_size: str = setting(
        "1:64",
        "Batch sizes to predict: numbers, lists and ranges, such as 1,2,4 or 1:64 or 8:64:8.",
        "Prediction",
        metavar="N,…",
    )
    queue_size: int | None = setting(
        None,
        "Number of requests to serve; those of the result are repeated.",
        "Prediction",
        min=1,
        max=10**8,
        default_text="as many as in the result, but at least 8 per slot of the largest batch",
    )
    output: Path | None = folder_setting(
        "predict.json, predict.csv and the picture",
        "the folder predict in RESULT, which is replaced",
    )
    overwrite: bool = setting(False, "Replace the prediction in the output folder.", "Output")
    json: bool = setting(False, "Print only predict.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary.", "Output")


@with_options()
def predict(
    study: PredictSpec,
    folder: ResultFolder,
) -> None:
    sizes = _batch_sizes(study.batch_size)
    from batchbench.studies.predict import batch_sizes as report
    from batchbench.studies.predict.fitted import read_fitted

    fitted = read_fitted(folder, "predict")
    place = study.output or Path(fitted.known.source) / "predict"
    overwrite = study.overwrite or study.output is None
    with output_folder(place, overwrite=overwrite, marker="predict.json") as output:
        curve = report.predict_slots(fitted, sizes, study.queue_size)
        command = typed_command()
        files, text = report.write_prediction(output, curve, command)
        show(study, text, report.sentence(curve), report.render(curve), command, files)


_PANEL = "Map"


@dataclass(frozen=True)
class BreakevenSpec(Spec):
    """Options of ``breakeven``."""

    cost: Path | None = setting(
        None,
        "Folder of a result that batchbench run wrote, to fit step costs on; its model is used.",
        _PANEL,
        metavar="RESULT",
        default_text="a run is made first, at the largest batch size",
    )
    batch_size: str = setting("2,4,8,16", "Batch sizes (slots).", _PANEL, metavar="N,…")
    spread: str = setting(
        "0,0.25,0.5,1,2",
        "Standard deviation of output lengths divided by their mean; 0: all lengths are equal.",
        _PANEL,
        metavar="X,…",
    )
    load: str = setting(
        "0.5,0.9,all",
        "Request rate, as a share of what continuous batching can serve; all: all requests "
        "arrive at the start.",
        _PANEL,
        metavar="X,…|all",
    )
    mean_tokens: int = setting(48, "Mean output length in tokens.", _PANEL, min=2, max=10**6)
    prompt_tokens: int = setting(16, "Tokens of each prompt.", _PANEL, min=1, max=10**6)
    batches: int = setting(
        8, "Number of requests per cell, as a multiple of its batch size.", _PANEL, min=2, max=10**6
    )
    engine: str = setting(
        "slots", "Engine of the run that is made first.", _PANEL, choices=("slots", "notebook")
    )
    prefill: str = setting(
        "auto",
        "As in run. With separate, each admission stalls the other requests for a pass, which "
        "favours static batching.",
        _PANEL,
        choices=PREFILLS,
    )
    seed: int = setting(
        0,
        "Seed for lengths, prompts, arrivals, dummy weights and the choice of measured cells.",
        _PANEL,
        min=0,
        max=2**63 - 1,
    )
    measure: int = setting(
        0,
        "Number of cells to measure as well; they are drawn at random.",
        "Measuring",
        min=0,
        max=10_000,
    )
    trials: int = setting(
        2, "Number of trials of each measured cell.", "Measuring", min=1, max=10_000
    )
    output: Path | None = folder_setting(
        "breakeven.json, breakeven.csv, the picture and the finished cells",
        "batchbench-results/<time>-breakeven",
    )
    overwrite: bool = setting(
        False, "Replace the map in the output folder; its finished cells are reused.", "Output"
    )
    json: bool = setting(False, "Print only breakeven.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        _batch_sizes(self.batch_size)
        if not all(0 <= spread <= 10 for spread in self.spreads):
            raise UsageError(f"--spread {shown(self.spread)}: must be at least 0 and at most 10")
        _ = self.loads

    @property
    def spreads(self) -> tuple[float, ...]:
        """Spreads, rising."""
        return tuple(sorted({float(n) for n in parse_numbers(self.spread, float, "--spread")}))

    @property
    def loads(self) -> tuple[str, ...]:
        """Loads as texts, rising, and ``all`` last."""
        parts = [part.strip() for part in self.load.split(",")]
        numbers = ",".join(part for part in parts if part != "all")
        loads = {float(n) for n in parse_numbers(numbers, float, "--load")} if numbers else set()
        if any(not 0.01 <= load <= 100 for load in loads):
            raise UsageError(
                f"--load {shown(self.load)}: must be all, or from 0.01 to 100, such as 0.9"
            )
        return (*(f"{load:g}" for load in sorted(loads)), *["all"] * ("all" in parts))


@with_options()
def breakeven(
    study: BreakevenSpec, model: ModelSpec, goals: GoalsSpec, machines: ExecutorSpec
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.studies.predict import breakeven_report as report
    from batchbench.studies.predict.breakeven import (
        CellList,
        MapSpec,
        make_map,
        measure,
        usual_limits,
    )
    from batchbench.studies.sweep.run import Store

    if study.cost is not None and model != ModelSpec():
        raise UsageError("--cost: uses the model of the result; drop --model and its options")
    lost = "the same command with the same --output continues from the cells that are kept"
    with output_folder(
        study.output,
        default_folders("breakeven"),
        overwrite=study.overwrite,
        marker="breakeven.json",
        lost=lost,
    ) as folder:
        fitted, first = _known(study, folder), _first_run(study, model)
        store, price = Store(folder), goals.price_per_hour
        kept = None if fitted is None else facts_of(fitted.result.data["environment"], {})
        needed = [first] if study.measure or fitted is None else []
        with (
            make_display(quiet=study.quiet, varying=CellList().varying) as display,
            closing(make_executor(machines, needed, folder, display, kept)) as executor,
        ):
            if fitted is None:
                _context(study, model)
                here = machines.executor == "local"
                fitted = _measured(first, folder, executor, display, here=here)
            spec = MapSpec(
                batch_sizes=tuple(_batch_sizes(study.batch_size)),
                spreads=study.spreads,
                loads=study.loads,
                mean_tokens=study.mean_tokens,
                prompt_tokens=study.prompt_tokens,
                batches=study.batches,
                seed=study.seed,
                engine=fitted.engine,
                prefill=study.prefill,
                model=fitted.model,
                context=_context(study, fitted.model),
            )
            limits = goals.limits_ms or usual_limits(fitted.known.cost, spec)
            result = make_map(spec, fitted, limits, store, display)
            result = measure(result, study.measure, study.trials, store, display, executor)
        command = typed_command(keep=["output", "overwrite"])
        files, text = report.write_map(folder, result, command, price)
        show(study, text, report.sentence(result), report.render(result, price), command, files)


def _first_run(study: BreakevenSpec, model: ModelSpec) -> Experiment:
    """Return the run on which step costs are fitted if there is no ``--cost``."""
    largest = max(_batch_sizes(study.batch_size))
    experiment = Experiment.of(
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
    return replace(experiment, model=model)


def _known(study: BreakevenSpec, folder: Path) -> FittedRun | None:
    """Return the result of ``--cost``, or the first run if it is kept; else None."""
    from batchbench.studies.predict.fitted import read_fitted

    if study.cost is not None:
        return read_fitted(study.cost, "--cost")
    own = folder / "teacher"
    return read_fitted(own, "--output") if (own / "result.json").exists() else None


def _measured(
    first: Experiment, folder: Path, executor: Executor, watch: Watch, *, here: bool
) -> FittedRun:
    """Make the first run as a job of the executor, which measures the cells too."""
    from batchbench.batching.dry_run import estimate
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import load_result
    from batchbench.studies.predict.fitted import read_fitted
    from batchbench.studies.sweep.run import CellWork

    watch.note(
        f"no --cost: a run at batch size {first.serving.batch_size} is made first to measure step "
        "times"
    )
    if here and (seconds := estimate(first, Watch()).seconds):
        watch.note(f"this takes about {spell_time(1.5 * seconds)} plus the warm-up")
    job, own = Job("the first run", CellWork(first)), folder / "teacher"
    write_whole(own, run_parts([job], executor, watch)[job.key][0])
    write_folder(own, load_result(own))  # with the pictures and the page of any run
    return read_fitted(own, "--output")


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
