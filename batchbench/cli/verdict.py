"""What the commands that compare have in common: where the verdict goes, and the exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchbench import settings
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError
from batchbench.files import claimed, reason_of, write_file
from batchbench.settings import setting

if TYPE_CHECKING:
    from batchbench.studies.gate.evidence import Gate

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
            raise UsageError("--junit -: give a file, such as junit.xml")
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
    from batchbench.reports.destination import check_file

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
    from batchbench.reports.formats import annotations, gate_markdown
    from batchbench.studies.gate import ci as junit

    code = gate.exit_code(strict=output.strict)
    report = gate_markdown.render(gate, strict=output.strict)
    contents: Mapping[str, bytes | str] = {
        "--markdown": report,
        "--junit": junit.render(gate, strict=output.strict),
    }
    marks = annotations.render(gate, strict=output.strict) if output.on_github else ""
    _show(gate, output, report)
    for option, file in output.files.items():
        with claimed(file, f"{option} {file}"):
            write_file(file, contents[option])
    # The runner reads workflow commands on both streams; a document keeps its own to itself.
    print(marks, end="", file=sys.stderr if output.holds_standard_output else sys.stdout)
    _append(output, STEP_SUMMARY, report)
    _append(output, STEP_OUTPUT, f"answer={gate.answer}\nexit-code={code}\n")
    raise typer.Exit(code)


def _show(gate: Gate, output: GateOutputSpec, report: str) -> None:
    if output.json:
        from batchbench.reports.formats import gate_json

        echo_json(gate_json.render(gate, strict=output.strict))
    elif output.markdown == STANDARD_OUTPUT:
        echo(report, end="")
    elif output.quiet:
        echo(gate.sentence)
    else:
        from rich.console import Console

        from batchbench.reports.formats import gate_terminal

        console = Console(highlight=False, markup=False, emoji=False)
        console.print(gate_terminal.render(gate, strict=output.strict))
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
