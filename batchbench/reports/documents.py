"""Documents to pass on: one file of one or several results, for people or for dashboards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.reports.result import Result

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
    from batchbench.reports.formats import bencher, github_benchmark, html, markdown
    from batchbench.reports.formats import pytest_benchmark as pytest_json
    from batchbench.reports.side_by_side import label_results

    shown = label_results(folders, results)
    if format == "html":
        return html.render(shown)
    if format.startswith("github-"):
        return github_benchmark.render(shown, bigger=format == "github-bigger")
    if format == "bencher":
        return bencher.render(shown)
    if format == "pytest-benchmark":
        return pytest_json.render(shown)
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
