"""The account of the time on a terminal: a line on what was saved, and a table of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from batchbench.reports.result import Result
from batchbench.reports.text import decimals_of, fixed
from batchbench.reports.time_budget import CAUSES, NAMES

_SAVED = CAUSES | {"useful_decode_s": "cheaper steps for the same tokens"}

_LOST = CAUSES | {"useful_decode_s": "dearer steps for the same tokens"}

MENTIONED = 0.05
"""Effects smaller than this share of the whole difference are not put into words."""

EQUAL = 0.005
"""A difference smaller than this share of the baseline's time has no causes worth words."""


def causes(result: Result) -> list[str]:
    """A line a candidate: what the time that it saved or lost was."""
    explain = result.data["explain"]
    lines = []
    for fall in explain["waterfall"]:
        whole = explain["strategies"][fall["baseline"]]["wall_s"]
        if abs(fall["saved_s"]) >= EQUAL * whole:
            lines.append(_cause(fall, several=len(explain["waterfall"]) > 1))
    return lines


def _cause(fall: Mapping[str, Any], *, several: bool) -> str:
    whole = fall["saved_s"]
    sign = 1 if whole > 0 else -1
    decimals = decimals_of(max(abs(whole), *(abs(step["saved_s"]) for step in fall["steps"])))

    def spelt(sign: int, words: Mapping[str, str]) -> str:
        effects = sorted((-sign * step["saved_s"], step["part"]) for step in fall["steps"])
        told = [(-s, part) for s, part in effects if -s >= MENTIONED * abs(whole)]
        return ", ".join(f"{s:,.{decimals}f} s {words[part]}" for s, part in told)

    words, other_words = (_SAVED, _LOST) if sign > 0 else (_LOST, _SAVED)
    verb, other = ("saved", "lost") if sign > 0 else ("lost", "saved")
    by = f" by {fall['candidate']}" if several else ""
    text = f"Of the {abs(whole):,.{decimals}f} s {verb}{by}: {spelt(sign, words)}"
    against = spelt(-sign, other_words)
    return f"{text}; {other}: {against}." if against else f"{text}."


def account_table(result: Result) -> Table:
    """Part × strategies in seconds, with shares where there is room; of two, what was saved."""
    explain = result.data["explain"]
    accounts: Mapping[str, Any] = explain["strategies"]
    shares, saved = len(accounts) < 3, len(explain["waterfall"]) == len(accounts) - 1 == 1
    grid = Table(
        title="Where the time went, in seconds",
        caption="; ".join(_notes(result)),
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    grid.add_column("Part", overflow="fold")
    for name in accounts:
        grid.add_column(name.replace("-", "-\n"), justify="right", overflow="fold")
        if shares:
            grid.add_column("%", justify="right", style="dim", overflow="fold")
    if saved:
        grid.add_column("saved", justify="right", overflow="fold")
    shortest = min((a["wall_s"] for a in accounts.values() if a), default=1.0)
    decimals = max(2, decimals_of(shortest))
    for part, label in {**NAMES, "wall_s": "wall time"}.items():
        each = {name: _value(account, part) for name, account in accounts.items()}
        if part not in ("residual_s", "wall_s") and not any(each.values()):
            continue
        if part == "wall_s":
            grid.add_section()
        cells = [label.capitalize()]
        for name, value in each.items():
            cells.append("N/A" if value is None else fixed(value, decimals))
            if shares:
                whole = accounts[name]["wall_s"] if accounts[name] else 0.0
                cells.append("" if value is None or not whole else f"{100 * value / whole:.1f}")
        if saved:
            before, after = each.values()
            assert before is not None  # there is a waterfall
            assert after is not None
            cells.append(fixed(before - after, decimals, sign="+"))
        grid.add_row(*cells)
    return grid


def _value(account: Mapping[str, Any] | None, part: str) -> float | None:
    if account is None:
        return None
    value: float = account["wall_s"] if part == "wall_s" else account["parts"][part]
    return value


def _notes(result: Result) -> list[str]:
    accounts = result.data["explain"]["strategies"]
    trials = len(result.recordings[result.names[0]])
    notes = []
    if trials > 1:
        notes.append("the trial of median duration" if trials % 2 else "mean of the middle trials")
    warm_up = next((a["warm_up_s"] for a in accounts.values() if a), None)
    if warm_up is not None:
        notes.append(f"before all trials a warm-up of {warm_up:.{decimals_of(warm_up)}f} s")
    hidden = [name for name, account in accounts.items() if account is None]
    if hidden:
        notes.append(f"{', '.join(hidden)} shows no steps")
    return notes
