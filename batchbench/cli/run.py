"""The commands run, simulate and report."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.batching.step_cost import CostSpec
from batchbench.cli.options import OutputSpec, ReportSpec, with_options
from batchbench.cli.streams import echo, echo_html, echo_json
from batchbench.errors import Interrupted, UsageError
from batchbench.files import claimed, undisturbed, write_file
from batchbench.reports.slo import GoalsSpec
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

REPORT_HELP = """Show results again: here, as a page, as Markdown, or as JSON for a dashboard.

Of one result, tables, pictures and report.html are derived again from its recordings.

Several results are set side by side, with the settings in which they differ.

Example: batchbench report batchbench-results/my-run --format html"""


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
    from batchbench.studies.predict.teacher import check_engine, read_teacher

    teacher = read_teacher(folder, "--cost")
    check_engine(teacher, asked.serving, "--cost")
    model = teacher.model if asked.model == ModelSpec() else asked.model
    return replace(asked, model=model, cost=teacher.known)


@with_options({"output": ReportSpec})
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT", help="Folders that run or simulate wrote.", show_default=False
        ),
    ],
    output: ReportSpec,
) -> None:
    """Show results again."""
    from batchbench.files import check_file
    from batchbench.reports.output import check_number
    from batchbench.reports.result import load_result, remake_result

    folders = [folder.parent if folder.name == "result.json" else folder for folder in folders]
    one = len(folders) == 1
    if not one and output.json:
        raise UsageError("--json: shows one result; give one folder")
    if not one and output.trace_out:
        raise UsageError(f"--trace-out {output.trace_out}: holds one result; give one folder")
    check_number(folders)
    file = None if output.chosen == "terminal" else output.file(folders)
    if file is not None:
        check_file(file, "--output")
    if output.trace_out is not None:
        from batchbench.reports.formats.trace_events import check_trace_file

        check_trace_file(output.trace_out)
    results = [remake_result(load_result(folder)) for folder in folders]
    if output.trace_out is not None:
        from batchbench.reports.formats.trace_events import write_trace

        write_trace(output.trace_out, results[0])
    if output.chosen != "terminal":
        _write_document(folders, results, file, output)
    elif one:
        _show_again(folders[0], results[0], output)
    else:
        _show_together(folders, results, output)


def _show_again(folder: Path, result: Result, output: ReportSpec) -> None:
    from batchbench.cli.output import output_folder

    with output_folder(folder, overwrite=True):
        from batchbench.reports.output import write_folder  # pandas and matplotlib, only now

        files = write_folder(folder, result)
        _show(result, files, OutputSpec(json=output.json, quiet=output.quiet))


def _show_together(folders: list[Path], results: list[Result], output: ReportSpec) -> None:
    from rich.console import Console

    from batchbench.reports.formats.terminal import render_side_by_side
    from batchbench.reports.side_by_side import SideBySide, label_results

    together = SideBySide(label_results(folders, results))
    if output.quiet:
        echo(together.sentence)
        return
    Console(highlight=False, markup=False, emoji=False).print(render_side_by_side(together))


def _write_document(
    folders: list[Path], results: list[Result], file: Path | None, output: ReportSpec
) -> None:
    from batchbench.reports.output import make_document

    document = make_document(output.chosen, folders, results, file)
    if file is None:
        if output.chosen == "html":
            echo_html(document)
        elif output.chosen == "markdown":
            echo(document, end="")
        else:
            echo_json(document)
        return
    with claimed(file, f"--output {file}"):
        write_file(file, document)
    if not output.quiet:
        echo(f"File: {shlex.quote(str(file))}")


def _conduct(experiment: Experiment, goals: GoalsSpec, output: OutputSpec) -> None:
    if output.dry_run:
        _dry_run(experiment)
        return
    from batchbench.cli.output import output_folder
    from batchbench.files import default_folders

    defaults = default_folders(experiment.model.model)
    with output_folder(output.output, defaults, overwrite=output.overwrite) as folder:
        if output.trace_out is not None:
            from batchbench.reports.formats.trace_events import check_trace_file

            check_trace_file(output.trace_out, folder)
        if not _measure_and_write(experiment, goals, output, folder):
            raise typer.Exit(1)


def _measure_and_write(
    experiment: Experiment, goals: GoalsSpec, output: OutputSpec, folder: Path
) -> bool:
    """Measure, write and show; return whether the outputs are right."""
    from batchbench.batching.session import StopReason, conduct
    from batchbench.cli.progress import make_display

    display = make_display(
        experiment.serving.strategies,
        experiment.trials.trials,
        quiet=output.quiet,
    )
    with display:
        outcome = conduct(experiment, display)
    # Only now: an error about what is asked should not wait for pandas and matplotlib.
    from batchbench.reports.output import write_folder
    from batchbench.reports.result import make_result

    with undisturbed():  # All that was asked for is measured: keep it.
        result = make_result(outcome, goals)
        files = write_folder(folder, result)
        if output.trace_out is not None:
            from batchbench.reports.formats.trace_events import write_trace

            write_trace(output.trace_out, result)
    _show(result, files, replace(output, output=folder))
    if outcome.stopped and outcome.stopped.reason is StopReason.INTERRUPTED:
        raise Interrupted(f"{outcome.stopped}; the results are in {folder}")
    return result.data["verification"]["passed"] is not False


def _show(result: Result, files: Iterable[Path], output: OutputSpec) -> None:
    from rich.console import Console

    from batchbench.reports.formats.terminal import render, sentence
    from batchbench.reports.result import to_json

    if output.json:
        echo_json(to_json(result))
        return
    if output.quiet:
        echo(sentence(result))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(render(result))
    console.print(f"\nAgain: {result.data['command']}", markup=False, soft_wrap=True)
    written = list(files)
    names = [f.name for f in written if f.suffix in (".json", ".html", ".csv", ".png")]
    console.print(
        f"Files: {shlex.quote(str(written[0].parent))}/ with {', '.join(names)} …",
        markup=False,
        soft_wrap=True,
    )


def _dry_run(experiment: Experiment) -> None:
    from batchbench.batching.dry_run import estimate
    from batchbench.cli.progress import make_display

    with make_display((), 1, quiet=True) as silent:
        found = estimate(experiment, silent)
    for line in found.lines():
        echo(line)
