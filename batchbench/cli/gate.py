"""The command duet."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchbench import settings
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import with_options
from batchbench.cli.verdict import GateOutputSpec, check_outputs, conclude
from batchbench.errors import UsageError
from batchbench.settings import setting
from batchbench.studies.gate.spec import DuetSpec
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.gate.evidence import Gate
    from batchbench.studies.gate.processes import Installation

DUET_HELP = """Compare another installation of batchbench with this one, in alternating turns.

Both serve the same workload in processes of their own that take turns of about 0.2 s on the machine
and are replaced every few seconds, so that noise falls on both alike. It stops as soon as the
answer is sure; a loss is confirmed by a second run. Exit code 1: slower, or other work done.

Example: batchbench duet --base-ref HEAD --preset ci --max-time 60"""


@dataclass(frozen=True)
class BaseSpec:
    """With what this installation is compared."""

    base_python: Path | None = setting(
        None,
        "Interpreter of an environment with another batchbench, as venv/bin/python.",
        "Base",
        metavar="PATH",
        excludes=("base_ref",),
    )
    base_ref: str | None = setting(
        None,
        "Commit, branch or tag of batchbench's repository; it is installed in a cache.",
        "Base",
        metavar="REV",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.base_python is None and self.base_ref is None:
            raise UsageError(
                "duet: needs a base to compare with; give --base-ref REV (such as main) or "
                "--base-python PATH"
            )


@dataclass(frozen=True)
class RecordSpec:
    """What is kept of it."""

    output: Path | None = setting(
        None, "Folder for duet.json, with every turn.", "Output", metavar="DIR"
    )
    overwrite: bool = setting(False, "Replace a record that the folder holds.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options(
    {
        "base": BaseSpec,
        "deciding": DuetSpec,
        "basis": Basis,
        "serving": ServingSpec,
        "workload": WorkloadSpec,
        "model": ModelSpec,
        "record": RecordSpec,
        "output": GateOutputSpec,
    }
)
def duet(
    base: BaseSpec,
    deciding: DuetSpec,
    basis: Basis,
    serving: ServingSpec,
    workload: WorkloadSpec,
    model: ModelSpec,
    record: RecordSpec,
    output: GateOutputSpec,
) -> None:
    """Compare two installations."""
    from batchbench.cli.output import interruptible, output_folder
    from batchbench.studies.gate.spec import lanes_of

    experiment = Experiment(workload, model, serving, TrialsSpec(), preset=basis.preset)
    lanes_of(experiment, deciding.timed)
    check_outputs(output)
    lost = "nothing was decided"
    with (
        output_folder(record.output, overwrite=record.overwrite, marker="duet.json", lost=lost)
        if record.output
        else interruptible(lost)
    ):
        conclude(_compare(base, deciding, experiment, record, output), output)


def _compare(
    base: BaseSpec,
    deciding: DuetSpec,
    experiment: Experiment,
    record: RecordSpec,
    output: GateOutputSpec,
) -> Gate:
    from batchbench.cli.turns import make_turns_display
    from batchbench.studies.duet_gate import make_gate, record_of
    from batchbench.studies.gate.duet import Stage, conduct_duet
    from batchbench.studies.gate.processes import Installation, Workers
    from batchbench.studies.gate.spec import lanes_of

    label, installation = _base(base)
    sides = (installation, Installation("new", Path(sys.executable), own=True))
    lanes, others = lanes_of(experiment, deciding.timed)
    threads = experiment.model.threads or 1
    until = time.monotonic() + deciding.max_time
    with (
        Workers(sides[0], threads, until) as base_workers,
        Workers(sides[1], threads, until) as new_workers,
        make_turns_display(deciding.max_time, quiet=output.quiet) as display,
    ):
        stage = Stage((base_workers, new_workers), experiment, others)
        found = conduct_duet(stage, lanes, deciding, display)
    gate = make_gate(
        found,
        sides,
        (label, "this installation"),
        _typed(base, deciding, experiment),
        allow_improvement=deciding.allow_improvement,
    )
    if record.output is not None:
        from batchbench.files import write_whole

        write_whole(record.output, {"duet.json": record_of(found, gate)})
    return gate


def _base(base: BaseSpec) -> tuple[str, Installation]:
    from batchbench.studies.gate.processes import Installation

    if base.base_ref is not None:
        from batchbench.studies.revision import install_revision

        python, commit = install_revision(base.base_ref)
        label = base.base_ref
        if not commit.startswith(label):
            label = f"{label} ({commit[:12]})"
        return label, Installation("base", python)
    assert base.base_python is not None
    if not base.base_python.is_file():
        what = "is a folder" if base.base_python.is_dir() else "no such file"
        raise UsageError(
            f"--base-python {base.base_python}: {what}; give the interpreter, such as "
            "venv/bin/python"
        )
    return str(base.base_python), Installation("base", base.base_python.absolute())


def _typed(base: BaseSpec, deciding: DuetSpec, experiment: Experiment) -> str:
    """The command line that does it again."""
    words = settings.words_of(base, BaseSpec(base_ref="HEAD"), always=("base_ref",))
    if base.base_ref is None:
        words = ["--base-python", str(base.base_python)]
    words += settings.words_of(deciding, DuetSpec())
    return f"{experiment.command('duet')} {shlex.join(words)}"
