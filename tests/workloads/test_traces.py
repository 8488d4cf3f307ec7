"""Trace files: what they tell is what is asked, and a wrong row is named by its place."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.trace_samples import AZURE, BURSTGPT, MOONCAKE, OWN, SAMPLES, SHAREGPT, read, write

from batchbench.cli.main import run_command
from batchbench.errors import UsageError
from batchbench.workloads import Workload, WorkloadSpec, make_workload
from batchbench.workloads.prompts import byte_tokens
from batchbench.workloads.sampling import Sampling
from batchbench.workloads.spec import TRACE_FORMATS
from batchbench.workloads.traces import BadRow, read_trace, write_workload


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_trace_tells_lengths_and_times(name: str, named: bool, file: Path) -> None:
    content, prompt, output, due = SAMPLES[name]
    format = name.split()[0]
    trace = read(write(file, content), format=format if named else None)
    assert trace.format == format
    assert trace.prompt_tokens.tolist() == prompt
    assert trace.output_tokens.tolist() == output
    assert (None if trace.due_ns is None else trace.due_ns.tolist()) == due


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("how", ["marked", "crlf", "blank end"])
def test_it_may_have_been_saved_on_another_system(name: str, how: str, file: Path) -> None:
    content = SAMPLES[name][0]
    changed = {
        "marked": b"\xef\xbb\xbf" + content.encode(),
        "crlf": content.replace("\n", "\r\n").encode(),
        "blank end": content.encode() + b"\n  \n\n",
    }
    assert read(write(file, changed[how])).prompt_tokens.tolist() == SAMPLES[name][1]


def test_every_format_has_a_sample() -> None:
    assert {name.split()[0] for name in SAMPLES} == set(TRACE_FORMATS)


def test_columns_are_found_by_their_names(file: Path) -> None:
    lines = [line.split(",") for line in BURSTGPT.splitlines()]
    turned = "\n".join(",".join([*reversed(line), "x"]) for line in lines)
    assert read(write(file, turned)).prompt_tokens.tolist() == [472, 1087, 417]


def test_the_first_question_is_the_prompt_in_tokens_of_the_tokenizer(file: Path) -> None:
    trace = read(write(file, SHAREGPT))
    assert trace.prompts is not None
    assert trace.prompts.row(0).tolist() == byte_tokens("Why is the sky blue?")
    words = read_trace(file, lambda text: [len(word) for word in text.split()])
    assert words.prompts is not None
    assert words.prompts.row(0).tolist() == [3, 2, 3, 3, 5]
    assert words.output_tokens.tolist() == [2, 2]


def test_rows_out_of_order_are_sorted_by_their_times_with_all_that_is_theirs(file: Path) -> None:
    lines = OWN.splitlines(keepends=True)
    trace = read(write(file, "".join(reversed(lines))))
    assert trace.due_ns is not None
    assert trace.prompts is not None
    assert trace.due_ns.tolist() == [0, 1_500_000_000]
    assert trace.prompts.row(0).tolist() == [464, 2068]
    mixed = read(write(file, "".join(np.array(MOONCAKE.splitlines(keepends=True))[[2, 0, 1]])))
    assert mixed.blocks is not None
    assert mixed.prompt_tokens.tolist() == [1100, 700, 1000]
    assert [mixed.blocks.row(i).tolist() for i in range(3)] == [[0, 1, 2], [28, 1], [0, 14]]


# As a workload


def made(spec: WorkloadSpec, **more: object) -> Workload:
    """The workload of a spec where no tokenizer is at hand."""
    return make_workload(
        spec,
        batch_size=8,
        vocab_size=50257,
        encode=None,
        **more,  # type: ignore[arg-type]
    )


def test_a_trace_is_replayed_with_its_times_and_as_much_faster_as_asked(file: Path) -> None:
    spec = WorkloadSpec(trace=write(file, AZURE))
    assert made(spec).due_ns.tolist() == [0, 4_314_579_000, 4_541_877_000]
    assert made(replace(spec, speed=10.0)).due_ns.tolist() == [0, 431_457_900, 454_187_700]
    assert not made(replace(spec, arrivals="at-once")).due_ns.any()
    poisson = made(replace(spec, request_rate=5.0)).due_ns
    assert poisson.tolist() != made(spec).due_ns.tolist()
    assert made(replace(spec, arrivals="constant", request_rate=4.0)).due_ns.tolist() == [
        0,
        250_000_000,
        500_000_000,
    ]


def test_blocks_of_one_name_hold_the_same_tokens_and_others_do_not(file: Path) -> None:
    workload = made(WorkloadSpec(trace=write(file, MOONCAKE)))
    one, two, three = (workload.prompt(i) for i in range(3))
    assert one[:512].tolist() == two[:512].tolist()
    assert one[512:700].tolist() == three[512:700].tolist()
    assert one[512:1000].tolist() != two[512:1000].tolist()
    assert one[:512].tolist() != three[:512].tolist()
    again = made(WorkloadSpec(trace=file, seed=1))
    assert again.prompt(0).tolist() != one.tolist()


def test_a_queue_size_takes_the_first_rows_and_too_large_a_one_is_told(file: Path) -> None:
    told: list[str] = []
    spec = WorkloadSpec(trace=write(file, AZURE))
    assert len(made(spec, note=told.append)) == 3
    assert made(replace(spec, queue_size=2), note=told.append).prompt_tokens.tolist() == [374, 396]
    assert told == [f"{file}: azure, 3 requests", f"{file}: azure, 2 requests"]
    told.clear()
    assert len(made(replace(spec, queue_size=9), note=told.append)) == 3
    assert told[1:] == [f"{file}: has 3 requests, fewer than --queue-size 9"]


def test_a_row_beyond_the_queue_size_is_not_looked_at(file: Path) -> None:
    assert len(made(WorkloadSpec(trace=write(file, AZURE + "spoiled\n"), queue_size=2))) == 2


def test_what_tells_no_times_needs_a_rate_to_come_over_time(file: Path) -> None:
    spec = WorkloadSpec(trace=write(file, SHAREGPT))
    assert made(spec).closed
    assert made(replace(spec, request_rate=2.0)).due_ns[1] > 0
    for changed in ({"speed": 2.0}, {"arrivals": "trace"}):
        with pytest.raises(UsageError, match=f"--trace {file}: has no times; give --request-rat"):
            made(replace(spec, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompt_tokens": "7"}, "--prompt-tokens and --trace exclude each other"),
        ({"output_tokens": "7"}, "--output-tokens and --trace exclude each other"),
        ({"long_tokens": 7}, "--trace and --long-tokens exclude each other"),
        ({"prompts": Path("trace")}, "--prompts and --trace exclude each other"),
        ({"speed": 2.0, "request_rate": 1.0}, "--request-rate and --speed exclude each other"),
        ({"speed": 2.0, "arrivals": "at-once"}, "--speed 2: applies to the trace's own times"),
        ({"trace_format": "csv"}, "--trace-format csv: must be one of sharegpt, azure"),
        ({"on_bad_row": "weep"}, "--on-bad-row weep: must be one of error, skip"),
    ],
)
def test_what_contradicts_a_trace_is_refused(
    settings: dict[str, object], told: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(file, AZURE).parent)
    with pytest.raises(UsageError) as refused:
        WorkloadSpec(trace=file, **settings)  # type: ignore[arg-type]
    assert told in str(refused.value)


# Our own format


SAMPLINGS = st.builds(
    Sampling,
    st.floats(0.001, 100),
    st.floats(1e-6, 1),
    st.integers(0, 10**9),
    st.integers(0, 2**63 - 1),
)


@st.composite
def any_workload(draw: st.DrawFn) -> Workload:
    """A few requests with varied ids, lengths and times."""
    count = draw(st.integers(1, 5))
    ids = st.lists(st.integers(0, 50256), min_size=1, max_size=5)
    return Workload.of(
        draw(st.text(max_size=9)),
        [draw(ids) for _ in range(count)],
        [draw(st.integers(1, 99)) for _ in range(count)],
        due_ns=sorted(draw(st.integers(0, 10**12)) for _ in range(count)),
        seed=draw(st.integers(0, 2**63 - 1)),
        stop_at_eos=draw(st.booleans()),
        max_concurrency=draw(st.none() | st.integers(1, 9)),
        sampling=draw(st.none() | SAMPLINGS),
    )


@given(workload=any_workload())
@law
def test_a_workload_that_is_saved_and_read_again_is_the_same(
    workload: Workload, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("own") / "saved.jsonl"
    file.write_text("".join(write_workload(workload)), encoding="utf-8")
    again = made(WorkloadSpec(trace=file))
    assert again.digest == workload.digest
    assert again.name.startswith(workload.name)
    assert (again.stop_at_eos, again.max_concurrency) == (
        workload.stop_at_eos,
        workload.max_concurrency,
    )
    assert again.sampling == workload.sampling
    greedy = made(WorkloadSpec(trace=file, temperature=0.0))
    assert (greedy.sampling, "sampled" in greedy.name) == (None, "sampled" in workload.name)
    assert (greedy.digest == workload.digest) == (workload.sampling is None)


@pytest.mark.parametrize("how", ["number", "cut", "order"])
def test_a_saved_workload_that_was_changed_since_is_told(how: str, file: Path) -> None:
    workload = Workload.of("w", [[1, 2], [3]], [5, 6], due_ns=[0, 4])
    header, one, two = write_workload(workload)
    changed = {
        "number": header + one + two.replace('"output_tokens":6', '"output_tokens":7'),
        "cut": header + one,
        "order": header + two + one.replace('"due_ns":0', '"due_ns":5'),
    }
    with pytest.raises(UsageError, match=r"was changed .* delete the digest"):
        made(WorkloadSpec(trace=write(file, changed[how])))
    without = changed[how].replace(workload.digest, "").replace('"digest": ""', '"digest": null')
    made(WorkloadSpec(trace=write(file, without)))
    # A part of it, or other times, are asked for knowingly.
    assert len(made(WorkloadSpec(trace=write(file, header + one + two), queue_size=1))) == 1


def test_a_file_by_hand_may_give_lengths_alone(file: Path) -> None:
    write(
        file, '{"prompt_tokens": 4, "output_tokens": 2}\n{"prompt_tokens": 1, "output_tokens": 9}'
    )
    workload = made(WorkloadSpec(trace=file))
    assert workload.prompt_tokens.tolist() == [4, 1]
    assert workload.closed


# Rows that are wrong

HUGE = "9" * 5000

WRONG: Sequence[tuple[str, str, str]] = [
    ("azure", "2023-11-16 18:15:46,374", "has 2 columns, the first line 3"),
    ("azure", "2023-11-16 18:15:46,374,44,1", "has 4 columns, the first line 3"),
    ("azure", "2023-11-16 18:15:46,0,44", "ContextTokens is 0: must be at least 1 token"),
    ("azure", "2023-11-16 18:15:46,374,", "GeneratedTokens is '': must be a whole number"),
    ("azure", "2023-11-16 18:15:46,374,4.5", "GeneratedTokens is '4.5': must be a whole number"),
    ("azure", "2023-11-16 18:15:46,374,-4", "GeneratedTokens is '-4': must be a whole number"),
    ("azure", "2023-11-16 18:15:46,374,nan", "GeneratedTokens is 'nan': must be a whole"),
    ("azure", f"2023-11-16 18:15:46,{HUGE},4", "ContextTokens is "),
    ("azure", "2023-13-16 18:15:46,374,44", "TIMESTAMP is '2023-13-16 18:15:46': must be a time"),
    ("azure", "18:15:46,374,44", "TIMESTAMP is '18:15:46': must be a time such as 2023-11-16"),
    ("azure", '2023-11-16 18:15:46,"374,44', "unexpected end of data"),
    ("azure", "\x00", "has 1 columns"),
    ("burstgpt", "5,ChatGPT,472,0,472,API log", "Response tokens is 0: the request failed"),
    ("burstgpt", "-5,ChatGPT,472,18,490,API log", "Timestamp is '-5': must be seconds"),
    ("burstgpt", "nan,ChatGPT,472,18,490,API log", "Timestamp is 'nan': must be seconds"),
    ("burstgpt", "5,ChatGPT,many,18,490,API log", "Request tokens is 'many': must be a whole"),
    ("mooncake", "{", "is not JSON"),
    ("mooncake", "[" * 100_000, "is not readable JSON"),
    ("mooncake", "[]", "is []: must be a JSON object"),
    ("mooncake", HUGE, "is not readable JSON"),
    ("mooncake", '{"timestamp": 0, "input_length": 7}', "output_length is missing: must be"),
    ("mooncake", '{"timestamp": 0, "input_length": true, "output_length": 7}', "input_length is"),
    ("mooncake", '{"timestamp": NaN, "input_length": 7, "output_length": 7}', "timestamp is nan"),
    ("mooncake", '{"timestamp": -1, "input_length": 7, "output_length": 7}', "timestamp is -1"),
    ("mooncake", '{"timestamp": 1e400, "input_length": 7, "output_length": 7}', "timestamp is inf"),
    ("mooncake", '{"input_length": 7, "output_length": 7}', "timestamp is missing: must be a"),
    (
        "mooncake",
        '{"timestamp": 0, "input_length": 7, "output_length": 7, "hash_ids": ["a"]}',
        "hash_ids is ['a']: must be a list",
    ),
    ("batchbench", '{"output_tokens": 7}', "prompt_tokens is missing: must be"),
    ("batchbench", '{"output_tokens": 7, "prompt_ids": []}', "prompt_ids is []: must be a list"),
    ("batchbench", '{"output_tokens": 7, "prompt_ids": [-1]}', "prompt_ids is [-1]"),
    ("batchbench", '{"output_tokens": 0, "prompt_ids": [1]}', "output_tokens is 0: must be at"),
    ("batchbench", '{"output_tokens": 7, "prompt_tokens": 3}', "unlike the requests before it"),
    ("batchbench", '{"due_ns": -1, "output_tokens": 7, "prompt_ids": [1]}', "due_ns is -1"),
]


@pytest.mark.parametrize(("format", "line", "told"), WRONG, ids=lambda text: text[:40])
def test_a_wrong_line_is_named_with_what_is_wrong(
    format: str, line: str, told: str, file: Path
) -> None:
    good = SAMPLES[format][0].splitlines(keepends=True)
    write(file, "".join([*good[:2], line + "\n", *good[2:]]))
    with pytest.raises(UsageError) as refused:
        read(file)
    text = str(refused.value)
    assert text.startswith(f"--trace {file}: line 3: ")
    assert told in text
    assert text.endswith("correct it, or skip such rows with --on-bad-row skip")
    assert len(text) < 500
    bad: list[BadRow] = []
    trace = read(file, on_bad_row=bad.append)
    assert [row.number for row in bad] == [3]
    assert trace.prompt_tokens.tolist() == SAMPLES[format][1]


ELEMENTS: Sequence[tuple[str, str]] = [
    ("7", "is 7: must be a JSON object"),
    ('{"id": "x"}', "has no list of conversations"),
    ('{"conversations": []}', "has no turn of a human that is followed by an answer of gpt"),
    ('{"conversations": [{"from": "human", "value": "a"}]}', "has no turn of a human that"),
    ('{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "a"}]}', "no"),
    ('{"conversations": [7]}', "a turn is 7: must be an object"),
    ('{"conversations": [{"from": "human"}]}', "a turn lacks from or value"),
    (
        '{"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}]}',
        "the question is empty",
    ),
]


@pytest.mark.parametrize(("element", "told"), ELEMENTS)
def test_a_wrong_conversation_is_named_by_its_row(element: str, told: str, file: Path) -> None:
    good = [json.dumps(each) for each in json.loads(SHAREGPT)]
    write(file, f"[{good[0]}, {element}, {good[1]}]")
    with pytest.raises(UsageError) as refused:
        read(file)
    assert str(refused.value).startswith(f"--trace {file}: row 2: ")
    assert told in str(refused.value)
    bad: list[BadRow] = []
    assert read(file, on_bad_row=bad.append).prompt_tokens.tolist() == [20, 8]
    assert [(row.number, row.unit) for row in bad] == [(2, "row")]


def test_an_array_that_breaks_off_is_told_and_read_so_far_if_asked(file: Path) -> None:
    write(file, SHAREGPT[: SHAREGPT.index("i6IyJda_0")])
    with pytest.raises(UsageError, match=r"row 2: is not JSON .* nothing after it can be read"):
        read(file)
    assert len(read(file, on_bad_row=lambda row: None).prompt_tokens) == 1


@pytest.mark.parametrize(
    ("content", "format", "told"),
    [
        (b"", None, "is an empty file; give a file with requests"),
        (b"\x89PNG\r\n", None, "is a picture"),
        (b"a,b\n", None, "of no known format (sharegpt, azure, burstgpt, mooncake, batchbench)"),
        (b"a,b,c\n1,2,3\n", None, "name it with --trace-format"),
        (b"a,b,c\n1,2,3\n", "azure", "line 1: lacks the column TIMESTAMP"),
        (b"", "azure", "is an empty file"),
        (
            AZURE.splitlines(keepends=True)[0].encode(),
            None,
            "contains no rows of the format azure; give a file with requests",
        ),
        (b"[]", None, "is JSON of no known format"),
        (b"[]", "sharegpt", "contains no rows of the format sharegpt"),
        (
            b'[{"instruction": "a", "output": "b"}]',
            None,
            "is JSON with the keys instruction, output,",
        ),
        (
            b'{"data": [{"text": "a"}]}',
            None,
            "is JSON with the keys data, text, of no known format",
        ),
        (b'{"a": 1}', "sharegpt", "line 1: has no list of conversations"),
        (b'{"batchbench_workload": 9}', None, "line 1: is of version 9, this batchbench reads 1"),
        (
            b'{"batchbench_workload": 1, "max_concurrency": 0}',
            None,
            "line 1: --max-concurrency 0: must",
        ),
        (
            b'{"batchbench_workload": 1, "sampling": {"temperature": -1}}',
            None,
            "line 1: --temperature -1.0: must be at least 0",
        ),
        (b'{"batchbench_workload": 1, "sampling": 7}', None, "line 1: name or sampling has a"),
        (b'{"batchbench_workload": 1}', None, "contains no rows of the format batchbench"),
        (b'{"batchbench_workload": 1}\n{"output_tokens": 3}', None, "line 2: prompt_tokens"),
    ],
)
def test_what_is_no_trace_is_refused(
    content: bytes, format: str | None, told: str, file: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        read(write(file, content), format=format)
    assert str(refused.value).startswith(f"--trace {file}: ")
    assert told in str(refused.value)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "azure 2024"])
def test_where_every_row_is_wrong_nothing_is_left(name: str, file: Path) -> None:
    header = {"azure": AZURE, "burstgpt": BURSTGPT}.get(name, "").partition("\n")[0]
    content = "[7, 8]" if name == "sharegpt" else f"{header}\n7\n8\n".lstrip()
    with pytest.raises(UsageError, match="contains no valid rows"):
        read(write(file, content), format=name, on_bad_row=lambda row: None)


def test_skipping_says_how_many_and_names_the_first(file: Path) -> None:
    told: list[str] = []
    write(file, AZURE + "spoiled\n" * 1500)
    workload = made(WorkloadSpec(trace=file, on_bad_row="skip"), note=told.append)
    assert len(workload) == 3
    assert told == [
        f"{file}: azure, 3 requests; invalid rows skipped: 1,500, "
        + "; ".join(f"line {n}: has 1 columns, the first line 3" for n in (5, 6, 7))
        + "; and 1,497 more"
    ]


# Many rows

ROWS = 20_000


def rows_of(format: str, count: int) -> list[str]:
    """Rows of a format, in lines of their own (ShareGPT's without their commas)."""
    rng = random.Random(1)
    rows = []
    for i in range(count):
        asked, answered = rng.randint(1, 999), rng.randint(1, 999)
        rows.append(
            {
                "azure": f"2023-11-16 {i // 3600:02}:{i // 60 % 60:02}:{i % 60:02},"
                f"{asked},{answered}",
                "burstgpt": f"{i},GPT-4,{asked},{answered},{asked + answered},API log",
                "mooncake": f'{{"timestamp": {1000 * i}, "input_length": {asked}, '
                f'"output_length": {answered}}}',
                "sharegpt": '{"conversations": [{"from": "human", "value": "why"}, '
                f'{{"from": "gpt", "value": "{"x" * (answered // 100 + 1)}"}}]}}',
                "batchbench": f'{{"due_ns": {i}, "output_tokens": {answered}, '
                f'"prompt_ids": [{asked}]}}',
            }[format]
        )
    return rows


def joined(format: str, rows: Sequence[str]) -> str:
    """A file of rows."""
    if format == "sharegpt":
        return "[\n" + ",\n".join(rows) + "\n]\n"
    header = {"azure": AZURE, "burstgpt": BURSTGPT}.get(format, "").partition("\n")[0]
    return f"{header}\n".lstrip() + "\n".join(rows) + "\n"


SPOILERS: Sequence[Callable[[str, random.Random], str]] = (
    lambda row, rng: row[: rng.randint(1, len(row) // 2)],  # torn
    lambda row, rng: "",
    lambda row, rng: f'"{row}',
    lambda row, rng: row.replace(",", ";"),
    lambda row, rng: "\ufffe\x00" + row[::-1],
)


@pytest.mark.parametrize("format", TRACE_FORMATS)
def test_each_of_a_thousand_rows_spoiled_at_random_is_named(format: str, file: Path) -> None:
    rng = random.Random(2)
    rows = rows_of(format, ROWS)
    spoiled = sorted(rng.sample(range(ROWS - 1), 1000))
    for i in spoiled:
        if format == "sharegpt":  # what is not JSON ends the array
            rows[i] = rng.choice(["7", "{}", rows[i].replace("gpt", "nobody"), '{"a": [1, {}]}'])
        else:
            rows[i] = rng.choice(SPOILERS)(rows[i], rng)
    bad: list[BadRow] = []
    trace = read(write(file, joined(format, rows)), on_bad_row=bad.append)
    first = {"azure": 2, "burstgpt": 2}.get(format, 1)
    assert [row.number for row in bad] == [i + first for i in spoiled]
    assert len(trace.output_tokens) == ROWS - 1000
    good = np.delete(np.arange(ROWS), spoiled)
    whole = read(write(file, joined(format, rows_of(format, ROWS))))
    assert trace.output_tokens.tolist() == whole.output_tokens[good].tolist()


@pytest.mark.parametrize("format", TRACE_FORMATS)
def test_reading_takes_memory_for_the_columns_and_little_besides(format: str, file: Path) -> None:
    few, many = (joined(format, rows_of(format, n)) for n in (100, ROWS))
    read(write(file, few))  # what is imported and compiled once
    write(file, many)
    del many
    tracemalloc.start()
    try:
        trace = read(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    columns = [trace.prompt_tokens, trace.output_tokens]
    columns += [] if trace.due_ns is None else [trace.due_ns]
    columns += [] if trace.prompts is None else [trace.prompts.values, trace.prompts.offsets]
    kept = sum(column.nbytes for column in columns)
    assert peak < 1.5 * kept + 2**19  # half a MiB for buffers; the file is several times that
    assert file.stat().st_size > 2**19


def test_a_line_without_an_end_is_wrong_and_is_not_held_in_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchbench.workloads.traces.rows.LONGEST_LINE", 1000)
    lines = AZURE.splitlines(keepends=True)
    write(file, "".join([*lines[:2], "9" * 5000, "\n", *lines[2:]]))
    bad: list[BadRow] = []
    assert len(read(file, on_bad_row=bad.append).prompt_tokens) == 3
    assert [row.number for row in bad] == [3]


# Pipes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    ("words", "content", "steps"),
    [
        ("--trace {}", AZURE, 208),
        ("--prompts {}", "one\ntwo\n", 132),
        ("--output-tokens empirical:{} --queue-size 8", "4\n4\n", 4),
        ("--workload {}", "queue_size = 8\nlong_tokens = 20", 20),
    ],
)
def test_what_is_read_may_be_a_pipe(
    words: str,
    content: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    asked = ["simulate", "--dry-run", "--prefill", "separate", "--overlong", "clip"]
    asked += [*words.format(pipe).split()]
    monkeypatch.setattr(sys, "argv", ["batchbench", *asked])
    writer = threading.Thread(target=pipe.write_text, args=(content,), daemon=True)
    writer.start()  # waits for its reader
    assert run_command() == 0
    writer.join(timeout=10)
    assert re.search(rf"continuous {steps} forward passes", capsys.readouterr().out)
