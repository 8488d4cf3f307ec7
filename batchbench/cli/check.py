"""The commands check and baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo
from batchbench.cli.verdict import GateOutputSpec, check_outputs, conclude
from batchbench.files import claimed, write_file, write_whole
from batchbench.settings import setting
from batchbench.studies.gate.spec import BaselineSpec, CheckSpec
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.gate.baseline import Baseline
    from batchbench.studies.gate.evidence import Gate

CHECK_HELP = """Hold this version against a kept baseline: its work exactly, its speed by ratios.

It runs the baseline's experiment in fresh processes, each with its twins in turns (static batching,
and the notebook engine), whose ratio the machine's speed cancels out of. Absolute times are told
and gate nothing. It stops as soon as the answer is sure. Exit code 1: slower, or other work done.

Example: batchbench check --baseline baseline.json"""

BASELINE_HELP = "Keep what this version does, to hold later ones against."

SAVE_HELP = """Measure an experiment in fresh processes and keep it as a baseline.

Example: batchbench baseline save --preset ci --output baseline.json"""

SHOW_HELP = """Say what a baseline holds, how old it is and what it was made on.

Example: batchbench baseline show baseline.json"""

app = typer.Typer(help=BASELINE_HELP, no_args_is_help=True)


RECORD = "check.json"


@dataclass(frozen=True)
class CheckRecordSpec:
    """The record of a check."""

    output: Path | None = setting(
        None, f"Folder for {RECORD}, with every process.", "Output", metavar="DIR"
    )
    overwrite: bool = setting(False, "Replace a record that the folder holds.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"asked": CheckSpec, "record": CheckRecordSpec, "output": GateOutputSpec})
def check(asked: CheckSpec, record: CheckRecordSpec, output: GateOutputSpec) -> None:
    """Compare with a baseline."""
    from batchbench.studies.gate.baseline import load_baseline

    assert asked.baseline is not None
    baseline = load_baseline(asked.baseline)
    check_outputs(output)
    from batchbench.cli.output import interruptible, output_folder

    lost = "nothing was decided"
    with (
        output_folder(record.output, overwrite=record.overwrite, marker=RECORD, lost=lost)
        if record.output
        else interruptible(lost)
    ):
        gate = _check(baseline, asked, record.output, quiet=output.quiet)
        conclude(gate, output)


def _check(baseline: Baseline, asked: CheckSpec, folder: Path | None, *, quiet: bool) -> Gate:
    from batchbench.cli.turns import make_turns_display
    from batchbench.studies.gate.check import Observed, conduct_check, record_of

    assert asked.baseline is not None
    observed = Observed()
    with make_turns_display(asked.max_time, quiet=quiet) as display:
        gate = conduct_check(baseline, asked.baseline, asked, display, observed)
    if folder is not None:
        write_whole(folder, {RECORD: record_of(observed, gate)})
    return gate


@app.command("save", help=SAVE_HELP)
@with_options(
    {
        "kept": BaselineSpec,
        "basis": Basis,
        "serving": ServingSpec,
        "workload": WorkloadSpec,
        "model": ModelSpec,
    }
)
def save(
    kept: BaselineSpec,
    basis: Basis,
    serving: ServingSpec,
    workload: WorkloadSpec,
    model: ModelSpec,
) -> None:
    """Make a baseline."""
    from batchbench.cli.output import interruptible
    from batchbench.cli.turns import make_turns_display
    from batchbench.reports.destination import check_files
    from batchbench.reports.formats.baseline import render
    from batchbench.studies.gate.baseline import to_json
    from batchbench.studies.gate.check import make_baseline

    experiment = Experiment(workload, model, serving, TrialsSpec(), preset=basis.preset)
    with (
        interruptible("no baseline was kept"),
        claimed(kept.output, f"--output {kept.output}"),
    ):
        check_files(kept.output.parent, [kept.output.name], overwrite=kept.overwrite)
        with make_turns_display(0, quiet=kept.quiet) as display:
            baseline = make_baseline(experiment, kept.processes, display)
        write_file(kept.output, to_json(baseline))
    if not kept.quiet:
        from rich.console import Console

        Console(highlight=False, markup=False, emoji=False).print(render(baseline))
        echo(f"File: {kept.output}")


@app.command("show", help=SHOW_HELP)
def show(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What baseline save wrote.", show_default=False),
    ],
) -> None:
    """Tell of a baseline."""
    from rich.console import Console

    from batchbench.reports.formats.baseline import render
    from batchbench.studies.gate.baseline import load_baseline

    Console(highlight=False, markup=False, emoji=False).print(render(load_baseline(file)))
