"""Slots in use and requests waiting, over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batchbench.reports.figures import card
from batchbench.reports.occupancy import MOST_LEVELS, Levels, levels_of
from batchbench.reports.text import plural, spell_percent


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
    picture = card.make_card(
        _headline(strategies, exact),
        title,
        0.3 + row * len(strategies) + 0.36,
        notes + which_trial(strategies),
    )
    entries = [card.make_entry("running", strategies, 0.25)]
    if any(levels.finished.any() for levels in drawn):
        entries.append(("done, slot still held", (Patch(**card.HELD),)))
    card.add_legend(picture, [*entries, ("empty", (Patch(fc="#ffffff", ec=card.INK, lw=0.8),))])
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
        _slots(panels[-2], strategy, levels, unit)
        _queue(panels[-1], levels, unit)
    share_time(panels, until_ns, unit)
    return picture.figure


def share_time(panels: Sequence[Axes], until_ns: float, unit: card.Unit) -> None:
    """Give panels that stand one above the other one time axis, written under the lowest."""
    for panel in panels:
        panel.set_xlim(0, until_ns / unit.ns)
        lowest = panel is panels[-1]
        panel.tick_params(axis="x", labelbottom=lowest, length=3 if lowest else 0)
    panels[-1].set_xlabel(f"time ({unit.name})")


def _slots(axes: Axes, strategy: card.Strategy, levels: Levels, unit: card.Unit) -> None:
    slots, edges = strategy.typical.header.slots, levels.edges_ns / unit.ns
    occupied = levels.running + levels.finished
    look: dict[str, Any] = {"color": strategy.tint(0.25), "lw": 0}
    axes.stairs(levels.running, edges, fill=True, gid=f"running-{strategy.index}", **look)
    look = {"baseline": levels.running, "gid": f"finished-{strategy.index}", **card.HELD}
    axes.stairs(occupied, edges, fill=True, **look)
    axes.plot(
        [0, edges[-1], edges[-1], 0], [slots, slots, 0, 0], color=card.INK, lw=1, clip_on=False
    )
    axes.set(ylim=(0, slots), yticks=sorted({0, slots // 2, slots}), ylabel="slots")
    card.strip_axes(axes, "left")


def _queue(axes: Axes, levels: Levels, unit: card.Unit) -> None:
    # At the start all requests wait for a time too short to see, which the axis leaves out.
    spans = np.diff(levels.edges_ns)
    seen = levels.waiting[spans > spans.sum() / (2 * MOST_LEVELS)]
    longest = max(seen.max(), 1.0)
    axes.stairs(levels.waiting, levels.edges_ns / unit.ns, color=card.INK, lw=1.1, baseline=None)
    axes.set(ylim=(0, longest * 1.08), yticks=[0, round(longest)], ylabel="waiting")
    card.strip_axes(axes, "left", "bottom")


def _useful(strategy: card.Strategy) -> float:
    return strategy.counted["useful_slot_steps"] / strategy.counted["slot_steps"]


def _headline(strategies: Sequence[card.Strategy], exact: Sequence[Levels]) -> str:
    first, last = strategies[0], strategies[-1]
    if first.typical.requests.due_ns.any():
        # With timed arrivals slots may be empty because no request has come; the queue says more.
        longest = [round(levels.waiting.max()) for levels in exact]
        text = f"At most {plural(longest[-1], 'request')} wait at once under {last.called}"
        return f"{text}, {longest[0]:,} under {first.called}" if last is not first else text
    text = f"{last.called} uses {spell_percent(_useful(last))} of its slot-steps"
    return f"{text}, {first.called} {spell_percent(_useful(first))}" if last is not first else text


def which_trial(strategies: Sequence[card.Strategy]) -> str:
    """Return the note of a picture that shows one of several trials."""
    several = len(strategies[0].trials) > 1
    return " Shown: the trial of median duration of each strategy." if several else ""
