"""What a gate is shown by, as text: which rows stand in its tables, and what in their cells."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from batchbench.reports.formats.markdown import escape, fenced, table
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.baseline import OLD_DAYS, Baseline, speedup
from batchbench.studies.gate.evidence import (
    CANNOT_TELL,
    Answer,
    Evidence,
    Gate,
    Kind,
    Varying,
    spell,
)

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


_STYLES = {Answer.PASSED: "bold green", Answer.FAILED: "bold red", Answer.UNKNOWN: "bold yellow"}


def render_terminal(gate: Gate, *, strict: bool = False) -> RenderableType:
    """The sentence, in a frame unless it passed, and all that it rests on.

    Args:
        strict: whether *cannot tell* ends with an exit code of its own.
    """
    parts: list[RenderableType] = [_answer(gate, strict=strict), Text()]
    identity = Table.grid(padding=(0, 2, 0, 0))
    for role, text in sides(gate):
        identity.add_row(Text(role, style="bold"), Text(text, overflow="fold"))
    parts += [identity, Text()]
    for title, rows in (("settings", gate.settings), ("environment", gate.environment)):
        if rows:
            parts += [_differences(f"Differing {title}", rows), Text()]
    for found in tables(gate):
        parts += [*_evidence(found), Text()]
    if not gate.evidence:
        parts += [Text("Nothing was compared."), Text()]
    parts += [Text(line, style="dim") for line in last_lines(gate)]
    return Group(*parts)


def _answer(gate: Gate, *, strict: bool) -> RenderableType:
    style = _STYLES[gate.answer]
    if gate.answer is Answer.PASSED:
        return Text(gate.sentence, style=style)
    text = Text(gate.sentence, style=style)
    if gate.answer is Answer.UNKNOWN:
        code = f"Exit code {CANNOT_TELL}." if strict else "Exit code 0; --strict makes it 3."
        text.append(f"\nThis is no pass: a loss may be there that was not seen. {code}")
    return Panel(text, box=box.HEAVY, style=style, padding=(0, 1))


def _differences(title: str, rows: Sequence[Varying]) -> Table:
    grid = _grid(title, ("Name", "Base", "New"), left=3)
    for each in rows:
        grid.add_row(*map(Text, varying(each)))
    return grid


def _evidence(found: Rows) -> list[RenderableType]:
    parts: list[RenderableType] = []
    title = TITLES[found.kind]
    if found.rows and found.kind is Kind.WORK:
        grid = _grid(title, ("Count\nor output", "Base", "New", "Change", "Verdict"), left=1)
        for row in found.rows:
            name, base, new, change, verdict, gate = row.cells
            grid.add_row(
                *map(Text, (name, base, new, change)), _reported(row.evidence, verdict, gate)
            )
        parts.append(grid)
    elif found.rows:
        parts.append(_measured_line(title, found))
    else:
        parts.append(Text(title, style="bold"))
    return [*parts, *(Text(line) for line in found.below)]


def _measured_line(title: str, found: Rows) -> Table:
    """Two lines a row, so that it fits into 80 columns."""
    head = ("Metric", "Base\nnew", "Change\n95 % CI", "Verdict", "Would find\nneeded")
    grid = _grid(title, head, left=1)
    for row in found.rows:
        name, base, new, change, interval, verdict, gate, smallest, needed = row.cells
        grid.add_row(
            Text(name.replace(".", ".\n", 1)),
            Text(f"{base}\n{new}"),
            Text(f"{change}\n{interval}"),
            _reported(row.evidence, verdict, gate),
            Text(f"{smallest}\n{needed}".rstrip()),
        )
    return grid


def _reported(each: Evidence, verdict: str, gate: str) -> Text:
    text = Text(f"{verdict}\n{gate}")
    if each.fails:
        text.stylize("bold red")
    elif each.verdict is Verdict.UNKNOWN:
        text.stylize("bold yellow" if each.gated else "yellow")
    elif each.verdict is Verdict.FASTER:
        text.stylize("green")
    return text


def _grid(title: str, head: Sequence[str], *, left: int) -> Table:
    grid = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for i, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    return grid


_ALERTS = {Answer.PASSED: "TIP", Answer.FAILED: "CAUTION", Answer.UNKNOWN: "WARNING"}
"""Coloured boxes, of GitHub's and GitLab's Markdown; elsewhere they are plain quotations."""


def render_markdown(gate: Gate, *, strict: bool = False) -> str:
    """The sentence, what varies, the evidence, how to do it again.

    Args:
        strict: whether *cannot tell* ends with an exit code of its own.
    """
    return "\n".join(_lines(gate, strict=strict)).rstrip() + "\n"


def _lines(gate: Gate, *, strict: bool) -> Iterator[str]:
    # By this line a comment of an earlier run is found again and replaced.
    yield from (
        f"<!-- batchbench {gate.command} -->",
        f"### batchbench {gate.command}",
        "",
    )
    yield from (f"> [!{_ALERTS[gate.answer]}]", f"> **{escape(gate.sentence)}**")
    if gate.answer is Answer.UNKNOWN:
        code = "Exit code 3." if strict else "Exit code 0; `--strict` makes it 3."
        yield from (">", f"> This is no pass: a loss may be there that was not seen. {code}")
    yield ""
    yield from table(["Side", "What it is"], sides(gate), left=2)
    for title, rows in (("settings", gate.settings), ("environment", gate.environment)):
        if rows:
            yield from (f"**Differing {title}**", "")
            yield from table(
                ["Name", "Base", "New"], [list(varying(each)) for each in rows], left=3
            )
    for found in tables(gate):
        yield from (f"**{TITLES[found.kind]}**", "")
        if found.rows:
            # A column that no row has anything in is not shown.
            kept = [i for i in range(len(found.head)) if any(row.cells[i] for row in found.rows)]
            rows_shown = [[row.cells[i] for i in kept] for row in found.rows]
            yield from table([found.head[i] for i in kept], rows_shown, left=1)
        for line in found.below:
            yield from (escape(line), "")
    if not gate.evidence:
        yield from ("Nothing was compared.", "")
    for line in last_lines(gate):
        yield from (f"- {escape(line)}",)
    yield from ("", "<details><summary>To do it again</summary>", "")
    yield from (*fenced(gate.typed), "", "</details>")


def render_json(gate: Gate, *, strict: bool = False) -> str:
    """What has no meaning is null, never NaN; what JSON does not know is text."""
    data = {**gate.as_data(), "exit_code": gate.exit_code(strict=strict)}
    return json.dumps(_told(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _told(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def render_baseline(baseline: Baseline) -> RenderableType:
    """Age, machine, the command that made it; then the work, and the ratios with their scatter."""
    data, processes = baseline.data, baseline.processes
    environment, model = data["environment"], data["model"]
    packages = ", ".join(f"{n} {v}" for n, v in environment["packages"].items())
    age = Text(f"Baseline, {baseline.age} ({data['created_at']})", "bold")
    if baseline.age_days > OLD_DAYS:
        age.stylize("bold yellow")
    commit = environment.get("git_commit") or "N/A"
    lines = (
        f"{model['name']} · {model['device']} {model['dtype']} · {baseline.machine}",
        f"batchbench {data['batchbench_version']} · commit {commit} · {packages}",
        f"{len(processes)} fresh processes · {baseline.throughput(baseline.candidate):,.0f} "
        f"tok/s under {baseline.candidate}",
    )
    grid = Table(pad_edge=False)
    grid.add_column("Faster than", overflow="fold")
    for title in ("Ratio", "Scatter", "Processes"):
        grid.add_column(title, justify="right")
    for twin in data["lanes"][1:]:
        scatter = float(np.std([p.ratios[twin] for p in processes], ddof=1))
        grid.add_row(
            twin, f"{speedup(processes, twin):.3f}×", f"{scatter:.1%}", str(len(processes))
        )
    work = Table(pad_edge=False)
    work.add_column("Counted of", overflow="fold")
    for title in ("Forward passes", "Useful slot-steps", "Idle", "Outputs"):
        work.add_column(title, justify="right")
    for name, counts in data["work"].items():
        figures = ("forward_passes", "useful_slot_steps", "idle_slot_steps")
        told = [f"{counts[f]:,}" if f in counts else "N/A" for f in figures]
        work.add_row(name, *told, (counts["output_digest"] or "N/A")[:8])
    return Group(
        age, *map(Text, lines), Text(), grid, Text(), work, Text(f"Again: {data['command']}")
    )
