"""What all pictures share: the card they are drawn on, colours, units, words, legends."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.batching.recording import Recording
from batchbench.reports import metrics
from batchbench.reports.result_file import Counters
from batchbench.reports.text import NO_BREAK, clean_text, spell_number

LOOKS: dict[str, tuple[str, Any]] = {
    "static": ("#D55E00", "solid"),
    "continuous": ("#0072B2", (0, (4, 1.4))),
    "static-fixed": ("#009E73", (0, (1.2, 1.2))),
    "static-bucketed": ("#CC79A7", (0, (6, 1.5, 1.2, 1.5))),
    "static-oracle": ("#E69F00", (0, (8, 2))),
}
"""Colour and dashes of our own strategies."""

_OTHER_LOOKS: tuple[tuple[str, Any], ...] = (
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
    ("#6b6b6b", (0, (2.5, 2.5))),
)
"""Of the others, after those of ours that are free. Okabe and Ito's colours, which
colour-blind people can tell apart; then grey."""


def looks_of(names: Collection[str]) -> dict[str, tuple[str, Any]]:
    """Static is always vermillion and continuous blue; others get what is left, in order."""
    left = [look for name, look in LOOKS.items() if name not in names]
    left += _OTHER_LOOKS
    others = [name for name in names if name not in LOOKS]
    return LOOKS | {name: left[i % len(left)] for i, name in enumerate(others)}


Floats = NDArray[np.float64]

DPI = 160

MOST_SLOTS = 32

"""Slots that the timeline draws; more lanes would be thinner than what a screen can show."""

MOST_BARS = 2_000

"""Bars that the timeline draws of one strategy."""

MOST_BARS_A_SLOT = 200

"""Beyond this a lane's bars are narrower than 2 points."""

_WIDTH, _EDGE, WIDE = 8.0, 0.35, 7.3  # inches: the card, its margin, what lies between margins

INK, QUIET, FAINT = "#1a1a1a", "#5c5c5c", "#d9d9d9"

HELD: dict[str, Any] = {
    "facecolor": "#ececec",
    "edgecolor": "#8c8c8c",
    "hatch": "/////",
    "linewidth": 0.0,
}


_STYLE = {
    "font.family": "sans-serif",
    # The first comes with matplotlib; a browser without it takes one about as wide.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,  # a $ in somebody's file name is a $
    "text.color": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#9a9a9a",
    "ytick.color": "#9a9a9a",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchbench",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Our style, whatever the user's own matplotlibrc says."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name may be written in letters that no font here has; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@dataclass(frozen=True, eq=False)
class Strategy:
    """A strategy's trials, and how it looks in every picture."""

    index: int
    name: str
    trials: Sequence[Recording]
    colour: str
    dashes: Any

    @cached_property
    def typical(self) -> Recording:
        """The trial that pictures of one trial show."""
        return metrics.typical_trial(self.trials)

    @property
    def in_steps(self) -> bool:
        """Whether its time is counted in steps."""
        return self.trials[0].in_steps

    @property
    def line(self) -> dict[str, Any]:
        """How a line of it looks: told apart by its dashes where colours are not seen."""
        return {"color": self.colour, "ls": self.dashes, "lw": 2}

    @cached_property
    def counted(self) -> Counters:
        """Counters of the typical trial."""
        return metrics.counters(self.typical)

    @property
    def called(self) -> str:
        """The name within a sentence."""
        name = f"{self.name} batching" if self.name in LOOKS else self.name
        return fit_text(name, 200, 13)

    def tint(self, by: float) -> tuple[float, float, float]:
        """The colour mixed with white (``by`` > 0) or black (``by`` < 0)."""
        r, g, b = (abs(by) * (by > 0) + (1 - abs(by)) * part for part in to_rgb(self.colour))
        return r, g, b


def name_strategies(recordings: Mapping[str, Sequence[Recording]]) -> list[Strategy]:
    """The strategies with their looks, in order."""
    looks = looks_of(recordings)
    return [
        Strategy(i, clean_text(name), trials, *looks[name])
        for i, (name, trials) in enumerate(recordings.items())
    ]


@dataclass(frozen=True)
class Unit:
    """A unit of time that suits what is shown."""

    ns: float
    name: str

    @classmethod
    def of(cls, strategies: Sequence[Strategy], longest_ns: float) -> Unit:
        """Steps in simulation, else the unit in which ``longest_ns`` is at least 1."""
        if strategies[0].in_steps:
            return cls(UNIT_NS, "steps")
        units = (cls(1e9, "s"), cls(1e6, "ms"), cls(1e3, "µs"))
        return next((unit for unit in units if longest_ns >= unit.ns), units[-1])

    def text(self, ns: float) -> str:
        """A time with its unit, three or more significant digits."""
        value = spell_number(ns / self.ns)
        name = "step" if (value, self.name) == ("1", "steps") else self.name
        return f"{value}{NO_BREAK}{name}"


def _sentence(text: str) -> str:
    """With a capital, unless it begins with somebody's own name."""
    ours = tuple(f"{name} batching" for name in LOOKS)
    return text[0].upper() + text[1:] if text.startswith(ours) else text


@lru_cache(maxsize=4096)
def text_extent(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in points, with some to spare: pixels widen letters a little."""
    font = FontProperties(size=size, weight=weight)
    return 1.02 * float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def fit_text(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text, with its middle left out where it is wider than ``width`` points."""
    if text_extent(text, size, weight) <= width:
        return text
    for keep in range(min(len(text), 300), 0, -1):
        tail = keep // 2
        short = f"{text[: keep - tail]}…{text[len(text) - tail :]}"
        if text_extent(short, size, weight) <= width:
            return short
    return "…"


def _wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """The text in lines of at most ``width`` points."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if text_extent(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(fit_text(word, width, size, weight))
    return [line for line in lines if line] or [""]


class Picture(Figure):
    """A figure that a notebook shows by itself, in the house style."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        with house_style():
            self.savefig(out, format="png", dpi=100)
        return out.getvalue()


@dataclass(frozen=True, eq=False)
class Card:
    """A figure that places things by inches from its body's upper left corner."""

    figure: Figure
    head: float  # inches above the body

    def at(self, left: float, top: float) -> tuple[float, float]:
        """A point as fractions of the figure."""
        height = self.figure.get_figheight()
        return (_EDGE + left) / _WIDTH, 1 - (self.head + top) / height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose frame has this place and size."""
        x, y = self.at(left, top + height)
        return self.figure.add_axes(
            (x, y, width / _WIDTH, height / self.figure.get_figheight()),
        )

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """A text whose upper left corner (or as ``ha`` and ``va`` say) is here."""
        self.figure.text(*self.at(left, top), text, **{"va": "top", **style})

    def label(self, top: float, strategy: Strategy, detail: str, *, dark: bool = False) -> None:
        """A strategy's name in its colour, and behind it a detail; its baseline is at ``top``."""
        weight = "bold" if dark else "normal"
        room = WIDE * 72 - text_extent(detail, 9.5, weight) - 10
        name = fit_text(strategy.name, room, 10.5, "bold")
        behind = (text_extent(name, 10.5, "bold") + 10) / 72
        shown: dict[str, Any] = {"va": "baseline", "size": 10.5, "weight": "bold"}
        self.write(0, top, name, color=strategy.tint(-0.15), **shown)
        shown = {"va": "baseline", "size": 9.5, "weight": weight}
        self.write(behind, top, detail, color=INK if dark else QUIET, **shown)


def make_card(headline: str, title: str, body: float, notes: str) -> Card:
    """A card with headline, title and notes around a body of ``body`` inches."""
    wide = WIDE * 72
    blocks = [
        ("\n".join(lines := _wrap(text, wide, size, weight)), size, weight, colour, len(lines))
        for text, size, weight, colour in (
            (_sentence(headline), 13.0, "bold", INK),
            (title, 9.5, "normal", QUIET),
            (notes, 8.5, "normal", QUIET),
        )
    ]
    tall = [size * 1.3 * lines / 72 for _, size, _, _, lines in blocks]
    head = 0.27 + tall[0] + 0.06 + tall[1] + 0.2
    figure = Picture(
        (_WIDTH, head + body + 0.14 + tall[2] + 0.24),
        facecolor="#ffffff",
        edgecolor="#c4c4c4",  # the card's rim on a white page
        linewidth=1.5,
    )
    card = Card(figure, head)
    places = (0.27 - head, 0.27 - head + tall[0] + 0.06, body + 0.14)
    for place, (text, size, weight, colour, _) in zip(places, blocks, strict=True):
        card.write(0, place, text, size=size, weight=weight, color=colour, linespacing=1.15)
    return card


def strip_axes(axes: Axes, *kept: str) -> None:
    """Take away the frame but for the sides that are kept; thousands stand apart on the axes."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.10g}")
    for side, spine in axes.spines.items():
        spine.set_visible(side in kept)


Entry = tuple[str, tuple[Patch, ...]]


def make_entry(label: str, strategies: Sequence[Strategy], tint: float) -> Entry:
    """A meaning that has a shade in each strategy's colour; two of them suffice to see it."""
    return label, tuple(Patch(fc=s.tint(tint), lw=0) for s in strategies[:2])


def add_legend(card: Card, entries: Sequence[Entry]) -> None:
    """The meanings of shades and hatches, row by row at the top of the body."""
    rows = -(-len(entries) // 3)
    # A legend fills its columns one after the other; rows read better.
    columns = -(-len(entries) // rows)
    order = [i for column in range(columns) for i in range(column, len(entries), columns)]
    handles: list[Any] = [entries[i][1] for i in order]
    card.figure.legend(
        handles,
        [entries[i][0] for i in order],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.15)},
        ncols=columns,
        loc="upper left",
        bbox_to_anchor=card.at(0, 0),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=2.2,
        columnspacing=2.0,
    )


def add_line_legend(card: Card, strategies: Sequence[Strategy], *more: Line2D) -> None:
    """Which line is whose."""
    handles = [
        Line2D([], [], marker="o", ms=4, label=fit_text(s.name, 150, 9.5), **s.line)
        for s in strategies
    ]
    card.figure.legend(
        handles=[*handles, *more],
        ncols=len(handles) + len(more),
        loc="upper left",
        bbox_to_anchor=card.at(0, 0),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=3,
        columnspacing=1.8,
        fontsize=9.5,
    )
