"""The command ladder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import OutputSpec, with_options
from batchbench.cli.output import echo, echo_json, output_folder
from batchbench.errors import Interrupted
from batchbench.files import undisturbed
from batchbench.studies.ladder.rungs import LadderSpec, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.ladder.report import LadderResult

LADDER_HELP = """Compare engines, from the notebook's loop to the limits of this hardware.

All serve one workload, in turn. Each adds one change: continuous batching, a lasting cache, own
kernels …

Example: batchbench ladder --rungs notebook,generate_batch,packed"""

_SPECS = {
    "basis": Basis,
    "serving": ServingSpec,
    "workload": WorkloadSpec,
    "model": ModelSpec,
    "trials": TrialsSpec,
    "ladder": LadderSpec,
    "output": OutputSpec,
}

_DECIDED = (
    "strategy",
    "engine",
    "max_wait",
    "prefill",
    "execution",
    "stop_at_eos",
    "trials",
    "max_time",
    "dry_run",
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
) -> None:
    from batchbench.files import default_folders

    experiment = Experiment(workload, model, serving, trials, preset=basis.preset)
    with output_folder(
        output.output,
        default_folders(model.model, "ladder"),
        overwrite=output.overwrite,
        marker="ladder.json",
    ) as folder:
        if not _run(experiment, ladder, output, folder):
            raise typer.Exit(1)


def _run(experiment: Experiment, spec: LadderSpec, output: OutputSpec, folder: Path) -> bool:
    """Measure the machine and its rungs, write and show; return True if outputs are right."""
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder.run import Ladder

    names = tuple(rung.name for rung in choose_rungs(spec.rungs))
    with make_display(names, spec.rounds, quiet=output.quiet) as display:
        ladder = Ladder(experiment, spec, display)
        ceilings = ladder.measure()
    # Only now: an error about the options should not wait for scipy and matplotlib.
    from batchbench.studies.ladder.report import card_lines, make_card, make_ladder, write_ladder

    if not output.quiet and not output.json:
        echo("\n".join([*card_lines(make_card(ceilings)), ""]))
    with display:
        outcome = ladder.run(ceilings)
    with undisturbed():  # the measurement is complete: keep it
        result = make_ladder(outcome)
        files = write_ladder(folder, result)
    _show(result, files, output)
    if outcome.stopped:
        raise Interrupted(f"{outcome.stopped}; the results are in {folder}")
    return result.passed


def _show(result: LadderResult, files: Sequence[Path], output: OutputSpec) -> None:
    from rich.console import Console

    from batchbench.studies.ladder.report import render, sentence, to_json

    if output.json:
        echo_json(to_json(result))
        return
    if output.quiet:
        echo(sentence(result))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(render(result))
    console.print(f"\nAgain: {result.data['command']}", markup=False, soft_wrap=True)
    folder = files[0].parent
    names = ", ".join(file.name for file in files if file.parent == folder)
    console.print(
        f"Files: {shlex.quote(str(folder))}/ with {names} …", markup=False, soft_wrap=True
    )
