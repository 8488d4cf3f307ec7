"""Formats of traces: detect a format, read its rows, and write batchbench's own format."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from batchbench.errors import UsageError
from batchbench.settings import from_json
from batchbench.workloads.prompts import BLOCK_TOKENS, Encode
from batchbench.workloads.request import Workload
from batchbench.workloads.spec import TIME_UNITS, WorkloadSpec
from batchbench.workloads.traces.rows import (
    InvalidError,
    Row,
    Rows,
    Source,
    TraceError,
    lines,
    nanoseconds_of,
    objects,
    parsed,
    shown,
    tokens_of,
    whole_of,
)

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""https://github.com/Azure/AzurePublicDataset, traces of 2023 and 2024."""

BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
"""Columns that are read of https://github.com/HPMLL/BurstGPT; a failed request has 0 response
tokens."""

TURNS = ("conversations", "conversation", "messages", "items")
"""Keys of a conversation's turns."""

_KEYS = (
    ("batchbench", ("batchbench_workload",)),
    ("sharegpt", TURNS[:1]),
    ("mooncake", ("input_length", "hash_ids", "text_input", "output_length")),
    ("batchbench", ("output_tokens", "prompt_ids", "prompt_tokens", "due_ns")),
    ("sharegpt", TURNS[1:]),
)
"""JSON keys of the formats, in the order in which they are looked for."""


def format_of(head: str) -> str | None:
    """Return the format of a trace with this beginning; None if it has none."""
    begin = head.lstrip()
    if begin.startswith(("[", "{")):
        for format, keys in _KEYS:
            if re.search(rf'"(?:{"|".join(keys)})"\s*:', begin):
                return format
        return None
    try:
        _, names = _columns_of(begin.partition("\n")[0])
    except InvalidError:
        return None
    for format, columns in (("azure", AZURE), ("burstgpt", BURSTGPT)):
        if all(_plain(column) in names for column in columns[-2:]):
            return format
    return None


# CSV: Azure's traces of LLM inference, and BurstGPT


def _read_table(
    columns: tuple[str, str, str], time_of: Callable[[str, str], int], source: Source
) -> Rows[Row]:
    rows = lines(source)
    for number, header in rows:
        if not isinstance(header, InvalidError):
            break
        yield number, header
    else:
        return
    where, header = f"line {number}", header.strip()
    try:
        delimiter, names = _columns_of(header)
    except InvalidError as error:
        raise TraceError(f"{where}: {error}") from error
    for column in columns:
        count = names.count(_plain(column))
        if count > 1:
            raise TraceError(f"{where}: has the column {column} {count} times; keep one of them")
        if not count:
            others = ", ".join(columns)
            raise TraceError(f"{where}: lacks the column {column}; the format has {others}")
    cells_of_row = itemgetter(*(names.index(_plain(column)) for column in columns))

    def row_of(line: str) -> Row:
        if line.strip() == header:  # files joined with cat
            raise InvalidError("repeats the header", "repeated headers skipped", harmless=True)
        cells = _cells(line, delimiter)
        if len(cells) != len(names):
            raise InvalidError(f"has {len(cells)} columns, the first line {len(names)}")
        time, prompt, output = cells_of_row(cells)
        if columns is BURSTGPT and whole_of(output) == 0:
            raise InvalidError("Response tokens is 0: the request failed", "failed requests")
        return Row(
            prompt_tokens=tokens_of(columns[1], prompt),
            output_tokens=tokens_of(columns[2], output),
            due_ns=time_of(columns[0], time.strip(" \t")),
        )

    yield from parsed(rows, row_of)


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of one line, so that a stray quote does not swallow the next lines."""
    try:
        (cells,) = csv.reader([line], delimiter=delimiter, strict=True)
    except csv.Error as error:
        inside = "new-line character" in str(error)
        raise InvalidError("has a carriage return in a row" if inside else str(error)) from error
    return cells


def _columns_of(header: str) -> tuple[str, list[str]]:
    """Return the delimiter of a table and the plain names of its columns."""
    delimiter = max(",;\t", key=header.count)  # the comma if there is none
    return delimiter, [_plain(cell) for cell in _cells(header, delimiter)]


def _plain(column: str) -> str:
    """Return the name of a column without case, spaces and underscores."""
    return re.sub(r"[\s_]+", "", column).lower()


_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d++))?"
    r"(?: ?(?:(?:Z|UTC|GMT)|([+-]\d\d(?::?\d\d)?)))?",
    re.ASCII | re.IGNORECASE,
)

_SECONDS = re.compile(r"\d++(?:\.\d*+)?(?:[eE][+-]?\d{1,3})?", re.ASCII)


def _moment(what: str, text: str) -> int:
    """Return a date and time, taken as UTC without an offset, as ns since 1970."""
    parts = _TIME.fullmatch(text)
    try:
        if parts is None:
            raise ValueError
        zone = parts[4] or "+00:00"
        moment = datetime.fromisoformat(f"{parts[1]}T{parts[2]}{zone}").astimezone(UTC)
        seconds = round(moment.timestamp())
    except (ValueError, OverflowError) as error:
        raise InvalidError(
            f"{what} is {shown(text)}: must be a time such as 2023-11-16 18:15:46.6805900"
        ) from error
    fraction = (parts[3] or "0")[:9].ljust(9, "0")
    return nanoseconds_of(what, seconds * 10**9 + int(fraction))


def _seconds(what: str, text: str) -> int:
    """Return seconds, such as 45, 45.5 or 1e-05, as ns."""
    if not _SECONDS.fullmatch(text):
        raise InvalidError(f"{what} is {shown(text)}: must be seconds, such as 45 or 45.5")
    return nanoseconds_of(what, int(min(Decimal(text), Decimal(10**11)) * 10**9))


# Conversations as JSON, in the dialects of ShareGPT

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "chatgpt", "assistant", "model", "bing", "bard")

_LONGEST_TEXT = 2**22
"""Maximum number of characters of a question or an answer."""


def _conversation(source: Source, data: dict[str, Any]) -> Row:
    """Return the first question of a conversation, and the length of the first answer to it."""
    turns = next((data[key] for key in TURNS if key in data), None)
    if not isinstance(turns, list):
        raise InvalidError("has no list of conversations")
    questions: list[str] = []
    answer, others = None, 0
    for turn in turns:
        if not isinstance(turn, dict):
            raise InvalidError(f"a turn is {shown(turn)}: must be an object with from and value")
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str):
            raise InvalidError(_LACKS)
        if speaker.lower() in _ASKS:
            questions.append(_text_of(turn))
        elif speaker.lower() in _ANSWERS and questions:
            answer = _text_of(turn)
            break
        else:
            others += 1
    if answer is None:
        raise InvalidError("has no turn of a human that is followed by an answer of gpt")
    ids = _ids_of("the question", "\n".join(questions), source.encode)
    output_ids = _ids_of("the answer", answer, source.encode)
    if others:
        source.counts["prompts without their system and other turns"] += 1
    return Row(len(ids), len(output_ids), ids=ids)


_LACKS = "a turn lacks from or value, or they are not texts"


def _text_of(turn: dict[str, Any]) -> str:
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):  # OpenAI's messages have parts
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in text]
        text = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        raise InvalidError(_LACKS)
    return text


def _ids_of(what: str, text: object, encode: Encode) -> Sequence[int]:
    if not isinstance(text, str):
        raise InvalidError(f"{what} is {shown(text)}: must be a text")
    if len(text) > _LONGEST_TEXT:
        raise InvalidError(f"{what} is longer than {_LONGEST_TEXT:,} characters")
    if not text.isascii():
        # Half of a surrogate pair, as in "\ud83d", is not a character that a tokenizer takes.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = encode(text)
    if not ids:
        raise InvalidError(f"{what} is empty", "empty texts")
    return ids


# Mooncake: JSON objects with lengths, times and the names of blocks. Such a file does not state the
# block size and the unit of times. They are inferred from its first rows, unless they are given.
# Mooncake itself has blocks of 512 tokens and times in ms (https://github.com/kvcache-ai/Mooncake),
# Bailian's traces of Qwen have blocks of 16 tokens, times in s, and a chat_id
# (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon).

_FIRST_ROWS = 1000
"""Rows from which the block size and the unit of times are inferred."""

_FIRST_NUMBERS = 2**20
"""Maximum number of token ids and block names in these rows."""

_ANY = 2**62
"""Largest block size that fits a prompt of one block."""


def read_mooncake(source: Source) -> Rows[Row]:
    """Yield the rows; infer the block size and the unit of times.

    Until the unit is known, ``due_ns`` of a row is its time as it is in the file.
    """
    of_bailian = False

    def raw_row_of(data: dict[str, Any]) -> Row:
        nonlocal of_bailian
        of_bailian |= "chat_id" in data
        return _raw_row(source.encode, data)

    rows = parsed(objects(source), raw_row_of)
    first: list[tuple[int, Row | InvalidError]] = []
    good: list[tuple[int, Row]] = []
    numbers = 0
    for number, row in rows:
        if isinstance(row, Row):
            good.append((number, row))
            numbers += len(row.blocks) + len(row.ids or ())
        elif not good:
            yield number, row
            continue
        first.append((number, row))
        if len(first) == _FIRST_ROWS or numbers > _FIRST_NUMBERS:
            break
    if not good:
        return
    if named := [(number, row) for number, row in good if row.blocks]:
        size = source.block_tokens or _block_tokens(named, source)
        how = "" if source.block_tokens or size == BLOCK_TOKENS else " (inferred)"
        source.size_of_blocks = size
        source.inferred.append(f"blocks of {size} tokens{how}")
    unit = None
    if good[0][1].due_ns is not None:
        times = [row.due_ns for _, row in good if row.due_ns is not None]
        usual = "s" if of_bailian else None
        unit = source.time_unit or usual or _time_unit(times)
        how = "" if source.time_unit or unit == "ms" else " (inferred)"
        source.inferred.append(f"times in {unit}{how}")
    elif source.time_unit:
        raise TraceError("has no times; drop --trace-time-unit")
    yield from parsed(chain(first, rows), partial(_row, source.size_of_blocks, unit))


def _raw_row(encode: Encode, data: dict[str, Any]) -> Row:
    blocks = data.get("hash_ids") or ()
    if blocks and not (
        isinstance(blocks, list)
        and set(map(type, blocks)) == {int}
        and 0 <= min(blocks) <= max(blocks) < 2**63
    ):
        raise InvalidError(
            f"hash_ids is {shown(blocks)}: must be a list of whole numbers below 2**63"
        )
    ids = None
    if (text := data.get("text_input")) is not None:
        ids, blocks = _ids_of("text_input", text, encode), ()  # the text is what the blocks hold
    if (time := data.get("timestamp")) is not None:
        nanoseconds_of("timestamp", time)
    prompt_tokens = len(ids) if ids is not None else data.get("input_length")
    return Row(
        prompt_tokens=tokens_of("input_length", prompt_tokens),
        output_tokens=tokens_of("output_length", data.get("output_length")),
        due_ns=time,
        ids=ids,
        blocks=blocks,
    )


def _row(block_tokens: int, unit: str | None, row: Row) -> Row:
    """Return the row with its time in ns; refuse one that is unlike the others."""
    blocks = -(-row.prompt_tokens // block_tokens)
    if row.blocks and len(row.blocks) != blocks:
        raise InvalidError(
            f"hash_ids names {len(row.blocks):,} blocks, but {row.prompt_tokens:,} tokens are "
            f"{blocks:,} blocks of {block_tokens} (--trace-block-size)"
        )
    if unit is not None:
        return row._replace(due_ns=nanoseconds_of("timestamp", row.due_ns, TIME_UNITS[unit]))
    if row.due_ns is not None:
        raise InvalidError("has a timestamp, unlike the first row")
    return row


def _block_tokens(named: Sequence[tuple[int, Row]], source: Source) -> int:
    """Return the tokens of a block: 512 if that fits, or the one size that fits most rows."""
    tokens = np.array([row.prompt_tokens for _, row in named])
    blocks = np.array([len(row.blocks) for _, row in named])
    # A prompt of n blocks has sizes from ⌈tokens / n⌉ to ⌈tokens / (n - 1)⌉ - 1; of one, any above.
    lows = -(-tokens // blocks)
    highs = np.where(blocks > 1, -(-tokens // np.maximum(blocks - 1, 1)) - 1, _ANY)

    def fitting(size: int) -> int:
        return int(((lows <= size) & (size <= highs)).sum())

    sizes = {BLOCK_TOKENS, *lows.tolist()}
    best = max(sizes, key=lambda size: (fitting(size), size == BLOCK_TOKENS))
    if fitting(best) * 2 <= len(named):
        odd = int(np.flatnonzero((lows > BLOCK_TOKENS) | (highs < BLOCK_TOKENS))[0])
        raise TraceError(
            f"{source.unit} {named[odd][0]}: hash_ids names {blocks[odd]:,} blocks for "
            f"{tokens[odd]:,} tokens, and no block size fits most rows; give --trace-block-size"
        )
    within = (lows <= best) & (best <= highs)
    low, high = int(lows[within].max()), int(highs[within].min())
    powers = [2**i for i in range(31) if low <= 2**i <= high]
    if low <= BLOCK_TOKENS <= high:
        return BLOCK_TOKENS
    if low != high and len(powers) != 1:
        fit = f"at least {low}" if high == _ANY else f"{low} to {high}"
        raise TraceError(
            f"hash_ids fit blocks of {fit} tokens; give their size with --trace-block-size"
        )
    return low if low == high else powers[0]


def _time_unit(times: Sequence[float]) -> str:
    """Return the unit of the times: ms unless that is implausible.

    Present times, counted from 1970, have 10 digits in s, 13 in ms, and so on. Others are in ms
    unless that makes more than 1,000 requests/s of times with fractions. The unit must be given
    where ms makes an implausible rate: over 100 requests/s (over 10 with fractions), or fewer than
    one in 100 s.
    """
    begin, span = min(times), max(times) - min(times)
    for unit, ns in TIME_UNITS.items():
        if 10**18 <= begin * ns < 10**19:
            return unit
    if not span:
        return "ms"
    gap = span / (len(times) - 1)
    fractional = any(time != int(time) for time in times)
    if fractional and gap < 1:
        return "s"
    if gap < (100 if fractional else 10) or gap > 100_000:
        other = "s" if gap < 100 else "us"
        rates = _short(1000 / gap), _short(1e9 / (gap * TIME_UNITS[other]))
        raise TraceError(
            f"times are {_short(gap)} apart on average: {rates[0]} requests/s if in ms, {rates[1]} "
            f"if in {other}; give their unit with --trace-time-unit"
        )
    return "ms"


def _short(number: float) -> str:
    """Return a number with three significant digits, such as ``1,000`` or ``0.0125``."""
    return f"{float(f'{number:.3g}'):,.10g}"


# Our own trace: a workload as JSON lines, written and read without loss. The first line describes
# the workload, {"batchbench_workload": 1, "name": …, "digest": …}; each other line is a request,
# {"due_ns": 0, "output_tokens": 10, "prompt_ids": [464, …]}. A file written by hand may omit the
# first line, and have prompt_tokens instead of prompt_ids; its prompts are then random.

VERSION = 1


def write_workload(workload: Workload) -> Iterator[str]:
    """Yield the lines of a workload, each with its end."""
    about: dict[str, Any] = {
        "batchbench_workload": VERSION,
        "name": workload.name,
        "seed": workload.seed,
        "requests": len(workload),
        "stop_at_eos": workload.stop_at_eos,
        "max_concurrency": workload.max_concurrency,
        "digest": workload.digest,
    }
    if workload.sampling is not None:
        about["sampling"] = asdict(workload.sampling)
    yield json.dumps(about, ensure_ascii=False) + "\n"
    for request in workload:
        row = {
            "due_ns": request.due_ns,
            "output_tokens": request.output_tokens,
            "prompt_ids": workload.prompt(request.index).tolist(),
        }
        yield json.dumps(row, separators=(",", ":")) + "\n"


def _check_about(data: dict[str, Any]) -> None:
    version, where = data["batchbench_workload"], "line 1"
    if version != VERSION:
        reads = f"this batchbench reads {VERSION}; save it again"
        raise TraceError(f"{where}: is of version {shown(version)}, {reads}")
    name, sampling = data.get("name", ""), data.get("sampling", {})
    if not isinstance(name, str) or not isinstance(sampling, dict):
        raise TraceError(f"{where}: name or sampling has a wrong value")
    options = {key: data[key] for key in data.keys() & {"stop_at_eos", "max_concurrency"}}
    try:
        data["sampling"] = from_json(WorkloadSpec, {**options, **sampling}).sampling
    except UsageError as error:
        raise TraceError(f"{where}: {error}") from error


def _own_row(source: Source, data: dict[str, Any]) -> Row | None:
    """Return a request; the content of the first line goes to ``source``."""
    if "batchbench_workload" in data and not source.about:
        _check_about(data)
        source.about = data
        return None
    ids = data.get("prompt_ids")
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    ):
        raise InvalidError(f"prompt_ids is {shown(ids)}: must be a list of token ids")
    prompt_tokens = data.get("prompt_tokens") if ids is None else len(ids)
    return Row(
        prompt_tokens=tokens_of("prompt_tokens", prompt_tokens),
        output_tokens=tokens_of("output_tokens", data.get("output_tokens")),
        due_ns=nanoseconds_of("due_ns", data.get("due_ns", 0)),
        ids=ids,
    )


READERS: dict[str, Callable[[Source], Rows[Row]]] = {
    "sharegpt": lambda source: parsed(objects(source), partial(_conversation, source)),
    "azure": partial(_read_table, AZURE, _moment),
    "burstgpt": partial(_read_table, BURSTGPT, _seconds),
    "mooncake": read_mooncake,
    "batchbench": lambda source: parsed(objects(source), partial(_own_row, source)),
}
