"""A verdict on its way out: screen, Markdown, annotations, JUnit, JSON, and the exit code."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from junitparser import Failure, JUnitXml, Skipped
from rich.console import Console
from support import gates
from support.gates import EMPTY, FAILED, PASSED, UNGATED, UNKNOWN, UNSURE, throughput
from support.laws import law

from batchbench.cli import main
from batchbench.cli.gate import GateOutputSpec, check_outputs, conclude
from batchbench.errors import UsageError
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate import report
from batchbench.studies.gate.evidence import Answer, Gate

NAMES = ("passed", "failed", "unknown", "unsure", "empty")
ANSWERED = dict(zip(NAMES, (PASSED, FAILED, UNKNOWN, UNSURE, EMPTY), strict=True))
CODES = [
    (PASSED, False, 0),
    (PASSED, True, 0),
    (FAILED, False, 1),
    (FAILED, True, 1),
    (UNKNOWN, False, 0),
    (UNKNOWN, True, 3),
    (UNSURE, True, 3),
    (EMPTY, False, 0),
    (EMPTY, True, 3),
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the test in an empty folder."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def concluded(gate: Gate, output: GateOutputSpec) -> int:
    """The exit code."""
    check_outputs(output)
    with pytest.raises(typer.Exit) as ended:
        conclude(gate, output)
    return ended.value.exit_code


def shown(gate: Gate, width: int = 80, *, strict: bool = False) -> str:
    """Return the text on a terminal without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(report.render_terminal(gate, strict=strict))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# The exit code


@pytest.mark.parametrize(("gate", "strict", "code"), CODES)
def test_the_exit_code_is_the_gates(gate: Gate, strict: bool, code: int) -> None:
    assert concluded(gate, GateOutputSpec(strict=strict)) == code


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (report, "render_markdown"),
        (report, "render_junit"),
        (report, "render_annotations"),
        (report, "render_terminal"),
    ],
)
def test_a_fault_is_never_a_verdict_and_leaves_no_file(
    module: Any, function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(gate: Gate, **_: bool) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(module, function, broken)
    output = GateOutputSpec(junit=Path("j.xml"), markdown=Path("r.md"), github="on")
    monkeypatch.setattr(main, "app", lambda *_, **__: conclude(PASSED, output))
    assert main.run_command() == 70
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


# Where it goes


def test_files_are_written_whole_and_standard_output_is_the_documents_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    output = GateOutputSpec(json=True, markdown=Path("out/r.md"), junit=Path("out/j.xml"))
    assert concluded(FAILED, output) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["answer"] == "failed"
    assert said.err.startswith("::error ")
    assert sorted(file.name for file in Path("out").iterdir()) == ["j.xml", "r.md"]
    assert Path("out/r.md").read_text(encoding="utf-8") == report.render_markdown(FAILED)
    assert Path("out/j.xml").read_bytes() == report.render_junit(FAILED)


def test_names_that_are_no_text_stop_no_report() -> None:
    odd = replace(PASSED, notes=["folder \udcff"])
    assert (
        concluded(odd, GateOutputSpec(markdown=Path("r.md"), junit=Path("j.xml"), quiet=True)) == 0
    )
    assert r"folder \udcff" in Path("r.md").read_text(encoding="utf-8")


def test_markdown_and_the_sentence_alone(capsys: pytest.CaptureFixture[str]) -> None:
    concluded(UNKNOWN, GateOutputSpec(markdown=Path("-")))
    assert capsys.readouterr().out == report.render_markdown(UNKNOWN)
    concluded(UNKNOWN, GateOutputSpec(quiet=True))
    assert capsys.readouterr().out == f"{UNKNOWN.sentence}\n"


def test_on_github_the_summary_is_appended_and_the_outputs_are_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("summary").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary")
    monkeypatch.setenv("GITHUB_OUTPUT", "outputs")
    concluded(UNKNOWN, GateOutputSpec())
    assert Path("summary").read_text(encoding="utf-8") == "before\n"
    assert "::" not in capsys.readouterr().out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    concluded(UNKNOWN, GateOutputSpec(github="off"))
    assert Path("summary").read_text(encoding="utf-8") == "before\n"
    concluded(UNKNOWN, GateOutputSpec(strict=True))
    assert Path("summary").read_text(encoding="utf-8") == "before\n" + report.render_markdown(
        UNKNOWN, strict=True
    )
    assert Path("outputs").read_text(encoding="utf-8") == "answer=cannot tell\nexit-code=3\n"
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("::error title=batchbench")


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("file").touch()
    with pytest.raises(UsageError, match=r"--junit file/j.xml: cannot be written: not a directory"):
        check_outputs(GateOutputSpec(junit=Path("file/j.xml")))
    with pytest.raises(UsageError, match=r"--markdown \.: is a directory; give a file"):
        check_outputs(GateOutputSpec(markdown=Path()))
    with pytest.raises(UsageError, match=r"--markdown /dev/null: is not a file"):
        check_outputs(GateOutputSpec(markdown=Path("/dev/null")))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "file/summary")
    with pytest.raises(UsageError, match=r"GITHUB_STEP_SUMMARY file/summary: cannot be written"):
        check_outputs(GateOutputSpec(github="on"))
    assert [file.name for file in Path.cwd().iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"json": True, "markdown": Path("-")}, "--json and --markdown -: both write to standard"),
        ({"junit": Path("-")}, "--junit -: give a file"),
        ({"junit": Path("a"), "markdown": Path("a")}, "--junit a: is the file of --markdown"),
        ({"github": "yes"}, "--github yes: must be one of auto, on, off"),
    ],
)
def test_options_that_contradict_are_refused(given: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        GateOutputSpec(**given)


def test_the_options_need_none_of_the_heavy_libraries() -> None:
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from batchbench.cli.gate import GateOutputSpec, check_outputs, conclude
check_outputs(GateOutputSpec(junit=Path("j.xml"), github="on"))
heavy = ("torch", "transformers", "pandas", "matplotlib", "numpy", "scipy")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("[]\n", "")


# A terminal


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", NAMES)
def test_the_screen_fits_and_says_all(name: str, width: int) -> None:
    gate = ANSWERED[name]
    screen = shown(gate, width)
    assert max(map(len, screen.splitlines())) <= width
    flat = re.sub(r"[\s┃┏┓┗┛━]+", "", screen)
    for text in (gate.sentence, gate.base.label, *gate.notes):
        assert re.sub(r"\s+", "", text) in flat
    for each in gate.evidence:
        if each.verdict is not Verdict.SAME:
            assert each.metric in flat
    framed = gate.answer is not Answer.PASSED
    assert ("┏━" in screen) == framed


def test_what_cannot_be_told_is_loud_and_no_pass() -> None:
    for gate in (UNKNOWN, UNSURE, EMPTY):
        assert "CANNOT TELL" in shown(gate)
        assert "This is not a pass" in shown(gate)
        assert "--strict makes it 3" in shown(gate)
        assert "Exit code 3." in shown(gate, strict=True)
        assert "This is not a pass" in report.render_markdown(gate)
    assert "CANNOT TELL" not in shown(PASSED)


def test_only_what_varies_and_what_changed_is_listed() -> None:
    screen = shown(FAILED)
    assert "2 other counts and outputs are the same." in screen
    assert "slot_steps" not in screen
    assert "+3 (+0.8%)" in screen
    assert "3f3f3f3f3f3f " in screen  # of a digest the beginning
    assert gates.DIGESTS[0] not in screen
    assert "All 2 counts and outputs are the same." in shown(PASSED)
    assert "batch size" in screen
    plain = Gate("duet", "x", gates.BASE, gates.NEW, PASSED.evidence)
    assert "differ" not in shown(plain)
    assert screen.count("python 3.12.4") == 1  # of both


# Markdown


def tables_of(text: str) -> list[list[str]]:
    """Each table's lines."""
    found = [part.splitlines() for part in text.split("\n\n")]
    return [lines for lines in found if lines and lines[0].startswith("|")]


@law
@given(gates.gates())
def test_markdown_of_any_gate_keeps_its_tables_and_its_answer(gate: Gate) -> None:
    text = report.render_markdown(gate)
    assert text.splitlines()[0] == f"<!-- batchbench {gate.command} -->"
    alerts = {Answer.PASSED: "TIP", Answer.FAILED: "CAUTION", Answer.UNKNOWN: "WARNING"}
    assert f"> [!{alerts[gate.answer]}]\n> **" in text
    for lines in tables_of(text):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1
    body = text.split("<details>")[0].split("\n", 1)[1]
    assert not re.search(r"(?<!\\)<", body.replace("<!--", ""))


def test_what_others_named_is_no_markup() -> None:
    odd = replace(UNSURE, unsure="<img src=x> | **bold**", notes=["[link](x) @somebody"])
    text = report.render_markdown(odd)
    assert r"> **CANNOT TELL: \<img src=x\> \| \*\*bold\*\*.**" in text
    assert r"- \[link\](x) \@somebody" in text


# Annotations


def commands_of(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Workflow commands as a runner reads them, by GitHub's documentation of them."""
    found = []
    for line in text.split("\n"):
        if not line.startswith("::"):
            assert not line
            continue
        head, message = line[2:].split("::", 1)
        kind, _, rest = head.partition(" ")
        pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
        properties = {key: unescape(value, property=True) for key, _, value in pairs}
        found.append((kind, properties, unescape(message)))
    return found


def unescape(text: str, *, property: bool = False) -> str:
    """Unescape a text; %25 comes last, so that nothing is unescaped twice."""
    codes = {"%0D": "\r", "%0A": "\n", **({"%3A": ":", "%2C": ","} if property else {})}
    for code, character in [*codes.items(), ("%25", "%")]:
        text = text.replace(code, character)
    return text


@law
@given(st.sampled_from(["error", "warning"]), gates.nasty, gates.nasty)
def test_any_text_comes_back_from_an_annotation(kind: str, title: str, text: str) -> None:
    line = report.workflow_command(kind, title, text)
    assert line.count("\n") == 1
    assert commands_of(line) == [(kind, {"title": title}, text)]


@law
@given(gates.gates(), st.booleans())
def test_annotations_are_few_and_no_other_commands(gate: Gate, strict: bool) -> None:
    found = commands_of(report.render_annotations(gate, strict=strict))
    assert len(found) <= report.MOST_ANNOTATIONS
    assert {kind for kind, _, _ in found} <= {"error", "warning"}
    assert all(properties.keys() == {"title"} for _, properties, _ in found)
    bad = gate.answer is Answer.FAILED or (strict and gate.answer is Answer.UNKNOWN)
    assert any(kind == "error" for kind, _, _ in found) == bad
    if gate.answer is Answer.UNKNOWN:
        assert found


def test_what_is_annotated() -> None:
    assert report.render_annotations(PASSED) == ""
    kinds = [
        (kind, about["title"]) for kind, about, _ in commands_of(report.render_annotations(FAILED))
    ]
    assert kinds == [
        ("error", "batchbench duet: continuous.decode_passes changed"),
        ("error", "batchbench duet: static.output_digest changed"),
        ("error", "batchbench duet: continuous.output_throughput is slower"),
    ]
    ((kind, about, text),) = commands_of(report.render_annotations(UNGATED))
    assert (kind, about["title"]) == (
        "warning",
        "batchbench duet: continuous.output_throughput is slower, not gated",
    )
    assert "-5.0% (95 % CI -6.1% to -4.3%)" in text
    many = gates.gate(*[throughput(Verdict.SLOWER)] * 9)
    found = commands_of(report.render_annotations(many))
    assert len(found) == report.MOST_ANNOTATIONS
    assert found[-1][2].endswith("\n4 more: see the report")


# JUnit

# What the schema that Jenkins' xUnit plugin publishes for JUnit (G. Boissinot) lets each element
# have: its attributes, those that must be there, and its children.
COUNTED = {"name", "tests", "failures", "errors", "time"}
SCHEMA: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": ({*COUNTED, "disabled"}, set(), {"testsuite"}),
    "testsuite": ({*COUNTED, "skipped"}, {"tests"}, {"testcase"}),
    "testcase": (
        {"name", "classname", "time"},
        {"name"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set(), set()),
    "skipped": ({"type", "message"}, set(), set()),
    "system-out": (set(), set(), set()),
}


def conforms(element: ElementTree.Element) -> bool:
    """Check an element and all within against the schema."""
    attributes, required, children = SCHEMA[element.tag]
    return (
        required <= set(element.keys()) <= attributes
        and {child.tag for child in element} <= children
        and all(map(conforms, element))
    )


@law
@given(gates.gates(), st.booleans())
def test_junit_of_any_gate_conforms_and_means_the_answer(gate: Gate, strict: bool) -> None:
    document = report.render_junit(gate, strict=strict)
    assert conforms(ElementTree.fromstring(document))
    read = JUnitXml.fromstring(document)
    suites = list(read)
    cases = [case for suite in suites for case in suite]
    outcomes = [type(each) for case in cases for each in case.result]
    assert len(cases) >= max(1, len(gate.evidence))
    assert read.tests == sum(suite.tests for suite in suites) == len(cases)
    assert read.failures == outcomes.count(Failure)
    assert sum(suite.skipped for suite in suites) == outcomes.count(Skipped)
    bad = gate.answer is Answer.FAILED or (strict and gate.answer is Answer.UNKNOWN)
    assert (Failure in outcomes) == bad or (strict and bool(gate.undecided))
    if gate.answer is Answer.UNKNOWN:
        assert outcomes
    if gate.answer is Answer.PASSED:
        assert not outcomes


def test_what_was_not_gated_passes_and_says_what_was_found() -> None:
    cases = {
        case.name: case
        for suite in JUnitXml.fromstring(report.render_junit(UNGATED))
        for case in suite
    }
    slower = cases["continuous.output_throughput"]
    assert slower.is_passed
    assert "is slower: -5.0%" in slower.system_out
    assert "Gate: not gated" in slower.system_out


def test_a_suite_a_kind_and_the_reason_where_no_evidence_bears_it() -> None:
    names = [suite.name for suite in JUnitXml.fromstring(report.render_junit(FAILED))]
    assert names == ["batchbench.work", "batchbench.time"]
    for gate in (UNSURE, EMPTY):
        *_, last = JUnitXml.fromstring(report.render_junit(gate))
        (case,) = last
        assert (last.name, case.name) == ("batchbench.gate", "answer")
        assert [each.message for each in case.result] == [gate.sentence]


# JSON


@law
@given(gates.gates(), st.booleans())
def test_json_of_any_gate_is_json(gate: Gate, strict: bool) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(report.render_json(gate, strict=strict), parse_constant=refuse)
    assert data["answer"] == gate.answer
    assert data["exit_code"] == gate.exit_code(strict=strict)
    assert len(data["evidence"]) == len(gate.evidence)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_and_not_shown_as_one(value: float) -> None:
    given = {"base": value, "change": value, "low": value, "high": value, "smallest": value}
    odd = gates.gate(replace(throughput(Verdict.UNKNOWN), **given))
    (told,) = json.loads(report.render_json(odd))["evidence"]
    assert [told[name] for name in given] == [None] * len(given)
    assert "N/A to N/A" in shown(odd)


@law
@given(gates.gates(), st.sampled_from([40, 60, 80]))
def test_any_gate_can_be_shown(gate: Gate, width: int) -> None:
    assert gate.sentence.split()[0] in shown(gate, width)
