"""The command ladder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import OutputSpec, with_options
from batchbench.cli.output import echo, output_folder, show
from batchbench.errors import Interrupted
from batchbench.files import undisturbed
from batchbench.studies.ladder.rungs import LadderSpec, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    pass

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
    from batchbench.studies.ladder.report import (
        card_lines,
        make_card,
        make_ladder,
        render,
        sentence,
        to_json,
        write_ladder,
    )

    if not output.quiet and not output.json:
        echo("\n".join([*card_lines(make_card(ceilings)), ""]))
    with display:
        outcome = ladder.run(ceilings)
    with undisturbed():  # the measurement is complete: keep it
        result = make_ladder(outcome)
        files = write_ladder(folder, result)
    show(
        output,
        lambda: to_json(result),
        lambda: sentence(result),
        lambda: render(result),
        result.data["command"],
        files,
    )
    if outcome.stopped:
        raise Interrupted(f"{outcome.stopped}; the results are in {folder}")
    return result.passed
