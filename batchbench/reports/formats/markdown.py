"""Markdown, for pull requests and notes: the sentence, the tables, pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from batchbench.reports.formats.terminal import causes, cells, notes, prediction_lines, sentence
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import FIGURES, Labelled, SideBySide

_TOLD = {
    "timeline": "Who held which slot, and when",
    "latency": "How long requests wait",
    "account": "Where the time went",
}


def render(shown: Sequence[Labelled], pictures: Sequence[Mapping[str, str]]) -> str:
    """One result, or several side by side.

    Args:
        pictures: of each result, paths by the picture's name, as the document is to refer to them.
    """
    lines: list[str] = []
    if len(shown) > 1:
        lines += _together(SideBySide(shown))
    for one, paths in zip(shown, pictures, strict=True):
        lines += _of_result(one, paths, several=len(shown) > 1)
    return "\n".join(lines).rstrip() + "\n"


def _together(together: SideBySide) -> Iterator[str]:
    yield from (f"**{escape(together.sentence)}**", "")
    if together.settings:
        rows = [[name, *values] for name, values in together.settings]
        yield from table(["Differs", *together.labels], rows, left=len(together.labels) + 1)
    head = ["Result", "Strategy", "Speed-up", *(name for name, _ in FIGURES), "Run"]
    rows = [[x.label, x.strategy, x.speedup, *x.figures, x.status] for x in together.lines]
    yield from table(head, rows, left=2)


def _of_result(one: Labelled, pictures: Mapping[str, str], *, several: bool) -> Iterator[str]:
    result = one.result
    if several:
        yield from (f"## {escape(one.label)}", "")
    yield from (f"**{escape(sentence(result))}**", "", escape(result.title), "")
    for line in causes(result):
        yield from (escape(line), "")
    head, rows = cells(result)
    yield from table(head, rows, left=2)
    if notes(result):
        yield from (escape("; ".join(notes(result))), "")
    for line in prediction_lines(result):
        yield from (escape(line), "")
    for name, path in pictures.items():
        yield from (f"![{_TOLD[name]}]({quote(path)})", "")
    yield from _again(result)


def _again(result: Result) -> Iterator[str]:
    data = result.data
    packages = data["environment"].get("packages", {})
    found = ", ".join(f"{name} {version}" for name, version in packages.items())
    machine = data["environment"].get("gpu") or data["environment"].get("cpu") or "N/A"
    yield from ("<details><summary>To do it again</summary>", "")
    yield from (*fenced(data["command"]), "")
    version = data["batchbench_version"]
    yield from (escape(f"{machine}; batchbench {version}, {found or 'packages N/A'}"), "")
    yield from ("</details>", "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> Iterator[str]:
    """The first ``left`` columns to the left, the others, numbers, to the right."""
    yield _row(head)
    yield _row(["---" if i < left else "---:" for i in range(len(head))], plain=True)
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[str], *, plain: bool = False) -> str:
    return "| " + " | ".join(cells if plain else map(escape, cells)) + " |"


def fenced(text: str) -> tuple[str, str, str]:
    """A command in a code block whose fence is longer than any within."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}console", " ".join(text.split()), fence


def escape(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#&~$@])", r"\\\1", line)
