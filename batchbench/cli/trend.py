"""The command trend."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench.cli.options import with_options
from batchbench.cli.streams import echo, echo_json
from batchbench.errors import UsageError, shown
from batchbench.files import claimed, write_file
from batchbench.studies.trend.history import TrendSpec

if TYPE_CHECKING:
    from batchbench.studies.trend.changes import Trend
    from batchbench.studies.trend.history import Entry

TREND_HELP = """Find the commits at which kept results changed for good.

Results are put in order of time, apart by workload, configuration, machine and versions; small
losses that add up are told too. Exit code 0; with --fail-on-loss 1 after a loss; 2: there is no
result to look at.

Example: batchbench trend batchbench-results"""


@with_options({"asked": TrendSpec})
def trend(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Results, or folders that hold results at any depth.",
            show_default=False,
        ),
    ],
    asked: TrendSpec,
) -> None:
    """Show a history."""
    from batchbench.cli.output import interruptible, output_folder
    from batchbench.files import check_files
    from batchbench.studies.gate.evidence import CANNOT_TELL, Answer

    to_stdout = str(asked.markdown) == "-"
    if asked.markdown is not None and not to_stdout:
        check_files(asked.markdown.parent, [asked.markdown.name], overwrite=True)
    with (
        output_folder(asked.output, overwrite=True, marker="trend.json")
        if asked.output
        else interruptible("nothing was written")
    ):
        found = _look(folders, asked)
        _write(found, asked)
        _show(found, asked)
    if asked.fail_on_loss and found.answer is Answer.FAILED:
        raise typer.Exit(1)
    if asked.fail_on_loss and asked.strict and found.answer is Answer.UNKNOWN:
        raise typer.Exit(CANNOT_TELL)


def _look(folders: list[Path], asked: TrendSpec) -> Trend:
    """Read and judge; what cannot be read is told at once, a line a file."""
    from batchbench.studies.trend.changes import judge
    from batchbench.studies.trend.history import find_results, make_lines, read_entry

    files, spoiled = find_results(folders)
    entries: list[Entry] = []
    for file in files:
        try:
            entries.append(read_entry(file, asked.metric))
        except UsageError as error:
            spoiled.append(str(error))
    if not entries:
        told = f"; the first: {spoiled[0]}" if files else ""
        raise UsageError(
            f"{', '.join(map(str, folders))}: no result to look at{told}; give folders that "
            "batchbench run --output wrote"
        )
    for line in spoiled:
        echo(f"left out: {line}", err=True)
    commits = [entry.commit for entry in entries if entry.commit is not None]
    if asked.accept and not any(commit.startswith(asked.accept) for commit in commits):
        echo(f"--accept {asked.accept}: is the commit of no result", err=True)
    _check_strategies(entries, asked)
    return judge(make_lines(entries, asked.last), asked, spoiled)


def _check_strategies(entries: list[Entry], asked: TrendSpec) -> None:
    """Raise UsageError for a strategy or metric that no result has."""
    keys = {key for entry in entries for key in entry.values}
    metrics, there = {metric for metric, _ in keys}, {strategy for _, strategy in keys}
    for metric in asked.metric:
        if metric not in metrics and metric not in TrendSpec.metric:
            raise UsageError(f"--metric {shown(metric)}: no result has a value of it")
    for strategy in asked.strategy:
        if strategy not in there:
            raise UsageError(
                f"--strategy {shown(strategy)}: is in no result; there are "
                f"{', '.join(sorted(there))}"
            )


def _write(found: Trend, asked: TrendSpec) -> None:
    from batchbench.studies.trend.report import render_markdown

    if asked.markdown is not None and str(asked.markdown) != "-":
        with claimed(asked.markdown, f"--markdown {asked.markdown}"):
            write_file(asked.markdown, render_markdown(found))
    if asked.output is not None:
        from batchbench.studies.trend.report import write_trend  # matplotlib, only now

        write_trend(asked.output, found)


def _show(found: Trend, asked: TrendSpec) -> None:
    from rich.console import Console

    from batchbench.studies.trend.report import render, render_markdown

    if asked.json:
        echo_json(json_format.dumps(found.as_data(), indent=2, ensure_ascii=False) + "\n")
    elif str(asked.markdown) == "-":
        echo(render_markdown(found), end="")
    elif asked.quiet:
        echo(found.sentence)
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(render(found))
        if asked.output is not None:
            names = ", ".join(sorted(path.name for path in asked.output.glob("trend*")))
            console.print(f"Files: {asked.output}/ with {names}", markup=False, soft_wrap=True)
