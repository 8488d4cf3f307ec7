"""The command duet."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import Basis
from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError
from batchbench.files import claimed, reason_of, write_file, write_whole
from batchbench.settings import setting
from batchbench.studies.gate.spec import BaselineSpec, CheckSpec, CompareSpec, DuetSpec
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.studies.gate.baseline import Baseline
    from batchbench.studies.gate.evidence import Gate
    from batchbench.studies.gate.processes import Installation


STANDARD_OUTPUT = Path("-")

STEP_SUMMARY, STEP_OUTPUT = "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"
"""Variables by which GitHub names the files that a step may append to."""


@dataclass(frozen=True)
class GateOutputSpec:
    """What is shown of a verdict, what is written, and what counts as bad."""

    strict: bool = setting(
        False,
        "Exit with 3 where it cannot be told; otherwise that is a loud line and 0.",
        "Output",
    )
    json: bool = setting(
        False, "Print what was found as JSON on standard output, and nothing else.", "Output"
    )
    markdown: Path | None = setting(
        None,
        "File for a report as Markdown, for a pull request; - is standard output.",
        "Output",
        metavar="FILE",
    )
    junit: Path | None = setting(
        None, "File for a report as JUnit XML, a test case a metric.", "Output", metavar="FILE"
    )
    github: str = setting(
        "auto",
        "Annotations, a report in the summary of the job, and the outputs answer and exit-code of "
        "the step: on, off, or auto, where GITHUB_ACTIONS is true.",
        "Output",
        choices=("auto", "on", "off"),
        metavar="WHEN",
    )
    quiet: bool = setting(False, "No progress, and of the report only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)
        if self.json and self.markdown == STANDARD_OUTPUT:
            raise UsageError(
                "--json and --markdown -: both want standard output; give --markdown a file"
            )
        if self.junit == STANDARD_OUTPUT:
            raise UsageError("--junit -: give a file, such.xml")
        if self.junit is not None and self.junit == self.markdown:
            raise UsageError(f"--junit {self.junit}: is the file of --markdown; give another")

    @property
    def files(self) -> dict[str, Path]:
        """Files that will be written, by the option that names them."""
        named = {"--markdown": self.markdown, "--junit": self.junit}
        return {
            option: file
            for option, file in named.items()
            if file is not None and file != STANDARD_OUTPUT
        }

    @property
    def on_github(self) -> bool:
        """Whether GitHub's own places are written to."""
        if self.github == "auto":
            return os.environ.get("GITHUB_ACTIONS") == "true"
        return self.github == "on"

    def github_file(self, variable: str) -> Path | None:
        """The file that GitHub names by a variable, if it is to be written to."""
        named = os.environ.get(variable)
        return Path(named) if self.on_github and named else None

    @property
    def holds_standard_output(self) -> bool:
        """Whether a document has standard output for itself."""
        return self.json or self.markdown == STANDARD_OUTPUT


def check_outputs(output: GateOutputSpec) -> None:
    """See, before anything is measured, that all can be written; leaves nothing behind.

    Raises:
        UsageError: a file cannot be written.
    """
    from batchbench.files import check_file

    for option, file in output.files.items():
        check_file(file, option)
    for variable in (STEP_SUMMARY, STEP_OUTPUT):
        named = output.github_file(variable)
        if named is not None:
            check_file(named, variable)


def conclude(gate: Gate, output: GateOutputSpec) -> None:
    """Show a gate, write its files, and end the command with its exit code.

    All texts are made before the first is shown, so that a fault in one is no half verdict.

    Raises:
        UsageError: a file cannot be written.
        typer.Exit: always, otherwise.
    """
    from batchbench.studies.gate import ci, report

    code = gate.exit_code(strict=output.strict)
    markdown = report.render_markdown(gate, strict=output.strict)
    contents: Mapping[str, bytes | str] = {
        "--markdown": markdown,
        "--junit": ci.render_junit(gate, strict=output.strict),
    }
    marks = ci.render_annotations(gate, strict=output.strict) if output.on_github else ""
    _show(gate, output, markdown)
    for option, file in output.files.items():
        with claimed(file, f"{option} {file}"):
            write_file(file, contents[option])
    # The runner reads workflow commands on both streams; a document keeps its own to itself.
    print(marks, end="", file=sys.stderr if output.holds_standard_output else sys.stdout)
    _append(output, STEP_SUMMARY, markdown)
    _append(output, STEP_OUTPUT, f"answer={gate.answer}\nexit-code={code}\n")
    raise typer.Exit(code)


def _show(gate: Gate, output: GateOutputSpec, markdown: str) -> None:
    if output.json:
        from batchbench.studies.gate import report

        echo_json(report.render_json(gate, strict=output.strict))
    elif output.markdown == STANDARD_OUTPUT:
        echo(markdown, end="")
    elif output.quiet:
        echo(gate.sentence)
    else:
        from rich.console import Console

        from batchbench.studies.gate import report

        console = Console(highlight=False, markup=False, emoji=False)
        console.print(report.render_terminal(gate, strict=output.strict))
        console.print(f"Again: {gate.typed}", markup=False, soft_wrap=True)
        if output.files:
            names = ", ".join(shlex.quote(str(file)) for file in output.files.values())
            console.print(f"Files: {names}", markup=False, soft_wrap=True)


def _append(output: GateOutputSpec, variable: str, text: str) -> None:
    file = output.github_file(variable)
    if file is None:
        return
    try:
        with file.open("a", encoding="utf-8", errors="replace") as out:
            out.write(text)
    except OSError as error:
        raise UsageError(
            f"{variable} {file}: cannot be written: {reason_of(error)}; give --github off"
        ) from error


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
    from batchbench.cli.progress import make_turns_display
    from batchbench.studies.gate.duet import Stage, conduct_duet, make_gate, record_of
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
        from batchbench.studies.gate.processes import install_revision

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
    from batchbench.cli.progress import make_turns_display
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
    from batchbench.cli.progress import make_turns_display
    from batchbench.files import check_files
    from batchbench.studies.gate.baseline import to_json
    from batchbench.studies.gate.check import make_baseline
    from batchbench.studies.gate.report import render_baseline

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

        Console(highlight=False, markup=False, emoji=False).print(render_baseline(baseline))
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

    from batchbench.studies.gate.baseline import load_baseline
    from batchbench.studies.gate.report import render_baseline

    Console(highlight=False, markup=False, emoji=False).print(render_baseline(load_baseline(file)))


COMPARE_HELP = """Compare two versions by their results, and say which differences are real.

First the work: the exact counts of closed workloads, and the tokens, where
any change fails. Then speed-ups within a run, which the machine's own speed
cancels out of. Absolute times are compared only between like environments,
and fail only where --fail-if asks for it. Four or more runs a side, each of
a process of its own, in a folder that holds them, tell far more than one.

Exit code 0: nothing is worse, or it cannot be told (--strict makes that 3);
1: something is worse, or the work changed; 2: the two cannot be compared.

Example: batchbench compare batchbench-results/my-run batchbench-results/my-run
Example: batchbench compare batchbench-results/my-run batchbench-results/my-run --fail-if 'output_throughput < -5%'"""  # noqa: E501


@with_options({"question": CompareSpec, "output": GateOutputSpec})
def compare(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="A result's folder, its result.json, or a folder of several results.",
            show_default=False,
        ),
    ],
    new: Annotated[
        Path,
        typer.Argument(metavar="NEW", help="The same of the new version.", show_default=False),
    ],
    question: CompareSpec,
    output: GateOutputSpec,
) -> None:
    """Hold two versions against each other."""
    check_outputs(output)
    from batchbench.studies.gate.compare import compare_versions
    from batchbench.studies.gate.runs import load_runs

    words = ["batchbench", "compare", str(base), str(new)]
    typed = shlex.join([*words, *settings.words_of(question, CompareSpec())])
    conclude(compare_versions(load_runs(base), load_runs(new), question, typed), output)
