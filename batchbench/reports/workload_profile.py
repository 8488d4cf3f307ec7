"""The profile of a workload before anything serves it: lengths and arrivals in numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.bar import Bar as Blocks
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.figures.card import INK, QUIET, WIDE, house_style, make_card, strip_axes
from batchbench.reports.text import clean_text, number, plural, span, spell_number
from batchbench.workloads.generate import Outline
from batchbench.workloads.request import Ints


class Pace(NamedTuple):
    """The time from the first arrival to the last, arrivals per second, and their variation.

    ``variation`` is the coefficient of variation of the gaps, 1 for a Poisson process and
    burstiness ** -0.5 for a gamma one; None if there are fewer than two gaps or no time passes.
    """

    span_s: float
    per_second: float | None
    variation: float | None


def spread(lengths: Ints) -> list[float]:
    """Return the mean, min, p50, p90, p99, max and total of all requests, in tokens."""
    return [lengths.mean(), *np.percentile(lengths, (0, 50, 90, 99, 100)), lengths.sum()]


def pace(due_ns: Ints) -> Pace:
    gaps = np.diff(due_ns)
    span_s = float(due_ns[-1] - due_ns[0]) / 1e9
    if not span_s:
        return Pace(span_s, None, None)
    variation = float(gaps.std() / gaps.mean()) if len(gaps) > 1 else None
    return Pace(span_s, len(gaps) / span_s, variation)


def bars(lengths: Ints, most: int = 10) -> list[tuple[int, int, int]]:
    """Return a histogram: first and last length, and requests, of bars of equal width."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // most)
    counts = np.bincount((lengths - low) // width).tolist()
    starts = (low + width * i for i in range(len(counts)))
    return [(at, min(at + width - 1, high), n) for at, n in zip(starts, counts, strict=True)]


def title(outline: Outline) -> str:
    prompt, output = int(outline.prompt_tokens.sum()), int(outline.output_tokens.sum())
    requests = plural(len(outline), "request")
    return f"{requests} · {prompt:,} prompt tokens · {output:,} output tokens"


# In a terminal


def render(outline: Outline) -> RenderableType:
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
    grid = Table("Tokens", pad_edge=False)
    for name in ("mean", "min", "p50", "p90", "p99", "max", "total"):
        grid.add_column(name, justify="right")
    prompt, output = outline.prompt_tokens, outline.output_tokens
    for name, lengths in (("prompt", prompt), ("output", output), ("both", prompt + output)):
        grid.add_row(name, *map(number, spread(lengths)))
    return grid


def arrivals(outline: Outline) -> str:
    """Return the requested arrival process and the arrivals that it gave."""
    arrived, text = pace(outline.due_ns), outline.arrivals
    if arrived.per_second is not None:
        text += f"; {number(arrived.per_second)} requests/s over {number(arrived.span_s)} s"
    if arrived.variation is not None:
        text += f"; the gaps' coefficient of variation is {arrived.variation:.2f} (Poisson: 1)"
    if outline.max_concurrency is not None:
        text += f"; at most {outline.max_concurrency:,} in the system"
    return text


def _histogram(name: str, lengths: Ints) -> Table:
    grid = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_row(Text(name, style="bold"), "", Text("requests", style="dim"))
    histogram, width = bars(lengths), 40
    longest = max(count for *_, count in histogram)
    for low, high, count in histogram:
        shown = max(count, longest / width / 8) if count else 0  # at least an eighth
        blocks = Blocks(longest, 0, shown, width=width, color="cyan")
        grid.add_row(span(low, high), blocks, f"{count:,}")
    return grid


# The picture

_PANEL = 1.5  # inches: height of a panel

_PROMPT, _OUTPUT = "#009E73", "#E69F00"  # Okabe and Ito's; not those of the strategies


def draw_portrait(outline: Outline) -> Figure:
    """Draw histograms of lengths and, if requests come over time, their number over time."""
    timed = bool(outline.due_ns.any())
    rate, half = pace(outline.due_ns).per_second, (WIDE - 0.55) / 2
    prompt, output = (
        spell_number(n.mean()) for n in (outline.prompt_tokens, outline.output_tokens)
    )
    headline = (
        f"{prompt} prompt and {output} output tokens per request, "
        f"{'all at once' if rate is None else f'{spell_number(rate)} requests/s'}"
    )
    notes = "Bars: number of requests. Dotted: the mean."
    if timed:
        notes += f" Below, dotted: an even rate. Arrivals: {arrivals(outline)}."
    with house_style():
        tall = 0.1 + _PANEL + 0.45 + timed * (_PANEL + 0.55)
        card = make_card(headline, clean_text(outline.name), tall, clean_text(notes))
        for left, lengths, colour, kind in (
            (0.0, outline.prompt_tokens, _PROMPT, "prompt"),
            (half + 0.55, outline.output_tokens, _OUTPUT, "output"),
        ):
            axes = card.axes(left + 0.35, 0.1, half - 0.35, _PANEL)
            _draw_lengths(axes, lengths, colour, kind)
        if timed:
            _draw_arrivals(card.axes(0.35, 0.1 + _PANEL + 0.65, WIDE - 0.35, _PANEL), outline)
        return card.figure


def _draw_lengths(axes: Axes, lengths: Ints, colour: str, kind: str) -> None:
    histogram = bars(lengths, 40)
    low, high, counts = np.array(histogram).T
    width = high[0] - low[0] + 1
    axes.bar(low - 0.5, counts, width, align="edge", color=colour, gid=kind)
    axes.axvline(lengths.mean(), color=INK, lw=1.2, ls=":")
    axes.set_title(f"mean {spell_number(lengths.mean())}", loc="right", size=8.5)
    if len(histogram) == 1:  # a bar of all requests should not fill the panel
        axes.set_xlim(lengths[0] - 10 * width, lengths[0] + 10 * width)
    axes.set_xlabel(f"{kind} tokens per request")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")


def _draw_arrivals(axes: Axes, outline: Outline) -> None:
    seconds = outline.due_ns / 1e9
    count = np.arange(1, len(seconds) + 1)
    # More points than pixels do not make a line clearer.
    shown = np.unique(np.linspace(0, len(seconds) - 1, 2_000).astype(np.int64))
    axes.plot([0, seconds[-1]], [1, len(seconds)], color=QUIET, lw=1.2, ls=":")
    axes.plot(seconds[shown], count[shown], drawstyle="steps-post", color=INK, lw=1.6, gid="come")
    axes.set(xlim=(0, seconds[-1]), ylim=(0, len(seconds) * 1.02))
    axes.set_xlabel("time since the first arrival (s)")
    axes.set_title("requests arrived", loc="left", size=8.5, color=QUIET)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")
