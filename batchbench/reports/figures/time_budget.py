"""The parts of each strategy's wall time, and the time that a candidate saved in each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batchbench.reports.figures import card
from batchbench.reports.text import spell_percent
from batchbench.reports.time_budget import (
    LOST_TO,
    NAMES,
    PARTS,
    SAVED_BY,
    TimeBudget,
    typical_budget,
    waterfall,
)

MINUS = "\N{MINUS SIGN}"

_ROW, _BAR = 0.62, 0.3  # inches: a strategy's row, and the bar at its lower end

_STEP = 0.25  # inches: a row of a waterfall

_LABELS = 2.05  # inches left of a waterfall's bars

_SHOWN = 0.005
"""Smaller shares of the baseline's time are drawn together."""

_LOOKS: dict[str, dict[str, Any]] = {
    "finished_s": card.HELD,
    "empty_s": {"facecolor": "#ffffff", "edgecolor": "#b0b0b0", "lw": 0.8},
    "prefill_padding_s": {**card.HELD, "hatch": "xxxx"},
    "stalled_s": {**card.HELD, "hatch": "|||||"},
    "waiting_s": {**card.HELD, "hatch": "...", "facecolor": "#ffffff"},
    "host_s": {"facecolor": "#8c8c8c", "lw": 0},
    "residual_s": {"facecolor": card.INK, "lw": 0},
}
"""The looks of parts that are the same under each strategy; useful parts have its colour."""

_TINTS = {"useful_decode_s": 0.25, "prefill_useful_s": -0.55}

_DARK = ("prefill_useful_s", "residual_s")

STACKED = sorted(PARTS, key=lambda part: part not in _TINTS)
"""Parts in the order in which they are drawn: useful ones first."""

Budget = tuple[card.Strategy, TimeBudget]


@dataclass(frozen=True)
class WaterfallRow:
    """A bar of a waterfall, in seconds."""

    label: str
    left_s: float
    width_s: float
    saved_s: float | None = None  # negative: lost; None for a whole trial

    @property
    def right_s(self) -> float:
        return self.left_s + self.width_s

    def text(self, unit: card.Unit) -> str:
        text = unit.text(round(self.width_s * 1e9))
        if self.saved_s is None:
            return text
        return f"{'+' if self.saved_s < 0 else MINUS}{text}"


@dataclass(frozen=True, eq=False)
class Waterfall:
    """Bars from the baseline's wall time to a candidate's, part by part, largest saving first."""

    baseline: card.Strategy
    candidate: card.Strategy
    rows: Sequence[WaterfallRow]

    @classmethod
    def between(cls, baseline: Budget, candidate: Budget) -> Waterfall:
        """Return the bars; parts too small to be seen are one, so that the bars add up."""
        (first, before), (last, after) = baseline, candidate
        saved = {step["part"]: step["saved_s"] for step in waterfall(before, after)[1]}
        shown = {p: s for p, s in saved.items() if abs(s) >= _SHOWN * before.wall_s}
        effects = [(_name(p, shown[p]), shown[p]) for p in sorted(shown, key=lambda p: -shown[p])]
        rest = sum(s for part, s in saved.items() if part not in shown)
        if abs(rest) > _SHOWN / 10 * before.wall_s:
            effects.append(("all else", rest))
        rows, at = [WaterfallRow(first.name, 0.0, before.wall_s)], before.wall_s
        for name, gain in effects:
            rows.append(WaterfallRow(name, min(at, at - gain), abs(gain), gain))
            at -= gain
        return cls(first, last, [*rows, WaterfallRow(last.name, 0.0, after.wall_s)])

    @property
    def height(self) -> float:
        """Inches of the rows and of the heading above them."""
        return 0.5 + len(self.rows) * _STEP

    def draw(self, picture: card.Card, top: float, unit: card.Unit) -> None:
        saved_s = self.rows[0].width_s - self.rows[-1].width_s
        difference = unit.text(round(abs(saved_s) * 1e9))
        detail = (
            f"{difference} {'saved' if saved_s > 0 else 'lost'}" if saved_s else "no difference"
        )
        title = f"From {self.baseline.name} to {self.candidate.name}"
        picture.heading(top + 0.4, card.fit_text(title, 300, 10.5, "bold"), detail)
        width, tall = card.WIDE - _LABELS - 0.95, len(self.rows) * _STEP
        axes, scale = picture.axes(_LABELS, top + 0.5, width, tall), 1e9 / unit.ns
        for i, row in enumerate(self.rows):
            whose = self.baseline if i == 0 else self.candidate
            look: dict[str, Any] = {"facecolor": whose.tint(0.25)}
            if row.saved_s is not None:
                look |= {"edgecolor": look["facecolor"], "linewidth": 1.2}
                look["gid"] = f"effect-{whose.index}-{i}"
            start, width = row.left_s * scale, row.width_s * scale
            if row.saved_s is not None and row.saved_s < 0:
                start, width, look["facecolor"] = start + width, -width, "#ffffff"
            axes.barh(i, width, left=start, height=0.66, **look)
            style: dict[str, Any] = {"size": 9, "va": "center", "weight": "bold"}
            place = (row.right_s * scale, i)
            axes.annotate(row.text(unit), place, (5, 0), textcoords="offset points", **style)
        names = [card.fit_text(row.label, _LABELS * 72 - 12, 9) for row in self.rows]
        axes.set(ylim=(len(names) - 0.5, -0.5), xticks=[])
        axes.margins(x=0)
        axes.axvline(0, color=card.FAINT, lw=0.8, zorder=0)
        axes.tick_params(axis="y", length=0)
        card.strip_axes(axes)
        axes.set_yticks(range(len(names)), names)
        for label in (axes.get_yticklabels()[0], axes.get_yticklabels()[-1]):
            label.set_fontweight("bold")


def waterfalls(budgets: Sequence[Budget]) -> list[Waterfall]:
    if not budgets or budgets[0][0].index:
        return []  # the baseline logs no steps
    return [Waterfall.between(budgets[0], candidate) for candidate in budgets[1:]]


def budgets_of(strategies: Sequence[card.Strategy]) -> list[Budget]:
    budgets = [(strategy, typical_budget(strategy.trials)) for strategy in strategies]
    return [(strategy, times) for strategy, times in budgets if times is not None]


def draw_time_budget(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw stacked bars of each strategy's wall time, and waterfalls from the baseline's."""
    budgets = budgets_of(strategies)
    longest = max((times.wall_s for _, times in budgets), default=1.0)
    unit = card.Unit.of(strategies, longest * 1e9)
    entries, falls = _entries(budgets), waterfalls(budgets)
    top, tall = card.legend_height(entries), len(strategies) * _ROW
    body = top + tall + 0.42 + sum(fall.height for fall in falls)
    picture = card.make_card(_headline(budgets), title, body, _notes(strategies, falls))
    card.add_legend(picture, entries)
    axes = picture.axes(0, top, card.WIDE, tall + 0.05)
    by_index = {strategy.index: times for strategy, times in budgets}
    for strategy in strategies:
        times, detail = by_index.get(strategy.index), "logs no steps: no time budget"
        if times is not None:
            useful = spell_percent(_useful_share(times))
            detail = f"{unit.text(round(times.wall_s * 1e9))}, {useful} of it useful"
            _stack(axes, (strategy, times), unit, longest)
        picture.label(top + strategy.index * _ROW + 0.2, strategy, detail)
    axes.set(xlim=(0, longest * 1e9 / unit.ns * 1.002), ylim=(tall + 0.05, 0), yticks=[])
    axes.set_xlabel("steps" if unit.name == "steps" else f"time ({unit.name})")
    axes.locator_params(axis="x", nbins=8)
    card.strip_axes(axes, "bottom")
    top += tall + 0.42
    for fall in falls:
        fall.draw(picture, top, unit)
        top += fall.height
    return picture.figure


def _stack(axes: Axes, budget: Budget, unit: card.Unit, longest: float) -> None:
    """Draw the parts of one strategy one after another; the y axis counts inches downwards."""
    strategy, times = budget
    y, left, scale = (strategy.index + 1) * _ROW - _BAR / 2, 0.0, 1e9 / unit.ns
    for part in STACKED:
        seconds = max(getattr(times, part), 0.0)
        look = _LOOKS.get(part, {"lw": 0})
        if part in _TINTS:
            look = look | {"facecolor": strategy.tint(_TINTS[part])}
        axes.barh(y, seconds * scale, _BAR, left=left, gid=f"{part}-{strategy.index}", **look)
        text = spell_percent(seconds / times.wall_s)
        if card.text_extent(text, 8.5) + 6 <= seconds / longest * card.WIDE * 72:
            style: dict[str, Any] = {"ha": "center", "va": "center", "size": 8.5}
            style["color"] = "#ffffff" if part in _DARK else card.INK
            if look.get("hatch"):
                style["bbox"] = {"fc": "#ffffff", "ec": "none", "pad": 1.2, "alpha": 0.9}
            axes.text(left + seconds * scale / 2, y, text, **style)
        left += seconds * scale


def _entries(budgets: Sequence[Budget]) -> list[card.Entry]:
    strategies = [strategy for strategy, _ in budgets]
    seen = [p for p in PARTS if any(getattr(t, p) >= t.wall_s / 1000 for _, t in budgets)]
    return [
        card.make_entry(NAMES[part], strategies, _TINTS[part])
        if part in _TINTS
        else (NAMES[part], Patch(**_LOOKS[part]))
        for part in seen
    ]


def _useful_share(times: TimeBudget) -> float:
    return (times.useful_decode_s + times.prefill_useful_s) / times.wall_s


def _name(part: str, saved: float) -> str:
    if part != "useful_decode_s":
        return NAMES[part]
    return "faster decode steps" if saved >= 0 else "slower decode steps"


def _headline(budgets: Sequence[Budget]) -> str:
    if not budgets:
        return "No strategy logs its steps: there is no time budget"
    (baseline, before), (candidate, after) = budgets[0], budgets[-1]
    if len(budgets) == 1 or baseline.index:
        return f"{spell_percent(_useful_share(before))} of the time of {baseline.called} is useful"
    saved = before.wall_s - after.wall_s
    if abs(saved) < _SHOWN * before.wall_s:
        return f"{candidate.called} takes as long as {baseline.called}"
    unit = card.Unit.of([baseline], before.wall_s * 1e9)
    parts = {step["part"]: step["saved_s"] for step in waterfall(before, after)[1]}
    difference = unit.text(round(abs(saved) * 1e9))
    if saved < 0:
        most = LOST_TO[min(parts, key=lambda part: parts[part])]
        text = f"{candidate.called} takes {difference} longer than {baseline.called}"
        return f"{text}, mostly due {most}"
    whole, most = (
        unit.text(round(before.wall_s * 1e9)),
        SAVED_BY[max(parts, key=lambda p: parts[p])],
    )
    return f"{candidate.called} saves {difference} of {baseline.called}'s {whole}, mostly {most}"


def _notes(strategies: Sequence[card.Strategy], falls: Sequence[Waterfall]) -> str:
    notes = "A decode step's time is shared equally over the slots, a prefill's over the requests."
    trials = len(strategies[0].trials)
    if trials > 1:
        which = "trial of median duration" if trials % 2 else "mean of the middle trials"
        notes += f" Shown: the {which} of each strategy."
    if falls:
        notes += f" Filled ({MINUS}): time saved in a part; outlined (+): time lost."
    return notes
