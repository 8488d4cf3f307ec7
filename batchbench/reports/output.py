"""Files of a result or of a study, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.reports.figures import draw, figure_bytes
from batchbench.reports.formats import html
from batchbench.reports.frames import requests_frame, steps_frame
from batchbench.reports.result import Result, recording_files, to_json
from batchbench.reports.side_by_side import Labelled


def write_folder(folder: Path, result: Result) -> list[Path]:
    """Write everything of a result; the paths, ``result.json`` first."""
    return write_whole(folder, _contents(result), stale=["recordings"])


def _contents(result: Result) -> Mapping[str, bytes | str]:
    """Each file's name and bytes."""
    files: dict[str, bytes | str] = {"result.json": to_json(result)}
    figures = draw(result.recordings, result.title)
    for name, figure in figures.items():
        for format in ("png", "svg"):
            files[f"{name}.{format}"] = figure_bytes(figure, format)
    files["requests.csv"] = requests_frame(result).to_csv(index=False)
    files["steps.csv"] = steps_frame(result).to_csv(index=False)
    files["report.html"] = html.render([Labelled("", result)])
    return files | recording_files(result.recordings)


MOST_RESULTS = 24
"""Results of one document, which stays readable and small."""

PICTURES = ("timeline", "latency", "account")
"""Pictures that Markdown refers to, in this order."""


def check_number(folders: Sequence[Path]) -> None:
    """See that so many results can be shown side by side, each once.

    Raises:
        UsageError: they are too many, or one is named twice.
    """
    if len(folders) > MOST_RESULTS:
        raise UsageError(f"{len(folders)} results: show at most {MOST_RESULTS} side by side")
    seen: set[str] = set()
    for folder in folders:
        real = os.path.realpath(folder)  # Path.resolve fails on a link that leads to itself
        if real in seen:
            raise UsageError(f"{folder}: is named twice; name each result once")
        seen.add(real)


def make_document(
    format: str, folders: Sequence[Path], results: Sequence[Result], file: Path | None
) -> str:
    """The text of a document, in the format of ``report --format``, that is to lie at ``file``."""
    from batchbench.reports.formats import dashboards, html, markdown
    from batchbench.reports.formats import dashboards as pytest_json
    from batchbench.reports.side_by_side import label_results

    shown = label_results(folders, results)
    if format == "html":
        return html.render(shown)
    if format.startswith("github-"):
        return dashboards.render_github_benchmark(shown, bigger=format == "github-bigger")
    if format == "bencher":
        return dashboards.render_bencher(shown)
    if format == "pytest-benchmark":
        return pytest_json.render_pytest_benchmark(shown)
    at = Path.cwd() if file is None else file.absolute().parent
    return markdown.render(shown, [_pictures(folder, at) for folder in folders])


def _pictures(folder: Path, at: Path) -> dict[str, str]:
    """Pictures of a result that are there, by name, as seen from ``at``."""
    files = {name: folder / f"{name}.png" for name in PICTURES}
    return {
        name: Path(os.path.relpath(file.absolute(), at)).as_posix()
        for name, file in files.items()
        if file.exists()
    }
