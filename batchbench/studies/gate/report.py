"""A gate as terminal text, Markdown, JSON, JUnit XML and GitHub annotations; and a baseline."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from batchbench.json_file import json_text
from batchbench.reports.formats.markdown import escape, fenced, table
from batchbench.reports.formats.terminal import make_table
from batchbench.reports.statistics import Verdict
from batchbench.reports.text import interval_percent, percent, plural
from batchbench.studies.gate.check import OLD_DAYS, Baseline
from batchbench.studies.gate.evidence import (
    CANNOT_TELL,
    Answer,
    Evidence,
    Gate,
    Kind,
    describe,
    spell,
)

TITLES: Mapping[Kind, str] = {
    Kind.WORK: "Counts and outputs",
    Kind.RATIO: "Ratios within a run",
    Kind.TIME: "Absolute times and rates",
}

_COUNTED = ("Count or output", "Base", "New", "Change", "Verdict", "Gate")

_MEASURED = (
    *("Metric", "Base", "New", "Change", "95 % CI", "Verdict", "Gate"),
    *("Smallest detectable loss", "Samples needed"),
)

_DIFFERING = ("Name", "Base", "New")

_DETECTABLE = "Detectable: the smallest loss that this many samples would probably have shown."

MOST_ROWS = 30
"""Rows of a table; step summaries and comments have a limit."""

_NO_PASS = "This is not a pass: a loss may exist."


def tables(
    gate: Gate, *, verbose: bool = False
) -> Iterator[tuple[Kind, Sequence[Evidence], Sequence[str]]]:
    """Yield each kind of evidence with its rows, failures first, and with lines below them.

    ``verbose`` includes unchanged metrics.
    """
    verbose = verbose or not gate.of(Kind.WORK)  # another tool's files hold times only
    for kind in Kind:
        evidence, counted = gate.of(kind), kind is Kind.WORK
        alone = not counted and len(evidence) == 1
        chosen = [item for item in evidence if verbose or alone or _matters(item)]
        chosen.sort(key=lambda item: (not item.fails, not item.is_undecided, not item.gated))
        shown, rest = chosen[:MOST_ROWS], len(evidence) - len(chosen)
        below = _reasons(shown)
        if len(chosen) > MOST_ROWS:
            below.insert(0, f"{plural(len(chosen) - MOST_ROWS, 'more row')} in the JSON (--json).")
        if not counted and any(item.smallest is not None for item in shown):
            below.append(_DETECTABLE)
        if rest and counted:
            which = f"{rest} other" if shown else "The only" if rest == 1 else f"All {rest}"
            what = "counts and outputs are" if rest > 1 else "count is"
            below.append(f"{which} {what} the same.")
        elif rest:
            others = plural(rest, "other metric" if shown else "metric")
            below.append(f"No change was shown for {others}; --verbose lists all.")
        if shown or below:
            yield kind, shown, below


def _matters(evidence: Evidence) -> bool:
    if evidence.kind is Kind.WORK:
        return evidence.fails or evidence.verdict is not Verdict.SAME
    changed = evidence.verdict not in (Verdict.SAME, Verdict.UNKNOWN)
    return evidence.gated or changed or evidence.metric.startswith("speedup")


def _reasons(shown: Sequence[Evidence]) -> list[str]:
    """Return each reason once, with the rows that it is for; a count's row shows it already."""
    rows: dict[str, list[str]] = {}
    for evidence in shown:
        counted = evidence.kind is Kind.WORK and evidence.fails and isinstance(evidence.base, int)
        if evidence.why and not counted:
            rows.setdefault(evidence.why, []).append(evidence.name)
    return [
        f"{', '.join(names[:2])}{f' and {len(names) - 2} more' * (len(names) > 2)}: {why}"
        for why, names in rows.items()
    ]


def cells(evidence: Evidence) -> tuple[str, ...]:
    verdict = str(evidence.verdict)
    verdict = verdict.upper() if evidence.fails or evidence.is_undecided else verdict
    gate = "FAILS" if evidence.fails else "gated" if evidence.gated else "not gated"
    values, change = (evidence.base, evidence.new), percent(evidence.change, 1, "+")
    base, new = map(spell, values)
    if evidence.kind is Kind.WORK:
        if isinstance(values[0], int | float) and isinstance(values[1], int | float):
            share = "" if evidence.change is None else f" ({change})"
            change = f"{values[1] - values[0]:+,}{share}"
        else:
            change = "N/A"
        return evidence.name, base, new, change, verdict, gate
    unit = f" {evidence.unit}" if evidence.unit else ""
    return (
        evidence.name,
        base + unit * (values[0] is not None),
        new + unit * (values[1] is not None),
        change,
        interval_percent(evidence.low, evidence.high),
        verdict,
        gate,
        percent(evidence.smallest, 1),
        evidence.needed or "",
    )


def _differing(gate: Gate) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield a title and rows for the settings and facts that differ."""
    for part, found in (("settings", gate.settings), ("environment", gate.environment)):
        if found:
            rows = [[d.name, _spell_setting(d.base), _spell_setting(d.new)] for d in found]
            yield f"Differing {part}", rows


def _spell_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_spell_setting, value))
    text = spell(value) if isinstance(value, int | float | str) or value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _sides(gate: Gate) -> list[tuple[str, str]]:
    """Return each side with its own facts, and a row of those that both share."""
    base, new = gate.base.facts, gate.new.facts
    shared = {name: fact for name, fact in base.items() if new.get(name) == fact}

    def spelled(facts: Mapping[str, str | None]) -> list[str]:
        return [f"{name} {fact}" for name, fact in facts.items() if fact is not None]

    rows = []
    for role, side in (("Base", gate.base), ("New", gate.new)):
        own = {name: fact for name, fact in side.facts.items() if name not in shared}
        rows.append((role, " · ".join([side.label, *spelled(own)])))
    return [*rows, ("Both", " · ".join(spelled(shared)))] if spelled(shared) else rows


def _last_lines(gate: Gate) -> list[str]:
    return [*gate.notes, *([] if gate.seconds is None else [f"Took {gate.seconds:,.0f} s."])]


# Terminal

_STYLES = {Answer.PASSED: "bold green", Answer.FAILED: "bold red", Answer.UNKNOWN: "bold yellow"}


def render_terminal(gate: Gate, *, strict: bool = False, verbose: bool = False) -> RenderableType:
    parts: list[RenderableType] = [_answer(gate, strict=strict), Text()]
    identity = Table.grid(padding=(0, 2, 0, 0))
    for role, text in _sides(gate):
        identity.add_row(Text(role, style="bold"), Text(text, overflow="fold"))
    parts += [identity, Text()]
    for title, differing in _differing(gate):
        parts += [make_table(title, _DIFFERING, differing, left=3), Text()]
    for kind, rows, below in tables(gate, verbose=verbose):
        parts.append(_table(kind, rows) if rows else Text(TITLES[kind], style="bold"))
        parts += [*map(Text, below), Text()]
    if not gate.evidence:
        parts += [Text("Nothing was compared."), Text()]
    return Group(*parts, *(Text(line, style="dim") for line in _last_lines(gate)))


def _answer(gate: Gate, *, strict: bool) -> RenderableType:
    style = _STYLES[gate.answer]
    text = Text(gate.sentence, style=style)
    if gate.answer is Answer.PASSED:
        return text
    if gate.answer is Answer.UNKNOWN:
        code = f"Exit code {CANNOT_TELL}." if strict else "Exit code 0; --strict makes it 3."
        text.append(f"\n{_NO_PASS} {code}")
    return Panel(text, box=box.HEAVY, style=style, padding=(0, 1))


def _table(kind: Kind, rows: Sequence[Evidence]) -> Table:
    """Return a table in which two cells share a column, so that it fits into 60 characters."""
    limits = any(one.smallest is not None or one.needed for one in rows)
    head = ["Count\nor output", "Base", "New", "Change", "Verdict"]
    if kind is not Kind.WORK:
        head = ["Metric", "Base\nnew", "Change\n95 % CI", "Verdict"]
        head += ["Detectable\nneeded"] * limits
    grid = make_table(TITLES[kind], head, [])
    for evidence in rows:
        style = ""
        if evidence.fails:
            style = "bold red"
        elif evidence.verdict is Verdict.UNKNOWN:
            style = "bold yellow" if evidence.gated else "yellow"
        elif evidence.verdict is Verdict.FASTER:
            style = "green"
        if kind is Kind.WORK:
            *row, verdict, gate = cells(evidence)
            grid.add_row(*map(Text, row), Text(f"{verdict}\n{gate}", style=style))
            continue
        name, base, new, change, interval, verdict, gate, *more = cells(evidence)
        grid.add_row(
            Text(name.replace(".", ".\n", 1)),
            Text(f"{base}\n{new}"),
            Text(f"{change}\n{interval}"),
            Text(f"{verdict}\n{gate}", style=style),
            *[Text("\n".join(more).rstrip())] * limits,
        )
    return grid


# Markdown and JSON

_ALERTS = {Answer.PASSED: "TIP", Answer.FAILED: "CAUTION", Answer.UNKNOWN: "WARNING"}
"""Coloured boxes in the Markdown of GitHub and GitLab; elsewhere they are plain quotations."""


def render_markdown(gate: Gate, *, strict: bool = False, verbose: bool = False) -> str:
    return "\n".join(_lines(gate, strict=strict, verbose=verbose)).rstrip() + "\n"


def _lines(gate: Gate, *, strict: bool, verbose: bool) -> Iterator[str]:
    # The first line identifies a comment of an earlier run, which is to be replaced.
    yield from (f"<!-- batchbench {gate.command} -->", f"### batchbench {gate.command}", "")
    yield from (f"> [!{_ALERTS[gate.answer]}]", f"> **{escape(gate.sentence)}**")
    if gate.answer is Answer.UNKNOWN:
        code = "Exit code 3." if strict else "Exit code 0; `--strict` makes it 3."
        yield from (">", f"> {_NO_PASS} {code}")
    yield ""
    yield from table(["Side", "Version"], _sides(gate), left=2)
    for title, differing in _differing(gate):
        yield from (f"**{title}**", "")
        yield from table(_DIFFERING, differing, left=3)
    for kind, rows, below in tables(gate, verbose=verbose):
        yield from (f"**{TITLES[kind]}**", "")
        if rows:
            heads = _COUNTED if kind is Kind.WORK else _MEASURED
            columns = list(zip(heads, *map(cells, rows), strict=True))
            head, *body = zip(*(column for column in columns if any(column[1:])), strict=True)
            yield from table(head, body, left=1)
        for line in below:
            yield from (escape(line), "")
    if not gate.evidence:
        yield from ("Nothing was compared.", "")
    yield from (f"- {escape(line)}" for line in _last_lines(gate))
    yield from ("", "<details><summary>Command</summary>", "")
    yield from (*fenced(gate.typed), "", "</details>")


def render_json(gate: Gate, *, strict: bool = False) -> str:
    """Return JSON; a number without meaning is null, and values unknown to JSON are text."""
    text = json.dumps({**gate.as_data(), "exit_code": gate.exit_code(strict=strict)}, default=str)
    return json_text(json.loads(text, parse_constant=lambda _: None))


# JUnit XML, with the elements and attributes of Jenkins' xUnit plugin (its junit-10.xsd)

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(gate: Gate, *, strict: bool = False) -> bytes:
    """Return a test suite for each kind of evidence, with a test case for each piece.

    Failing evidence is a failure; gated evidence without a verdict is skipped, or a failure if
    strict; other evidence passes and has its row as output. If no piece of evidence has the reason
    for *cannot tell*, a suite ``gate`` does, so there is always a test case.
    """
    suites = {
        str(kind): [_case(evidence, strict=strict) for evidence in gate.of(kind)] for kind in Kind
    }
    if gate.answer is Answer.UNKNOWN and (gate.unsure or not gate.undecided):
        case = _named("answer", "gate")
        _outcome(case, "failure" if strict else "skipped", gate.sentence, gate.sentence)
        suites["gate"] = [case]
    root = ElementTree.Element("testsuites", name=_xml(f"batchbench {gate.command}"))
    if gate.seconds is not None:
        root.set("time", f"{gate.seconds:.3f}")
    for name, cases in suites.items():
        if cases:
            suite = ElementTree.SubElement(root, "testsuite", name=f"batchbench.{name}")
            suite.extend(cases)
            _count(suite)
    _count(root)
    del root.attrib["skipped"]  # testsuites has no such attribute
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _count(element: ElementTree.Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        element.set(name, str(sum(1 for _ in element.iter(tag))))
    element.set("errors", "0")


def _case(evidence: Evidence, *, strict: bool) -> ElementTree.Element:
    case = _named(evidence.name, evidence.kind.value)
    head = _COUNTED if evidence.kind is Kind.WORK else _MEASURED
    lines = [f"{TITLES[evidence.kind]}: {describe(evidence)}"]
    lines += [f"{name}: {cell}" for name, cell in zip(head, cells(evidence), strict=True) if cell]
    details = "\n".join([*lines, *([evidence.why] if evidence.why else [])])
    if evidence.fails:
        _outcome(case, "failure", describe(evidence), details)
    elif evidence.is_undecided:
        why = f"cannot tell: {evidence.why or 'is too uncertain'}"
        _outcome(case, "failure" if strict else "skipped", why, details)
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(details)
    return case


def _named(name: str, suite: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", name=_xml(name), classname=f"batchbench.{suite}")


def _outcome(case: ElementTree.Element, tag: str, message: str, details: str) -> None:
    element = ElementTree.SubElement(case, tag, message=_xml(message), type="batchbench")
    element.text = _xml(details)


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)


# Annotations

MOST_ANNOTATIONS = 5


def render_annotations(gate: Gate, *, strict: bool = False) -> str:
    """Return GitHub workflow commands.

    Failures are errors. *Cannot tell* is a warning, or an error if strict; losses that are not
    gated are warnings.
    """
    marks = list(_annotations(gate, strict=strict))
    shown, left_out = marks[:MOST_ANNOTATIONS], len(marks) - MOST_ANNOTATIONS
    if left_out > 0:
        level, title, text = shown[-1]
        shown[-1] = level, title, f"{text}\n{left_out} more: see the report"
    return "".join(workflow_command(*mark) for mark in shown)


def _annotations(gate: Gate, *, strict: bool) -> Iterator[tuple[str, str, str]]:
    name = f"batchbench {gate.command}"

    def title(evidence: Evidence) -> str:
        changed = evidence.verdict is Verdict.CHANGED
        return f"{name}: {evidence.name} {'changed' if changed else f'is {evidence.verdict}'}"

    for evidence in gate.failures:
        yield "error", title(evidence), describe(evidence)
    if gate.answer is Answer.UNKNOWN:
        yield "error" if strict else "warning", f"{name}: cannot tell", gate.sentence
    elif gate.undecided:
        which = ", ".join(evidence.name for evidence in gate.undecided)
        yield "warning", f"{name}: cannot tell", f"There is no verdict on {which}."
    for evidence in gate.evidence:
        if evidence.verdict in (Verdict.SLOWER, Verdict.CHANGED) and not evidence.fails:
            why = "allowed" if evidence.gated else "not gated"
            yield "warning", f"{title(evidence)}, {why}", describe(evidence)


def workflow_command(level: str, title: str, text: str) -> str:
    def escaped(value: str) -> str:
        return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    title = escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{escaped(text)}\n"


# A baseline


def render_baseline(baseline: Baseline) -> RenderableType:
    data, processes, candidate = baseline.data, baseline.processes, baseline.candidate
    environment, model = data["environment"], data["model"]
    packages = ", ".join(f"{n} {v}" for n, v in environment["packages"].items())
    commit = environment.get("git_commit") or "N/A"
    age = Text(f"Baseline, saved {baseline.age} ({data['created_at']})", "bold")
    if baseline.age_days > OLD_DAYS:
        age.stylize("bold yellow")
    step_s = fmean(process.step_ns[candidate] for process in processes) / 1e9
    rate = data["workload"]["total_output_tokens"] / (processes[0].passes[candidate] * step_s)
    lines = (
        f"{model['name']} · {model['device']} {model['dtype']} · {baseline.machine}",
        f"batchbench {data['batchbench_version']} · commit {commit} · {packages}",
        f"{len(processes)} fresh processes · {rate:,.0f} tok/s with {candidate}",
    )
    ratios = []
    for name in data["lanes"][1:]:
        logs = [process.ratios[name] for process in processes]
        ratios.append([name, f"{math.exp(-fmean(logs)):.3f}×", f"{stdev(logs):.1%}"])
    work = []
    for name, counts in data["work"].items():
        names = ("forward_passes", "useful_slot_steps", "idle_slot_steps")
        shown = [f"{counts[f]:,}" if f in counts else "N/A" for f in names]
        work.append([name, *shown, (counts["output_digest"] or "N/A")[:8]])
    head = ["Strategy", "Forward passes", "Useful slot-steps", "Idle", "Outputs"]
    return Group(
        *(age, *map(Text, lines), Text()),
        make_table("", [f"{candidate} compared with", "Speed-up", "Std. deviation"], ratios),
        *(Text(), make_table("", head, work), Text(f"Again: {data['command']}")),
    )
