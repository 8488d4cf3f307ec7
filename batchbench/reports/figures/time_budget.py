"""Where the time went: each strategy's wall time in its parts, and what each part saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batchbench.reports.figures.card import (
    FAINT,
    HELD,
    INK,
    QUIET,
    WIDE,
    Card,
    Entry,
    Strategy,
    Unit,
    add_legend,
    fit_text,
    make_card,
    make_entry,
    strip_axes,
    text_extent,
)
from batchbench.reports.text import spell_percent
from batchbench.reports.time_budget import CAUSES, NAMES, PARTS, TimeBudget, typical_budget

_ROW, _BAR = 0.62, 0.3  # inches: a strategy's row, and the bar at its lower end

_STEP = 0.25  # inches: a row of a waterfall

_LABELS = 2.05  # inches left of a waterfall's bars

_SHOWN = 0.005
"""Effects smaller than this share of the baseline's time are drawn together."""

_LOOKS: dict[str, dict[str, Any]] = {
    "finished_s": HELD,
    "empty_s": {"facecolor": "#ffffff", "edgecolor": "#b0b0b0", "linewidth": 0.8},
    "prefill_padding_s": {**HELD, "hatch": "xxxx"},
    "stalled_s": {**HELD, "hatch": "|||||"},
    "waiting_s": {**HELD, "hatch": "...", "facecolor": "#ffffff"},
    "host_s": {"facecolor": "#8c8c8c", "linewidth": 0.0},
    "residual_s": {"facecolor": INK, "linewidth": 0.0},
}
"""Parts that look the same under each strategy; what is useful wears its colour."""

_TINTS = {"useful_decode_s": 0.25, "prefill_useful_s": -0.55}

_STACKED = sorted(PARTS, key=lambda part: part not in _TINTS)
"""What is useful stands first."""

Accounted = tuple[Strategy, TimeBudget]


def draw_account(strategies: Sequence[Strategy], title: str) -> Figure:
    """Stacked bars of each strategy's wall time, and a waterfall from the first to each other.

    A strategy that shows no steps has a row that says so.
    """
    found = [(strategy, typical_budget(strategy.trials)) for strategy in strategies]
    accounts = [(strategy, account) for strategy, account in found if account is not None]
    longest = max((account.wall_s for _, account in accounts), default=1.0)
    unit = Unit.of(strategies, longest * 1e9)
    entries = _entries(accounts)
    falls = [
        _Fall.between(accounts[0], candidate)
        for candidate in accounts[1:]
        if accounts[0][0].index == 0
    ]
    bars = 0.24 * -(-len(entries) // 3) + 0.08
    tall = len(strategies) * _ROW
    body = bars + tall + 0.42 + sum(fall.height for fall in falls)
    card = make_card(_headline(accounts), title, body, _notes(strategies, falls))
    add_legend(card, entries)
    _stacks(card, bars, found, unit, longest)
    top = bars + tall + 0.42
    for fall in falls:
        fall.draw(card, top, unit)
        top += fall.height
    return card.figure


def _stacks(
    card: Card,
    top: float,
    found: Sequence[tuple[Strategy, TimeBudget | None]],
    unit: Unit,
    longest: float,
) -> None:
    """A bar a strategy, one after another its parts; the y axis counts inches downwards."""
    axes = card.axes(0, top, WIDE, len(found) * _ROW + 0.05)
    scale = 1e9 / unit.ns
    for strategy, account in found:
        if account is None:
            card.label(top + strategy.index * _ROW + 0.2, strategy, "shows no steps: no account")
            continue
        useful = (account.useful_decode_s + account.prefill_useful_s) / account.wall_s
        detail = f"{unit.text(round(account.wall_s * 1e9))}, {spell_percent(useful)} of it useful"
        card.label(top + strategy.index * _ROW + 0.2, strategy, detail)
        y, left = (strategy.index + 1) * _ROW - _BAR / 2, 0.0
        for part in _STACKED:
            width = max(getattr(account, part), 0.0) * scale
            gid = f"{part}-{strategy.index}"
            axes.barh(y, width, _BAR, left=left, gid=gid, **_look(part, strategy))
            _share(axes, part, (left, y, width), width / longest / scale, account.wall_s * scale)
            left += width
    axes.set(xlim=(0, longest * scale * 1.002), ylim=(len(found) * _ROW + 0.05, 0), yticks=[])
    axes.set_xlabel(f"{'steps' if unit.name == 'steps' else f'time in {unit.name}'}")
    axes.locator_params(axis="x", nbins=8)
    strip_axes(axes, "bottom")


def _share(
    axes: Axes, part: str, place: tuple[float, float, float], of_axis: float, wall: float
) -> None:
    """A part's share of its strategy's time, where its bar has room for it."""
    left, y, width = place
    text = spell_percent(width / wall)
    if text_extent(text, 8.5) + 6 > of_axis * WIDE * 72:
        return
    dark = part in ("prefill_useful_s", "residual_s")
    style: dict[str, Any] = {"ha": "center", "va": "center", "size": 8.5}
    if _LOOKS.get(part, {}).get("hatch"):
        style["bbox"] = {"fc": "#ffffff", "ec": "none", "pad": 1.2, "alpha": 0.9}
    axes.text(left + width / 2, y, text, color="#ffffff" if dark else INK, **style)


def _look(part: str, strategy: Strategy) -> dict[str, Any]:
    if part in _TINTS:
        return {"facecolor": strategy.tint(_TINTS[part]), "linewidth": 0.0}
    return _LOOKS[part]


def _entries(accounts: Sequence[Accounted]) -> list[Entry]:
    """What colours and hatches mean; only those that occur."""
    entries: list[Entry] = []
    strategies = [strategy for strategy, _ in accounts]
    for part in PARTS:
        if not any(getattr(a, part) >= a.wall_s / 1000 for _, a in accounts):
            continue
        if part in _TINTS:
            entries.append(make_entry(NAMES[part], strategies, _TINTS[part]))
        else:
            entries.append((NAMES[part], (Patch(**_LOOKS[part]),)))
    return entries


@dataclass(frozen=True, eq=False)
class _Fall:
    """From the baseline's wall time to a candidate's, effect by effect."""

    baseline: Accounted
    candidate: Accounted
    effects: Sequence[tuple[str, float]]  # what it is, and the seconds that it saved

    @classmethod
    def between(cls, baseline: Accounted, candidate: Accounted) -> _Fall:
        """Effects too small to be seen are one; together they are the whole difference."""
        before, after = baseline[1], candidate[1]
        each = [
            (_effect(part, saved), saved)
            for part in PARTS
            for saved in [getattr(before, part) - getattr(after, part)]
        ]
        shown = [(name, saved) for name, saved in each if abs(saved) >= _SHOWN * before.wall_s]
        rest = sum(saved for name, saved in each if (name, saved) not in shown)
        shown.sort(key=lambda effect: -effect[1])
        if abs(rest) > _SHOWN / 10 * before.wall_s:
            shown.append(("all else", rest))
        return cls(baseline, candidate, shown)

    @property
    def height(self) -> float:
        """Inches of its rows, and above them its name."""
        return 0.5 + (len(self.effects) + 2) * _STEP

    def draw(self, card: Card, top: float, unit: Unit) -> None:
        """Below a line that says between whom it stands a row an effect, between both ends."""
        top += 0.4
        (first, before), (last, after) = self.baseline, self.candidate
        names = fit_text(f"From {first.name} to {last.name}", 300, 10.5, "bold")
        card.write(0, top, names, size=10.5, weight="bold", va="baseline")
        saved = before.wall_s - after.wall_s
        difference = unit.text(round(abs(saved) * 1e9))
        what = f"{difference} {'saved' if saved > 0 else 'lost'}" if saved else "no difference"
        behind = (text_extent(names, 10.5, "bold") + 10) / 72
        card.write(behind, top, what, size=9.5, color=QUIET, va="baseline")
        rows = len(self.effects) + 2
        axes = card.axes(_LABELS, top + 0.1, WIDE - _LABELS - 0.95, rows * _STEP)
        scale = 1e9 / unit.ns
        bar: dict[str, Any] = {"height": 0.66}
        at, reach = before.wall_s, [before.wall_s, after.wall_s]
        axes.barh(0, before.wall_s * scale, color=first.tint(0.25), **bar)
        self._write(axes, 0, before.wall_s * scale, unit.text(round(before.wall_s * 1e9)))
        for row, (_, gain) in enumerate(self.effects, 1):
            colour = last.tint(0.25)
            look: dict[str, Any] = {"facecolor": colour if gain >= 0 else "#ffffff"}
            look |= {"edgecolor": colour, "linewidth": 1.2}
            gid = f"effect-{last.index}-{row}"
            axes.barh(row, gain * scale, left=(at - gain) * scale, gid=gid, **look, **bar)
            edge = max(at, at - gain) * scale
            axes.plot([at * scale] * 2, [row - 1.33, row + 0.33], color=QUIET, lw=0.7)
            sign = "\N{MINUS SIGN}" if gain >= 0 else "+"
            self._write(axes, row, edge, f"{sign}{unit.text(round(abs(gain) * 1e9))}")
            at -= gain
            reach.append(at)
        axes.plot([at * scale] * 2, [rows - 2.33, rows - 0.67], color=QUIET, lw=0.7)
        axes.barh(rows - 1, after.wall_s * scale, color=last.tint(0.25), **bar)
        self._write(axes, rows - 1, after.wall_s * scale, unit.text(round(after.wall_s * 1e9)))
        labels = [fit_text(first.name, _LABELS * 72 - 12, 9)]
        labels += [name for name, _ in self.effects]
        labels.append(fit_text(last.name, _LABELS * 72 - 12, 9))
        axes.set(xlim=(min(0.0, *reach) * scale, max(reach) * scale), ylim=(rows - 0.5, -0.5))
        axes.set_yticks(range(rows), labels)
        axes.set_xticks([])
        axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
        axes.tick_params(axis="y", length=0)
        for label in (axes.get_yticklabels()[0], axes.get_yticklabels()[-1]):
            label.set_fontweight("bold")
        strip_axes(axes)
        axes.set_yticks(range(rows), labels)

    @staticmethod
    def _write(axes: Axes, row: int, edge: float, text: str) -> None:
        style: dict[str, Any] = {"size": 9, "va": "center", "weight": "bold"}
        axes.annotate(text, (edge, row), (5, 0), textcoords="offset points", **style)


def _headline(accounts: Sequence[Accounted]) -> str:
    """What of the baseline's time went where it need not, or what saved the most."""
    if not accounts:
        return "No strategy shows its steps: there is no account of the time"
    strategy, account = accounts[0]
    if len(accounts) == 1 or strategy.index:
        useful = (account.useful_decode_s + account.prefill_useful_s) / account.wall_s
        return f"{spell_percent(useful)} of the time of {strategy.called} is useful work"
    candidate, after = accounts[-1]
    saved = account.wall_s - after.wall_s
    if abs(saved) < _SHOWN * account.wall_s:
        return f"{candidate.called} takes as long as {strategy.called}"
    unit = Unit.of([strategy], account.wall_s * 1e9)
    sign = 1 if saved > 0 else -1
    most = max(PARTS, key=lambda part: sign * (getattr(account, part) - getattr(after, part)))
    difference = unit.text(round(abs(saved) * 1e9))
    if saved > 0:
        whole = unit.text(round(account.wall_s * 1e9))
        text = f"{candidate.called} saves {difference} of {strategy.called}'s {whole}"
        return f"{text}, above all on {CAUSES[most]}"
    text = f"{candidate.called} takes {difference} longer than {strategy.called}"
    return f"{text}, above all for {CAUSES[most]}"


def _effect(part: str, saved: float) -> str:
    """A part within a waterfall: the same useful tokens can only cost more or less."""
    if part != "useful_decode_s":
        return NAMES[part]
    return "cheaper decode steps" if saved >= 0 else "dearer decode steps"


def _notes(strategies: Sequence[Strategy], falls: Sequence[_Fall]) -> str:
    notes = "A decode step's time is shared equally over the slots, a prefill's over the requests."
    trials = len(strategies[0].trials)
    if trials > 1:
        which = "the trial of median duration" if trials % 2 else "the mean of the middle trials"
        notes += f" Shown is {which} of each strategy."
    if falls:
        notes += " Filled (\N{MINUS SIGN}) is what was saved of a part, outlined (+) what was lost."
    return notes
