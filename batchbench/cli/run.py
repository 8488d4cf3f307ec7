"""The commands run, simulate and report."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench.batching.cost import CostSpec
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import OutputSpec, with_options
from batchbench.errors import Interrupted
from batchbench.reports.goals import GoalsSpec
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.reports.result import Result

_SPECS = {
    "basis": Basis,
    "serving": ServingSpec,
    "workload": WorkloadSpec,
    "model": ModelSpec,
    "trials": TrialsSpec,
    "goals": GoalsSpec,
    "output": OutputSpec,
}

RUN_HELP = """Serve a workload under static and continuous batching, check the outputs, compare.

Example: batchbench run --batch-size 8 --queue-size 32"""

SIMULATE_HELP = """Do what run does on a virtual clock: no model, every step costs one unit (1 ms).

With --cost RESULT a step costs what the steps of a run teach: times are then predictions, of any
batch size, rate or length.

Example: batchbench simulate --batch-size 8 --queue-size 32"""

REPORT_HELP = """Derive tables and pictures of a result again from its recordings, and show them.

Example: batchbench report batchbench-results/my-run"""


@with_options(_SPECS)
def run(
    basis: Basis,
    serving: ServingSpec,
    workload: WorkloadSpec,
    model: ModelSpec,
    trials: TrialsSpec,
    goals: GoalsSpec,
    output: OutputSpec,
) -> None:
    """Measure on the model."""
    asked = Experiment(workload, model, serving, trials, preset=basis.preset)
    _conduct(asked, goals, output)


@with_options({"cost": CostSpec, **_SPECS}, defaults={"trials": 1})
def simulate(
    cost: CostSpec,
    basis: Basis,
    serving: ServingSpec,
    workload: WorkloadSpec,
    model: ModelSpec,
    trials: TrialsSpec,
    goals: GoalsSpec,
    output: OutputSpec,
) -> None:
    """Measure nothing: count steps."""
    asked = Experiment(workload, model, serving, trials, simulated=True, preset=basis.preset)
    if cost.cost is not None:
        asked = _on_cost(asked, cost.cost)
    _conduct(asked, goals, output)


def _on_cost(asked: Experiment, folder: Path) -> Experiment:
    """The experiment with the costs that a result teaches, on its model."""
    from batchbench.reports.teaching import check_engine, read_teacher

    teacher = read_teacher(folder, "--cost")
    check_engine(teacher, asked.serving, "--cost")
    model = teacher.model if asked.model == ModelSpec() else asked.model
    return replace(asked, model=model, cost=teacher.known)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a result.", show_default=False)
    ],
    json: Annotated[
        bool, typer.Option("--json", help="Print result.json on standard output, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show only the sentence.")] = False,
) -> None:
    """Show a result again."""
    from batchbench.reports.destination import check_folder
    from batchbench.reports.result import load_result, remake_result

    folder = folder.parent if folder.name == "result.json" else folder
    result = remake_result(load_result(folder))
    check_folder(folder, overwrite=True)
    from batchbench.reports.folder import write_folder  # pandas and matplotlib, only now

    files = write_folder(folder, result)
    _show(result, files, OutputSpec(json=json, quiet=quiet))


def _conduct(experiment: Experiment, goals: GoalsSpec, output: OutputSpec) -> None:
    if output.dry_run:
        _dry_run(experiment)
        return
    from batchbench.reports.destination import check_folder, default_folder, remove_if_empty

    folder = output.output or default_folder(experiment.model.model)
    made = check_folder(folder, overwrite=output.overwrite)
    try:
        code = _measure_and_write(experiment, goals, output, folder)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing was kept") from error
    finally:
        remove_if_empty(made)
    if code:
        raise typer.Exit(code)


def _measure_and_write(
    experiment: Experiment, goals: GoalsSpec, output: OutputSpec, folder: Path
) -> int:
    from batchbench.batching.conduct import conduct
    from batchbench.cli.display import make_display

    display = make_display(
        experiment.serving.strategies,
        experiment.trials.trials,
        quiet=output.quiet,
    )
    with display:
        outcome = conduct(experiment, display)
    # Only now: an error about what is asked should not wait for pandas and matplotlib.
    from batchbench.reports.folder import write_folder
    from batchbench.reports.result import make_result

    result = make_result(outcome, goals)
    files = write_folder(folder, result)
    _show(result, files, replace(output, output=folder))
    if outcome.stopped and outcome.stopped.startswith("interrupted"):
        return 130
    return 1 if result.data["verification"]["passed"] is False else 0


def _show(result: Result, files: Iterable[Path], output: OutputSpec) -> None:
    from rich.console import Console

    from batchbench.reports.formats.terminal import render, sentence
    from batchbench.reports.result import to_json

    if output.json:
        typer.echo(to_json(result), nl=False)
        return
    if output.quiet:
        typer.echo(sentence(result))
        return
    console = Console(highlight=False)
    console.print(render(result))
    console.print(f"\nAgain: {result.data['command']}", markup=False, soft_wrap=True)
    written = list(files)
    names = [f.name for f in written if f.suffix in (".json", ".csv", ".png")]
    console.print(
        f"Files: {shlex.quote(str(written[0].parent))}/ with {', '.join(names)} …",
        markup=False,
        soft_wrap=True,
    )


def _dry_run(experiment: Experiment) -> None:
    from batchbench.batching.estimate import estimate
    from batchbench.cli.display import make_display

    with make_display((), 1, quiet=True) as silent:
        found = estimate(experiment, silent)
    for line in found.lines():
        typer.echo(line)
