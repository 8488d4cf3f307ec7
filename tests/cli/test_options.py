"""Options: one name has one meaning everywhere, usual forms are read, and the rest is refused."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import ALL, OPTIONS, Option, arguments_of, call, check_refused, options_of

from batchbench.batching.models import ModelSpec
from batchbench.batching.step_cost import StepCost
from batchbench.errors import UsageError, one_line, shown
from batchbench.reports.slo import parse_slos
from batchbench.settings import option_name, parse, parse_float, parse_number, parse_whole, words_of
from batchbench.studies.gate.check import rule_of as check_rule
from batchbench.studies.gate.duet import rule_of as duet_rule
from batchbench.studies.gate.evidence import MetricQuery
from batchbench.studies.gate.spec import CheckSpec, CompareSpec, DuetSpec, parse_condition
from batchbench.studies.predict.breakeven import MapSpec, usual_limits
from batchbench.studies.sweep.grid import SWEPT, parse_numbers, words_of_axes
from batchbench.workloads.lengths import parse_lengths

law = settings(deadline=None, derandomize=True, max_examples=200)

LISTS_OF_NUMBERS = {
    ("predict", "batch_size"),
    ("breakeven", "batch_size"),
    ("breakeven", "spread"),
    ("breakeven", "load"),
}
"""Options with a list of numbers, which their command parses."""

OTHER_MEANINGS = {
    ("predict", "batch_size"): "several sizes",
    ("breakeven", "batch_size"): "several sizes",
    ("breakeven", "prompt_tokens"): "one length",
    ("trend", "strategy"): "one name each time",
    ("baseline save", "output"): "never None",
    ("breakeven", "engine"): "no other engine",
}
"""Names with another type than elsewhere, each with the reason."""


def is_number(option: Option) -> bool:
    return option.kind in (int, float)


def holds_numbers(option: Option) -> bool:
    return is_number(option) or (" ".join(option.path), option.field.name) in LISTS_OF_NUMBERS


# One name, one meaning


def test_every_option_is_derived_from_a_field() -> None:
    for path, command in ALL.items():
        names = {p.opts[0] for p in command.params if p.param_type_name == "option"}
        derived = {option.name for option in options_of(path)}
        flags = {name for name in names if name.startswith("--no-")}
        assert names - derived - flags <= {"--help", "--help-all"}, path


def test_a_name_has_one_type_and_one_unit_in_all_commands() -> None:
    meanings: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for option in OPTIONS:
        if (" ".join(option.path), option.field.name) not in OTHER_MEANINGS:
            meaning = (option.kind, option.known.unit)
            meanings[option.name][meaning].append(" ".join(option.path))
    assert {name: dict(found) for name, found in meanings.items() if len(found) > 1} == {}


def test_a_percentage_is_one_by_its_name_and_says_so() -> None:
    for option in OPTIONS:
        is_percent = option.known.unit == "percent"
        assert is_percent == (option.name in ("--floor", "--margin")), option
        assert is_percent == (option.known.metavar == "PERCENT"), option
        assert not is_percent or "ercent" in option.known.help, option


def test_every_command_that_writes_a_folder_takes_overwrite() -> None:
    goes_on = {
        ("sweep",): "the same command goes on where it was",
        ("report",): "a document is derived again",
        ("trend",): "a picture is derived again",
    }
    for path in ALL:
        names = {option.name for option in options_of(path)}
        if "--output" in names and path not in goes_on:
            assert "--overwrite" in names, path
    assert "--output" in {option.name for option in options_of(("check",))}


# Numbers


def value_within(option: Option) -> float:
    """A number that an option takes."""
    low = option.known.min if option.known.min is not None else 0
    high = option.known.max if option.known.max is not None else 10**6
    usual = option.field.default
    if isinstance(usual, int | float) and not isinstance(usual, bool) and usual > 0:
        return usual
    tried = (5, 50, 500, 0.96, low, high)
    return next(number for number in tried if low <= number <= high)


@pytest.mark.parametrize("option", [o for o in OPTIONS if is_number(o)], ids=str)
def test_every_usual_form_of_a_number_is_read(option: Option) -> None:
    value = option.kind(value_within(option))
    text = f"{Decimal(repr(value)):f}"
    forms = [text, f"+{text}", f" {text} ", f"{text}e0", f"{text}E+00", f"0{text}"]
    forms += [
        f"{Decimal(repr(value)) * 10:f}e-1",
        f"{value:e}" if float(f"{value:e}") == value else text,
    ]
    forms += [f"{text}.", f"{text}.0", f"{text}.e0"] * ("." not in text)
    for form in forms:
        assert parse(option.spec, option.field, form) == value, form
    top = option.known.max if option.known.max is not None else math.inf
    if top >= 1270 and (option.known.min or 0) <= 1000:
        for form in ("1_000", "1e3", "1E+03", "10e2", ".1e4", "1000.0"):
            assert parse(option.spec, option.field, form) == 1000, form
        assert parse(option.spec, option.field, "1.27e+03") == 1270
    if option.known.unit == "percent":
        for form in ("5", "5%", "5.0 %", " 5 % ", "+5e0%", "0.5e1"):
            assert parse(option.spec, option.field, form) == 5.0, form
    if option.known.unit == "share":
        assert parse(option.spec, option.field, "96%") == parse(option.spec, option.field, "0.96")
        assert "must be at most 1; write 96% for percent" in check_refused(option, "96")


def test_every_number_is_bounded() -> None:
    """Huge numbers are refused before they reach NumPy's integers."""
    for option in OPTIONS:
        if is_number(option):
            assert option.known.min is not None, option
            assert option.known.max is not None, option
            assert option.known.max < 2**63, option


NO_NUMBERS = (
    *("", " ", "abc", "nan", "inf", "-inf", "Infinity", "1e400", "1e99999999999999999999"),
    *(
        "9" * 400,
        "-" + "9" * 400,
        "٣",
        "²",
        "1__0",
        "_1",
        "1_",
        "0x10",
        "1e",
        "e3",
        ".",
        "+",
        "--5",
    ),
    *("1\n2", "\x1b[31m1", "1 2", "1'000", "five", "1/2", "5%%", "%", "null", "None", "true"),
)


@pytest.mark.parametrize("option", [o for o in OPTIONS if holds_numbers(o)], ids=str)
def test_a_text_that_is_not_a_number_is_refused_in_one_plain_line(option: Option) -> None:
    for value in NO_NUMBERS:
        check_refused(option, value)
    if option.kind is int:
        check_refused(option, "1.5")
        check_refused(option, "15e-1")


@pytest.mark.parametrize("option", [o for o in OPTIONS if is_number(o)], ids=str)
def test_a_number_beyond_a_bound_is_refused_with_the_bound(option: Option) -> None:
    known = option.known
    if known.min is not None:
        assert "must be at least" in check_refused(option, str(known.min - 1))
    if known.max is not None:
        assert "must be at most" in check_refused(option, str(known.max * 2 + 1))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.known.unit == "percent"], ids=str)
def test_a_percentage_that_may_be_a_share_needs_its_sign(option: Option) -> None:
    line = check_refused(option, "0.05")
    assert line.endswith("write 0.05% if you mean that, or 5% for the share 0.05")
    assert parse(option.spec, option.field, "0.5%") == 0.5
    assert parse(option.spec, option.field, "1") == 1.0


def test_five_is_five_percent_in_every_command() -> None:
    """The same loss of 5 % in the rule of each command."""
    up, down = math.log1p(0.05), -math.log1p(-0.05)
    checked = CheckSpec(baseline=Path("b.json"), floor=5.0, margin=9.0)
    assert duet_rule(DuetSpec(floor=5.0, margin=9.0)).floor == pytest.approx(up)
    assert duet_rule(DuetSpec(floor=4.0, margin=5.0)).margin == pytest.approx(up)
    assert check_rule(checked, 1, other=True).floor == pytest.approx(up)
    for text, floor in (("p99_ttft_ms > 5%", up), ("output_throughput < -5.0 %", down)):
        condition = parse_condition(text)
        query = MetricQuery(condition.metric, "static", condition.share, True, condition)
        assert query.log_floor == pytest.approx(floor)
    told = duet_rule(DuetSpec(floor=5.0, margin=9.0)).as_data()
    assert (told["floor_percent"], told["margin_percent"]) == pytest.approx((5.0, 9.0))
    typed = words_of(CompareSpec(floor=5.0, margin=0.5), CompareSpec(floor=1.0))
    assert typed == ["--floor", "5.0%", "--margin", "0.5%"]


# Texts and choices


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.known.choices], ids=str)
def test_another_value_than_the_choices_is_refused_with_the_choices(option: Option) -> None:
    for value in ("nope", "x" * 400, "\x1b[31mred", "two\nlines", option.known.choices[0].upper()):
        if value not in option.known.choices:
            line = check_refused(option, value)
            assert all(choice in line for choice in option.known.choices)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.kind is not bool], ids=str)
def test_an_empty_value_is_refused(option: Option) -> None:
    for value in ("", " ", "\t"):
        check_refused(option, value)


GRAMMARS = {
    "device": ("gpu", "cuda:", "cuda:x", "cuda:٣", "x" * 400),
    "verify": ("some", "-1", "1.5", "9" * 400, "x" * 400, "²"),
    "output_tokens": ("0", "-3", "1.5", "5:4", "x" * 400, "9" * 400, "normal:mean=1", "uniform"),
    "arrivals": ("never", "ramp:from=1", "ramp:from=0,to=1", "ramp:from=nan,to=1", "x" * 400),
    "slo": ("ttft", "ttft:", "ttft:0", "ttft:nan", "itl:5", "ttft:" + "9" * 400, "x" * 400, ":"),
    "fail_if": (
        "speedup",
        "speedup < 5",
        "speedup < 5%",
        "nope < -5%",
        "x" * 400,
        "speedup < nan%",
    ),
    "rungs": ("nope", "x" * 400, "packed,packed"),
    "strategy": ("nope", "x" * 400, "static,static", ":X", "a:b:c", "os:system", "no_such:X"),
    "metric": ("nope", "x" * 400),
    "accept": ("abc",),
}
"""Options with a form of their own, and texts that do not have it."""


@pytest.mark.parametrize(
    "option",
    [
        o
        for o in OPTIONS
        if o.field.name in GRAMMARS
        and not is_number(o)
        and (" ".join(o.path), o.field.name) not in OTHER_MEANINGS
    ],
    ids=str,
)
def test_a_text_of_another_form_is_refused_in_one_plain_line(option: Option) -> None:
    needs = {"duet": ["--base-ref=HEAD"], "check": ["--baseline=none.json"]}
    for value in GRAMMARS[option.field.name]:
        check_refused(option, value, needs.get(option.path[0], []))


# Files


@pytest.mark.parametrize(
    "option",
    [o for o in OPTIONS if o.field.name in ("prompts", "trace", "workload", "baseline", "cost")],
    ids=str,
)
def test_a_file_that_is_not_there_is_refused_by_its_option(
    option: Option, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a command may first see whether it can write here
    (tmp_path / "folder").mkdir()
    for value in ("nowhere", "x" * 400, "new\nline", str(tmp_path / "folder"), "red\x1b[31m"):
        needs = ["--base-ref=HEAD"] if option.path == ("duet",) else []
        given_words = [*arguments_of(option.path), *needs, f"{option.name}={value}"]
        code, out, line = call(option.path, given_words)
        assert (code, out) == (2, "")
        assert line.isprintable()
        assert len(line) < 900
        assert line.startswith(option.name) or value[:3] in line


@pytest.mark.parametrize("path", [p for p in ALL if arguments_of(p)], ids=" ".join)
def test_an_argument_that_is_missing_or_not_there_is_named(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, line = call(path, [])
    assert code == 2
    assert "is missing" in line
    if path == ("workload", "save"):
        return
    (tmp_path / "folder").mkdir()
    for name in ("nowhere", "folder", "x" * 400, "new\nline", "red\x1b[31m"):
        words = [name for _ in arguments_of(path)]
        extra = ["--gif=film.gif"] if path == ("watch",) else []
        code, out, line = call(path, [*words, *extra])
        assert (code, out) == (2, "")
        assert line.isprintable()
        assert len(line) < 900
        assert not line.startswith("Error")


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_words_that_no_command_knows_are_refused_in_one_plain_line(path: tuple[str, ...]) -> None:
    words = arguments_of(path)
    more = [] if any(p.nargs == -1 for p in ALL[path].params) else [[*words, "4" * 400]]
    for given_words in ([*words, "--nope"], [*words, "--quiet=3"], *more):
        code, out, line = call(path, given_words)
        assert (code, out) == (2, "")
        assert len(line) < 300
        assert "4" * 81 not in line


# The parsers


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20))
@law
def test_a_number_is_read_exactly(number: Decimal) -> None:
    assert parse_number(str(number), "here") == number
    assert parse_float(str(number), "here") == float(number)


@given(st.integers(-(10**40), 10**40))
@law
def test_a_whole_number_is_read_exactly(number: int) -> None:
    for text in (str(number), f"{number:_}", f"{number}.0", f"{number}0e-1", f" {number:+} "):
        assert parse_whole(text, "here") == number


@given(st.text(max_size=20))
@law
def test_any_text_is_a_number_or_refused(text: str) -> None:
    try:
        number = parse_number(text, "here")
    except UsageError:
        return
    assert float(text.strip().replace("−", "-").replace("_", "")) == float(number)


@given(st.text(max_size=300), st.integers(2, 100))
@law
def test_a_value_is_shown_printable_and_cut(text: str, most: int) -> None:
    told = shown(text, most)
    assert told.isprintable()
    assert len(told) <= most
    assert told == text or not text.isprintable() or len(text) > most


@given(st.text(max_size=5000))
@law
def test_a_message_is_one_line_of_bounded_length(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 2000


def test_fields_of_one_name_within_a_command_are_one() -> None:
    for path in ALL:
        names = [option.field.name for option in options_of(path)]
        assert len(set(names)) == len(names), path
    assert option_name("batch_size") == "--batch-size"
    assert dataclasses.is_dataclass(OPTIONS[0].spec)


# Generated texts are read again


@pytest.mark.parametrize("option", [o for o in OPTIONS if is_number(o)], ids=str)
def test_a_printed_command_is_parsed_back_unchanged(option: Option) -> None:
    low = option.known.min if option.known.min is not None else 0
    high = option.known.max if option.known.max is not None else 10**12
    numbers = (
        st.integers(math.ceil(low), math.floor(high))
        if option.kind is int
        else st.floats(float(low), float(high))
    )

    @given(numbers)
    @settings(deadline=None, derandomize=True, max_examples=20)
    def holds(value: Any) -> None:
        sign = "%" if option.known.unit == "percent" else ""
        assert parse(option.spec, option.field, f"{value}{sign}") == value
        if option.path == ("sweep",) and option.spec in SWEPT.values():
            words = words_of_axes({option.field.name: (value, value)})
            assert parse_numbers(words[1], option.kind, option.name) == [value, value]

    holds()


@given(st.integers(2, 10**6), st.floats(0, 10), st.integers(1, 10**6))
@law
def test_the_lengths_of_a_map_are_lengths(mean: int, spread: float, prompt: int) -> None:
    spec = map_spec(mean, prompt)
    assert parse_lengths(spec.lengths(spread), "--output-tokens").longest is not None


@given(st.floats(1, 1e12), st.integers(2, 10**6))
@law
def test_the_usual_limits_of_a_map_are_numbers_whatever_a_step_costs(ns: float, mean: int) -> None:
    limits = usual_limits(StepCost(ns), map_spec(mean, 16))
    assert all(0 < limit < math.inf for limit in limits.values())
    assert limits["ttft"] == pytest.approx(mean * ns / 1e6, rel=0.01)
    texts = tuple(f"{name}:{limit}" for name, limit in limits.items())
    assert parse_slos(texts) == limits


def map_spec(mean: int, prompt: int) -> MapSpec:
    """A map of one cell."""
    return MapSpec(
        batch_sizes=(2,),
        spreads=(0.0,),
        loads=("all",),
        mean_tokens=mean,
        prompt_tokens=prompt,
        batches=8,
        seed=0,
        engine="slots",
        prefill="auto",
        model=ModelSpec(),
        context=None,
    )
