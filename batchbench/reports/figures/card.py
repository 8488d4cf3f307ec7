"""The card that every picture is drawn on, and the colours, units and legends that all share."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.batching.recording import Recording
from batchbench.reports import metrics
from batchbench.reports.latency import Latencies
from batchbench.reports.result_data import Counters
from batchbench.reports.text import NO_BREAK, WAVES, called, clean_text, label_of, spell_number

LOOKS: dict[str, tuple[str, Any]] = {
    "static": ("#D55E00", "solid"),
    "continuous": ("#0072B2", (0, (4, 1.4))),
    "static-fixed": ("#009E73", (0, (1.2, 1.2))),
    "static-bucketed": ("#CC79A7", (0, (6, 1.5, 1.2, 1.5))),
    "static-oracle": ("#E69F00", (0, (8, 2))),
}
"""Colour and dashes of the built-in strategies: Okabe and Ito's colours, which colour-blind people
can distinguish."""

_MORE_LOOKS = (("#56B4E9", (0, (3, 1, 1, 1, 1, 1))), ("#6b6b6b", (0, (2.5, 2.5))))


def looks_of(names: Collection[str]) -> dict[str, tuple[str, Any]]:
    """Return the look of each strategy; other people's strategies get the unused ones in order."""
    ours = LOOKS | {WAVES: LOOKS["static"]}
    free = cycle([*(look for name, look in LOOKS.items() if name not in names), *_MORE_LOOKS])
    return ours | {name: next(free) for name in names if name not in ours}


DPI = 160

_WIDTH, _EDGE, WIDE = 8.0, 0.35, 7.3  # inches: the card, its margin, the width between margins

INK, QUIET, FAINT = "#1a1a1a", "#5c5c5c", "#d9d9d9"

HELD: dict[str, Any] = {"facecolor": "#ececec", "edgecolor": "#8c8c8c", "hatch": "/////", "lw": 0}
"""A slot that a finished request still holds."""

_STYLE = Path(__file__).with_name("pictures.mplstyle")


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style of all pictures, regardless of the user's own matplotlibrc."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Letters of a name that no font here has are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@dataclass(frozen=True, eq=False)
class Strategy:
    """A strategy's trials and its look in every picture."""

    index: int
    name: str
    trials: Sequence[Recording]
    colour: str
    dashes: Any

    @cached_property
    def typical(self) -> Recording:
        return metrics.typical_trial(self.trials)

    @property
    def in_steps(self) -> bool:
        return self.trials[0].in_steps

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "ls": self.dashes, "lw": 2}

    @cached_property
    def counted(self) -> Counters:
        return metrics.counters(self.typical)

    @cached_property
    def latencies(self) -> Latencies:
        return Latencies.of(*self.trials)

    @property
    def called(self) -> str:
        """The name within a sentence."""
        return fit_text(called(self.name), 200, 13)

    def tint(self, by: float) -> tuple[float, float, float]:
        """Mix the colour with white (``by`` > 0) or black (``by`` < 0)."""
        r, g, b = (abs(by) * (by > 0) + (1 - abs(by)) * part for part in to_rgb(self.colour))
        return r, g, b


def name_strategies(recordings: Mapping[str, Sequence[Recording]]) -> list[Strategy]:
    """Return the strategies with their looks; they may have no trials."""
    looks, strategies = looks_of(recordings), list[Strategy]()
    for name, trials in recordings.items():
        label = label_of(clean_text(name), has_steps=not trials or trials[0].has_steps)
        strategies.append(Strategy(len(strategies), label, trials, *looks[name]))
    return strategies


@dataclass(frozen=True)
class Unit:
    ns: float
    name: str

    @classmethod
    def of(cls, strategies: Sequence[Strategy], longest_ns: float) -> Unit:
        """Return steps where time counts steps, else a unit in which ``longest_ns`` is above 1."""
        if strategies[0].in_steps:
            return cls(UNIT_NS, "steps")
        units = (cls(1e9, "s"), cls(1e6, "ms"), cls(1e3, "µs"))
        return next((unit for unit in units if longest_ns >= unit.ns), units[-1])

    def text(self, ns: float) -> str:
        value = spell_number(ns / self.ns)
        name = "step" if (value, self.name) == ("1", "steps") else self.name
        return f"{value}{NO_BREAK}{name}"


def capitalize(sentence: str) -> str:
    """Begin with a capital letter, except where the first word is a user's own name."""
    ours = (*(called(name) for name in LOOKS), "in simulation", "at ")
    return sentence[0].upper() + sentence[1:] if sentence.startswith(ours) else sentence


@lru_cache(maxsize=4096)
def text_extent(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a text in points, and 2 % more since pixels widen letters a little."""
    font = FontProperties(size=size, weight=weight)
    return 1.02 * float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def fit_text(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Shorten the middle of a text that is wider than ``width`` points."""
    if text_extent(text, size, weight) <= width:
        return text
    for keep in range(min(len(text), 300), 0, -1):
        tail = keep // 2
        short = f"{text[: keep - tail]}…{text[len(text) - tail :]}"
        if text_extent(short, size, weight) <= width:
            return short
    return "…"


def _wrap(text: str, size: float, weight: str) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if text_extent(longer, size, weight) <= WIDE * 72:
            lines[-1] = longer
        else:
            lines.append(fit_text(word, WIDE * 72, size, weight))
    return [line for line in lines if line] or [""]


class Picture(Figure):
    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        with house_style():
            self.savefig(out, format="png", dpi=100)
        return out.getvalue()


@dataclass(frozen=True, eq=False)
class Card:
    """A figure on which places are inches from the upper left corner of its body."""

    figure: Figure
    head: float  # inches above the body

    def at(self, left: float, top: float) -> tuple[float, float]:
        height = self.figure.get_figheight()
        return (_EDGE + left) / _WIDTH, 1 - (self.head + top) / height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        x, y = self.at(left, top + height)
        return self.figure.add_axes((x, y, width / _WIDTH, height / self.figure.get_figheight()))

    def grid(
        self,
        shape: tuple[int, int],
        top: float,
        height: float,
        *,
        left: float = 0.62,
        gap: float = 0.2,
        between: float = 0.0,
        share: bool | Literal["col"] = True,
    ) -> list[list[Axes]]:
        """Return axes of a height in inches, in rows and columns as wide as the card.

        ``left`` is the room for labels, ``gap`` that to the next column, ``between`` that to the
        next row. The axes share both scales; with "col", only the x-axis of each column.
        """
        rows, columns = shape
        width = (WIDE - left - (columns - 1) * gap) / columns
        x0, y1 = self.at(left, top)
        x1, y0 = self.at(WIDE, top + rows * height + (rows - 1) * between)
        spec = self.figure.add_gridspec(
            *shape,
            left=x0,
            top=y1,
            right=x1,
            bottom=y0,
            wspace=gap / width,
            hspace=between / height,
        )
        grid: list[list[Axes]] = spec.subplots(
            sharex="col" if share == "col" else share, sharey=share is True, squeeze=False
        ).tolist()
        return grid

    def write(self, left: float, top: float, text: str, **style: Any) -> Text:
        """Write a text whose upper left corner (or as ``ha`` and ``va`` say) is here."""
        return self.figure.text(*self.at(left, top), text, **{"va": "top", **style})

    def heading(self, top: float, text: str, detail: str, ink: Any = INK, **look: Any) -> Text:
        """Write a bold text with its baseline at ``top`` and a detail behind it; return that."""
        text = fit_text(text, WIDE * 72 - text_extent(detail, 9.5, "bold") - 10, 10.5, "bold")
        self.write(0, top, text, color=ink, va="baseline", size=10.5, weight="bold")
        behind = (text_extent(text, 10.5, "bold") + 10) / 72
        look = {"color": QUIET, "size": 9.5, "va": "baseline", **look}
        return self.write(behind, top, detail, **look)

    def label(self, top: float, strategy: Strategy, detail: str, **look: Any) -> Text:
        """Write a strategy's name in its colour and a detail behind it; return the detail."""
        return self.heading(top, strategy.name, detail, strategy.tint(-0.15), **look)


def make_card(headline: str, title: str, body: float, notes: str) -> Card:
    """Return a card with headline, title and notes around a body of ``body`` inches."""
    styles: list[tuple[str, float, str, str]] = [
        (capitalize(headline), 13.0, "bold", INK),
        (title, 9.5, "normal", QUIET),
        (notes, 8.5, "normal", QUIET),
    ]
    lines = [_wrap(text, size, weight) for text, size, weight, _ in styles]
    tall = [size * 1.3 * len(text) / 72 for text, (_, size, *_) in zip(lines, styles, strict=True)]
    head = 0.27 + tall[0] + 0.06 + tall[1] + 0.2
    figure = Picture(
        (_WIDTH, head + body + 0.14 + tall[2] + 0.24),
        facecolor="#ffffff",
        edgecolor="#c4c4c4",  # the card's rim on a white page
        linewidth=1.5,
    )
    card = Card(figure, head)
    places = (0.27 - head, 0.33 - head + tall[0], body + 0.14)
    for top, text, (_, size, weight, colour) in zip(places, lines, styles, strict=True):
        look: dict[str, Any] = {"size": size, "weight": weight, "color": colour}
        card.write(0, top, "\n".join(text), linespacing=1.15, **look)
    return card


def strip_axes(axes: Axes, *sides: str) -> None:
    """Remove the frame except for the given sides; write axis numbers with commas."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.10g}")
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)


Entry = tuple[str, Any]
"""A label of a legend, and its handle or handles."""


def make_entry(label: str, strategies: Sequence[Strategy], tint: float) -> Entry:
    return label, tuple(Patch(fc=s.tint(tint), lw=0) for s in strategies[:2])


def legend_height(entries: Sequence[Entry]) -> float:
    return 0.24 * -(-len(entries) // 3) + 0.08


def add_legend(card: Card, entries: Sequence[Entry], columns: int = 3, **look: Any) -> None:
    rows = -(-len(entries) // columns)
    columns = -(-len(entries) // rows)
    # matplotlib fills column after column.
    order = [i for column in range(columns) for i in range(column, len(entries), columns)]
    card.figure.legend(
        [entries[i][1] for i in order],
        [entries[i][0] for i in order],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.15)},
        ncols=columns,
        bbox_to_anchor=card.at(0, 0),
        loc="upper left",
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        **{"handlelength": 2.2, "columnspacing": 2.0, **look},
    )


def add_line_legend(card: Card, strategies: Sequence[Strategy], *more: Artist) -> None:
    """Write a legend of the strategies' lines, and of more artists by their labels."""
    entries: list[Entry] = [
        (fit_text(s.name, 150, 9.5), Line2D([], [], marker="o", ms=4, **s.line)) for s in strategies
    ]
    entries += [(str(artist.get_label()), artist) for artist in more]
    add_legend(card, entries, len(entries), handlelength=3, columnspacing=1.8, fontsize=9.5)


def finish_panel(axes: Axes, title: str, size: float = 9.0) -> None:
    """Give a panel a title, and horizontal rules instead of a frame."""
    axes.set_title(title, size=size, weight="bold", loc="left", pad=5)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    axes.tick_params(axis="y", length=0)
    axes.minorticks_off()
    strip_axes(axes, "bottom")


def count_doublings(axes: Axes) -> None:
    """Make the x-axis logarithmic, with ticks at powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
