"""The command ladder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import OutputSpec, typed_command, with_options
from batchbench.cli.output import echo, output_folder, show
from batchbench.errors import Interrupted, UsageError
from batchbench.files import undisturbed
from batchbench.json_file import parse_json
from batchbench.studies.executors.jobs import Job, run_parts
from batchbench.studies.executors.spec import ExecutorSpec, make_executor
from batchbench.studies.ladder.rungs import LadderSpec, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.ladder.report import LadderResult

LADDER_HELP = """Compare engines, from the notebook's loop to the limits of this hardware.

All engines serve the same workload in turn. Each makes one change to the engine before it.

Example: batchbench ladder --rungs notebook,generate_batch,packed"""

_SPECS = {
    "basis": Basis,
    "serving": ServingSpec,
    "workload": WorkloadSpec,
    "model": ModelSpec,
    "trials": TrialsSpec,
    "ladder": LadderSpec,
    "output": OutputSpec,
    "machines": ExecutorSpec,
}

_DECIDED = (
    *("strategy", "engine", "max_wait", "prefill", "execution"),
    *("stop_at_eos", "trials", "max_time", "dry_run", "trace_out"),
)
"""Options of a run in which rungs differ, or which a ladder does not have."""


@with_options(_SPECS, omit=_DECIDED)
def ladder(
    basis: Basis,
    serving: ServingSpec,
    workload: WorkloadSpec,
    model: ModelSpec,
    trials: TrialsSpec,
    ladder: LadderSpec,
    output: OutputSpec,
    machines: ExecutorSpec,
) -> None:
    from batchbench.files import default_folders

    experiment = Experiment(workload, model, serving, trials, preset=basis.preset)
    with output_folder(
        output.output,
        default_folders(model.model, "ladder"),
        overwrite=output.overwrite,
        marker="ladder.json",
    ) as folder:
        if machines.executor == "local":
            passed = _run(experiment, ladder, output, folder)
        else:
            passed = _run_elsewhere(experiment, ladder, output, machines, folder)
        if not passed:
            raise typer.Exit(1)


def _run(experiment: Experiment, spec: LadderSpec, output: OutputSpec, folder: Path) -> bool:
    """Measure the machine and its rungs, write and show; return True if outputs are right."""
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder.run import Ladder

    names, command = tuple(rung.name for rung in choose_rungs(spec.rungs)), typed_command()
    with make_display(names, spec.rounds, quiet=output.quiet) as display:
        ladder = Ladder(experiment, spec, display)
        ceilings = ladder.measure()
    from batchbench.studies.ladder import report  # scipy and matplotlib: after errors of options

    if not output.quiet and not output.json:
        echo("\n".join([*report.card_lines(report.make_card(ceilings)), ""]))
    with display:
        outcome = ladder.run(ceilings)
    with undisturbed():  # the measurement is complete: keep it
        result = report.make_ladder(outcome, command)
        files = report.write_ladder(folder, result)
    _show(result, files, output, command)
    if outcome.stopped:
        raise Interrupted(f"{outcome.stopped}; the results are in {folder}")
    if outcome.failed:
        raise UsageError(f"{outcome.failed}; the results before it are in {folder}")
    return result.passed


def _run_elsewhere(
    experiment: Experiment,
    spec: LadderSpec,
    output: OutputSpec,
    machines: ExecutorSpec,
    folder: Path,
) -> bool:
    """Run the ladder as one job of an executor, write and show; return True if outputs are right.

    Its rungs are compared with each other, so they stay together and take turns.
    """
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder import report

    command = typed_command()
    job = Job("the ladder", report.LadderWork(experiment, spec, command))
    with (
        make_display((), spec.rounds, quiet=output.quiet) as display,
        closing(make_executor(machines, [experiment], folder, display)) as executor,
    ):
        contents = dict(run_parts([job], executor, display)[job.key][0])
    failed = contents.pop("failed")
    result = report.LadderResult(parse_json(str(contents["ladder.json"]).encode()), {})
    files = report.write_ladder(folder, result, contents)
    _show(result, files, output, command)
    if failed:
        raise UsageError(f"{failed!s}; the results before it are in {folder}")
    return result.passed


def _show(result: LadderResult, files: Sequence[Path], output: OutputSpec, command: str) -> None:
    from batchbench.studies.ladder import report

    show(
        output,
        lambda: report.to_json(result),
        lambda: report.sentence(result),
        lambda: report.render(result),
        command,
        files,
    )
