"""The commands compare, duet, check and baseline."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchbench import settings
from batchbench.batching.experiment import make_experiment
from batchbench.cli.options import EXPERIMENT, typed_command, with_options
from batchbench.cli.output import echo, echo_json, interruptible, make_console, output_folder
from batchbench.errors import UsageError, shown
from batchbench.files import (
    check_file,
    check_files,
    check_place,
    claimed,
    reason_of,
    write_file,
    write_whole,
)
from batchbench.settings import setting
from batchbench.studies.gate.spec import (
    BaselineSpec,
    CheckSpec,
    CompareSpec,
    DuetSpec,
    timed_strategies,
)

if TYPE_CHECKING:
    from batchbench.studies.gate.evidence import Gate
    from batchbench.studies.gate.processes import Installation


STANDARD_OUTPUT = Path("-")

STEP_SUMMARY, STEP_OUTPUT = "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"
"""Environment variables with the files that a GitHub step may append to."""


@dataclass(frozen=True)
class GateOutputSpec:
    """The reports of a gate, and the exit code of *cannot tell*."""

    strict: bool = setting(
        False,
        "Exit with code 3 if the answer is 'cannot tell'; the default is 0 with a warning.",
        "Output",
    )
    verbose: bool = setting(
        False, "Also show metrics that did not change and are not gated.", "Output"
    )
    json: bool = setting(False, "Print only the findings, as JSON.", "Output")
    markdown: Path | None = setting(
        None,
        "Write the report as Markdown, for a pull request; - is standard output.",
        "Output",
        metavar="FILE",
    )
    junit: Path | None = setting(
        None, "Write JUnit XML, with a test case for each metric.", "Output", metavar="FILE"
    )
    github: str = setting(
        "auto",
        "Write annotations, the job summary, and the step outputs answer and exit-code: on, off, "
        "or auto, which means on if GITHUB_ACTIONS is true.",
        "Output",
        choices=("auto", "on", "off"),
        metavar="WHEN",
    )
    quiet: bool = setting(
        False, "Print only the first sentence of the report; no progress.", "Output"
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.json and self.markdown == STANDARD_OUTPUT:
            raise UsageError(
                "--json and --markdown -: both write to standard output; give --markdown a file"
            )
        if self.junit == STANDARD_OUTPUT:
            raise UsageError("--junit -: give a file, such as junit.xml")
        if self.junit is not None and self.junit == self.markdown:
            raise UsageError(f"--junit {self.junit}: is the file of --markdown; give another")

    @property
    def files(self) -> dict[str, Path]:
        named = {"--markdown": self.markdown, "--junit": self.junit}
        return {o: file for o, file in named.items() if file and file != STANDARD_OUTPUT}

    @property
    def on_github(self) -> bool:
        is_there = os.environ.get("GITHUB_ACTIONS") == "true"
        return self.github == "on" or (self.github == "auto" and is_there)

    def github_file(self, variable: str) -> Path | None:
        """Return the file that an environment variable names, if GitHub output is on."""
        named = os.environ.get(variable)
        return Path(named) if self.on_github and named else None


def check_outputs(output: GateOutputSpec) -> None:
    """Check, before anything is measured, that all files can be written; leave nothing behind."""
    appended = {variable: output.github_file(variable) for variable in (STEP_SUMMARY, STEP_OUTPUT)}
    for option, file in {**output.files, **appended}.items():
        if file is not None:
            check_file(file, option)


def conclude(gate: Gate, output: GateOutputSpec) -> None:
    """Show a gate, write its files, and end the command with its exit code.

    All texts are made before the first is shown, so that an error never leaves half a verdict.
    """
    from batchbench.studies.gate import report

    code = gate.exit_code(strict=output.strict)
    markdown = report.render_markdown(gate, strict=output.strict, verbose=output.verbose)
    contents = {
        "--markdown": markdown.encode("utf-8", "backslashreplace"),
        "--junit": report.render_junit(gate, strict=output.strict),
    }
    marks = report.render_annotations(gate, strict=output.strict) if output.on_github else ""
    if output.json:
        echo_json(report.render_json(gate, strict=output.strict))
    elif output.markdown == STANDARD_OUTPUT:
        echo(markdown, end="")
    elif output.quiet:
        echo(gate.sentence)
    else:
        console = make_console()
        console.print(report.render_terminal(gate, strict=output.strict, verbose=output.verbose))
        console.print(f"Again: {gate.typed}", soft_wrap=True)  # one line, to be copied
        if output.files:
            names = ", ".join(shlex.quote(str(file)) for file in output.files.values())
            console.print(f"Files: {names}")
    for option, file in output.files.items():
        with claimed(file, f"{option} {file}"):
            write_file(file, contents[option])
    # GitHub reads annotations on both streams; a document has standard output to itself.
    is_document = output.json or output.markdown == STANDARD_OUTPUT
    echo(marks, end="", err=is_document)
    outputs = f"answer={gate.answer}\nexit-code={code}\n"
    for variable, text in ((STEP_SUMMARY, markdown), (STEP_OUTPUT, outputs)):
        if target := output.github_file(variable):
            try:
                with target.open("a", encoding="utf-8", errors="replace") as out:
                    out.write(text)
            except OSError as error:
                raise UsageError(
                    f"{variable} {target}: cannot be written: {reason_of(error)}; give --github off"
                ) from error
    raise typer.Exit(code)


@dataclass(frozen=True)
class RecordSpec:
    """The folder for the record of a duet or a check."""

    output: Path | None = setting(
        None, "Folder for duet.json or check.json, with all measurements.", "Output", metavar="DIR"
    )
    overwrite: bool = setting(False, "Replace the record in that folder.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


def _recording(record: RecordSpec, name: str) -> AbstractContextManager[Path]:
    lost, overwrite = "there is no answer", record.overwrite
    return output_folder(record.output, overwrite=overwrite, marker=name, lost=lost)


DUET_HELP = """Compare another installation of batchbench with this one, in alternating
turns.

Each serves the same workload in its own process. The two processes take
turns of about 0.2 s and are replaced every few seconds, so that noise
affects both sides alike. The comparison stops as soon as the answer is
clear; a loss is confirmed by a second series. Exit code 1: this installation
is slower, or counts or outputs differ.

Example: batchbench duet --base-ref HEAD --preset ci --max-time 60"""


@dataclass(frozen=True)
class BaseSpec:
    """The installation to compare with."""

    base_python: Path | None = setting(
        None,
        "Python interpreter of an environment with another batchbench, such as venv/bin/python.",
        "Base",
        metavar="PATH",
        excludes=("base_ref",),
    )
    base_ref: str | None = setting(
        None,
        "Commit, branch or tag of batchbench's git repository; its package is cached.",
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


@with_options(EXPERIMENT)
def duet(
    base: BaseSpec,
    deciding: DuetSpec,
    given: Mapping[str, Any],
    record: RecordSpec,
    output: GateOutputSpec,
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.studies.gate.duet import ProcessPairs, make_duet_gate, record_of, run_duet
    from batchbench.studies.gate.evidence import Side
    from batchbench.studies.gate.processes import Workers, this_installation

    experiment = make_experiment(given, simulated=False)
    timed, others = timed_strategies(experiment, deciding.timed)
    check_outputs(output)
    with _recording(record, "duet.json"):
        label, installation = _base(base)
        here = this_installation("new")
        threads, until = experiment.model.threads or 1, time.monotonic() + deciding.max_time
        with (
            Workers(installation, threads, until) as base_workers,
            Workers(here, threads, until) as new_workers,
            make_display(quiet=output.quiet, max_time=deciding.max_time) as display,
        ):
            source = ProcessPairs((base_workers, new_workers), experiment, others)
            result = run_duet(source, timed, deciding, display)
        sides = (
            Side(label, {"python": str(installation.python)}),
            Side("this installation", {"python": str(here.python)}),
        )
        allowed = deciding.allow_improvement
        gate = make_duet_gate(result, sides, typed_command(), allow_improvement=allowed)
        if record.output is not None:
            write_whole(record.output, {"duet.json": record_of(result, gate)})
        conclude(gate, output)


def _base(base: BaseSpec) -> tuple[str, Installation]:
    from batchbench.studies.gate.processes import Installation, install_revision

    if base.base_ref is not None:
        folder, commit = install_revision(base.base_ref)
        more = "" if commit.startswith(base.base_ref) else f" ({commit[:12]})"
        own = Installation("base", Path(sys.executable), own=True, folder=folder)
        return f"{base.base_ref}{more}", own
    assert base.base_python is not None
    if not base.base_python.is_file():
        what = "is a folder" if base.base_python.is_dir() else "no such file"
        raise UsageError(
            f"--base-python {base.base_python}: {what}; give the interpreter, such as "
            "venv/bin/python"
        )
    return str(base.base_python), Installation("base", base.base_python.absolute())


CHECK_HELP = """Check this version against a saved baseline: counts and outputs exactly,
speed by ratios.

It runs the baseline's experiment in fresh processes. Each process alternates
the last strategy with reference runs (static batching, and the notebook
engine), so that machine speed cancels out of the ratios. Absolute times are
reported, not gated. The check stops as soon as the answer is clear. Exit code
1: this version is slower, or counts or outputs differ.

Example: batchbench check --baseline baseline.json"""

BASELINE_HELP = "Save counts and speed ratios of this version, for later checks."

SAVE_HELP = """Measure an experiment in fresh processes and save it as a baseline.

Example: batchbench baseline save baseline.json --preset ci"""

SHOW_HELP = """Show the content of a baseline, its age, and the machine it was made on.

Example: batchbench baseline show baseline.json"""

app = typer.Typer(help=BASELINE_HELP, no_args_is_help=True)


@with_options()
def check(check_spec: CheckSpec, record: RecordSpec, output: GateOutputSpec) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.studies.gate.check import load_baseline, record_of, run_check

    file = check_spec.baseline
    assert file is not None
    baseline = load_baseline(file)
    check_outputs(output)
    with _recording(record, "check.json"):
        with make_display(quiet=output.quiet, max_time=check_spec.max_time) as display:
            gate, session = run_check(baseline, file, check_spec, display, typed_command())
        if record.output is not None:
            write_whole(record.output, {"check.json": record_of(session, gate)})
        conclude(gate, output)


@app.command("save", help=SAVE_HELP)
@with_options(EXPERIMENT)
def save(
    saving: BaselineSpec,
    given: Mapping[str, Any],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="File for the baseline.", show_default="baseline.json"),
    ] = None,
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.json_file import json_text
    from batchbench.studies.gate.check import make_baseline
    from batchbench.studies.gate.report import render_baseline

    if file is not None and saving.output is not None:
        raise UsageError(f"--output {saving.output}: {file} is given as well; give one of the two")
    target = saving.output or file or Path("baseline.json")
    named = f"--output {target}" if saving.output else shown(target)
    check_place(target, named)
    experiment = make_experiment(given, simulated=False)
    with interruptible("no baseline was saved"), claimed(target, named):
        check_files(target.parent, [target.name], overwrite=saving.overwrite)
        with make_display(quiet=saving.quiet) as display:
            baseline = make_baseline(experiment, saving.processes, display, typed_command())
        write_file(target, json_text(baseline.data))
    if not saving.quiet:
        make_console().print(render_baseline(baseline))
        echo(f"File: {target}")


@app.command("show", help=SHOW_HELP)
def show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A saved baseline.", show_default=False)
    ],
) -> None:
    from batchbench.studies.gate.check import load_baseline
    from batchbench.studies.gate.report import render_baseline

    make_console().print(render_baseline(load_baseline(file)))


COMPARE_HELP = """Compare the results of two versions, and show which differences are real.

Counts of closed workloads and output tokens are compared exactly, and any
change fails. Speed-ups within a run are compared next; they do not depend on
the machine's speed. Absolute times are compared only if the environments
match, and they fail only with --fail-if. One run detects only large changes.
To detect smaller ones, give folders with four or more runs per side, each made
by its own process.

Exit code 0: nothing is worse, or 'cannot tell' (3 with --strict); 1:
something is worse, or counts or outputs changed; 2: the two cannot be
compared.

Example: batchbench compare batchbench-results/my-run batchbench-results/my-run
Example: batchbench compare batchbench-results/my-run batchbench-results/my-run --fail-if
'output_throughput < -5%'"""


@with_options()
def compare(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="Folder of a result, its result.json, or a folder of several results; or files "
            "of vllm bench serve, guidellm, aiperf or llm-d.",
            show_default=False,
        ),
    ],
    new: Annotated[
        Path,
        typer.Argument(metavar="NEW", help="The same for the new version.", show_default=False),
    ],
    question: CompareSpec,
    output: GateOutputSpec,
) -> None:
    from batchbench.studies.gate.compare import compare_versions, load_runs

    check_outputs(output)
    runs = load_runs(base), load_runs(new)
    conclude(compare_versions(*runs, question, typed_command()), output)
