"""How full the slots are over time, and who waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batchbench.reports.figures.card import (
    HELD,
    INK,
    Entry,
    Strategy,
    Unit,
    add_legend,
    make_card,
    make_entry,
    strip_axes,
)
from batchbench.reports.occupancy import MOST_LEVELS, Levels, levels_of
from batchbench.reports.text import spell_percent


def draw_occupancy(strategies: Sequence[Strategy], title: str) -> Figure:
    """Running, held and empty slots over one time axis, and the queue beneath."""
    exact = [levels_of(strategy.typical) for strategy in strategies]
    each = [levels.thinned() for levels in exact]
    unit = Unit.of(strategies, max(levels.edges_ns[-1] for levels in each))
    tall = float(np.clip(3.2 / len(strategies), 0.8, 1.35))
    row = tall + 0.96
    notes = _occupancy_notes(strategies, each, unit)
    headline = _occupancy_headline(strategies, exact)
    card = make_card(headline, title, 0.3 + row * len(strategies) + 0.36, notes)
    add_legend(card, _kinds_of_slots(strategies, any(levels.finished.any() for levels in each)))
    panels = []
    for place, (strategy, levels) in enumerate(zip(strategies, each, strict=True)):
        top = 0.3 + row * place
        done = unit.text(strategy.typical.duration_ns)
        detail = f"{spell_percent(_useful(strategy))} of its slot-steps useful, done after {done}"
        card.label(top + 0.18, strategy, detail)
        panels += [
            card.axes(0.5, top + 0.3, 6.8, tall),
            card.axes(0.5, top + tall + 0.44, 6.8, 0.36),
        ]
        _slots(panels[-2], strategy, levels, unit)
        _queue(panels[-1], levels, unit)
    share_time(panels, max(levels.edges_ns[-1] for levels in each), unit)
    return card.figure


def share_time(panels: Sequence[Axes], until_ns: float, unit: Unit) -> None:
    """One time axis for panels that stand one above the other, written under the lowest."""
    for panel in panels:
        panel.set_xlim(0, until_ns / unit.ns)
        lowest = panel is panels[-1]
        panel.tick_params(axis="x", labelbottom=lowest, length=3 if lowest else 0)
    panels[-1].set_xlabel(f"time ({unit.name})")


def _kinds_of_slots(strategies: Sequence[Strategy], held: bool) -> list[Entry]:
    """What fills and hatches mean."""
    entries = [make_entry("running", strategies, 0.25)]
    if held:
        entries.append(("done, slot still held", (Patch(**HELD),)))
    return [*entries, ("empty", (Patch(fc="#ffffff", ec=INK, lw=0.8),))]


def _slots(axes: Axes, strategy: Strategy, levels: Levels, unit: Unit) -> None:
    """Running slots filled, held ones hatched, and a box up to the number of slots."""
    slots, edges = strategy.typical.header.slots, levels.edges_ns / unit.ns
    axes.stairs(
        levels.running,
        edges,
        fill=True,
        color=strategy.tint(0.25),
        lw=0,
        gid=f"running-{strategy.index}",
    )
    axes.stairs(
        levels.running + levels.finished,
        edges,
        baseline=levels.running,
        fill=True,
        gid=f"finished-{strategy.index}",
        **HELD,
    )
    axes.plot([0, edges[-1], edges[-1], 0], [slots, slots, 0, 0], color=INK, lw=1, clip_on=False)
    axes.set(ylim=(0, slots), yticks=sorted({0, slots // 2, slots}), ylabel="slots")
    strip_axes(axes, "left")


def _queue(axes: Axes, levels: Levels, unit: Unit) -> None:
    """Requests that wait for a slot."""
    # At the very start all wait for an instant, which no eye sees and no axis should show.
    spans = np.diff(levels.edges_ns)
    seen = levels.waiting[spans > spans.sum() / (2 * MOST_LEVELS)]
    longest = max(seen.max(), 1.0)
    axes.stairs(levels.waiting, levels.edges_ns / unit.ns, color=INK, lw=1.1, baseline=None)
    axes.set(ylim=(0, longest * 1.08), yticks=[0, round(longest)], ylabel="waiting")
    strip_axes(axes, "left", "bottom")


def _useful(strategy: Strategy) -> float:
    """Utilisation: useful slot-steps in all slot-steps."""
    counted = strategy.counted
    return counted["useful_slot_steps"] / counted["slot_steps"]


def _occupancy_headline(strategies: Sequence[Strategy], exact: Sequence[Levels]) -> str:
    if strategies[0].typical.requests.due_ns.any():
        # Requests come in their own time: slots are empty when nobody comes, whatever is done.
        longest = [round(levels.waiting.max()) for levels in exact]
        text = f"At most {longest[-1]:,} request{'s' * (longest[-1] != 1)} wait at once under "
        text += strategies[-1].called
        if len(strategies) > 1:
            text += f", {longest[0]:,} under {strategies[0].called}"
        return text
    share = spell_percent(_useful(strategies[-1]))
    text = f"{strategies[-1].called} makes use of {share} of its slot-steps"
    if len(strategies) > 1:
        text += f", {strategies[0].called} of {spell_percent(_useful(strategies[0]))}"
    return text


def _occupancy_notes(strategies: Sequence[Strategy], each: Sequence[Levels], unit: Unit) -> str:
    notes = "A slot-step is one slot in one forward pass; useful ones yield a token."
    if coarse := max(levels.mean_over_ns for levels in each):
        notes += f" Levels are means over {unit.text(coarse)}."
    return notes + which_trial(strategies)


def which_trial(strategies: Sequence[Strategy]) -> str:
    """What a picture of one trial says about its choice."""
    several = len(strategies[0].trials) > 1
    return " Of each strategy the trial of median duration." if several else ""
