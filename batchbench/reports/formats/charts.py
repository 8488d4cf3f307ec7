"""Charts of the page: shapes in SVG that stretch to any width, and where their labels stand.

Shapes lie in a box of ``SCALE`` × ``SCALE`` that is stretched without keeping its proportions, so
that one chart suits a telephone, a wide screen and paper; words are no part of it (they would be
stretched too) but stand beside it in HTML, at shares of its width and height. Colours are classes,
which the page's style sheet fills for light and dark.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.figures.card import Strategy, Unit
from batchbench.reports.figures.latency import staircase
from batchbench.reports.occupancy import Holdings, levels_of
from batchbench.reports.statistics import Distribution, Floats

SCALE = 10_000
"""Width and height of a chart's box; whole numbers in it are finer than any screen's pixels."""

MOST_LANES = 64
"""Slots that a timeline shows."""

MOST_STEPS = 400
"""Corners of a curve: more are narrower than a pixel."""

_RIM = 0.008
"""Bars wider than this share of the window get a rim, which would hide narrower ones."""


@dataclass(frozen=True)
class Tick:
    """A label of an axis: where (a share of its length) and what."""

    at: float
    text: str


@dataclass(frozen=True)
class Shape:
    """A path and the class that colours it."""

    look: str
    path: str


@dataclass(frozen=True)
class Timeline:
    """A strategy's lanes within the window that all strategies share."""

    name: str
    series: int
    lanes: int
    slots: int
    end: str
    end_at: float | None  # share of the window; None where it ends beyond
    shapes: tuple[Shape, ...]
    columns: dict[str, Any]  # of the requests shown, for hovering; times in µs


@dataclass(frozen=True)
class Curves:
    """Distribution functions of one latency, a curve a strategy."""

    title: str
    about: str
    shapes: tuple[Shape, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Levels:
    """Slots in use and requests waiting, of one strategy, over time."""

    name: str
    series: int
    slots: int
    most_waiting: int
    slot_shapes: tuple[Shape, ...]
    queue_shapes: tuple[Shape, ...]


def nice_ticks(until: float, unit: str, most: int = 5) -> tuple[Tick, ...]:
    """Round numbers from 0 to ``until``, at most ``most`` + 1; the last carries the unit."""
    if not until > 0:
        return (Tick(0.0, f"0 {unit}"),)
    rough = until / most
    size: float = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * (1 - 1e-9))
    count = int(until / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    texts = ["0", *(f"{i * step:,.{decimals}f}" for i in range(1, count + 1))]
    texts[-1] += f" {unit}"
    return tuple(Tick(i * step / until, text) for i, text in enumerate(texts))


def draw_timelines(
    strategies: Sequence[Strategy], most_bars: int
) -> tuple[list[Timeline], int, tuple[Tick, ...], Unit]:
    """The lanes of each strategy, the window that they share in ns, its ticks and its unit.

    Only of those that show steps: the others' slots are not known.

    Args:
        most_bars: bars of one strategy; where there are more, the window ends before them.
    """
    unit = Unit.of(strategies, 1)
    strategies = [strategy for strategy in strategies if strategy.typical.has_steps]
    if not strategies:
        return [], 1, (), unit
    trials = [strategy.typical for strategy in strategies]
    longest = max(trial.duration_ns for trial in trials)
    window = min([longest, *(_bars_end(trial, most_bars) for trial in trials)])
    unit = Unit.of(strategies, window)
    long = _long_from(trials)
    lanes = [_timeline(strategy, window, long, unit, most_bars) for strategy in strategies]
    return lanes, window, nice_ticks(window / unit.ns, unit.name), unit


def _bars_end(recording: Recording, most: int) -> int:
    """Time up to which all bars can be shown; beyond any end where they are few enough."""
    shown = recording.requests.slot < MOST_LANES
    starts = np.sort(recording.starts_of(recording.requests.admitted[shown]))
    return max(int(starts[most]), 1) if len(starts) > most else sys.maxsize


def _long_from(trials: Sequence[Recording]) -> float:
    """Halfway between the shortest and the longest output: what is longer is drawn darker."""
    lengths = [trial.requests.output_tokens for trial in trials]
    low, high = min(int(n.min()) for n in lengths), max(int(n.max()) for n in lengths)
    return (low + high) / 2 if low < high else 0.0


def _timeline(strategy: Strategy, window: int, long: float, unit: Unit, most_bars: int) -> Timeline:
    recording = strategy.typical
    slots = recording.header.slots
    lanes = min(slots, MOST_LANES)
    held = Holdings.of(recording)
    held = held.where((held.slot < lanes) & (held.admitted < window))
    # Requests that came in at one time with the first that is too many are left out as well.
    soon = np.zeros(len(held.slot), np.bool_)
    soon[np.argsort(held.admitted, kind="stable")[:most_bars]] = True
    held = held.where(soon)
    dark = recording.requests.output_tokens[held.request] > long
    wide = held.done - held.admitted > window * _RIM

    def boxes(look: str, start: Ints, stop: Ints, chosen: NDArray[np.bool_]) -> Shape:
        return Shape(look, _boxes(start[chosen], stop[chosen], held.slot[chosen], lanes, window))

    shapes = [boxes("held", held.done, held.freed, held.freed > held.done)]
    for look, chosen in (("short", ~dark), ("long", dark)):
        shapes.append(boxes(f"{look} rim", held.admitted, held.done, chosen & wide))
        shapes.append(boxes(look, held.admitted, held.done, chosen & ~wide))
    shapes.append(boxes("prompt", held.admitted, held.first, held.first > held.admitted))
    end = recording.duration_ns
    return Timeline(
        name=strategy.name,
        series=strategy.index,
        lanes=lanes,
        slots=slots,
        end=unit.text(end),
        end_at=end / window if end <= window else None,
        shapes=tuple(shape for shape in shapes if shape.path),
        columns=_columns(recording, held),
    )


def _columns(recording: Recording, held: Holdings) -> dict[str, Any]:
    """What hovering tells, a list a column: times are µs since the start of the trial."""
    r = recording.requests

    def micro(times: Ints) -> list[int]:
        rounded: list[int] = np.rint(times / 1000).astype(np.int64).tolist()
        return rounded

    return {
        "request": held.request.tolist(),
        "slot": held.slot.tolist(),
        "prompt": r.prompt_tokens[held.request].tolist(),
        "output": r.output_tokens[held.request].tolist(),
        "due": micro(r.due_ns[held.request]),
        "admitted": micro(held.admitted),
        "first": micro(held.first),
        "done": micro(held.done),
        "freed": micro(held.freed),
    }


def _boxes(start: Ints, stop: Ints, lane: Ints, lanes: int, window: int) -> str:
    """One path of a rectangle a request, each within its lane."""
    left = _across(start / window)
    width = np.maximum(_across(stop / window) - left, 1)
    height = round(SCALE / lanes * 0.84)
    top = np.rint((lane + 0.08) * SCALE / lanes).astype(np.int64)
    rows = zip(left.tolist(), top.tolist(), width.tolist(), strict=True)
    return "".join(f"M{x} {y}h{w}v{height}h-{w}z" for x, y, w in rows)


def _across(shares: Floats) -> Ints:
    """Shares as whole numbers of the box; what lies far beyond it ends just outside."""
    return np.rint(np.clip(shares, 0, 1.02) * SCALE).astype(np.int64)


def draw_curves(
    strategies: Sequence[Strategy], found: Sequence[Distribution], title: str, about: str
) -> Curves:
    """Staircases of one latency in ms; a strategy that has none of it has no curve."""
    longest = max((values.values[-1] for values in found if values.count), default=0.0)
    unit = Unit.of(strategies, longest * 1e6)
    shapes = []
    for strategy, values in zip(strategies, found, strict=True):
        if not values.count:
            continue
        x, y = staircase(values)
        kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_STEPS)).astype(np.int64))
        columns, rows = _across(x[kept] / (longest or 1.0)), _down(y[kept])
        path = f"M{columns[0]} {rows[0]}" + "".join(
            f"H{a}V{b}" for a, b in zip(columns.tolist(), rows.tolist(), strict=True)
        )
        shapes.append(Shape(f"line s{strategy.index} d{strategy.index % 4}", f"{path}H{SCALE}"))
    return Curves(title, about, tuple(shapes), nice_ticks(longest * 1e6 / unit.ns, unit.name, 4))


def _down(shares: Floats) -> Ints:
    """Shares of the height, measured from below."""
    return np.rint((1 - shares) * SCALE).astype(np.int64)


def draw_levels(strategies: Sequence[Strategy]) -> tuple[list[Levels], tuple[Tick, ...]]:
    """Occupancy and queue of each strategy that shows steps, over one time axis, and its ticks."""
    strategies = [strategy for strategy in strategies if strategy.typical.has_steps]
    if not strategies:
        return [], ()
    each = [levels_of(strategy.typical).thinned() for strategy in strategies]
    until = max(float(levels.edges_ns[-1]) for levels in each)
    unit = Unit.of(strategies, until)
    drawn = []
    for strategy, levels in zip(strategies, each, strict=True):
        slots = strategy.typical.header.slots
        edges = _across(levels.edges_ns / until)
        most = max(1, math.ceil(levels.waiting.max()))
        shapes = [
            Shape("held", _area(edges, (levels.running + levels.finished) / slots)),
            Shape("running", _area(edges, levels.running / slots)),
        ]
        queue = (Shape("queue", _area(edges, levels.waiting / most)),)
        drawn.append(
            Levels(
                strategy.name,
                strategy.index,
                slots,
                most,
                tuple(shapes) if levels.finished.any() else tuple(shapes[1:]),
                queue,
            )
        )
    return drawn, nice_ticks(until / unit.ns, unit.name)


def _area(edges: Ints, heights: Floats) -> str:
    """The area under a staircase."""
    rows = _down(heights)
    steps = (f"V{y}H{x}" for y, x in zip(rows.tolist(), edges[1:].tolist(), strict=True))
    return f"M{edges[0]} {SCALE}{''.join(steps)}V{SCALE}z"
