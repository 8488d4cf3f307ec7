"""What a gate is shown by, as text: which rows stand in its tables, and what in their cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchbench.reports.sequential import Verdict
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Varying, spell

TITLES: Mapping[Kind, str] = {
    Kind.WORK: "Work",
    Kind.RATIO: "Ratios within a run",
    Kind.TIME: "Absolute times and rates",
}

COUNTED = ("Count or output", "Base", "New", "Change", "Verdict", "Gate")
MEASURED = (
    "Metric",
    "Base",
    "New",
    "Change",
    "95 % CI",
    "Verdict",
    "Gate",
    "Would find",
    "Needed",
)
"""Of ratios and times."""

_FINDS = "Would find: the least loss that so many samples would probably have shown."

MOST = 30
"""Rows of a table; a step summary and a comment have an end, and so has patience."""


@dataclass(frozen=True)
class Row:
    """A row of a table; ``cells`` as COUNTED or MEASURED."""

    evidence: Evidence
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """The rows of one kind of evidence, what fails first, and lines about the others."""

    kind: Kind
    head: tuple[str, ...]
    rows: Sequence[Row]
    below: Sequence[str]


def tables(gate: Gate) -> list[Rows]:
    """A table for each kind of evidence that there is any of, the strongest first."""
    found = [_counted(gate), *(_measured(gate, kind) for kind in (Kind.RATIO, Kind.TIME))]
    return [each for each in found if each.rows or each.below]


def _counted(gate: Gate) -> Rows:
    work = gate.of(Kind.WORK)
    told = [each for each in work if each.fails or each.verdict is not Verdict.SAME]
    same = len(work) - len(told)
    below: list[str] = []
    if same:
        which = f"All {same}" if not told else f"{same} other"
        below = [f"{which} counts and outputs are the same."]
        if same == 1:
            below = ["The only count is the same." if not told else "1 other count is the same."]
    return _cut(Kind.WORK, COUNTED, [Row(each, cells(each)) for each in told], below)


def _measured(gate: Gate, kind: Kind) -> Rows:
    found = gate.of(kind)
    told = any(each.smallest is not None for each in found)
    return _cut(kind, MEASURED, [Row(each, cells(each)) for each in found], [_FINDS] * told)


def _cut(kind: Kind, head: tuple[str, ...], rows: Sequence[Row], below: Sequence[str]) -> Rows:
    """What matters first, and no more rows than can be read."""
    ranked = sorted(rows, key=lambda row: _rank(row.evidence))
    left_out = len(ranked) - MOST
    more = [f"{left_out} more rows are in the JSON (--json)."] if left_out > 0 else []
    shown = ranked[:MOST]
    return Rows(kind, head, shown, [*more, *_reasons([row.evidence for row in shown]), *below])


def _reasons(shown: Sequence[Evidence]) -> list[str]:
    """Why, once for all rows of which it is true; what a count's row shows is not told again."""
    rows: dict[str, list[str]] = {}
    for each in shown:
        counted = each.kind is Kind.WORK and each.fails and isinstance(each.base, int)
        if each.why and not counted:
            rows.setdefault(each.why, []).append(each.name)
    return [
        f"{', '.join(names[:2])}{f' and {len(names) - 2} more' * (len(names) > 2)}: {why}"
        for why, names in rows.items()
    ]


def _rank(each: Evidence) -> int:
    if each.fails:
        return 0
    return (1 if each.verdict is Verdict.UNKNOWN else 2) if each.gated else 3


def cells(each: Evidence) -> tuple[str, ...]:
    """A row, as COUNTED or MEASURED."""
    return _counts(each) if each.kind is Kind.WORK else _measures(each)


def _counts(each: Evidence) -> tuple[str, ...]:
    return (
        each.name,
        spell(each.base),
        spell(each.new),
        _difference(each),
        _loud(each),
        standing(each),
    )


def _difference(each: Evidence) -> str:
    """How much a count changed; outputs only change."""
    if not (isinstance(each.base, int | float) and isinstance(each.new, int | float)):
        return "N/A"
    text = f"{each.new - each.base:+,}"
    return text if each.change is None else f"{text} ({percent(each.change)})"


def _measures(each: Evidence) -> tuple[str, ...]:
    interval = "N/A"
    if each.low is not None and each.high is not None:
        interval = f"{percent(each.low)} to {percent(each.high)}"
    unit = f" {each.unit}" if each.unit else ""
    return (
        each.name,
        spell(each.base) + unit * (each.base is not None),
        spell(each.new) + unit * (each.new is not None),
        percent(each.change),
        interval,
        _loud(each),
        standing(each),
        "N/A" if each.smallest is None else percent(each.smallest, sign=""),
        each.needed or "",
    )


def _loud(each: Evidence) -> str:
    """The verdict, in capitals where it decides against the new version, or leaves it open."""
    text = str(each.verdict)
    return text.upper() if each.fails or (each.gated and each.verdict is Verdict.UNKNOWN) else text


def standing(each: Evidence) -> str:
    """What a piece of evidence does to the answer."""
    return "FAILS" if each.fails else "gated" if each.gated else "not gated"


def percent(share: float | None, sign: str = "+") -> str:
    """A share as people read it."""
    if share is None or not math.isfinite(share):
        return "N/A"
    if abs(share) > 10:
        return f"{'>' if share > 0 else '<'} {'+' if share > 0 else '-'}1000%"
    text = f"{share:{sign}.1%}"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def varying(each: Varying) -> tuple[str, str, str]:
    """A setting in which the sides differ: its name, and their values."""
    return each.name, _setting(each.base), _setting(each.new)


def _setting(given: Any) -> str:
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, list | tuple):
        return ", ".join(map(_setting, given))
    text = spell(given) if isinstance(given, int | float | str) or given is None else str(given)
    return text if len(text) <= 80 else f"{text[:79]}…"


def sides(gate: Gate) -> list[tuple[str, str]]:
    """What the two versions are: what they share said once."""
    facts = [each.facts for each in (gate.base, gate.new)]
    names = dict.fromkeys(name for of_side in facts for name in of_side)
    shared = {name for name in names if facts[0].get(name) == facts[1].get(name)}
    rows = [
        (role, " · ".join([side.label, *_facts(side.facts, [n for n in names if n not in shared])]))
        for role, side in (("Base", gate.base), ("New", gate.new))
    ]
    both = _facts(facts[0], [name for name in names if name in shared])
    return [*rows, ("Both", " · ".join(both))] if both else rows


def _facts(facts: Mapping[str, str | None], names: Sequence[str]) -> list[str]:
    return [f"{name} {facts[name]}" for name in names if facts.get(name) is not None]


def last_lines(gate: Gate) -> list[str]:
    """Notes, and how long it took."""
    took = [] if gate.seconds is None else [f"Took {gate.seconds:,.0f} s."]
    return [*gate.notes, *took]
