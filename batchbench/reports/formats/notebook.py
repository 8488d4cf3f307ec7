"""The result in a notebook: the sentence, and the table of the terminal as HTML."""

from __future__ import annotations

from html import escape

from rich.text import Text

from batchbench.reports.formats.terminal import sentence, table
from batchbench.reports.result import Result


def render(result: Result) -> str:
    """Sentence and table."""
    grid = table(result)
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in grid.columns]
    head, *rows = zip(*columns, strict=True)
    lines = [
        f"<p><b>{escape(sentence(result))}</b></p>",
        f"<table><caption>{escape(result.title)}</caption>",
        f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead><tbody>",
        *(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        "</tbody></table>",
    ]
    if grid.caption is not None:
        lines.append(f"<p><small>{escape(_plain(grid.caption))}</small></p>")
    return "\n".join(lines)


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
