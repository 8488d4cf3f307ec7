"""The commands report and watch, which show results and studies again."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchbench import settings
from batchbench.cli.options import ReportSpec, ResultFolder, Spec, with_options
from batchbench.cli.output import (
    echo,
    echo_html,
    echo_json,
    make_console,
    output_folder,
    patience,
    show,
)
from batchbench.errors import Interrupted, UsageError
from batchbench.files import check_file, check_files, claimed, reason_of, write_file
from batchbench.settings import setting

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from batchbench.batching.engines import Clock
    from batchbench.reports.peers.values import PeerFile
    from batchbench.reports.replay.frames import Replay
    from batchbench.reports.result import Result

REPORT_HELP = """Show results again: in the terminal, as a web page, as Markdown or as JSON.

Tables, pictures and report.html of a single result are built again from its recordings. Several
results are shown side by side, with the settings in which they differ. The command also reads files
of vllm bench serve, guidellm, aiperf and llm-d. The result of a sweep, ladder, capacity search,
prediction or break-even map is shown in short form.

Example: batchbench report batchbench-results/my-run --format html"""

WATCH_HELP = """Replay a result: watch slots fill and empty, with the strategies side by side.

For each strategy it shows the trial of median duration. By default, the longest trial takes about
12 s. The last frame stays on the screen. Ctrl-C stops the replay. --gif writes the replay to a file
for slides.

Example: batchbench watch batchbench-results/my-run --speed 4"""


@with_options()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT",
            help="Folder of a result (or its result.json) or of a study, or a file of vllm bench "
            "serve, guidellm, aiperf or llm-d.",
            show_default=False,
        ),
    ],
    output: ReportSpec,
) -> None:
    output = replace(output, json=output.chosen == "json")
    if len(folders) == 1 and (study := _study_file(folders[0])) is not None:
        _show_study(study, output)
        return
    from batchbench.reports.formats.trace_events import check_trace_file, write_trace
    from batchbench.reports.peers import read_peer
    from batchbench.reports.result import load_result, remake_result

    peers = [read_peer(folder) for folder in folders]
    if output.chosen == "llmd" or any(peers):
        _show_peers(folders, peers, output)
        return
    folders = [folder.parent if folder.name == "result.json" else folder for folder in folders]
    if len(folders) > 1:
        for option, given in (("--json", output.json), ("--trace-out", output.trace_out)):
            if given:
                raise UsageError(f"{option}: works for one result; give one folder")
        from batchbench.reports.output import check_number  # imports pandas and matplotlib

        check_number(folders)
    shown = output.chosen in ("terminal", "json")
    file = None if shown else output.destination(folders)
    if file is not None:
        check_file(file, "--file")
    if output.trace_out is not None:
        check_trace_file(output.trace_out)
    loaded = [load_result(folder) for folder in folders]
    with patience("making the report", "a few seconds", quiet=output.quiet):
        results = [remake_result(result) for result in loaded]
        if output.trace_out is not None:
            write_trace(output.trace_out, results[0])
        if not shown:
            from batchbench.reports.output import make_document

            _deliver(make_document(output.chosen, folders, results, file), file, output)
        elif len(folders) > 1:
            from batchbench.reports.formats.terminal import render_side_by_side
            from batchbench.reports.side_by_side import SideBySide, label_results

            together = SideBySide(label_results(folders, results))
            show(output, "", together.sentence, render_side_by_side(together), "", [])
        else:
            _show_again(folders[0], results[0], output)


def _show_again(folder: Path, result: Result, output: ReportSpec) -> None:
    from batchbench.cli.run import show_result
    from batchbench.reports.output import write_folder

    with output_folder(folder, overwrite=True):
        show_result(result, write_folder(folder, result), output)


def _deliver(document: str, file: Path | None, output: ReportSpec) -> None:
    """Write a document to its file, or print it on standard output."""
    if file is not None:
        with claimed(file, f"--file {file}"):
            write_file(file, document)
        if not output.quiet:
            echo(f"File: {shlex.quote(str(file))}")
    elif output.chosen == "html":
        echo_html(document)
    elif output.chosen == "markdown":
        echo(document, end="")
    else:
        echo_json(document)


# Other tools


def _show_peers(folders: list[Path], peers: list[PeerFile | None], output: ReportSpec) -> None:
    """Show or convert files of other tools, and our own results beside them or as theirs."""
    from batchbench.reports.output import check_number
    from batchbench.reports.peers import table
    from batchbench.reports.peers.values import of_result
    from batchbench.reports.result import load_result
    from batchbench.reports.side_by_side import labels_of

    formats = ("terminal", "json", "markdown", "llmd")
    if output.chosen not in formats or output.trace_out is not None:
        other = next(folder for folder, peer in zip(folders, peers, strict=True) if peer)
        raise UsageError(
            f"{other}: was not written by batchbench; give --format {', '.join(formats[:-1])} or "
            f"{formats[-1]}"
        )
    check_number(folders)
    if output.file is not None and str(output.file) != "-":
        check_file(output.file, "--file")
    pairs = zip(folders, peers, strict=True)
    files = [peer or of_result(load_result(folder)) for folder, peer in pairs]
    places = [folder if folder.is_dir() else folder.parent for folder in folders]
    named = list(zip(labels_of(folders), files, strict=True))
    if output.chosen == "llmd":
        _write_llmd(places, files, output)
    elif output.chosen == "markdown":
        _deliver(table.render_markdown(named), output.destination(places), output)
    else:
        text, sentence = table.render_json(named), table.sentence(named)
        show(output, text, sentence, table.render(named), "", [])


def _write_llmd(places: list[Path], files: list[PeerFile], output: ReportSpec) -> None:
    """Write a report for each run, since the schema has one load per report."""
    from batchbench.reports.peers.llmd import write_llmd

    if len(files) > 1:
        raise UsageError("--format llmd: works for one result; give one")
    (source,), file = files, output.destination(places)
    texts = {run.name: write_llmd(source, run) for run in source.runs}
    if file is None and len(texts) > 1:
        raise UsageError(
            f"--file -: the result has {', '.join(texts)}, and each is a report of its own; give "
            "--file NAME.json"
        )
    for name, text in texts.items():
        own = file
        if file is not None and len(texts) > 1:
            own = file.with_stem(f"{file.stem}-{re.sub('[^A-Za-z0-9.=-]+', '-', name).strip('-')}")
        _deliver(text, own, output)


# Studies

Data = Mapping[str, Any]
Answer = tuple[str, "RenderableType"]
"""A sentence about a study, and what a terminal shows of it."""


def _study_file(folder: Path) -> Path | None:
    """Return the JSON file of a study, given the file or its folder; None for anything else."""
    if folder.name in STUDIES and os.path.isfile(folder):  # False too if the name is too long
        return folder
    if os.path.isfile(folder / "result.json"):
        return None
    return next((folder / name for name in STUDIES if os.path.isfile(folder / name)), None)


def _show_study(file: Path, output: ReportSpec) -> None:
    from batchbench.json_file import read_json

    if output.chosen not in ("terminal", "json") or output.trace_out is not None:
        raise UsageError(
            f"{file.parent}: is the result of a study: give only --format terminal or --json; "
            "its picture is in the same folder"
        )
    try:
        text, data = file.read_text(encoding="utf-8"), read_json(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "is not UTF-8"
        raise UsageError(f"{file}: cannot be read: {reason}") from error
    if not isinstance(data, dict) or data.get("schema_version") != 1:
        raise UsageError(f"{file}: was not written by this version of batchbench")
    if output.json:
        echo_json(text)
        return
    try:
        with patience("reading the study", "a few seconds", quiet=output.quiet):
            sentence, rendered = STUDIES[file.name](file.parent, data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{file}: is damaged: {type(error).__name__} {error}") from error
    command = str(data.get("command", ""))
    again = command if command.startswith("batchbench ") else ""
    show(output, text, sentence, rendered, again, [file, *sorted(file.parent.glob("*.*"))])


def _sweep(folder: Path, data: Data) -> Answer:
    from batchbench.reports.slo import GoalsSpec
    from batchbench.studies.sweep import report as sweeps
    from batchbench.studies.sweep.grid import Grid
    from batchbench.studies.sweep.run import Store

    axes = {
        name: tuple(tuple(value) if isinstance(value, list) else value for value in values)
        for name, values in data["axes"].items()
    }
    grid = Grid(axes, data["simulated"], digests=[cell["digest"] for cell in data["cells"]])
    swept = sweeps.read_sweep(grid, Store(folder), settings.from_json(GoalsSpec, data["goals"]))
    cells = sweeps.cells_of(swept)
    return sweeps.sentence(swept, cells), sweeps.render(swept, cells, data["pictures_not_drawn"])


def _own(module: str, folder: Path, data: Data) -> Answer:
    """Return what the study's own report says."""
    report = importlib.import_module(f"batchbench.studies.{module}.report")
    return report.sentence(data), report.render(data)


def _prediction(data: Data) -> tuple[str, Any]:
    best = ", ".join(f"{name} {size} slots" for name, size in data["enough"].items())
    return f"95 % of the best throughput: {best}.", data["points"]


def _trend(data: Data) -> tuple[str, Any]:
    return data["sentence"], [
        {
            "series": f"{series['strategy']}.{series['metric']}",
            "results": len(series["points"]),
            "level": series["segments"][-1]["mean"] if series["segments"] else "N/A",
            "changes": len(series["changes"]),
        }
        for line in data["lines"]
        for series in line["series"]
    ]


def _gate(data: Data) -> tuple[str, Any]:
    from batchbench.reports.text import number, percent

    def spell(value: object) -> str:
        return number(value) if isinstance(value, int | float) else str(value)[:12]

    return data["gate"]["sentence"], [
        {
            "metric": evidence["name"],
            "base": spell(evidence["base"]),
            "new": spell(evidence["new"]),
            "change": percent(evidence["change"], 1, "+"),
            "verdict": evidence["verdict"],
        }
        for evidence in data["gate"]["evidence"]
    ]


def _tabular(
    rows_of: Callable[[Data], tuple[str, Sequence[Mapping[str, Any]]]], folder: Path, data: Data
) -> Answer:
    """Return a study as its sentence and a table of rows, without columns of one value."""
    from rich.console import Group
    from rich.table import Table

    from batchbench.reports.text import number

    sentence, rows = rows_of(data)
    if not rows:
        return sentence, sentence
    names = [name for name, value in rows[0].items() if isinstance(value, str | int | float)]
    names = [n for n in names if len(rows) == 1 or len({str(row[n]) for row in rows}) > 1]
    names = names[:MOST_COLUMNS]
    grid = Table(pad_edge=False)
    for name in names:
        left = isinstance(rows[0][name], str)
        grid.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=left)
    for row in rows[:MOST_ROWS]:
        values = (row[name] for name in names)
        grid.add_row(*(number(v) if isinstance(v, float) else str(v) for v in values))
    if len(rows) > MOST_ROWS:
        grid.caption = f"{len(rows) - MOST_ROWS} more rows in the files"
    return sentence, Group(sentence, grid)


MOST_COLUMNS, MOST_ROWS = 7, 40

STUDIES: Mapping[str, Callable[[Path, Data], Answer]] = {
    "sweep.json": _sweep,
    "ladder.json": partial(_own, "ladder"),
    "capacity.json": partial(_own, "capacity"),
    "predict.json": partial(_tabular, _prediction),
    "breakeven.json": partial(_tabular, lambda data: (data["sentence"], data["cells"])),
    "trend.json": partial(_tabular, _trend),
    "duet.json": partial(_tabular, _gate),
    "check.json": partial(_tabular, _gate),
}
"""Files that hold the result of a study, each with its reader."""


# Replays


@dataclass(frozen=True)
class WatchSpec(Spec):
    """The speed of the replay and its destination."""

    speed: float | None = setting(
        None,
        "Seconds of the trial shown per second: 1 is the real speed, 4 is four times as fast.",
        "Replay",
        min=1e-9,
        max=1e9,
        default_text="a speed at which the replay takes about 12 s",
    )
    gif: Path | None = setting(
        None, "Write an animated GIF for slides instead.", "Output", metavar="FILE"
    )
    overwrite: bool = setting(False, "Replace the file if it exists.", "Output")


@with_options()
def watch(folder: ResultFolder, spec: WatchSpec) -> None:
    file = spec.gif
    if file is None and not sys.stdout.isatty():
        raise UsageError("watch: the output is not a terminal; add --gif FILE to write a GIF")
    from batchbench.reports.replay.frames import Replay, usual_speed
    from batchbench.reports.result import load_result

    result = load_result(folder)
    replay = Replay.of(result)
    if file is None:
        from batchbench.batching.engines import WallClock

        console = make_console()
        if console.is_dumb_terminal:
            raise UsageError(
                "watch: this terminal cannot move its cursor; add --gif FILE to write a GIF"
            )
        play(replay, spec.speed or usual_speed(replay), console, WallClock())
        return
    if file.suffix != ".gif":
        raise UsageError(f"--gif {file}: must end in .gif, such as --gif replay.gif")
    with claimed(file, f"--gif {file}"):
        check_files(file.parent, [file.name], overwrite=spec.overwrite)
        with patience("drawing the frames", "a few seconds; a minute for long trials"):
            from batchbench.reports.replay.gif import draw_gif

            content = draw_gif(result, spec.speed)
        write_file(file, content)
    echo(f"{file}: {len(content) / 1e6:.1f} MB")


def play(replay: Replay, speed: float, console: Console, clock: Clock) -> None:
    """Show a replay on a terminal, at the times of the clock; its last frame stays.

    Raises:
        Interrupted: Ctrl-C; the frame of that moment stays.
    """
    from rich.live import Live

    from batchbench.reports.replay.frames import moments
    from batchbench.reports.replay.terminal import render

    shown, plain = 0, console.options.ascii_only
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            for t_ns in moments(replay, speed, clock):
                shown, frame = t_ns, replay.frame_at(t_ns)
                picture = render(replay, frame, *console.size, speed, ascii_only=plain)
                live.update(picture, refresh=True)
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at {replay.spell(shown)}") from error
