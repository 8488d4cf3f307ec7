"""A gate on a terminal: the answer, what varies, then the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from batchbench.reports.sequential import Verdict
from batchbench.studies.gate.evidence import CANNOT_TELL, Answer, Evidence, Gate, Kind, Varying
from batchbench.studies.gate.report import TITLES, Rows, last_lines, sides, tables, varying

_STYLES = {Answer.PASSED: "bold green", Answer.FAILED: "bold red", Answer.UNKNOWN: "bold yellow"}


def render(gate: Gate, *, strict: bool = False) -> RenderableType:
    """The sentence, in a frame unless it passed, and all that it rests on.

    Args:
        strict: whether *cannot tell* ends with an exit code of its own.
    """
    parts: list[RenderableType] = [_answer(gate, strict=strict), Text()]
    identity = Table.grid(padding=(0, 2, 0, 0))
    for role, text in sides(gate):
        identity.add_row(Text(role, style="bold"), Text(text, overflow="fold"))
    parts += [identity, Text()]
    for title, rows in (("settings", gate.settings), ("environment", gate.environment)):
        if rows:
            parts += [_differences(f"Differing {title}", rows), Text()]
    for found in tables(gate):
        parts += [*_evidence(found), Text()]
    if not gate.evidence:
        parts += [Text("Nothing was compared."), Text()]
    parts += [Text(line, style="dim") for line in last_lines(gate)]
    return Group(*parts)


def _answer(gate: Gate, *, strict: bool) -> RenderableType:
    style = _STYLES[gate.answer]
    if gate.answer is Answer.PASSED:
        return Text(gate.sentence, style=style)
    text = Text(gate.sentence, style=style)
    if gate.answer is Answer.UNKNOWN:
        code = f"Exit code {CANNOT_TELL}." if strict else "Exit code 0; --strict makes it 3."
        text.append(f"\nThis is no pass: a loss may be there that was not seen. {code}")
    return Panel(text, box=box.HEAVY, style=style, padding=(0, 1))


def _differences(title: str, rows: Sequence[Varying]) -> Table:
    grid = _grid(title, ("Name", "Base", "New"), left=3)
    for each in rows:
        grid.add_row(*map(Text, varying(each)))
    return grid


def _evidence(found: Rows) -> list[RenderableType]:
    parts: list[RenderableType] = []
    title = TITLES[found.kind]
    if found.rows and found.kind is Kind.WORK:
        grid = _grid(title, ("Count\nor output", "Base", "New", "Change", "Verdict"), left=1)
        for row in found.rows:
            name, base, new, change, verdict, gate = row.cells
            grid.add_row(*map(Text, (name, base, new, change)), _told(row.evidence, verdict, gate))
        parts.append(grid)
    elif found.rows:
        parts.append(_measured(title, found))
    else:
        parts.append(Text(title, style="bold"))
    return [*parts, *(Text(line) for line in found.below)]


def _measured(title: str, found: Rows) -> Table:
    """Two lines a row, so that it fits into 80 columns."""
    head = ("Metric", "Base\nnew", "Change\n95 % CI", "Verdict", "Would find\nneeded")
    grid = _grid(title, head, left=1)
    for row in found.rows:
        name, base, new, change, interval, verdict, gate, smallest, needed = row.cells
        grid.add_row(
            Text(name.replace(".", ".\n", 1)),
            Text(f"{base}\n{new}"),
            Text(f"{change}\n{interval}"),
            _told(row.evidence, verdict, gate),
            Text(f"{smallest}\n{needed}".rstrip()),
        )
    return grid


def _told(each: Evidence, verdict: str, gate: str) -> Text:
    text = Text(f"{verdict}\n{gate}")
    if each.fails:
        text.stylize("bold red")
    elif each.verdict is Verdict.UNKNOWN:
        text.stylize("bold yellow" if each.gated else "yellow")
    elif each.verdict is Verdict.FASTER:
        text.stylize("green")
    return text


def _grid(title: str, head: Sequence[str], *, left: int) -> Table:
    grid = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for i, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    return grid
