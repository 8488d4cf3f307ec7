"""A gate as JUnit XML, which GitLab, Jenkins, Azure and others show beside the tests.

Elements and attributes are those that Jenkins' xUnit plugin reads (its ``junit-10.xsd``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.evidence import Answer, Evidence, Gate, Kind, describe
from batchbench.studies.gate.report import COUNTED, MEASURED, TITLES, cells

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(gate: Gate, *, strict: bool = False) -> bytes:
    """A test suite a kind of evidence, a test case a piece of it; there is always one.

    What fails is a failure; what was gated and cannot be told is skipped, or a failure where
    ``strict``; all else passes and says in its output what was found. Where it cannot be told for a
    reason that no evidence bears, a suite ``gate`` says so.
    """
    suites = [(kind.value, [_case(each, strict=strict) for each in gate.of(kind)]) for kind in Kind]
    if gate.answer is Answer.UNKNOWN and (gate.unsure or not gate.untold):
        suites.append(("gate", [_unknown("answer", "gate", gate.sentence, strict=strict)]))
    root = ElementTree.Element("testsuites", name=_text(f"batchbench {gate.command}"))
    if gate.seconds is not None:
        root.set("time", f"{gate.seconds:.3f}")
    for name, cases in suites:
        if cases:
            suite = ElementTree.SubElement(root, "testsuite", name=f"batchbench.{name}")
            _count(suite, cases)
            suite.extend(cases)
    _count(root, [case for _, cases in suites for case in cases])
    del root.attrib["skipped"]  # which testsuites has not
    ElementTree.indent(root)
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found + b"\n"


def _count(element: ElementTree.Element, cases: Sequence[ElementTree.Element]) -> None:
    element.set("tests", str(len(cases)))
    element.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    element.set("errors", "0")
    element.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))


def _case(each: Evidence, *, strict: bool) -> ElementTree.Element:
    if each.gated and each.verdict is Verdict.UNKNOWN and not each.fails:
        why = each.why or "is too uncertain"
        return _unknown(each.name, each.kind.value, f"cannot tell: {why}", strict=strict, of=each)
    case = _named(each.name, each.kind.value)
    if each.fails:
        _outcome(case, "failure", describe(each), _details(each))
    else:
        ElementTree.SubElement(case, "system-out").text = _text(_details(each))
    return case


def _unknown(
    name: str, suite: str, why: str, *, strict: bool, of: Evidence | None = None
) -> ElementTree.Element:
    case = _named(name, suite)
    _outcome(case, "failure" if strict else "skipped", why, why if of is None else _details(of))
    return case


def _named(name: str, suite: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", name=_text(name), classname=f"batchbench.{suite}")


def _outcome(case: ElementTree.Element, tag: str, message: str, details: str) -> None:
    element = ElementTree.SubElement(case, tag, message=_text(message), type="batchbench")
    element.text = _text(details)


def _details(each: Evidence) -> str:
    """Its row of the table, a line a cell."""
    head = COUNTED if each.kind is Kind.WORK else MEASURED
    lines = [f"{TITLES[each.kind]}: {describe(each)}"]
    lines += [f"{name}: {cell}" for name, cell in zip(head, cells(each), strict=True) if cell]
    return "\n".join([*lines, *([each.why] if each.why else [])])


def _text(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)


MOST = 5
"""Lines of one gate."""


def render_annotations(gate: Gate, *, strict: bool = False) -> str:
    """Errors for what fails, warnings for what cannot be told and for losses that were not gated.

    Args:
        strict: whether *cannot tell* is an error.
    """
    found = list(_found(gate, strict=strict))
    shown, left_out = found[:MOST], len(found) - MOST
    if left_out > 0:
        kind, title, text = shown[-1]
        shown[-1] = kind, title, f"{text}\n{left_out} more: see the report"
    return "".join(command(kind, title, text) for kind, title, text in shown)


def _found(gate: Gate, *, strict: bool) -> Iterator[tuple[str, str, str]]:
    """Kind, title and text; errors first."""
    name = f"batchbench {gate.command}"
    for each in gate.failures:
        yield "error", f"{name}: {_short(each)}", describe(each)
    if gate.answer is Answer.UNKNOWN:
        yield "error" if strict else "warning", f"{name}: cannot tell", gate.sentence
    elif gate.untold:
        which = ", ".join(each.name for each in gate.untold)
        yield "warning", f"{name}: cannot tell", f"Of these nothing can be told: {which}."
    for each in gate.evidence:
        if each.verdict in (Verdict.SLOWER, Verdict.CHANGED) and not each.fails:
            why = "allowed" if each.gated else "not gated"
            yield "warning", f"{name}: {_short(each)}, {why}", describe(each)


def _short(each: Evidence) -> str:
    return f"{each.name} {'changed' if each.verdict is Verdict.CHANGED else f'is {each.verdict}'}"


def command(kind: str, title: str, text: str) -> str:
    """One workflow command, with its line end."""
    return f"::{kind} title={_property(title)}::{_data(text)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
