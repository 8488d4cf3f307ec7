"""Dialects of trace files: all usual ones are read, and none is misread."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.trace_samples import AZURE, BURSTGPT, MOONCAKE, OWN, SHAREGPT, read, write

from batchbench.errors import UsageError
from batchbench.workloads import WorkloadSpec, make_workload
from batchbench.workloads.traces import BadRow


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def lines(*rows: object) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusal(file: Path, content: str | bytes, **more: object) -> str:
    """Return the one line that refuses a file."""
    with pytest.raises(UsageError) as refused:
        read(write(file, content), **more)
    text = str(refused.value)
    assert text.startswith(f"--trace {file}: ")
    assert "\n" not in text
    assert len(text) < 500
    return text.removeprefix(f"--trace {file}: ")


# Mooncake: block sizes


def mooncake(*lengths: int, block: int, gap: float = 1000) -> list[dict[str, Any]]:
    """Return rows of Mooncake with a name for each block."""
    return [
        {
            "timestamp": i * gap,
            "input_length": length,
            "output_length": 5,
            "hash_ids": [100 * i + n for n in range(-(-length // block))],
        }
        for i, length in enumerate(lengths)
    ]


@given(
    block=st.integers(0, 11).map(lambda n: 2**n),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    limit=st.none() | st.integers(1, 3),
)
@law
def test_a_block_size_is_inferred_correctly_or_must_be_given(
    block: int, lengths: list[int], limit: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("blocks") / "trace"
    write(file, lines(*mooncake(*lengths, block=block)))
    try:
        trace = read(file, limit=limit)
    except UsageError as error:
        assert "--trace-block-size" in str(error)  # noqa: PT017
    else:
        # Another size is right too if these rows fit it.
        size = trace.block_tokens
        assert [-(-n // size) for n in lengths] == [-(-n // block) for n in lengths]
        assert size in (block, 512)
        assert trace.remarks[0] == f"blocks of {size} tokens" + " (inferred)" * (size != 512)
    trace = read(file, limit=limit, block_tokens=block)
    assert trace.block_tokens == block
    assert trace.prompt_tokens.tolist() == lengths[:limit]
    assert trace.remarks[0] == f"blocks of {block} tokens"


@pytest.mark.parametrize("names", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize("wrong", [0, 3])
def test_a_row_with_too_few_or_too_many_names_of_blocks_is_named(
    names: int, block: int, wrong: int, file: Path
) -> None:
    rows = mooncake(*[3 * block - 1] * 5, block=block)
    rows[wrong]["hash_ids"] = list(range(names))
    if not names:  # such a row has no blocks to check
        assert len(read(write(file, lines(*rows))).prompt_tokens) == 5
        return
    told = refusal(file, lines(*rows))
    assert told.startswith(
        f"line {wrong + 1}: hash_ids names {names} blocks, but {3 * block - 1:,} tokens are "
        f"3 blocks of {block} (--trace-block-size)"
    )
    bad: list[BadRow] = []
    trace = read(file, on_bad_row=bad.append, limit=4)
    assert [row.number for row in bad] == [wrong + 1]
    assert len(trace.prompt_tokens) == 4


def test_a_row_of_20_tokens_and_two_blocks_among_those_of_512_is_named(file: Path) -> None:
    row = {"timestamp": 9000, "input_length": 20, "output_length": 8, "hash_ids": [0, 1]}
    assert refusal(file, MOONCAKE + lines(row)).startswith("line 4: hash_ids names 2 blocks")
    assert refusal(file, lines(row) + MOONCAKE).startswith("line 1: hash_ids names 2 blocks")


def test_an_ambiguous_block_size_must_be_given(file: Path) -> None:
    rows = lines(*mooncake(900, 700, block=100))
    assert refusal(file, rows).startswith(
        "hash_ids fit blocks of 100 to 112 tokens; give their size"
    )
    rows = lines(*mooncake(900, block=100), *mooncake(900, block=300))
    assert refusal(file, rows) == (
        "line 1: hash_ids names 9 blocks for 900 tokens, and no block size fits most rows; give "
        "--trace-block-size"
    )


def test_prompts_of_one_block_keep_the_usual_size(file: Path) -> None:
    assert read(write(file, lines(*mooncake(100, 400, block=4096)))).block_tokens == 512
    told = refusal(file, lines(*mooncake(100, 600, 700, block=4096)))
    assert told.startswith(
        "hash_ids fit blocks of at least 700 tokens; give their size with --trace-"
    )


def test_blocks_of_another_size_hold_the_same_tokens(file: Path) -> None:
    rows = mooncake(40, 40, block=16)
    rows[1]["hash_ids"][:2] = rows[0]["hash_ids"][:2]
    write(file, lines(*rows))
    workload = make_workload(WorkloadSpec(trace=file), batch_size=8, vocab_size=50257, encode=None)
    one, two = workload.prompt(0), workload.prompt(1)
    assert one[:32].tolist() == two[:32].tolist()
    assert one[32:].tolist() != two[32:].tolist()
    assert workload.name == "mooncake trace trace: 2 requests, blocks of 16 tokens"


# Mooncake: units of times


@pytest.mark.parametrize(
    ("times", "unit", "due_ns"),
    [
        ([0, 3052, 3052], "ms", [0, 3_052_000_000, 3_052_000_000]),
        ([27482.5, 28000, 27500], "ms", [0, 17_500_000, 517_500_000]),
        ([0.0, 0.2, 0.4], "s", [0, 200_000_000, 400_000_000]),
        ([0, 0, 0.25], "s", [0, 0, 250_000_000]),
        ([1_700_000_000, 1_700_000_003], "s", [0, 3_000_000_000]),
        ([1_700_000_000.5, 1_700_000_003], "s", [0, 2_500_000_000]),
        ([1_700_000_000_000, 1_700_000_000_003], "ms", [0, 3_000_000]),
        ([1_700_000_000_000_000, 1_700_000_000_003_000], "us", [0, 3_000_000]),
        ([1_700_000_000_000_000_000, 1_700_000_000_000_000_007], "ns", [0, 7]),
        ([0], "ms", [0]),
        ([0, 0, 0], "ms", [0, 0, 0]),
    ],
)
def test_an_inferred_unit_of_times_is_reported(
    times: list[float], unit: str, due_ns: list[int], file: Path
) -> None:
    rows = [{"timestamp": t, "input_length": 7, "output_length": 7} for t in times]
    trace = read(write(file, lines(*rows)))
    assert trace.due_ns is not None
    assert trace.due_ns.tolist() == due_ns
    assert trace.remarks == (f"times in {unit}" + " (inferred)" * (unit != "ms"),)


@pytest.mark.parametrize("gap", [250_000, 10**6, 10**9])
def test_times_that_may_be_us_or_ns_are_questioned(gap: int, file: Path) -> None:
    rows = [{"timestamp": i * gap, "input_length": 7, "output_length": 7} for i in range(9)]
    assert "in us; give their unit with --trace-time-unit" in refusal(file, lines(*rows))
    due = read(file, time_unit="us").due_ns
    assert due is not None
    assert due[1] == gap * 1000


@pytest.mark.parametrize(
    "times",
    [[0, 0, 1, 1, 2], [0, 1, 2, 3], [5, 12, 20], [3.5, 12.25, 20.5], [0, 40.5, 80.25]],
)
def test_an_ambiguous_unit_of_times_must_be_given(times: list[float], file: Path) -> None:
    rows = [{"timestamp": t, "input_length": 7, "output_length": 7} for t in times]
    told = refusal(file, lines(*rows))
    assert re.fullmatch(
        r"times are \S+ apart on average: \S+ requests/s if in ms, \S+ if in s; give their unit "
        r"with --trace-time-unit",
        told,
    )
    for unit, ns in (("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1)):
        due = read(file, time_unit=unit).due_ns
        assert due is not None
        expected = [round(t * ns) for t in times]
        assert due.tolist() == [t - expected[0] for t in expected]


def test_traces_of_bailian_have_seconds_and_blocks_of_16(file: Path) -> None:
    rows = [
        {"chat_id": i, "parent_chat_id": -1, **row, "turn": 1}
        for i, row in enumerate(mooncake(45, 60, block=16, gap=30.5))
    ]
    trace = read(write(file, lines(*rows)))
    assert trace.due_ns is not None
    assert trace.due_ns.tolist() == [0, 30_500_000_000]
    assert trace.block_tokens == 16


@pytest.mark.parametrize(
    ("option", "value"), [("block_tokens", 16), ("time_unit", "s")], ids=["block", "unit"]
)
@pytest.mark.parametrize("content", [AZURE, BURSTGPT, SHAREGPT, OWN])
def test_options_of_mooncake_are_refused_for_other_formats(
    option: str, value: object, content: str, file: Path
) -> None:
    with pytest.raises(UsageError, match=r"^--trace-\S+ \w+: is for Mooncake traces, and --trace"):
        read(write(file, content), **{option: value})


# Mooncake: other forms


def test_mooncake_without_times_comes_all_at_once(file: Path) -> None:
    rows = [{"input_length": 30, "output_length": 5}, {"input_length": 40, "output_length": 9}]
    trace = read(write(file, lines(*rows)))
    assert trace.format == "mooncake"
    assert trace.due_ns is None
    assert trace.prompt_tokens.tolist() == [30, 40]
    with pytest.raises(UsageError, match=r"^--trace \S+: has no times; drop --trace-time-unit$"):
        read(file, time_unit="s")
    told = refusal(file, lines(*rows, {"timestamp": 5, **rows[0]}))
    assert told.startswith("line 3: has a timestamp, unlike the first row")
    told = refusal(file, lines({"timestamp": 5, **rows[0]}, *rows))
    assert told.startswith("line 2: timestamp is missing: must be a number")


def test_mooncake_may_hold_the_texts_of_its_prompts(file: Path) -> None:
    text = {"timestamp": 0, "text_input": "Once upon a time", "output_length": 8}
    trace = read(write(file, lines(text, {**text, "timestamp": 100, "hash_ids": [1, 2, 3]})))
    assert trace.prompts is not None
    assert trace.prompt_tokens.tolist() == [16, 16]
    for row, fault in (
        ({"timestamp": 100, "input_length": 20}, "output_length is missing"),
        (
            {"timestamp": 100, "input_length": 20, "output_length": 7},
            "lacks the content of its prompt, unlike",
        ),
        ({**text, "text_input": ""}, "text_input is empty"),
        ({**text, "text_input": 7}, "text_input is 7: must be a text"),
    ):
        assert refusal(file, lines(text, row)).startswith(f"line 2: {fault}")


def test_objects_may_be_the_elements_of_an_array(file: Path) -> None:
    for content in (MOONCAKE, OWN):
        rows = [json.loads(line) for line in content.splitlines()]
        whole = read(write(file, content))
        for text in (json.dumps(rows), json.dumps({"version": 1.5, "data": rows, "x": [{}]})):
            trace = read(write(file, text))
            assert trace.format == whole.format
            assert trace.prompt_tokens.tolist() == whole.prompt_tokens.tolist()


# ShareGPT

TURNS = [("human", "Why?"), ("gpt", "So."), ("human", "And?"), ("gpt", None)]


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages", "items"])
@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("User", "bard")])
@pytest.mark.parametrize("form", ["array", "indented", "lines", "data", "data indented"])
def test_conversations_come_in_many_forms(
    key: str, who: str, what: str, names: tuple[str, str], form: str, file: Path
) -> None:
    said = dict(zip(("human", "gpt"), names, strict=True))
    turns = [{who: said[speaker], what: text} for speaker, text in TURNS]
    rows = [{"id": "a", key: turns}, {key: turns, "source": {"data": []}}]
    content = {
        "array": json.dumps(rows),
        "indented": json.dumps(rows, indent=1),
        "lines": lines(*rows),
        "data": json.dumps({"data": rows}),
        "data indented": json.dumps({"version": "1", "data": rows}, indent=4),
    }
    trace = read(write(file, content[form]))
    assert trace.format == "sharegpt"
    assert trace.prompt_tokens.tolist() == [4, 4]
    assert trace.output_tokens.tolist() == [3, 3]
    assert trace.remarks == ()


def conversation(*turns: tuple[str, object]) -> dict[str, Any]:
    """Return a row of ShareGPT."""
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def test_turns_before_the_answer_are_one_prompt_and_others_are_counted(file: Path) -> None:
    rows = [
        conversation(("human", "a"), ("human", "bc"), ("gpt", "d")),
        conversation(("system", "Be kind."), ("human", "ab"), ("gpt", "c")),
        conversation(("gpt", "before"), ("human", "ab"), ("tool", "7"), ("gpt", "c")),
        conversation(("human", [{"type": "text", "text": "a"}, {"text": "b"}]), ("gpt", "c")),
    ]
    trace = read(write(file, lines(*rows)))
    assert trace.prompts is not None
    assert bytes(i + 33 for i in trace.prompts.row(0) if i < 94) == b"abc"
    assert trace.prompt_tokens.tolist() == [4, 2, 2, 3]
    assert trace.remarks == ("prompts without their system and other turns: 2",)


def test_half_of_a_surrogate_pair_is_replaced(file: Path) -> None:
    write(
        file, r'[{"conversations":[{"from":"human","value":"a\ud83d"},{"from":"gpt","value":"b"}]}]'
    )
    assert read(file).prompt_tokens.tolist() == [4]  # U+FFFD has three bytes


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('[{"a": 1} {"a": 2}]', "row 2: is not JSON ('{' instead of , or ]); nothing after"),
        ("[7", "row 2: is not JSON (the end of the file instead of , or ])"),
        ("[{}, ]", "row 2: is not JSON (Expecting value); nothing after it can be read"),
        ("[{}] [{}]", "row 2: follows the end of the array; nothing after it can be read"),
        ('{"data": [{}], "data": []}', "row 2: has the key 'data' twice in one object"),
        ('{"data": [{}]', "row 2: is not JSON (Expecting ',' delimiter)"),
        ('{"data": {}}', "line 1: has no list of conversations"),
        ("[nul", "row 1: is not JSON"),
    ],
)
def test_a_broken_array_is_refused_with_the_row(content: str, fault: str, file: Path) -> None:
    bad: list[BadRow] = []
    with pytest.raises(UsageError):
        read(write(file, content), format="sharegpt", on_bad_row=bad.append)
    assert any(str(row).startswith(fault) for row in bad)


# CSV


def test_burstgpt_as_pandas_writes_it(file: Path) -> None:
    content = (
        ",Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "0,1e-05,ChatGPT,472.0,18.0,490.0,Conversation log\n"
        "1,5.0,ChatGPT,1087.00,230.,1317.0,Conversation log\n"
        "2,1.25E+1,ChatGPT,1,1,2,\n"
    )
    trace = read(write(file, content))
    assert trace.due_ns is not None
    assert trace.due_ns.tolist() == [0, 4_999_990_000, 12_499_990_000]
    assert trace.prompt_tokens.tolist() == [472, 1087, 1]
    assert trace.output_tokens.tolist() == [18, 230, 1]
    for zero in ("0", "0.0", "0.", "000", " 0.00 "):
        failed = f"9,7,ChatGPT,9,{zero},9,API log\n"
        assert refusal(file, content + failed).startswith(
            "line 5: Response tokens is 0: the request failed; correct it"
        )
    told: list[str] = []
    make_workload(
        WorkloadSpec(trace=file, on_bad_row="skip"),
        batch_size=8,
        vocab_size=50257,
        encode=None,
        note=told.append,
    )
    assert told == [
        f"{file}: burstgpt, 3 requests; failed requests skipped: 1, line 5: Response tokens is "
        "0: the request failed"
    ]


@pytest.mark.parametrize(
    ("time", "ns"),
    [
        ("2023-11-16 18:15:46", 0),
        ("2023-11-16T18:15:46Z", 0),
        ("2023-11-16 18:15:46z", 0),
        ("2023-11-16 18:15:46 UTC", 0),
        ("2023-11-16 18:15:46.25 utc", 250_000_000),
        ("2023-11-16 18:15:46 GMT", 0),
        ("2023-11-16 20:15:46+02", 0),
        ("2023-11-16 20:15:46 +02", 0),
        ("2023-11-16 20:15:46.0+0200", 0),
        ("2023-11-16 20:45:46+02:30", 0),
        ("2023-11-16 13:15:46-05", 0),
        ("2023-11-16 18:15:46.1", 100_000_000),
        ("2023-11-16 18:15:46.123456789", 123_456_789),
        ("2023-11-16 18:15:46.123456789999999999999999", 123_456_789),
        (" 2023-11-16 18:15:46 ", 0),
    ],
)
def test_times_of_azure_in_their_variants(time: str, ns: int, file: Path) -> None:
    content = f"timestamp,contexttokens,generatedtokens\n{time},1,2\n2023-11-16 18:15:47,1,2\n"
    due = read(write(file, content)).due_ns
    assert due is not None
    assert due.tolist() == [0, 10**9 - ns]


@pytest.mark.parametrize(
    "time",
    ["2023-11-16", "16.11.2023 18:15", "2023-11-16 18:15:60", "2023-11-16 18:15:46+99", "+02", "",
     "2023-11-16 18:15:46.", "2023-11-16 18:15:46 CET", "２023-11-16 18:15:46", "1700158546"],
)  # fmt: skip
def test_invalid_times_of_azure_are_refused(time: str, file: Path) -> None:
    told = refusal(file, f"{AZURE}{time},1,2\n")
    assert told.startswith("line 5: TIMESTAMP is ")


@pytest.mark.parametrize(
    "header",
    [
        "timestamp,contexttokens,generatedtokens",
        "Timestamp,Context Tokens,Generated_Tokens",
        '"TIMESTAMP", ContextTokens ,"GeneratedTokens"',
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_headers_in_their_variants(header: str, delimiter: str, file: Path) -> None:
    rows = AZURE.partition("\n")[2]
    content = f"\n{header}\n{rows}".replace(",", delimiter)
    trace = read(write(file, content))
    assert trace.format == "azure"
    assert trace.prompt_tokens.tolist() == [374, 396, 879]


def test_blank_lines_and_repeated_headers_are_skipped_and_counted(file: Path) -> None:
    trace = read(write(file, AZURE + "\n  \r\n" + AZURE + "\n\n"))
    assert trace.prompt_tokens.tolist() == [374, 374, 396, 396, 879, 879]
    assert trace.remarks == ("blank lines skipped: 2", "repeated headers skipped: 1")
    bad: list[BadRow] = []
    read(file, on_bad_row=bad.append)
    assert [(row.number, row.harmless) for row in bad] == [(5, True), (6, True), (7, True)]
    blank = MOONCAKE.replace("\n", "\n\n")
    assert read(write(file, blank)).remarks[-1] == "blank lines skipped: 2"


# Cells

CELLS = st.text(st.sampled_from("0123456789.+-_eEx, \t\"'２²٣\u00a0\x00naif"), max_size=24)


@pytest.mark.parametrize("column", [0, 1])
@given(cell=CELLS | st.from_regex(r" ?0{0,30}[0-9]{1,9}(\.0{0,30})?\t?", fullmatch=True))
@law
def test_a_number_of_tokens_is_read_correctly_or_refused(
    column: int, cell: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("cells") / "trace"
    numbers = [cell, "7"] if column == 0 else ["7", cell]
    quoted = ['"' + number.replace('"', '""') + '"' for number in numbers]
    write(file, f"{AZURE}2023-11-16 18:15:46,{','.join(quoted)}\n")
    plain = re.fullmatch(r"[ \t]*[0-9]+(\.0*)?[ \t]*", cell)
    fits = plain and 1 <= Decimal(cell.strip(" \t")) <= 10**9
    try:
        trace = read(file)
    except UsageError as error:
        assert not fits
        assert ": line 5: " in str(error)  # noqa: PT017
    else:
        assert fits
        columns = (trace.prompt_tokens, trace.output_tokens)
        assert Decimal(int(columns[column][0])) == Decimal(cell.strip(" \t"))


@pytest.mark.parametrize(
    "value",
    ["true", "null", '"7x"', "[7]", '{"a": 7}', "7.5", "1e400", "-1e400", "NaN", "Infinity",
     "-Infinity", "1e30", "-7", "0", "0.0", '"+7"', '"7_0"', '"1,000"', '"７"', '"7\\u0000"', '""',
     "9" * 30, "9" * 5000],
)  # fmt: skip
@pytest.mark.parametrize("format", ["mooncake", "batchbench"])
def test_an_invalid_number_in_json_is_refused(value: str, format: str, file: Path) -> None:
    key, content = ("output_length", MOONCAKE) if format == "mooncake" else ("output_tokens", OWN)
    line = content.splitlines()[0]
    changed = re.sub(rf'"{key}": \d+', lambda _: f'"{key}": {value}', line)
    told = refusal(file, content + changed + "\n")
    assert re.match(r"line \d: (output_|is not readable JSON: a number has)", told)


def test_a_number_that_is_padded_with_zeros_is_the_number(file: Path) -> None:
    padded = AZURE.replace(",374,", f",{'0' * 18}374,").replace(",879,", f",{'0' * 99999}879,")
    assert read(write(file, padded)).prompt_tokens.tolist() == [374, 396, 879]
    times = BURSTGPT.replace("\n5,", f"\n{'0' * 40}5,").replace("45.5", f"{'0' * 30}45.5")
    due = read(write(file, times)).due_ns
    assert due is not None
    assert due.tolist() == [0, 40_500_000_000, 113_000_000_000]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens,ContextTokens\n2023-11-16 18:15:46,1,2,3\n",
            "line 1: has the column ContextTokens 2 times; keep one of them",
        ),
        (
            "TIMESTAMP,context_tokens,GeneratedTokens,Context Tokens\n2023-11-16 18:15:46,1,2,3\n",
            "line 1: has the column ContextTokens 2 times; keep one of them",
        ),
        (BURSTGPT.replace("Model", "Response tokens"), "line 1: has the column Response tokens 2"),
        (
            MOONCAKE.replace('"timestamp": 3052,', '"timestamp": 3, "timestamp": 4,', 1),
            "line 2: has the key 'timestamp' twice in one object",
        ),
        (
            OWN.replace('"due_ns": 0', '"due_ns": 0, "output_tokens": 9'),
            "line 1: has the key 'output_tokens' twice in one object",
        ),
        (
            SHAREGPT.replace('"value": "Why', '"value": "No", "value": "Why'),
            "row 1: has the key 'value' twice in one object",
        ),
        (
            SHAREGPT.replace('"id": "i6', '"conversations": [], "id": "i6'),
            "row 2: has the key 'conversations' twice in one object",
        ),
    ],
)
def test_columns_and_keys_that_occur_twice_are_refused(content: str, told: str, file: Path) -> None:
    assert refusal(file, content).startswith(told)


def test_other_columns_may_have_one_name(file: Path) -> None:
    header, *rows = AZURE.splitlines()
    content = "\n".join([header + ",,", *(row + ",x,y" for row in rows)])
    assert read(write(file, content)).prompt_tokens.tolist() == [374, 396, 879]


def test_columns_stay_whole_numbers(file: Path) -> None:
    trace = read(write(file, BURSTGPT))
    assert trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int64
