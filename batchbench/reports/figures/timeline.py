"""One bar per request in its slot, on one time axis for all strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.figures import card
from batchbench.reports.figures.occupancy import share_time, which_trial
from batchbench.reports.occupancy import Holdings
from batchbench.reports.statistics import Floats
from batchbench.reports.text import plural, span, spell_percent

MOST_SLOTS = 32
"""Slots that are drawn; rows of more would be thinner than a screen can show."""

MOST_BARS = 2_000
"""Bars that are drawn of one strategy."""

MOST_BARS_A_SLOT = 200
"""Bars that are drawn of one slot; more are narrower than 2 points."""

_LEFT, _RIGHT = 0.5, 0.95  # inches left of the rows, and right of them for the end times

_SMALLEST = 5.5  # points: the smallest number that can be read


@dataclass(frozen=True, eq=False)
class Bars:
    """Requests of a trial that hold one of the first slots within a window of time."""

    held: Holdings
    long: NDArray[np.bool_]  # output above the middle length of all strategies

    @classmethod
    def of(cls, recording: Recording, window_ns: float, slots: int, middle: float) -> Bars:
        held = Holdings.of(recording)
        held = held.where((held.slot < slots) & (held.admitted < window_ns))
        return cls(held, recording.requests.output_tokens[held.request] > middle)


def window_of(trials: Sequence[Recording], slots: int, bars: Sequence[int]) -> float:
    """Return the time (ns) that can be drawn: to the last end, or to the first bar too many.

    ``bars`` may be drawn of each trial, in its first ``slots`` slots.
    """
    window = float(max(trial.duration_ns for trial in trials))
    for trial, most in zip(trials, bars, strict=True):
        shown = trial.requests.slot < slots
        starts = np.sort(trial.starts_of(trial.requests.admitted[shown]))
        if len(starts) > most:
            window = min(window, max(float(starts[most]), 1.0))
    return window


def middle_length(trials: Sequence[Recording]) -> float:
    """Return the middle of the shortest and longest output, in tokens; 0 if all are equal."""
    lengths = [trial.requests.output_tokens for trial in trials]
    shortest, longest = min(int(n.min()) for n in lengths), max(int(n.max()) for n in lengths)
    return (shortest + longest) / 2 if shortest < longest else 0.0


@dataclass(frozen=True, eq=False)
class Scale:
    unit: card.Unit  # of the axis
    unit_of_ends: card.Unit
    window_ns: float  # from 0; the whole trial unless there are too many bars
    row: float  # inches of a slot
    middle: float  # output tokens; longer requests are drawn darker
    baseline_ns: int  # duration of the baseline
    cut: bool  # only the beginning is drawn

    @property
    def points_per_ns(self) -> float:
        return (card.WIDE - _LEFT - _RIGHT) * 72 / self.window_ns


@dataclass(frozen=True, eq=False)
class Panel:
    strategy: card.Strategy
    axes: Axes
    detail: Text


def draw_timeline(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw a row per slot and a bar per request, all strategies over one time axis."""
    picture, scale, panels = lay_out(strategies, title)
    for panel in panels:
        draw_end(panel, scale)
    return picture.figure


def lay_out(
    strategies: Sequence[card.Strategy], title: str, tallest: float = 7.0
) -> tuple[card.Card, Scale, list[Panel]]:
    """Draw a timeline without the ends; all slots together take ``tallest`` inches at most."""
    scale = _scale_of(strategies, tallest)
    tall = [max(_rows(strategy.typical) * scale.row, 0.62) for strategy in strategies]
    entries = _entries(strategies, scale)
    top = card.legend_height(entries)
    body = top + sum(tall) + 0.46 * len(tall) + 0.36
    picture = card.make_card(timeline_headline(strategies), title, body, _notes(strategies, scale))
    card.add_legend(picture, entries)
    panels = []
    for strategy, height in zip(strategies, tall, strict=True):
        axes = picture.axes(_LEFT, top + 0.3, card.WIDE - _LEFT - _RIGHT, height)
        panels.append(Panel(strategy, axes, picture.label(top + 0.22, strategy, _detail(strategy))))
        _draw_slots(axes, strategy, scale)
        top += height + 0.46
    share_time([panel.axes for panel in panels], scale.window_ns, scale.unit)
    panels[-1].axes.spines["bottom"].set_visible(True)
    return picture, scale, panels


def _scale_of(strategies: Sequence[card.Strategy], tallest: float) -> Scale:
    trials = [strategy.typical for strategy in strategies]
    longest = max(trial.duration_ns for trial in trials)
    most = [min(MOST_BARS, MOST_BARS_A_SLOT * _rows(trial)) for trial in trials]
    window = window_of(trials, MOST_SLOTS, most)
    return Scale(
        unit=card.Unit.of(strategies, window),
        unit_of_ends=card.Unit.of(strategies, longest),
        window_ns=window,
        row=float(np.clip(tallest / sum(map(_rows, trials)), 0.06, 0.25)),
        middle=middle_length(trials),
        baseline_ns=trials[0].duration_ns,
        cut=window < longest,
    )


def _rows(recording: Recording) -> int:
    return min(recording.header.slots, MOST_SLOTS)


def _draw_slots(axes: Axes, strategy: card.Strategy, scale: Scale) -> None:
    recording, rows = strategy.typical, _rows(strategy.typical)
    bars = Bars.of(recording, scale.window_ns, rows, scale.middle)
    end = min(recording.duration_ns, scale.window_ns) / scale.unit.ns
    rules = [((0, y - 0.5), (end, y - 0.5)) for y in range(rows + 1)]
    axes.add_collection(LineCollection(rules, colors=card.FAINT, lw=0.7, zorder=0))
    _draw_bars(axes, strategy, scale, bars)
    if scale.row * 72 * 0.72 >= _SMALLEST:
        _number(axes, scale, bars)
    ticks = range(0, rows, max(1, -(-rows // 8)))
    axes.set(ylim=(rows - 0.5, -0.5), yticks=ticks, ylabel="slot")
    axes.tick_params(axis="y", length=0)
    card.strip_axes(axes)


def _draw_bars(axes: Axes, strategy: card.Strategy, scale: Scale, bars: Bars) -> None:
    held, key = bars.held, strategy.index
    late = held.where(held.freed > held.done)
    wide = (held.done - held.admitted) * scale.points_per_ns > 6
    requests: dict[str, Any] = {
        "facecolor": np.where(bars.long[:, None], strategy.tint(0), strategy.tint(0.6)),
        "edgecolor": "#ffffff",
        "linewidth": np.where(wide, 0.7, 0.0),  # a rim would hide a narrow bar
    }
    prompt = {"facecolor": strategy.tint(-0.55), "linewidth": 0}
    for gid, start, stop, slot, look in (
        (f"held-{key}", late.done, late.freed, late.slot, card.HELD),
        (f"requests-{key}", held.admitted, held.done, held.slot, requests),
        (f"prefill-{key}", held.admitted, held.first, held.slot, prompt),
    ):
        axes.add_collection(PolyCollection(_boxes(scale, start, stop, slot), gid=gid, **look))


def _boxes(scale: Scale, start: Ints, stop: Ints, slot: Ints) -> list[Floats]:
    """Return the corners of each box, ``[4, 2]``, in the row of its slot."""
    left, right, y = start / scale.unit.ns, stop / scale.unit.ns, slot.astype(np.float64)
    low, high = y - 0.42, y + 0.42
    corners = ((left, low), (left, high), (right, high), (right, low))
    return list(np.stack([np.stack(corner, -1) for corner in corners], axis=1))


def _number(axes: Axes, scale: Scale, bars: Bars) -> None:
    held, most = bars.held, min(8.0, scale.row * 72 * 0.72)
    stop = np.minimum(held.done, scale.window_ns)
    width = (stop - held.first) * scale.points_per_ns - 1
    middle = (held.first + stop) / 2 / scale.unit.ns
    for i in np.flatnonzero(width > card.text_extent("0", _SMALLEST)).tolist():
        number = str(held.request[i])
        size = min(most, width[i] / card.text_extent(number, 1))
        if size >= _SMALLEST:
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": size}
            colour = "#ffffff" if bars.long[i] else card.INK
            axes.text(middle[i], held.slot[i], number, color=colour, **style)


def draw_end(panel: Panel, scale: Scale) -> None:
    axes, strategy = panel.axes, panel.strategy
    end, window = strategy.typical.duration_ns, scale.window_ns
    at, saved = min(end, window) / scale.unit.ns, 0.0
    if scale.baseline_ns <= window:
        axes.axvline(
            scale.baseline_ns / scale.unit.ns, color=card.QUIET, lw=1, ls=":", clip_on=False
        )
        saved = (scale.baseline_ns - end) * scale.points_per_ns
    text = scale.unit_of_ends.text(end)
    if end > window:
        text = f"ends at\n{text}"
    else:
        axes.axvline(at, color=card.INK, lw=2, clip_on=False, gid=f"end-{strategy.index}")
    look: dict[str, Any] = {"va": "center", "size": 10.5, "weight": "bold"}
    look["bbox"] = {"fc": "#ffffff", "ec": "none", "pad": 1.5}  # the baseline's end may be near
    look |= {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    axes.annotate(text, (at, 0.72 if saved > 0 else 0.5), (6, 0), **look)
    if saved > 14:
        _draw_saved(axes, scale, end, saved)


def _draw_saved(axes: Axes, scale: Scale, end: int, width: float) -> None:
    left, right = end / scale.unit.ns, scale.baseline_ns / scale.unit.ns
    across = axes.get_xaxis_transform()
    arrow = {"arrowstyle": "<|-|>", "color": card.INK, "lw": 1.1, "shrinkA": 2, "shrinkB": 1}
    ends: Any = {"xycoords": across, "textcoords": across, "arrowprops": arrow}
    axes.annotate("", (right, 0.36), (left, 0.36), **ends)
    text = f"{scale.unit_of_ends.text(scale.baseline_ns - end)} saved"
    if card.text_extent(text, 9.5) + 12 < width:
        below: Any = {"xycoords": across, "textcoords": "offset points", "va": "top"}
        axes.annotate(text, ((left + right) / 2, 0.36), (0, -4), ha="center", size=9.5, **below)


def _detail(strategy: card.Strategy) -> str:
    counted, slots = strategy.counted, strategy.typical.header.slots
    share = counted["finished_slot_steps"] / counted["slot_steps"]
    text = plural(slots, "slot")
    return (
        f"{text}, {spell_percent(share)} of slot-steps held by finished requests" if share else text
    )


def _entries(strategies: Sequence[card.Strategy], scale: Scale) -> list[card.Entry]:
    lengths = np.concatenate([s.typical.requests.output_tokens for s in strategies])
    entries = []
    for word, tint, chosen in (
        ("long request", 0.0, lengths[lengths > scale.middle]),
        ("short request", 0.6, lengths[lengths <= scale.middle]),
    ):
        if len(chosen):
            name = word if len(chosen) < len(lengths) else "request"
            low, high = int(chosen.min()), int(chosen.max())
            label = f"{name} ({span(low, high)} {'token' if high == 1 else 'tokens'})"
            entries.append(card.make_entry(label, strategies, tint))
    entries.append(card.make_entry("prompt, up to the first token", strategies, -0.55))
    if any((s.typical.requests.released > s.typical.requests.last + 1).any() for s in strategies):
        entries.append(("done, slot still held", (Patch(**card.HELD),)))
    return [*entries, ("empty slot", (Patch(fc="#ffffff", ec=card.FAINT),))]


def timeline_headline(strategies: Sequence[card.Strategy]) -> str:
    ends = [strategy.typical.duration_ns for strategy in strategies]
    unit = card.Unit.of(strategies, max(ends))
    text = f"{strategies[-1].called} is done after {unit.text(ends[-1])}"
    if len(strategies) == 1:
        return text
    text += f", {strategies[0].called} after {unit.text(ends[0])}"
    if (strategies[0].name, strategies[-1].name) == ("static", "continuous") and ends[-1] < ends[0]:
        text += ": a free slot takes the next request at once"
    return text


def _notes(strategies: Sequence[card.Strategy], scale: Scale) -> str:
    notes = ["A bar is one request, with its number where there is room."]
    slots = max(strategy.typical.header.slots for strategy in strategies)
    if slots > MOST_SLOTS:
        notes.append(f"Drawn: slots 0 to {MOST_SLOTS - 1} of {slots:,}.")
    if scale.cut:
        notes.append("Only the beginning is drawn; the ends are written at the right.")
    return " ".join(notes) + which_trial(strategies)
