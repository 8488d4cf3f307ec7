"""A gate as Markdown, for a pull request or the summary of a job."""

from __future__ import annotations

from collections.abc import Iterator

from batchbench.reports.formats.markdown import escape, fenced, table
from batchbench.studies.gate.evidence import Answer, Gate
from batchbench.studies.gate.report import TITLES, last_lines, sides, tables, varying

_ALERTS = {Answer.PASSED: "TIP", Answer.FAILED: "CAUTION", Answer.UNKNOWN: "WARNING"}
"""Coloured boxes, of GitHub's and GitLab's Markdown; elsewhere they are plain quotations."""


def render(gate: Gate, *, strict: bool = False) -> str:
    """The sentence, what varies, the evidence, how to do it again.

    Args:
        strict: whether *cannot tell* ends with an exit code of its own.
    """
    return "\n".join(_lines(gate, strict=strict)).rstrip() + "\n"


def _lines(gate: Gate, *, strict: bool) -> Iterator[str]:
    # By this line a comment of an earlier run is found again and replaced.
    yield from (
        f"<!-- batchbench {gate.command} -->",
        f"### batchbench {gate.command}",
        "",
    )
    yield from (f"> [!{_ALERTS[gate.answer]}]", f"> **{escape(gate.sentence)}**")
    if gate.answer is Answer.UNKNOWN:
        code = "Exit code 3." if strict else "Exit code 0; `--strict` makes it 3."
        yield from (">", f"> This is no pass: a loss may be there that was not seen. {code}")
    yield ""
    yield from table(["Side", "What it is"], sides(gate), left=2)
    for title, rows in (("settings", gate.settings), ("environment", gate.environment)):
        if rows:
            yield from (f"**Differing {title}**", "")
            yield from table(
                ["Name", "Base", "New"], [list(varying(each)) for each in rows], left=3
            )
    for found in tables(gate):
        yield from (f"**{TITLES[found.kind]}**", "")
        if found.rows:
            # A column that no row has anything in is not shown.
            kept = [i for i in range(len(found.head)) if any(row.cells[i] for row in found.rows)]
            rows_shown = [[row.cells[i] for i in kept] for row in found.rows]
            yield from table([found.head[i] for i in kept], rows_shown, left=1)
        for line in found.below:
            yield from (escape(line), "")
    if not gate.evidence:
        yield from ("Nothing was compared.", "")
    for line in last_lines(gate):
        yield from (f"- {escape(line)}",)
    yield from ("", "<details><summary>To do it again</summary>", "")
    yield from (*fenced(gate.typed), "", "</details>")
