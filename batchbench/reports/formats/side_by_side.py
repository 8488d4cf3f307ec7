"""Several results on a terminal: what differs, then their figures."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.side_by_side import FIGURES, SideBySide


def render(together: SideBySide) -> RenderableType:
    """The sentence, the settings that vary, a line a result and strategy."""
    parts: list[RenderableType] = [Text(together.sentence, style="bold"), Text()]
    if together.settings:
        settings = _grid("What differs", ["Setting", *together.labels], left=99)
        for name, values in together.settings:
            settings.add_row(*map(Text, (name, *values)))
        parts += [settings, Text()]
    # Units stand in the head's second line; a table of five figures fits into 80 columns.
    names = [name.replace(" (", "\n(") for name, _ in FIGURES[:3]]
    figures = _grid("Side by side", ["Result", "Strategy", "Speed-up", *names], left=2)
    for line in together.lines:
        mark = "" if line.status == "valid" else f" ({line.status})"
        figures.add_row(
            *map(Text, (line.label + mark, line.strategy, line.speedup, *line.figures[:3]))
        )
    return Group(*parts, figures)


def _grid(title: str, head: list[str], left: int) -> Table:
    grid = Table(
        title=title,
        title_style="bold",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for i, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    return grid
