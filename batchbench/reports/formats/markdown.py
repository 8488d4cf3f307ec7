"""Markdown, for pull requests and notes: the sentence, the tables, references to pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from batchbench.reports.formats import terminal
from batchbench.reports.served import server_lines
from batchbench.reports.side_by_side import HEAD, Labelled, SideBySide

PICTURES = {  # that a document refers to, in this order
    "timeline": "Requests in their slots, over time",
    "latency": "How long requests wait",
    "account": "Where the time went",
}


def render(shown: Sequence[Labelled], pictures: Sequence[Mapping[str, str]]) -> str:
    """Return the document of one result, or of several side by side.

    Args:
        pictures: of each result, paths by the picture's name, as seen from the document.
    """
    lines = list(_together(SideBySide(shown))) if len(shown) > 1 else []
    for one, paths in zip(shown, pictures, strict=True):
        lines += _of_result(one, paths, several=len(shown) > 1)
    return "\n".join(lines).rstrip() + "\n"


def _together(together: SideBySide) -> Iterator[str]:
    yield from (f"**{escape(together.sentence)}**", "")
    if together.settings:
        head = ["Differs", *together.labels]
        yield from table(head, together.settings, left=len(head))
    yield from table(HEAD, together.rows, left=2)


def _of_result(one: Labelled, pictures: Mapping[str, str], *, several: bool) -> Iterator[str]:
    result = one.result
    if several:
        yield from (f"## {escape(one.label)}", "")
    yield f"**{escape(terminal.sentence(result))}**\n"
    for line in (result.title, *terminal.causes(result), *server_lines(result.data)):
        yield f"{escape(line)}\n"
    head, rows, notes = terminal.figures(result)
    yield from table(head, rows, left=2)
    for line in filter(None, ("; ".join(notes), *terminal.prediction_lines(result))):
        yield f"{escape(line)}\n"
    for name, path in pictures.items():
        yield f"![{PICTURES[name]}]({quote(path)})\n"
    data, machine = result.data, result.data["environment"]
    packages = [f"{name} {version}" for name, version in machine.get("packages", {}).items()]
    software = ", ".join([f"batchbench {data['batchbench_version']}", *packages])
    yield "<details><summary>Run it again</summary>\n"
    yield from (*fenced(data["command"]), "")
    yield f"{escape(machine.get('gpu') or machine.get('cpu') or 'N/A')}; {escape(software)}\n"
    yield "</details>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> Iterator[str]:
    """Yield the lines of a table; the first ``left`` columns are texts, the others numbers."""
    marks = ["---" if i < left else "---:" for i in range(len(head))]
    for row in (head, None, *rows):
        yield f"| {' | '.join(marks if row is None else map(escape, row))} |"
    yield ""


def fenced(text: str) -> tuple[str, str, str]:
    """Return a command in a code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}console", " ".join(text.split()), fence


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#&~$@])", r"\\\1", line)
