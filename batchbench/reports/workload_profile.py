"""What a workload looks like before anything serves it: lengths and arrivals in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.figures.card import INK, QUIET, WIDE, house_style, make_card, strip_axes
from batchbench.reports.text import clean_text, number, spell_number
from batchbench.workloads.generate import Outline
from batchbench.workloads.request import Ints


@dataclass(frozen=True)
class Spread:
    """Lengths of all requests, in tokens; percentiles are linear between neighbours."""

    total: int
    mean: float
    least: int
    p50: float
    p90: float
    p99: float
    most: int


@dataclass(frozen=True)
class Pace:
    """Arrivals: the time from the first to the last, gaps in it a second, and how they vary.

    ``variation`` is the coefficient of variation of the gaps, 1 for a Poisson process and
    burstiness ** -0.5 for a gamma one; None below two gaps or where all come at once.
    """

    span_s: float
    per_second: float | None
    variation: float | None


@dataclass(frozen=True)
class Bar:
    """Lengths from ``low`` to ``high``, both included, and how many there are."""

    low: int
    high: int
    count: int


def spread(lengths: Ints) -> Spread:
    """How lengths, ``[requests]``, are spread."""
    p50, p90, p99 = np.percentile(lengths, (50, 90, 99)).tolist()
    return Spread(
        int(lengths.sum()),
        float(lengths.mean()),
        int(lengths.min()),
        p50,
        p90,
        p99,
        int(lengths.max()),
    )


def pace(due_ns: Ints) -> Pace:
    """How requests due at these times, ``[requests]``, come in."""
    gaps = np.diff(due_ns)
    span = float(due_ns[-1] - due_ns[0]) / 1e9
    if not span:
        return Pace(span, None, None)
    variation = float(gaps.std() / gaps.mean()) if len(gaps) > 1 else None
    return Pace(span, len(gaps) / span, variation)


def bars(lengths: Ints, most: int = 10) -> list[Bar]:
    """A histogram of at most ``most`` bars of equal width, a whole number of tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // most)
    counts = np.bincount((lengths - low) // width)
    return [
        Bar(low + i * width, min(low + (i + 1) * width - 1, high), count)
        for i, count in enumerate(counts.tolist())
    ]


def title(outline: Outline) -> str:
    """Requests and tokens in a line."""
    prompt, output = int(outline.prompt_tokens.sum()), int(outline.output_tokens.sum())
    requests = f"{len(outline):,} request{'s' * (len(outline) != 1)}"
    return f"{requests} · {prompt:,} prompt tokens · {output:,} output tokens"


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


_PANEL = 1.5  # inches: height of a panel

_BARS = 40

_PROMPT, _OUTPUT = "#009E73", "#E69F00"  # Okabe and Ito's; not those of the strategies


def draw_portrait(outline: Outline) -> Figure:
    """Histograms of lengths and, where requests come over time, their number over time."""
    timed = bool(outline.due_ns.any())
    half = (WIDE - 0.55) / 2
    with house_style():
        card = make_card(
            _headline(outline),
            clean_text(outline.name),
            0.1 + _PANEL + 0.45 + timed * (_PANEL + 0.55),
            _notes(outline, timed),
        )
        for left, lengths, colour, what in (
            (0.0, outline.prompt_tokens, _PROMPT, "prompt"),
            (half + 0.55, outline.output_tokens, _OUTPUT, "output"),
        ):
            axes = card.axes(left + 0.35, 0.1, half - 0.35, _PANEL)
            _draw_lengths(axes, lengths, colour, what)
        if timed:
            _draw_arrivals(card.axes(0.35, 0.1 + _PANEL + 0.65, WIDE - 0.35, _PANEL), outline)
        return card.figure


def _draw_lengths(axes: Axes, lengths: Ints, colour: str, what: str) -> None:
    found = bars(lengths, _BARS)
    left = np.array([bar.low for bar in found]) - 0.5
    width = found[0].high - found[0].low + 1
    axes.bar(left, [bar.count for bar in found], width, align="edge", color=colour, gid=what)
    mean = spread(lengths).mean
    axes.axvline(mean, color=INK, lw=1.2, ls=":")
    right = mean > (left[0] + left[-1] + width) / 2
    axes.annotate(
        f"mean {spell_number(mean)}",
        (mean, 1.0),
        (-4 if right else 4, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        size=8.5,
    )
    if len(found) == 1:  # a bar of all requests should not fill the panel
        axes.set_xlim(lengths[0] - 10 * width, lengths[0] + 10 * width)
    axes.set_xlabel(f"{what} tokens of a request")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")


def _draw_arrivals(axes: Axes, outline: Outline) -> None:
    seconds = outline.due_ns / 1e9
    come = np.arange(1, len(seconds) + 1)
    # A line of more points than pixels is no clearer.
    shown = np.unique(np.linspace(0, len(seconds) - 1, 2_000).astype(np.int64))
    axes.plot([0, seconds[-1]], [1, len(seconds)], color=QUIET, lw=1.2, ls=":")
    axes.plot(seconds[shown], come[shown], drawstyle="steps-post", color=INK, lw=1.6, gid="come")
    axes.set(xlim=(0, seconds[-1]), ylim=(0, len(seconds) * 1.02))
    axes.set_xlabel("s since the first arrival")
    axes.set_title("requests that have come", loc="left", size=8.5, color=QUIET)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")


def _headline(outline: Outline) -> str:
    prompt, output = spread(outline.prompt_tokens), spread(outline.output_tokens)
    rate = pace(outline.due_ns).per_second
    return (
        f"{spell_number(prompt.mean)} prompt and {spell_number(output.mean)} output tokens a "
        f"request, {'all at once' if rate is None else f'{spell_number(rate)} requests/s'}"
    )


def _notes(outline: Outline, timed: bool) -> str:
    text = "Bars: number of requests. Dotted: the mean."
    if timed:
        variation = pace(outline.due_ns).variation
        told = (
            "" if variation is None else f"; the gaps' coefficient of variation is {variation:.2f}"
        )
        told += "" if variation is None else " (Poisson: 1)"
        text += f" Below, dotted: an even rate. Arrivals: {outline.arrivals}{told}."
    return clean_text(text)
