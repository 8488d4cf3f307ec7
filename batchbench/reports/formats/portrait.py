"""A workload on a terminal: its lengths in a table and as bars, and its arrivals."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.text import number
from batchbench.reports.workload_profile import bars, pace, spread, title
from batchbench.workloads.outline import Outline
from batchbench.workloads.ragged import Ints

_BAR = 40  # characters of the longest


def render(outline: Outline) -> RenderableType:
    """Name, table, arrivals, bars."""
    return Group(
        Text(title(outline), style="bold"),
        Text(outline.name, style="dim"),
        Text(),
        _table(outline),
        Text(),
        Text(f"Arrivals: {arrivals(outline)}"),
        Text(),
        _histogram("Prompt tokens", outline.prompt_tokens),
        Text(),
        _histogram("Output tokens", outline.output_tokens),
    )


def _table(outline: Outline) -> Table:
    grid = Table(pad_edge=False)
    grid.add_column("Tokens")
    for name in ("mean", "least", "p50", "p90", "p99", "most", "all together"):
        grid.add_column(name, justify="right")
    for name, lengths in (
        ("prompt", outline.prompt_tokens),
        ("output", outline.output_tokens),
        ("both", outline.prompt_tokens + outline.output_tokens),
    ):
        s = spread(lengths)
        values = (s.mean, s.least, s.p50, s.p90, s.p99, s.most, s.total)
        grid.add_row(name, *map(number, values))
    return grid


def arrivals(outline: Outline) -> str:
    """How requests come in, as asked and as it came out."""
    found, text = pace(outline.due_ns), outline.arrivals
    if found.per_second is not None:
        text += f"; {number(found.per_second)} requests/s over {number(found.span_s)} s"
    if found.variation is not None:
        text += f"; the gaps' coefficient of variation is {found.variation:.2f} (Poisson: 1)"
    if outline.max_concurrency is not None:
        text += f"; at most {outline.max_concurrency:,} in the system"
    return text


def _histogram(name: str, lengths: Ints) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(Text(name, style="bold"), "", Text("requests", style="dim"))
    found = bars(lengths)
    longest = max(bar.count for bar in found)
    for bar in found:
        label = f"{bar.low:,}–{bar.high:,}" if bar.high > bar.low else f"{bar.low:,}"
        grid.add_row(label, Text(_blocks(bar.count / longest), style="cyan"), f"{bar.count:,}")
    return grid


def _blocks(share: float) -> str:
    """A bar in eighths of a character; what is not nothing is seen."""
    eighths = max(round(share * _BAR * 8), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
