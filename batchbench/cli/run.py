"""The commands run and simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchbench.batching.experiment import Experiment, TrialsSpec, make_experiment
from batchbench.batching.models import ModelSpec
from batchbench.batching.remote.spec import TargetSpec
from batchbench.batching.step_cost import CostSpec
from batchbench.cli.options import (
    EXPERIMENT,
    OutputSpec,
    ReportSpec,
    typed_command,
    with_options,
)
from batchbench.cli.output import echo, output_folder, show
from batchbench.errors import Interrupted, UsageError
from batchbench.files import check_folder, default_folders, undisturbed
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.executors.spec import ExecutorSpec, clients_of

if TYPE_CHECKING:
    from batchbench.reports.result import Result

RUN_HELP = """Run a workload with static and continuous batching, and compare them.

The outputs are checked against unbatched generation.

Example: batchbench run --batch-size 8 --queue-size 32"""

SIMULATE_HELP = """Count the steps that run would take; this needs no model and takes seconds.

Every step takes one unit of time (1 ms). With --cost RESULT, step times are fitted to that run, so
that durations and latencies are predictions.

Example: batchbench simulate --batch-size 8 --queue-size 32"""


@with_options((*EXPERIMENT, TargetSpec, TrialsSpec))
def run(
    given: Mapping[str, Any], goals: GoalsSpec, output: OutputSpec, machines: ExecutorSpec
) -> None:
    experiment = make_experiment(given, simulated=False)
    target = experiment.target
    if machines.executor != "local" and (target is None or target.clients == 1):
        raise UsageError(
            f"--executor {machines.executor}: a run has no independent parts; give --target URL "
            "and --clients N, or use batchbench sweep"
        )
    if target is not None and output.dry_run:
        raise UsageError(
            "--dry-run: estimates our own engine, and --target measures a server; drop one of them"
        )
    _conduct(experiment, goals, output, machines)


@with_options((*EXPERIMENT, TrialsSpec), defaults={"trials": 1})
def simulate(
    cost: CostSpec, given: Mapping[str, Any], goals: GoalsSpec, output: OutputSpec
) -> None:
    experiment = make_experiment(given, simulated=True)
    if cost.cost is not None:
        from batchbench.studies.predict.fitted import check_engine, read_fitted

        measured = read_fitted(cost.cost, "--cost")
        check_engine(measured, experiment.serving, "--cost")
        model = measured.model if experiment.model == ModelSpec() else experiment.model
        experiment = replace(experiment, model=model, cost=measured.known)
    _conduct(experiment, goals, output, ExecutorSpec())


def _conduct(
    experiment: Experiment, goals: GoalsSpec, output: OutputSpec, machines: ExecutorSpec
) -> None:
    """Measure, write and show; exit with 1 if outputs are wrong or requests failed."""
    if output.dry_run:
        _dry_run(experiment, output)
        return
    defaults = default_folders(experiment.subject)
    with output_folder(output.output, defaults, overwrite=output.overwrite) as folder:
        _check_trace(output, folder)
        from batchbench.batching.session import StopReason, conduct
        from batchbench.cli.progress import make_display

        count = len(experiment.serving.strategies)
        display = make_display(quiet=output.quiet, strategies=count)
        with display, clients_of(machines, [experiment], folder, display) as start:
            outcome = conduct(experiment, display, start=start)
        # Imported only now, so that errors about options do not wait for pandas and matplotlib.
        from batchbench.reports.output import write_folder
        from batchbench.reports.result import make_result

        with undisturbed():  # everything is measured: do not lose it to Ctrl-C
            made = make_result(outcome, goals)
            result = replace(made, data={**made.data, "command": typed_command()})
            files = write_folder(folder, result)
            if output.trace_out is not None:
                from batchbench.reports.formats.trace_events import write_trace

                write_trace(output.trace_out, result)
        show_result(result, files, output)
        if outcome.stopped and outcome.stopped.reason is StopReason.INTERRUPTED:
            raise Interrupted(f"{outcome.stopped}; the results are in {folder}")
        if result.data["verification"]["passed"] is False or outcome.failures:
            raise typer.Exit(1)


def _check_trace(output: OutputSpec, folder: Path | None) -> None:
    if output.trace_out is not None:
        from batchbench.reports.formats.trace_events import check_trace_file

        check_trace_file(output.trace_out, folder)


def show_result(result: Result, files: Sequence[Path], output: OutputSpec | ReportSpec) -> None:
    """Print a result and where its files are."""
    from batchbench.reports.formats.terminal import render, sentence
    from batchbench.reports.result import to_json

    show(
        output,
        to_json(result),
        sentence(result),
        render(result, verbose=output.verbose),
        result.data["command"],
        files,
        more=None if output.verbose else "batchbench report --verbose",
    )


def _dry_run(experiment: Experiment, output: OutputSpec) -> None:
    if output.output is not None:
        check_folder(output.output, overwrite=output.overwrite)
    _check_trace(output, output.output)
    from batchbench.batching.dry_run import estimate
    from batchbench.cli.progress import make_display

    with make_display(quiet=output.quiet) as display:
        estimated = estimate(experiment, display)
    for line in estimated.lines():
        echo(line)
