"""Why: one bar a request in its slot, on one time axis for all strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.figures.card import (
    FAINT,
    HELD,
    INK,
    MOST_BARS,
    MOST_BARS_A_SLOT,
    MOST_SLOTS,
    QUIET,
    WIDE,
    Entry,
    Floats,
    Strategy,
    Unit,
    add_legend,
    make_card,
    make_entry,
    strip_axes,
    text_extent,
)
from batchbench.reports.figures.occupancy import share_time, which_trial
from batchbench.reports.occupancy import Holdings
from batchbench.reports.text import spell_percent

ROOM = 0.95  # inches right of the lanes, for the end times

_SMALLEST = 5.5  # points: a number that can still be read


@dataclass(frozen=True, eq=False)
class Scene:
    """What the panels of a timeline, or of a film of it, share."""

    unit: Unit  # of the axis
    unit_of_ends: Unit
    window_ns: float  # from 0; all of the trial unless there are too many bars
    lane: float  # inches
    longer_than: float  # output tokens; what has more is drawn as long
    baseline_ns: int  # when the baseline is done
    cut: bool  # whether only the beginning is drawn

    @property
    def points_a_ns(self) -> float:
        """Scale of the time axis."""
        return (WIDE - 0.5 - ROOM) * 72 / self.window_ns


def draw_timeline(strategies: Sequence[Strategy], title: str) -> Figure:
    """A lane a slot, a bar a request, all strategies over one time axis."""
    scene = scene_of(strategies)
    tall = [height_of(strategy, scene) for strategy in strategies]
    entries = kinds_of_bars(strategies, scene)
    top = 0.24 * -(-len(entries) // 3) + 0.08
    body = top + sum(tall) + 0.46 * len(tall) + 0.36
    notes = timeline_notes(strategies, scene)
    card = make_card(timeline_headline(strategies), title, body, notes)
    add_legend(card, entries)
    panels = []
    for strategy, height in zip(strategies, tall, strict=True):
        card.label(top + 0.22, strategy, _held_share(strategy))
        panels.append(card.axes(0.5, top + 0.3, WIDE - 0.5 - ROOM, height))
        draw_lanes(panels[-1], strategy, scene)
        draw_end(panels[-1], strategy, scene)
        top += height + 0.46
    share_time(panels, scene.window_ns, scene.unit)
    panels[-1].spines["bottom"].set_visible(True)
    return card.figure


def scene_of(strategies: Sequence[Strategy], tallest: float = 7.0) -> Scene:
    """Scales for these strategies, whose lanes take ``tallest`` inches together."""
    trials = [strategy.typical for strategy in strategies]
    longest = max(trial.duration_ns for trial in trials)
    window = float(min([longest, *(_bars_end(trial) for trial in trials)]))
    return Scene(
        unit=Unit.of(strategies, window),
        unit_of_ends=Unit.of(strategies, longest),
        window_ns=window,
        lane=float(np.clip(tallest / sum(map(count_lanes, trials)), 0.06, 0.25)),
        longer_than=_middle_length(trials),
        baseline_ns=trials[0].duration_ns,
        cut=window < longest,
    )


def height_of(strategy: Strategy, scene: Scene) -> float:
    """Inches of a strategy's lanes."""
    return max(count_lanes(strategy.typical) * scene.lane, 0.62)


def count_lanes(recording: Recording) -> int:
    """Number of slots that are drawn."""
    return min(recording.header.slots, MOST_SLOTS)


def _bars_end(recording: Recording) -> float:
    """Time in ns up to which all bars can be drawn; infinite where they are few enough."""
    shown = recording.requests.slot < MOST_SLOTS
    starts = np.sort(recording.starts_of(recording.requests.admitted[shown]))
    most = min(MOST_BARS, MOST_BARS_A_SLOT * count_lanes(recording))
    return float(starts[most]) if len(starts) > most else np.inf


def _middle_length(trials: Sequence[Recording]) -> float:
    """Halfway between the shortest and the longest output, in tokens; 0 where all are equal."""
    lengths = [trial.requests.output_tokens for trial in trials]
    shortest, longest = min(int(n.min()) for n in lengths), max(int(n.max()) for n in lengths)
    return (shortest + longest) / 2 if shortest < longest else 0.0


def draw_lanes(axes: Axes, strategy: Strategy, scene: Scene) -> None:
    """Everything that one strategy's slots hold within the window."""
    recording, lanes = strategy.typical, count_lanes(strategy.typical)
    held = Holdings.of(recording)
    held = held.where((held.slot < lanes) & (held.admitted < scene.window_ns))
    end = min(recording.duration_ns, scene.window_ns) / scene.unit.ns
    rules = [((0, y - 0.5), (end, y - 0.5)) for y in range(lanes + 1)]
    axes.add_collection(LineCollection(rules, colors=FAINT, lw=0.7, zorder=0))
    dark = recording.requests.output_tokens[held.request] > scene.longer_than
    _bodies(axes, strategy, scene, held, dark)
    if scene.lane * 72 * 0.72 >= _SMALLEST:
        _numbers(axes, scene, held, dark)
    ticks = range(0, lanes, max(1, -(-lanes // 8)))
    axes.set(ylim=(lanes - 0.5, -0.5), yticks=ticks, ylabel="slot")
    axes.tick_params(axis="y", length=0)
    strip_axes(axes)


def _bodies(
    axes: Axes, strategy: Strategy, scene: Scene, held: Holdings, dark: NDArray[np.bool_]
) -> None:
    """Bars of requests, their prompt's part on top, and what is held for nothing behind them."""
    late = held.where(held.freed > held.done)
    key = strategy.index
    boxes = _boxes(scene, late.done, late.freed, late.slot)
    axes.add_collection(PolyCollection(list(boxes), gid=f"held-{key}", **HELD))
    boxes = _boxes(scene, held.admitted, held.done, held.slot)
    wide = (held.done - held.admitted) * scene.points_a_ns > 6
    look: dict[str, Any] = {
        "facecolor": np.where(dark[:, None], strategy.tint(0), strategy.tint(0.6)),
        "edgecolor": "#ffffff",
        "linewidth": np.where(wide, 0.7, 0.0),  # a rim would hide a narrow bar
    }
    axes.add_collection(PolyCollection(list(boxes), gid=f"requests-{key}", **look))
    boxes = _boxes(scene, held.admitted, held.first, held.slot)
    look = {"facecolor": strategy.tint(-0.55), "linewidth": 0}
    axes.add_collection(PolyCollection(list(boxes), gid=f"prefill-{key}", **look))


def _boxes(scene: Scene, start: Ints, stop: Ints, slot: Ints) -> Floats:
    """Corners of a box from ``start`` to ``stop`` in each slot's lane, ``[boxes, 4, 2]``."""
    left, right, y = start / scene.unit.ns, stop / scene.unit.ns, slot.astype(np.float64)
    low, high = y - 0.42, y + 0.42
    corners = ((left, low), (left, high), (right, high), (right, low))
    return np.stack([np.stack(corner, -1) for corner in corners], axis=1)


def _numbers(axes: Axes, scene: Scene, held: Holdings, dark: NDArray[np.bool_]) -> None:
    """Requests' numbers in the bars that are wide enough."""
    most = min(8.0, scene.lane * 72 * 0.72)
    stop = np.minimum(held.done, scene.window_ns)
    width = (stop - held.first) * scene.points_a_ns - 1
    middle = (held.first + stop) / 2 / scene.unit.ns
    for i in np.flatnonzero(width > text_extent("0", _SMALLEST)).tolist():
        number = str(held.request[i])
        size = min(most, width[i] / text_extent(number, 1))
        if size >= _SMALLEST:
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": size}
            colour = "#ffffff" if dark[i] else INK
            axes.text(middle[i], held.slot[i], number, color=colour, **style)


def draw_end(axes: Axes, strategy: Strategy, scene: Scene) -> None:
    """When the strategy is done, and how much sooner than the baseline."""
    end, window = strategy.typical.duration_ns, scene.window_ns
    if scene.baseline_ns <= window:
        axes.axvline(scene.baseline_ns / scene.unit.ns, color=QUIET, lw=1, ls=":", clip_on=False)
    text, at = scene.unit_of_ends.text(end), min(end, window) / scene.unit.ns
    if end > window:
        text = f"ends at\n{text}"
    else:
        axes.axvline(at, color=INK, lw=2, clip_on=False, gid=f"end-{strategy.index}")
    saved = (scene.baseline_ns - end) * scene.points_a_ns if scene.baseline_ns <= window else 0.0
    place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "va": "center"}
    look: Any = {"size": 10.5, "weight": "bold"}
    look["bbox"] = {"fc": "#ffffff", "ec": "none", "pad": 1.5}  # the baseline's end may be near
    height = 0.72 if saved > 0 else 0.5
    axes.annotate(text, (at, height), (6, 0), textcoords="offset points", **place, **look)
    if saved > 14:
        _saved(axes, scene, end, saved)


def _saved(axes: Axes, scene: Scene, end: int, width: float) -> None:
    """An arrow of ``width`` points from an end to the baseline's."""
    left, right = end / scene.unit.ns, scene.baseline_ns / scene.unit.ns
    across = axes.get_xaxis_transform()
    arrow = {"arrowstyle": "<|-|>", "color": INK, "lw": 1.1, "shrinkA": 2, "shrinkB": 1}
    ends: Any = {"xycoords": across, "textcoords": across, "arrowprops": arrow}
    axes.annotate("", (right, 0.36), (left, 0.36), **ends)
    text = f"{scene.unit_of_ends.text(scene.baseline_ns - end)} saved"
    if text_extent(text, 9.5) + 12 < width:
        below: Any = {"xycoords": across, "textcoords": "offset points", "va": "top"}
        axes.annotate(text, ((left + right) / 2, 0.36), (0, -4), ha="center", size=9.5, **below)


def _held_share(strategy: Strategy) -> str:
    """How much of the slots' time goes to requests that are done."""
    counted = strategy.counted
    slots = strategy.typical.header.slots
    share = counted["finished_slot_steps"] / counted["slot_steps"]
    text = f"{slots} slot{'s' * (slots > 1)}"
    return f"{text}, {spell_percent(share)} of slot-steps held for nothing" if share else text


def kinds_of_bars(strategies: Sequence[Strategy], scene: Scene) -> list[Entry]:
    """What the shades mean; only those that occur."""
    lengths = np.concatenate([s.typical.requests.output_tokens for s in strategies])
    entries = []
    for word, tint, chosen in (
        ("long request", 0.0, lengths[lengths > scene.longer_than]),
        ("short request", 0.6, lengths[lengths <= scene.longer_than]),
    ):
        if len(chosen):
            name = word if len(chosen) < len(lengths) else "request"
            entries.append(make_entry(f"{name} ({_range(chosen)})", strategies, tint))
    entries.append(make_entry("prompt, up to the first token", strategies, -0.55))
    if any((s.typical.requests.released > s.typical.requests.last + 1).any() for s in strategies):
        entries.append(("done, slot still held", (Patch(**HELD),)))
    return [*entries, ("empty slot", (Patch(fc="#ffffff", ec=FAINT),))]


def _range(tokens: Ints) -> str:
    low, high = int(tokens.min()), int(tokens.max())
    text = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{text} token{'s' * (high > 1)}"


def timeline_headline(strategies: Sequence[Strategy]) -> str:
    """Who is done when."""
    ends = [strategy.typical.duration_ns for strategy in strategies]
    unit = Unit.of(strategies, max(ends))
    text = f"{strategies[-1].called} is done after {unit.text(ends[-1])}"
    if len(strategies) == 1:
        return text
    text += f", {strategies[0].called} after {unit.text(ends[0])}"
    if (strategies[0].name, strategies[-1].name) == ("static", "continuous") and ends[-1] < ends[0]:
        text += ": a free slot takes the next request at once"
    return text


def timeline_notes(strategies: Sequence[Strategy], scene: Scene) -> str:
    """What a reader should know of the drawing."""
    notes = ["A bar is one request, with its number where there is room."]
    slots = max(strategy.typical.header.slots for strategy in strategies)
    if slots > MOST_SLOTS:
        notes.append(f"Drawn are slots 0 to {MOST_SLOTS - 1} of {slots:,}.")
    if scene.cut:
        notes.append("Only the beginning is drawn; the ends are given at the right.")
    return " ".join(notes) + which_trial(strategies)
