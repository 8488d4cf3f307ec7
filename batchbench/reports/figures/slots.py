"""Slots over time: those in use above the requests that wait, and one bar per request."""

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
from batchbench.reports.occupancy import MOST_LEVELS, Holdings, Levels, levels_of
from batchbench.reports.statistics import Floats
from batchbench.reports.text import plural, span, spell_percent


def _held(*, seen: bool) -> list[card.Entry]:
    return [("done, slot still held", Patch(**card.HELD))] * seen


def which_trial(strategies: Sequence[card.Strategy]) -> str:
    """Return the note of a picture that shows one of several trials."""
    several = len(strategies[0].trials) > 1
    return " Shown: the trial of median duration of each strategy." if several else ""


def _share_time(panels: Sequence[Axes], until_ns: float, unit: card.Unit) -> None:
    """Give panels that stand one above the other one time axis, written under the lowest."""
    for panel in panels:
        panel.set_xlim(0, until_ns / unit.ns)
        lowest = panel is panels[-1]
        panel.tick_params(axis="x", labelbottom=lowest, length=3 if lowest else 0)
    panels[-1].set_xlabel(f"time ({unit.name})")


# Occupancy


def draw_occupancy(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw running, held and empty slots over one time axis, and the queue beneath."""
    exact = [levels_of(strategy.typical) for strategy in strategies]
    drawn = [levels.thinned() for levels in exact]
    until_ns = max(levels.edges_ns[-1] for levels in drawn)
    unit = card.Unit.of(strategies, until_ns)
    tall = float(np.clip(3.2 / len(strategies), 0.8, 1.35))
    row = tall + 0.96
    notes = "A slot-step is one slot in one forward pass; useful ones yield a token."
    if coarse := max(levels.mean_over_ns for levels in drawn):
        notes += f" Levels are means over {unit.text(coarse)}."
    body, notes = 0.66 + row * len(strategies), notes + which_trial(strategies)
    picture = card.make_card(_fullest(strategies, exact), title, body, notes)
    held = _held(seen=any(levels.finished.any() for levels in drawn))
    empty = ("empty", Patch(fc="#ffffff", ec=card.INK, lw=0.8))
    card.add_legend(picture, [card.make_entry("running", strategies, 0.25), *held, empty])
    panels = []
    for place, (strategy, levels) in enumerate(zip(strategies, drawn, strict=True)):
        top = 0.3 + row * place
        done = unit.text(strategy.typical.duration_ns)
        detail = f"{spell_percent(_useful(strategy))} of its slot-steps useful, done after {done}"
        picture.label(top + 0.18, strategy, detail)
        panels += [
            picture.axes(0.5, top + 0.3, 6.8, tall),
            picture.axes(0.5, top + tall + 0.44, 6.8, 0.36),
        ]
        _draw_levels(panels[-2], strategy, levels, unit)
        _draw_queue(panels[-1], levels, unit)
    _share_time(panels, until_ns, unit)
    return picture.figure


def _draw_levels(axes: Axes, strategy: card.Strategy, levels: Levels, unit: card.Unit) -> None:
    slots, edges = strategy.typical.header.slots, levels.edges_ns / unit.ns
    occupied = levels.running + levels.finished
    look: dict[str, Any] = {"color": strategy.tint(0.25), "lw": 0}
    axes.stairs(levels.running, edges, fill=True, gid=f"running-{strategy.index}", **look)
    look = {"baseline": levels.running, "gid": f"finished-{strategy.index}", **card.HELD}
    axes.stairs(occupied, edges, fill=True, **look)
    end = edges[-1]
    axes.plot([0, end, end, 0], [slots, slots, 0, 0], color=card.INK, lw=1, clip_on=False)
    axes.set(ylim=(0, slots), yticks=sorted({0, slots // 2, slots}), ylabel="slots")
    card.strip_axes(axes, "left")


def _draw_queue(axes: Axes, levels: Levels, unit: card.Unit) -> None:
    # At the start all requests wait for a time too short to see, which the axis leaves out.
    spans = np.diff(levels.edges_ns)
    seen = levels.waiting[spans > spans.sum() / (2 * MOST_LEVELS)]
    longest = max(seen.max(), 1.0)
    axes.stairs(levels.waiting, levels.edges_ns / unit.ns, color=card.INK, lw=1.1, baseline=None)
    axes.set(ylim=(0, longest * 1.08), yticks=[0, round(longest)], ylabel="waiting")
    card.strip_axes(axes, "left", "bottom")


def _useful(strategy: card.Strategy) -> float:
    return strategy.counted["useful_slot_steps"] / strategy.counted["slot_steps"]


def _fullest(strategies: Sequence[card.Strategy], exact: Sequence[Levels]) -> str:
    first, last = strategies[0], strategies[-1]
    if first.typical.requests.due_ns.any():
        # With timed arrivals slots may be empty because no request has come; the queue says more.
        longest = [round(levels.waiting.max()) for levels in exact]
        text = f"At most {plural(longest[-1], 'request')} wait at once under {last.called}"
        return f"{text}, {longest[0]:,} under {first.called}" if last is not first else text
    text = f"{last.called} uses {spell_percent(_useful(last))} of its slot-steps"
    return f"{text}, {first.called} {spell_percent(_useful(first))}" if last is not first else text


# Timeline

MOST_SLOTS = 32
"""Slots that are drawn; rows of more would be thinner than a screen can show."""

MOST_BARS = 2_000
"""Bars that are drawn of one strategy."""

MOST_BARS_A_SLOT = 200
"""Bars that are drawn of one slot; more are narrower than 2 points."""

_LEFT, _WIDTH = 0.5, card.WIDE - 1.45  # inches left of the rows, and their width

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
    lengths = np.concatenate([trial.requests.output_tokens for trial in trials])
    shortest, longest = int(lengths.min()), int(lengths.max())
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

    @classmethod
    def of(cls, strategies: Sequence[card.Strategy], tallest: float) -> Scale:
        trials = [strategy.typical for strategy in strategies]
        longest = max(trial.duration_ns for trial in trials)
        most = [min(MOST_BARS, MOST_BARS_A_SLOT * _rows(strategy)) for strategy in strategies]
        window = window_of(trials, MOST_SLOTS, most)
        return cls(
            unit=card.Unit.of(strategies, window),
            unit_of_ends=card.Unit.of(strategies, longest),
            window_ns=window,
            row=float(np.clip(tallest / sum(map(_rows, strategies)), 0.06, 0.25)),
            middle=middle_length(trials),
            baseline_ns=trials[0].duration_ns,
            cut=window < longest,
        )

    @property
    def points_per_ns(self) -> float:
        return _WIDTH * 72 / self.window_ns


def _rows(strategy: card.Strategy) -> int:
    return min(strategy.typical.header.slots, MOST_SLOTS)


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
    scale = Scale.of(strategies, tallest)
    tall = [max(_rows(strategy) * scale.row, 0.62) for strategy in strategies]
    entries = _entries(strategies, scale)
    top = card.legend_height(entries)
    body = top + sum(tall) + 0.46 * len(tall) + 0.36
    picture = card.make_card(_first_done(strategies), title, body, _notes(strategies, scale))
    card.add_legend(picture, entries)
    panels = []
    for strategy, height in zip(strategies, tall, strict=True):
        counted, detail = strategy.counted, plural(strategy.typical.header.slots, "slot")
        if held := counted["finished_slot_steps"]:
            share = spell_percent(held / counted["slot_steps"])
            detail += f", {share} of slot-steps held by finished requests"
        axes = picture.axes(_LEFT, top + 0.3, _WIDTH, height)
        panels.append(Panel(strategy, axes, picture.label(top + 0.22, strategy, detail)))
        _draw_slots(axes, strategy, scale)
        top += height + 0.46
    _share_time([panel.axes for panel in panels], scale.window_ns, scale.unit)
    panels[-1].axes.spines["bottom"].set_visible(True)
    return picture, scale, panels


def _draw_slots(axes: Axes, strategy: card.Strategy, scale: Scale) -> None:
    recording, rows = strategy.typical, _rows(strategy)
    bars = Bars.of(recording, scale.window_ns, rows, scale.middle)
    end = min(recording.duration_ns, scale.window_ns) / scale.unit.ns
    rules = [((0, y - 0.5), (end, y - 0.5)) for y in range(rows + 1)]
    axes.add_collection(LineCollection(rules, colors=card.FAINT, lw=0.7, zorder=0))
    _draw_bars(axes, strategy, scale, bars)
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
    x = np.stack([start, start, stop, stop], -1) / scale.unit.ns
    y = slot[:, None] + np.array([-0.42, 0.42, 0.42, -0.42])
    return list(np.stack([x, y], -1))


def _number(axes: Axes, scale: Scale, bars: Bars) -> None:
    held, size = bars.held, min(8.0, scale.row * 52)
    stop = np.minimum(held.done, scale.window_ns)
    width = (stop - held.first) * scale.points_per_ns - 1
    middle = (held.first + stop) / 2 / scale.unit.ns
    for i, request in enumerate(held.request):
        if size >= _SMALLEST and card.text_extent(str(request), size) < width[i]:
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": size}
            style["color"] = "#ffffff" if bars.long[i] else card.INK
            axes.text(middle[i], held.slot[i], str(request), **style)


def draw_end(panel: Panel, scale: Scale) -> None:
    """Mark the end of a trial and of the baseline's, and the time between them."""
    axes, strategy = panel.axes, panel.strategy
    end, base = strategy.typical.duration_ns, scale.baseline_ns
    at, width = min(end, scale.window_ns) / scale.unit.ns, 0.0
    if base <= scale.window_ns:
        axes.axvline(base / scale.unit.ns, color=card.QUIET, lw=1, ls=":", clip_on=False)
        width = (base - end) * scale.points_per_ns
    text, across = scale.unit_of_ends.text(end), axes.get_xaxis_transform()
    if end > scale.window_ns:
        text = f"ends at\n{text}"
    else:
        axes.axvline(at, color=card.INK, lw=2, clip_on=False, gid=f"end-{strategy.index}")
    place: dict[str, Any] = {"xycoords": across, "textcoords": "offset points"}
    look: dict[str, Any] = {"va": "center", "size": 10.5, "weight": "bold"}
    look["bbox"] = {"fc": "#ffffff", "ec": "none", "pad": 1.5}  # the baseline's end may be near
    axes.annotate(text, (at, 0.72 if width > 0 else 0.5), (6, 0), **place, **look)
    if width > 14:
        arrow = {"arrowstyle": "<|-|>", "color": card.INK, "lw": 1.1, "shrinkA": 2, "shrinkB": 1}
        right = base / scale.unit.ns
        ends: Any = {"xycoords": across, "textcoords": across, "arrowprops": arrow}
        axes.annotate("", (right, 0.36), (at, 0.36), **ends)
        text = f"{scale.unit_of_ends.text(base - end)} saved"
        if card.text_extent(text, 9.5) + 12 < width:
            look = {"ha": "center", "va": "top", "size": 9.5}
            axes.annotate(text, ((at + right) / 2, 0.36), (0, -4), **place, **look)


def _entries(strategies: Sequence[card.Strategy], scale: Scale) -> list[card.Entry]:
    requests = [strategy.typical.requests for strategy in strategies]
    lengths = np.concatenate([r.output_tokens for r in requests])
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
    entries += _held(seen=any((r.released > r.last + 1).any() for r in requests))
    return [*entries, ("empty slot", Patch(fc="#ffffff", ec=card.FAINT))]


def _first_done(strategies: Sequence[card.Strategy]) -> str:
    first, last = strategies[0], strategies[-1]
    ends = [strategy.typical.duration_ns for strategy in strategies]
    unit = card.Unit.of(strategies, max(ends))
    text = f"{last.called} is done after {unit.text(ends[-1])}"
    if last is first:
        return text
    text += f", {first.called} after {unit.text(ends[0])}"
    if (first.name, last.name) == ("static", "continuous") and ends[-1] < ends[0]:
        text += ": a free slot takes the next request at once"
    return text


def _notes(strategies: Sequence[card.Strategy], scale: Scale) -> str:
    notes = "A bar is one request, with its number where there is room."
    slots = max(strategy.typical.header.slots for strategy in strategies)
    if slots > MOST_SLOTS:
        notes += f" Drawn: slots 0 to {MOST_SLOTS - 1} of {slots:,}."
    if scale.cut:
        notes += " Only the beginning is drawn; the ends are written at the right."
    return notes + which_trial(strategies)
