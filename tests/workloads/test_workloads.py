"""Workloads: what a spec asks for is what is made, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law

from batchbench.errors import UsageError
from batchbench.settings import as_json, from_json
from batchbench.workloads import Workload, WorkloadSpec, make_workload
from batchbench.workloads.lengths import Drawn, parse_lengths
from batchbench.workloads.prompts import byte_tokens

GPT2 = 50257

seeds = st.integers(0, 2**63 - 1)


def made(spec: WorkloadSpec, *, batch_size: int = 8, vocab_size: int = GPT2) -> Workload:
    """The workload of a spec where no tokenizer is at hand."""
    return make_workload(spec, batch_size=batch_size, vocab_size=vocab_size, encode=None)


# Lengths of outputs


@given(
    st.integers(1, 100),
    st.none() | st.integers(1, 120),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(1, 20),
)
@law
def test_every_position_divisible_by_long_every_is_long_and_no_other(
    count: int, long_every: int | None, long: int, short: int, batch_size: int
) -> None:
    spec = WorkloadSpec(
        queue_size=count, long_every=long_every, long_tokens=long, short_tokens=short
    )
    every = batch_size if long_every is None else long_every
    expected = [long if i % every == 0 else short for i in range(count)]
    assert made(spec, batch_size=batch_size).output_tokens.tolist() == expected


def test_the_classic_workload() -> None:
    workload = made(WorkloadSpec())
    assert len(workload) == 32
    assert workload.output_tokens.sum() == 4 * 100 + 28 * 10
    assert not workload.due_ns.any()
    assert workload.closed
    assert workload.max_total_tokens == 107
    for i in range(32):
        assert workload.prompt(i).tolist() == [464, 2068, 7586, 21831, 11687, 625, 262]


def test_ids_stay_below_the_vocabulary() -> None:
    assert made(WorkloadSpec(), vocab_size=300).prompt_ids.max() < 300
    assert made(WorkloadSpec(prompt_tokens="1:50"), vocab_size=3).prompt_ids.max() == 2


def test_a_tokenizer_is_asked_for_the_classic_prompt() -> None:
    workload = make_workload(
        WorkloadSpec(queue_size=2), batch_size=8, vocab_size=GPT2, encode=lambda text: [len(text)]
    )
    assert workload.prompt(1).tolist() == [len("The quick brown fox jumped over the")]


# Lengths of prompts


@given(st.integers(1, 6), st.integers(0, 6), seeds)
@law
def test_lengths_lie_between_both_ends_and_reach_them(low: int, more: int, seed: int) -> None:
    high = low + more
    spec = WorkloadSpec(queue_size=400, prompt_tokens=f"{low}:{high}", seed=seed)
    assert set(made(spec).prompt_tokens.tolist()) == set(range(low, high + 1))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7, 7),
        (" 7 ", 7, 7),
        ("4:64", 4, 64),
        ("5:5", 5, 5),
        ("uniform:min=4,max=64", 4, 64),
        ("uniform:min=1,max=1", 1, 1),
    ],
)
def test_the_grammar_of_lengths(text: str, low: int, high: int) -> None:
    lengths = parse_lengths(text, "--prompt-tokens")
    assert isinstance(lengths, Drawn)
    assert (lengths.min, lengths.max) == (low, high)


def test_a_range_and_its_long_form_are_the_same_workload() -> None:
    short, long = (WorkloadSpec(prompt_tokens=t) for t in ("4:64", "uniform:min=4,max=64"))
    assert made(short).digest == made(long).digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0:5",
        "5:4",
        "-3",
        "-3:4",
        "nan",
        "inf",
        "1.5",
        "1e3x",
        "1:2:3",
        ":",
        "4:",
        ":4",
        "text",
        "uniform",
        "uniform:4:64",
        "uniform:min=4",
        "uniform:min=9,max=4",
        "9" * 20,
        "1:" + "9" * 20,
        "9" * 5000,
    ],
    ids=lambda text: text[:25] or "empty",
)
def test_lengths_outside_the_grammar_are_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        made(WorkloadSpec(queue_size=1, prompt_tokens=text))
    assert str(refused.value).startswith("--prompt-tokens ")
    assert text[:20] in str(refused.value)


# Seeds and digests


@given(seeds, seeds)
@law
def test_equal_seeds_and_only_they_give_equal_prompts(seed: int, other: int) -> None:
    spec = WorkloadSpec(queue_size=8, prompt_tokens="8:16", seed=seed)
    assert made(spec).digest == made(spec).digest
    assert (made(replace(spec, seed=other)).digest == made(spec).digest) == (other == seed)


def test_what_a_seed_gives_is_the_same_on_every_machine() -> None:
    spec = WorkloadSpec(
        queue_size=4,
        prompt_tokens="1:4",
        output_tokens="lognormal:mean=50,sigma=1",
        request_rate=2.0,
        burstiness=0.5,
        seed=1,
    )
    workload = made(spec, vocab_size=1000)
    assert [workload.prompt(i).tolist() for i in range(4)] == [[758], [8, 516], [991], [746]]
    assert workload.output_tokens.tolist() == [9, 29, 108, 55]
    # Logarithms of two C libraries may differ in the last digit.
    due = [0, 442065214, 732512124, 1500000000]
    assert np.abs(workload.due_ns - due).max() <= 1


@st.composite
def plain_workloads(draw: st.DrawFn) -> Workload:
    """A few requests with varied ids, lengths and times."""
    rows = draw(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 9), min_size=1, max_size=4),
                st.integers(1, 9),
                st.integers(0, 9),
            ),
            min_size=1,
            max_size=5,
        )
    )
    return Workload.of(
        "plain",
        [ids for ids, _, _ in rows],
        [length for _, length, _ in rows],
        due_ns=np.cumsum([gap for _, _, gap in rows]).tolist(),
        stop_at_eos=draw(st.booleans()),
    )


def content(workload: Workload) -> tuple[Any, ...]:
    """Return all requests of a workload, and their due times."""
    prompts = tuple(tuple(workload.prompt(i).tolist()) for i in range(len(workload)))
    return prompts, tuple(workload), workload.stop_at_eos


@given(plain_workloads(), plain_workloads())
@law
def test_digests_are_equal_where_all_that_is_asked_is_equal(one: Workload, other: Workload) -> None:
    assert (one.digest == other.digest) == (content(one) == content(other))
    assert one.digest == replace(one, name="another name", seed=7).digest


@given(plain_workloads(), st.data())
@law
def test_a_digest_changes_with_any_id_length_or_time_and_with_stop_at_eos(
    workload: Workload, data: st.DataObject
) -> None:
    digests = {workload.digest, replace(workload, stop_at_eos=not workload.stop_at_eos).digest}
    assert len(digests) == 2
    for column in ("prompt_ids", "output_tokens", "due_ns"):
        values = getattr(workload, column).copy()
        values[data.draw(st.integers(0, len(values) - 1))] += 1
        digests.add(replace(workload, **{column: values}).digest)
    assert len(digests) == 5


def test_a_digest_changes_when_a_prompt_ends_elsewhere() -> None:
    one, other = (Workload.of("w", prompts, [5, 5]) for prompts in ([[1], [2, 3]], [[1, 2], [3]]))
    assert one.digest != other.digest


def test_numbers_that_move_from_one_column_to_another_change_the_digest() -> None:
    one = Workload.of("w", [[9, 9, 9, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8]], [20], due_ns=[30])
    other = Workload.of("w", [[9]] * 4, [5, 6, 7, 8], due_ns=[0, 13, 20, 30])
    assert one.digest != other.digest


@given(plain_workloads())
@law
def test_a_workload_gives_back_what_it_was_made_of(workload: Workload) -> None:
    requests = list(workload)
    assert [request.index for request in requests] == list(range(len(workload)))
    for request in requests:
        assert request.prompt_tokens == len(workload.prompt(request.index))
        assert all(type(value) is int for value in request)
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    assert workload.max_total_tokens == longest
    all_there = all(request.due_ns == 0 for request in requests)
    assert workload.closed == (all_there and not workload.stop_at_eos)


# Prompts of your own


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.txt"


def prompts_of(file: Path, count: int) -> list[list[int]]:
    workload = made(WorkloadSpec(queue_size=count, prompts=file))
    return [workload.prompt(i).tolist() for i in range(count)]


def test_prompts_are_used_in_turn_until_the_queue_is_full(file: Path) -> None:
    file.write_text("one\ntwo three\n\n   \nfour", encoding="utf-8")
    texts = ["one", "two three", "four"]
    assert prompts_of(file, 8) == [byte_tokens(texts[i % 3]) for i in range(8)]
    assert prompts_of(file, 2) == [byte_tokens(text) for text in texts[:2]]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_may_end_as_on_any_system(end: bytes, file: Path) -> None:
    file.write_bytes(b"one" + end + b"two" + end)
    assert prompts_of(file, 2) == [byte_tokens("one"), byte_tokens("two")]


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_an_end_of_line_ends_a_prompt(character: str, file: Path) -> None:
    file.write_text(f"one{character}more\ntwo\n", encoding="utf-8")
    assert prompts_of(file, 2) == [byte_tokens(f"one{character}more"), byte_tokens("two")]


def test_a_byte_order_mark_is_no_part_of_a_prompt(file: Path) -> None:
    file.write_text("one\n", encoding="utf-8-sig")
    assert prompts_of(file, 1) == [byte_tokens("one")]


def empty(file: Path) -> None:
    file.touch()


def blank_lines(file: Path) -> None:
    file.write_text("\n  \n\t\n")


def latin_1(file: Path) -> None:
    file.write_bytes("größer\n".encode("latin-1"))


def utf_16(file: Path) -> None:
    file.write_bytes("one\n".encode("utf-16"))


def folder(file: Path) -> None:
    file.mkdir()


def missing(file: Path) -> None:
    """Nothing is there."""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (missing, "no such file"),
        (folder, "is a directory"),
        (empty, "contains no prompts"),
        (blank_lines, "contains no prompts"),
        (latin_1, "not UTF-8"),
        (utf_16, "not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_refused_by_its_name(
    spoil: Callable[[Path], None], reason: str, file: Path
) -> None:
    spoil(file)
    with pytest.raises(UsageError) as refused:
        made(WorkloadSpec(prompts=file))
    assert str(refused.value).startswith(f"--prompts {file}: ")
    assert reason in str(refused.value)


def test_a_prompt_without_tokens_is_refused(file: Path) -> None:
    file.write_text("one\n")
    with pytest.raises(UsageError, match=f"--prompts {file}: 'one' has no tokens"):
        make_workload(
            WorkloadSpec(prompts=file), batch_size=8, vocab_size=GPT2, encode=lambda text: []
        )


def test_prompts_from_a_file_and_random_prompts_exclude_each_other(file: Path) -> None:
    file.write_text("one\n")
    with pytest.raises(UsageError, match=r"--prompts and --prompt-tokens exclude each other"):
        WorkloadSpec(prompts=file, prompt_tokens="7")


# Byte tokens


def test_byte_tokens_are_a_bijection_on_bytes() -> None:
    text = "".join(chr(code) for code in range(0, 0x110000, 7) if not 0xD800 <= code < 0xE000)
    text += "".join(map(chr, range(128)))
    spelled = dict(zip(text.encode(), byte_tokens(text), strict=True))
    never_in_utf_8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set(spelled) == set(range(256)) - never_in_utf_8
    assert [spelled[byte] for byte in text.encode()] == byte_tokens(text)
    assert len(set(spelled.values())) == len(spelled)
    assert set(spelled.values()) <= set(range(256))


@pytest.mark.parametrize(
    ("character", "token"), [("!", 0), ("A", 32), ("a", 64), ("~", 93), (" ", 220), ("\n", 198)]
)
def test_byte_tokens_are_those_of_gpt2(character: str, token: int) -> None:
    assert byte_tokens(character) == [token]


@given(st.text(max_size=9), st.text(max_size=9))
@settings(law, max_examples=50)
def test_byte_tokens_of_a_text_are_those_of_its_pieces(one: str, other: str) -> None:
    assert byte_tokens(one + other) == byte_tokens(one) + byte_tokens(other)


# Bounds


@pytest.mark.parametrize(
    ("field", "lowest", "highest"),
    [
        ("queue_size", 1, None),
        ("long_every", 1, None),
        ("long_tokens", 1, None),
        ("short_tokens", 1, None),
        ("seed", 0, 2**63 - 1),
    ],
)
def test_a_spec_takes_its_bounds_and_nothing_beyond(
    field: str, lowest: int, highest: int | None
) -> None:
    assert getattr(WorkloadSpec(**{field: lowest}), field) == lowest
    beyond = [lowest - 1, -(2**40)]
    if highest is not None:
        assert getattr(WorkloadSpec(**{field: highest}), field) == highest
        beyond.append(highest + 1)
    for value in beyond:
        option = "--" + field.replace("_", "-")
        with pytest.raises(UsageError, match=f"^{option} {value}: must be at (least|most) "):
            WorkloadSpec(**{field: value})


def test_the_largest_seed_makes_prompts() -> None:
    made(WorkloadSpec(prompt_tokens="4", seed=2**63 - 1))


# Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "--top-p 0.9: greedy decoding has no use for it; give --temperature"),
        ({"top_k": 5}, "--top-k 5: greedy decoding has no use for it; give --temperature"),
        ({"temperature": 1e-4}, "--temperature 0.0001: must be 0, which is greedy, or at least"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0: must be at least 1e-06"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k -1: must be at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        WorkloadSpec(**options)
    assert str(refused.value).startswith(message)


def test_temperature_0_is_greedy_whatever_is_cut() -> None:
    greedy = made(WorkloadSpec())
    for spec in (WorkloadSpec(temperature=0.0), WorkloadSpec(temperature=0.0, top_p=0.5, top_k=3)):
        assert spec.sampling is None
        assert made(spec).digest == greedy.digest


def test_each_setting_of_sampling_changes_the_digest_and_no_request() -> None:
    specs = [
        WorkloadSpec(),
        WorkloadSpec(temperature=1.0),
        WorkloadSpec(temperature=0.7),
        WorkloadSpec(temperature=1.0, top_p=0.9),
        WorkloadSpec(temperature=1.0, top_k=50),
        WorkloadSpec(temperature=1.0, seed=1),
    ]
    workloads = [made(spec) for spec in specs]
    assert len({workload.digest for workload in workloads}) == len(specs)
    assert {content(workload) for workload in workloads} == {content(workloads[0])}
    assert workloads[3].name == f"{workloads[0].name}; sampled at temperature 1, top-p 0.9"


def test_a_greedy_workload_is_written_as_before_there_was_sampling() -> None:
    """Earlier versions read it: the other side of a duet, and the cells of a saved sweep."""
    assert not {"temperature", "top_p", "top_k"} & as_json(WorkloadSpec(seed=3)).keys()
    spec = WorkloadSpec(temperature=0.7, top_p=0.9)
    written = as_json(spec)
    assert (written["temperature"], written["top_p"], "top_k" in written) == (0.7, 0.9, False)
    assert from_json(WorkloadSpec, written) == spec
