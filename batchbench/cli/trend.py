"""The command trend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench.cli.options import with_options
from batchbench.cli.output import echo, echo_json, make_console, output_folder
from batchbench.errors import UsageError, shown
from batchbench.files import check_files, claimed, write_file
from batchbench.studies.trend.history import TrendSpec

if TYPE_CHECKING:
    from batchbench.studies.trend.changes import Trend
    from batchbench.studies.trend.history import Entry

TREND_HELP = """Find the commits at which performance changed, from saved results.

Results are ordered by time and grouped by workload, configuration, machine and versions; small
losses that add up are found too. Exit code 1: a loss was found, with --fail-on-loss; 2: there are
no results; 3: there are too few results, with --fail-on-loss --strict; otherwise 0.

Example: batchbench trend batchbench-results"""


@with_options()
def trend(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Results, or folders with results at any depth.",
            show_default=False,
        ),
    ],
    spec: TrendSpec,
) -> None:
    from batchbench.studies.gate.evidence import CANNOT_TELL, Answer
    from batchbench.studies.trend import report

    to_stdout = str(spec.markdown) == "-"
    if spec.markdown is not None and not to_stdout:
        check_files(spec.markdown.parent, [spec.markdown.name], overwrite=True)
    lost = "nothing was written"
    with output_folder(spec.output, overwrite=True, marker="trend.json", lost=lost):
        result = _analyse(folders, spec)
        if spec.markdown is not None and not to_stdout:
            with claimed(spec.markdown, f"--markdown {spec.markdown}"):
                write_file(spec.markdown, report.render_markdown(result))
        files = report.write_trend(spec.output, result) if spec.output else []
        if spec.json:
            echo_json(report.to_json(result))
        elif to_stdout:
            echo(report.render_markdown(result), end="")
        elif spec.quiet:
            echo(result.sentence)
        else:
            console = make_console()
            console.print(report.render(result))
            if files:
                names = ", ".join(sorted(file.name for file in files))
                console.print(f"Files: {spec.output}/ with {names}")
    if spec.fail_on_loss and result.answer is Answer.FAILED:
        raise typer.Exit(1)
    if spec.fail_on_loss and spec.strict and result.answer is Answer.UNKNOWN:
        raise typer.Exit(CANNOT_TELL)


def _analyse(folders: Sequence[Path], spec: TrendSpec) -> Trend:
    """Read and analyse the results; name each unreadable file at once, in one line."""
    from batchbench.studies.trend.changes import judge
    from batchbench.studies.trend.history import find_results, make_lines, read_entry

    files, unreadable = find_results(folders)
    entries: list[Entry] = []
    for file in files:
        try:
            entries.append(read_entry(file, spec.metric))
        except UsageError as error:
            unreadable.append(str(error))
    if not entries:
        first = f"; the first: {unreadable[0]}" if files else ""
        raise UsageError(
            f"{', '.join(map(str, folders))}: no readable result{first}; give folders that "
            "batchbench run --output wrote"
        )
    for line in unreadable:
        echo(f"left out: {line}", err=True)
    commits = [entry.commit for entry in entries if entry.commit is not None]
    if spec.accept and not any(commit.startswith(spec.accept) for commit in commits):
        echo(f"--accept {spec.accept}: no result has this commit", err=True)
    _check_names(entries, spec)
    return judge(make_lines(entries, spec.last), spec, unreadable)


def _check_names(entries: Sequence[Entry], spec: TrendSpec) -> None:
    """Raise UsageError for a strategy or metric that no result has."""
    keys = {key for entry in entries for key in entry.values}
    metrics, strategies = {metric for metric, _ in keys}, {strategy for _, strategy in keys}
    for metric in spec.metric:
        if metric not in metrics and metric not in TrendSpec.metric:
            raise UsageError(f"--metric {shown(metric)}: no result has a value of it")
    for strategy in spec.strategy:
        if strategy not in strategies:
            raise UsageError(
                f"--strategy {shown(strategy)}: is in no result; there are "
                f"{', '.join(sorted(strategies))}"
            )
