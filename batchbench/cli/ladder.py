"""The command ladder."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchbench.batching.experiment import ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import OutputSpec, with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import Interrupted
from batchbench.files import undisturbed
from batchbench.studies.ladder.rungs import Climb, LadderSpec, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.ladder.result import LadderResult

LADDER_HELP = """Serve one workload in ever faster ways, beside what this machine allows.

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
"""Options of a run that are what the rungs differ in, or that a ladder has no use for."""


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
    """Climb it."""
    from batchbench.cli.output import output_folder
    from batchbench.files import default_folders

    asked = Climb(workload, model, serving, trials, ladder, basis.preset)
    with output_folder(
        output.output,
        default_folders(model.model, "ladder"),
        overwrite=output.overwrite,
        marker="ladder.json",
    ) as folder:
        if not _climb(asked, output, folder):
            raise typer.Exit(1)


def _climb(asked: Climb, output: OutputSpec, folder: Path) -> bool:
    """Measure the machine and its rungs, write and show; return True if outputs are right."""
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder.run import Ladder

    silent = output.quiet or output.json
    rungs = tuple(rung.name for rung in choose_rungs(asked.ladder.rungs))
    display = make_display(rungs, asked.ladder.rounds, quiet=output.quiet)
    with display:
        made = Ladder(asked, display)
        allowed = made.measure(display)
    # Only now: an error about what is asked should not wait for scipy and matplotlib.
    from batchbench.studies.ladder.report import card_lines, write_ladder
    from batchbench.studies.ladder.result import make_card, make_ladder

    if not silent:
        echo("\n".join([*card_lines(make_card(allowed)), ""]))
    with display:
        climbed = made.climb(display, allowed)
    with undisturbed():  # All that was asked for is measured: keep it.
        result = make_ladder(
            command=asked.command(),
            config=asked.config(),
            environment=made.environment,
            model=made.model,
            workload=made.workload,
            ceilings=climbed.ceilings,
            rungs=[{**asdict(rung), "memory": made.memory[rung.name]} for rung in climbed.rungs],
            recordings=climbed.recordings,
            verifications=climbed.verifications,
            left_out=made.left_out,
            stopped=climbed.stopped,
        )
        files = write_ladder(folder, result)
    _show(result, files, output)
    if climbed.stopped:
        raise Interrupted(f"{climbed.stopped}; the results are in {folder}")
    return result.passed


def _show(result: LadderResult, files: Iterable[Path], output: OutputSpec) -> None:
    from rich.console import Console

    from batchbench.studies.ladder.report import render, sentence
    from batchbench.studies.ladder.result import to_json

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
    names = ", ".join(f.name for f in written if f.parent == written[0].parent)
    folder = shlex.quote(str(written[0].parent))
    console.print(f"Files: {folder}/ with {names} …", markup=False, soft_wrap=True)
