"""The web page: one self-contained HTML file, to view, print and share.

It needs no network and works without JavaScript, which only adds zooming and the times of a bar of
the timeline. The page stays small for any run: its timelines have at most ``MOST_BARS``
bars together, and curves as many corners as a screen has pixels.

Its charts show what the pictures of ``figures/`` show; windows, bars, levels and distributions come
from there. Their shapes lie in a box of ``SCALE`` × ``SCALE`` that is stretched without keeping its
proportions, so that one chart suits a phone, a wide screen and paper. Text would be stretched too,
so it stands beside the shapes in HTML, at shares of their width and height. Colours are classes,
which the style sheet fills for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.batching.remote.spec import OWN_ENGINE
from batchbench.reports.figures.card import Strategy, Unit, capitalize, name_strategies
from batchbench.reports.figures.slots import Bars, middle_length, which_trial, window_of
from batchbench.reports.figures.speed import staircase
from batchbench.reports.figures.time_budget import STACKED, budgets_of, waterfalls
from batchbench.reports.formats import terminal
from batchbench.reports.occupancy import Holdings, levels_of
from batchbench.reports.result import Result
from batchbench.reports.served import agreement_words, server_lines
from batchbench.reports.side_by_side import HEAD, Labelled, SideBySide, flat_settings, spell_name
from batchbench.reports.statistics import Distribution, Floats
from batchbench.reports.text import clean_text, number, percent, spell_setting
from batchbench.reports.time_budget import NAMES

MOST_BARS, FEWEST_BARS = 12_000, 200
"""Bars of all timelines of a page together (2 MB), and of each timeline at least."""

SCALE = 10_000
"""Width and height of a chart's box; a unit is smaller than a pixel of any screen."""

MOST_SLOTS = 64
"""Slots that a timeline shows."""

MOST_STEPS = 400
"""Corners of a curve: more are narrower than a pixel."""

_EMPTY = ("N/A", "no", "0", "")
"""Values of settings that the page leaves out."""

_RIM = 0.008
"""Bars wider than this share of the window get a rim, which would hide narrower ones."""

_CURVES = (
    ("ttft", "TTFT", "arrival to first token"),
    ("tpot", "TPOT", "time per later token"),
    ("itl", "ITL", "gap between two tokens"),
    ("e2el", "E2E latency", "arrival to last token"),
)


def render(shown: Sequence[Labelled]) -> str:
    """Return the page of one result, or of several side by side."""
    timelines = sum(len(one.result.names) for one in shown)
    most_bars = max(FEWEST_BARS, MOST_BARS // timelines)
    together = SideBySide(shown) if len(shown) > 1 else None
    page = _environment().get_template("page.html.jinja")
    title = " · ".join(together.labels) if together else shown[0].result.title
    return page.render(
        title=clean_text(title),
        together=together,
        head=HEAD,
        results=[_of_result(i, one, most_bars) for i, one in enumerate(shown)],
        version=shown[0].result.data["batchbench_version"],
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the templates; they escape every text, and an unknown name is an error."""
    loader = PackageLoader("batchbench.reports.formats", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["included"] = lambda name: Markup(loader.get_source(environment, name)[0])
    environment.globals["labels"] = {part: NAMES[part] for part in STACKED}
    environment.filters["number"] = number
    environment.filters["compact"] = lambda value: htmlsafe_json_dumps(
        value, separators=(",", ":"), allow_nan=False
    )
    return environment


def _of_result(index: int, one: Labelled, most_bars: int) -> dict[str, Any]:
    result, data = one.result, one.result.data
    strategies = name_strategies(result.recordings)
    timelines, window, ticks, unit = draw_timelines(strategies, most_bars)
    levels, level_ticks = draw_levels(strategies)
    head, rows, notes = terminal.figures(result)
    budgets = budgets_of(strategies) if data.get("explain") else []
    longest = max((budget.wall_s for _, budget in budgets), default=0.0) or 1.0
    return {
        "id": f"r{index}",
        "label": one.label,
        "result": result,
        "data": data,
        "sentence": capitalize(terminal.sentence(result, reasons=False)),
        "causes": terminal.causes(result) if budgets else [],
        "called": [result.label(name) for name in result.names],
        "agreement": agreement_words(data, agreed) if (agreed := data.get("agreement")) else "",
        "strategies": strategies,
        "head": head,
        "rows": rows,
        "notes": [*notes, *server_lines(data), *terminal.step_lines(result)],
        "timelines": timelines,
        "left_out": _left_out(result, timelines, window),
        "axis": {"window": window / 1000, "unit": unit.ns / 1000, "name": unit.name},
        "ticks": ticks,
        "trial": which_trial(strategies).strip(),
        "curves": [
            draw_curves(strategies, [getattr(s.latencies, key) for s in strategies], *words)
            for key, *words in _CURVES
        ],
        "levels": levels,
        "level_ticks": level_ticks,
        "budgets": budgets,
        "waterfalls": waterfalls(budgets),
        "longest_s": longest,
        "unit": Unit.of(strategies, longest * 1e9),
        "prediction": terminal.prediction_lines(result),
        "settings": [row for row in _settings(data, "config") if row[1] not in _EMPTY],
        "environment": _settings(data, "environment", "model"),
    }


def _left_out(result: Result, timelines: Sequence[Mapping[str, Any]], window: float) -> str:
    if result.served:
        return "A server does not tell which request is in which slot of its batch."
    sentences = [
        f"{name} logs no steps, so its slots are not known."
        for name, trials in result.recordings.items()
        if not trials[0].has_steps
    ]
    slots = max((timeline["slots"] for timeline in timelines), default=0)
    if slots > MOST_SLOTS:
        sentences.append(f"Only slots 0 to {MOST_SLOTS - 1} of {slots:,} are shown.")
    if any(timeline["end_at"] is None for timeline in timelines):
        shown = window / max(r.duration_ns for trials in result.recordings.values() for r in trials)
        sentences.append(
            f"Only the beginning is shown, "
            f"{percent(shown) if shown >= 0.01 else 'less than 1%'} of the time: "
            f"all {result.data['workload']['num_requests']:,} requests are in requests.csv."
        )
    return " ".join(sentences)


def _settings(data: Mapping[str, Any], *parts: str) -> list[tuple[str, str]]:
    """Return settings in words, without those of an engine of ours if it is a server's result."""
    unused = OWN_ENGINE if "target" in data["config"] else ()
    return [
        (spell_name(name), spell_setting(value))
        for part in parts
        for name, value in flat_settings(part, data[part])
        if name.rpartition(".")[2] not in unused
    ]


# Charts


class Tick(NamedTuple):
    at: float  # share of the axis
    text: str


class Shape(NamedTuple):
    look: str  # the class that colours it
    path: str


def nice_ticks(until: float, unit: str, most: int = 5) -> tuple[Tick, ...]:
    """Return round numbers from 0 to ``until``, at most ``most`` + 1; the last has the unit."""
    if not until > 0:
        return (Tick(0.0, f"0 {unit}"),)
    values = np.asarray(MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(0, until))
    values = values[values <= until * (1 + 1e-9)]
    decimals = max(0, -math.floor(math.log10(values[1]) + 1e-9))
    texts = ["0", *(f"{value:,.{decimals}f}" for value in values[1:])]
    texts[-1] += f" {unit}"
    return tuple(Tick(float(v) / until, text) for v, text in zip(values, texts, strict=True))


def draw_timelines(
    strategies: Sequence[Strategy], most_bars: int
) -> tuple[list[dict[str, Any]], float, tuple[Tick, ...], Unit]:
    """Return a timeline per strategy that logs steps, their window in ns, its ticks and unit."""
    strategies = [strategy for strategy in strategies if strategy.typical.has_steps]
    if not strategies:
        return [], 1, (), Unit(1e9, "s")
    trials = [strategy.typical for strategy in strategies]
    window, middle = window_of(trials, MOST_SLOTS, [most_bars] * len(trials)), middle_length(trials)
    unit = Unit.of(strategies, window)
    timelines = [_timeline(strategy, window, middle, unit) for strategy in strategies]
    return timelines, window, nice_ticks(window / unit.ns, unit.name), unit


def _timeline(strategy: Strategy, window: float, middle: float, unit: Unit) -> dict[str, Any]:
    recording, end = strategy.typical, strategy.typical.duration_ns
    rows = min(recording.header.slots, MOST_SLOTS)
    bars = Bars.of(recording, window, rows, middle)
    held, long = bars.held, bars.long
    wide = held.done - held.admitted > window * _RIM

    def boxes(look: str, start: Ints, stop: Ints, chosen: NDArray[np.bool_]) -> Shape:
        return Shape(look, _boxes(start[chosen], stop[chosen], held.slot[chosen], rows, window))

    shapes = [boxes("held", held.done, held.freed, held.freed > held.done)]
    for look, chosen in (("short", ~long), ("long", long)):
        shapes.append(boxes(f"{look} rim", held.admitted, held.done, chosen & wide))
        shapes.append(boxes(look, held.admitted, held.done, chosen & ~wide))
    shapes.append(boxes("prompt", held.admitted, held.first, held.first > held.admitted))
    return {
        "name": strategy.name,
        "series": strategy.index,
        "rows": rows,
        "slots": recording.header.slots,
        "end": unit.text(end),
        "end_at": end / window if end <= window else None,  # a share; None where it ends beyond
        "shapes": [shape for shape in shapes if shape.path],
        "columns": _columns(recording, held),  # for hovering
    }


def _columns(recording: Recording, held: Holdings) -> dict[str, Any]:
    """Return the requests shown, with times in µs."""
    r = recording.requests
    times = {name: getattr(held, name) for name in ("admitted", "first", "done", "freed")}
    times["due"] = r.due_ns[held.request]
    return {
        "request": held.request.tolist(),
        "slot": held.slot.tolist(),
        "prompt": r.prompt_tokens[held.request].tolist(),
        "output": r.output_tokens[held.request].tolist(),
        **{name: np.rint(ns / 1000).astype(np.int64).tolist() for name, ns in times.items()},
    }


def _boxes(start: Ints, stop: Ints, slot: Ints, rows: int, window: float) -> str:
    left = _across(start / window)
    width = np.maximum(_across(stop / window) - left, 1)
    height = round(SCALE / rows * 0.84)
    top = np.rint((slot + 0.08) * SCALE / rows).astype(np.int64)
    places = zip(left.tolist(), top.tolist(), width.tolist(), strict=True)
    return "".join(f"M{x} {y}h{w}v{height}h-{w}z" for x, y, w in places)


def _across(shares: Floats) -> Ints:
    """Return shares of the width; what lies beyond the box ends just outside it."""
    return np.rint(np.clip(shares, 0, 1.02) * SCALE).astype(np.int64)


def _down(shares: Floats) -> Ints:
    """Return shares of the height, measured from below."""
    return np.rint((1 - shares) * SCALE).astype(np.int64)


def draw_curves(
    strategies: Sequence[Strategy], latencies: Sequence[Distribution], title: str, about: str
) -> dict[str, Any]:
    """Return the staircases of one latency in ms; a strategy without any has no curve."""
    longest = max((values.values[-1] for values in latencies if values.count), default=0.0)
    unit = Unit.of(strategies, longest * 1e6)
    shapes = []
    for strategy, values in zip(strategies, latencies, strict=True):
        if not values.count:
            continue
        x, y = staircase(values, MOST_STEPS)
        columns, rows = _across(x / (longest or 1.0)).tolist(), _down(y).tolist()
        steps = "".join(f"H{a}V{b}" for a, b in zip(columns, rows, strict=True))
        look = f"line s{strategy.index} d{strategy.index % 4}"
        shapes.append(Shape(look, f"M{columns[0]} {rows[0]}{steps}H{SCALE}"))
    ticks = nice_ticks(longest * 1e6 / unit.ns, unit.name, 4)
    return {"title": title, "about": about, "shapes": shapes, "ticks": ticks}


def draw_levels(strategies: Sequence[Strategy]) -> tuple[list[dict[str, Any]], tuple[Tick, ...]]:
    """Return occupancy and queue of each strategy that logs steps, and the ticks of their axis."""
    strategies = [strategy for strategy in strategies if strategy.typical.has_steps]
    if not strategies:
        return [], ()
    levels_of_all = [levels_of(strategy.typical).thinned() for strategy in strategies]
    until = max(float(levels.edges_ns[-1]) for levels in levels_of_all)
    unit = Unit.of(strategies, until)
    drawn = []
    for strategy, levels in zip(strategies, levels_of_all, strict=True):
        slots, edges = strategy.typical.header.slots, _across(levels.edges_ns / until)
        most = max(1, math.ceil(levels.waiting.max()))
        shapes = [Shape("running", _area(edges, levels.running / slots))]
        if levels.finished.any():
            occupied = (levels.running + levels.finished) / slots
            shapes.insert(0, Shape("held", _area(edges, occupied)))
        drawn.append(
            {
                "name": strategy.name,
                "series": strategy.index,
                "slots": slots,
                "most_waiting": most,
                "slot_shapes": shapes,
                "queue_shapes": [Shape("queue", _area(edges, levels.waiting / most))],
            }
        )
    return drawn, nice_ticks(until / unit.ns, unit.name)


def _area(edges: Ints, heights: Floats) -> str:
    steps = zip(_down(heights).tolist(), edges[1:].tolist(), strict=True)
    return f"M{edges[0]} {SCALE}{''.join(f'V{y}H{x}' for y, x in steps)}V{SCALE}z"
