"""The commands doctor and help: this machine, and the pages of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from batchbench.cli.options import with_options
from batchbench.cli.output import echo, echo_json, make_console
from batchbench.errors import UsageError, shown
from batchbench.settings import setting
from batchbench.version import __version__

DOCTOR_HELP = """Show what this machine offers, what is missing, and the command that fixes it.

Example: batchbench doctor"""

HELP_HELP = """Read a page of the documentation, or the options of a command.

Without TOPIC it lists the pages.

Example: batchbench help metrics"""


@dataclass(frozen=True)
class DoctorSpec:
    """The output of doctor."""

    json: bool = setting(False, "Print the findings as JSON, for a bug report.", "Output")


@with_options()
def doctor(spec: DoctorSpec) -> None:
    from batchbench.json_file import json_text
    from batchbench.studies.doctor import examine

    findings = examine()
    if spec.json:
        found = [asdict(finding) for finding in findings]
        echo_json(json_text({"batchbench_version": __version__, "findings": found}))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for finding in findings:
            style = "bold red" if finding.fault else "yellow" if finding.mend else ""
            text = Text(finding.text, style=style, overflow="fold")
            if finding.mend:
                text.append(f"\n→ {finding.mend}", style="default")
            table.add_row(Text(finding.name, style="bold"), text)
        make_console().print(table)
    if any(finding.fault for finding in findings):
        raise typer.Exit(1)


def help(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="A page or a command.",
            show_default=False,
            autocompletion=lambda incomplete: _topics(incomplete),
        ),
    ] = None,
) -> None:
    from batchbench.cli.main import COMMANDS, run_command

    pages = find_pages()
    if topic in COMMANDS and topic not in pages:
        raise typer.Exit(run_command([topic, "--help"]))
    if topic is None:
        width = max(map(len, pages))
        for name, file in pages.items():
            echo(f"{name:{width}}  {title_of(file)}")
        echo("\nRead one: batchbench help PAGE. Options of a command: batchbench help COMMAND.")
        return
    if topic not in pages:
        import difflib

        near = difflib.get_close_matches(topic, [*pages, *COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "batchbench help lists the pages"
        raise UsageError(f"{shown(topic)}: is no page or command; {hint}")
    from rich.markdown import Markdown

    text = pages[topic].read_text(encoding="utf-8")
    make_console().print(Markdown(_plain(text), hyperlinks=False))


def _topics(incomplete: str) -> list[str]:
    from batchbench.cli.main import COMMANDS

    return [name for name in (*find_pages(), *COMMANDS) if name.startswith(incomplete)]


def find_pages() -> Mapping[str, Path]:
    """Return the pages by name: those beside the package in a wheel, or those of a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "docs" if (package / "docs").is_dir() else package.parent / "docs"
    files = {file.stem: file for file in sorted(folder.glob("*.md"))}
    return {
        name: file
        for name, file in files.items()
        if "<!-- generated" not in file.read_text(encoding="utf-8")
    }


def title_of(page: Path) -> str:
    first = page.read_text(encoding="utf-8").partition("\n")[0]
    return re.sub(r"[*`]", "", first.lstrip("# ")).strip()


def _plain(text: str) -> str:
    """Return Markdown without pictures, raw HTML and the targets of links to other pages."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<[a-z/][^>]*>", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
