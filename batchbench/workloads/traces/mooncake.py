"""Traces in the form of Mooncake: JSON objects with lengths, times and the names of blocks.

Such a file does not state the block size and the unit of times. They are inferred from its first
rows, unless they are given. Mooncake itself has blocks of 512 tokens and times in ms
(https://github.com/kvcache-ai/Mooncake), Bailian's traces of Qwen have blocks of 16 tokens, times
in s, and a ``chat_id`` (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from batchbench.errors import UsageError
from batchbench.workloads.prompts import BLOCK_TOKENS, Encode
from batchbench.workloads.spec import TIME_UNITS
from batchbench.workloads.traces.documents import ids_of
from batchbench.workloads.traces.objects import read_rows
from batchbench.workloads.traces.rows import (
    BadRow,
    Dialect,
    Place,
    Row,
    WrongError,
    nanoseconds_of,
    shown,
    tokens_of,
)

_FIRST_ROWS = 1000
"""Rows from which the block size and the unit of times are inferred."""

_FIRST_NUMBERS = 2**20
"""Most token ids and names of blocks in these rows."""


class _Request(NamedTuple):
    """A row as it is in the file."""

    place: Place
    prompt_tokens: int
    output_tokens: int
    time: float | None
    ids: Sequence[int] | None
    blocks: Sequence[int]
    of_bailian: bool

    def fits(self, block_tokens: int) -> bool:
        """Return True if the prompt has as many blocks of this size as it has names."""
        return not self.blocks or len(self.blocks) == -(-self.prompt_tokens // block_tokens)


def read_mooncake(
    content: BinaryIO,
    head: bytes,
    where: str,
    encode: Encode,
    dialect: Dialect,
    *,
    block_tokens: int | None = None,
    time_unit: str | None = None,
) -> Iterator[Row | BadRow]:
    """Yield the rows; add the inferred properties of the file to ``dialect``.

    Raises:
        UsageError: the block size or the unit of times cannot be inferred.
    """
    rows = read_rows(content, head, lambda place, found: _request(place, found, encode))
    first: list[_Request | BadRow] = []
    numbers = 0
    for row in rows:
        if isinstance(row, BadRow) and not first:
            yield row
            continue
        first.append(row)
        if isinstance(row, _Request):
            numbers += len(row.blocks) + len(row.ids or ())
        if len(first) == _FIRST_ROWS or numbers > _FIRST_NUMBERS:
            break
    good = [row for row in first if isinstance(row, _Request)]
    dialect.block_tokens = block_tokens or _block_tokens(good, where)
    if any(row.blocks for row in good):
        how = "" if block_tokens or dialect.block_tokens == BLOCK_TOKENS else " (inferred)"
        dialect.inferred.append(f"blocks of {dialect.block_tokens} tokens{how}")
    unit = None
    if good and good[0].time is not None:
        unit = time_unit or _time_unit(good, where)
        how = "" if time_unit or unit == "ms" else " (inferred)"
        dialect.inferred.append(f"times in {unit}{how}")
    elif good and time_unit:
        raise UsageError(f"--trace-time-unit {time_unit}: {where} has no times; drop it")
    with_text = bool(good) and good[0].ids is not None
    for row in chain(first, rows):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield _row(row, dialect.block_tokens, unit, with_text=with_text)
        except WrongError as error:
            yield error.at(row.place)


def _request(place: Place, found: dict[str, Any], encode: Encode) -> _Request:
    blocks = found.get("hash_ids") or ()
    if blocks and not (
        isinstance(blocks, list)
        and set(map(type, blocks)) == {int}
        and 0 <= min(blocks) <= max(blocks) < 2**63
    ):
        raise WrongError(
            f"hash_ids is {shown(blocks)}: must be a list of whole numbers below 2**63"
        )
    text, ids = found.get("text_input"), None
    if text is not None:
        ids, blocks = ids_of("text_input", text, encode), ()  # the text says what the blocks hold
        if not ids:
            raise WrongError("text_input is empty")
    time = found.get("timestamp")
    if time is not None:
        nanoseconds_of("timestamp", time, 1)
    return _Request(
        place,
        len(ids) if ids is not None else tokens_of("input_length", found.get("input_length")),
        tokens_of("output_length", found.get("output_length")),
        time,
        ids,
        blocks,
        "chat_id" in found,
    )


def _row(row: _Request, block_tokens: int, unit: str | None, *, with_text: bool) -> Row:
    """Return the row as a request of the trace; refuse one that is unlike the others."""
    if (row.ids is not None) != with_text:
        verb = "lacks" if with_text else "has"
        raise WrongError(f"{verb} text_input, unlike the first row")
    if not row.fits(block_tokens):
        raise WrongError(
            f"hash_ids names {len(row.blocks):,} blocks, but {row.prompt_tokens:,} tokens are "
            f"{-(-row.prompt_tokens // block_tokens):,} blocks of {block_tokens} "
            "(--trace-block-size)"
        )
    if unit is None:
        if row.time is not None:
            raise WrongError("has a timestamp, unlike the first row")
        due_ns = None
    else:
        due_ns = nanoseconds_of("timestamp", row.time, TIME_UNITS[unit])
    return Row(row.prompt_tokens, row.output_tokens, due_ns, row.ids, row.blocks)


def _block_tokens(rows: Sequence[_Request], where: str) -> int:
    """Return the tokens of a block: 512 if that fits, or the one size that fits most rows."""
    named = [row for row in rows if row.blocks]
    if not named:
        return BLOCK_TOKENS
    # A prompt of n blocks has sizes from ⌈tokens / n⌉ to ⌈tokens / (n - 1)⌉ - 1.
    lows = [-(-row.prompt_tokens // len(row.blocks)) for row in named]
    highs = [
        -(-row.prompt_tokens // (len(row.blocks) - 1)) - 1 if len(row.blocks) > 1 else math.inf
        for row in named
    ]
    lows_sorted, highs_sorted = sorted(lows), sorted(highs)

    def fitting(size: int) -> int:
        return bisect_right(lows_sorted, size) - bisect_left(highs_sorted, size)

    best = max({BLOCK_TOKENS, *lows}, key=lambda size: (fitting(size), size == BLOCK_TOKENS))
    if fitting(best) * 2 <= len(named):
        row = next(row for row in named if not row.fits(BLOCK_TOKENS))
        raise UsageError(
            f"{where}: {row.place.unit} {row.place.number}: hash_ids names {len(row.blocks):,} "
            f"blocks for {row.prompt_tokens:,} tokens, and no block size fits most rows; give "
            "--trace-block-size"
        )
    within = [pair for pair in zip(lows, highs, strict=True) if pair[0] <= best <= pair[1]]
    low, high = max(low for low, _ in within), min(high for _, high in within)
    if low <= BLOCK_TOKENS <= high or math.isinf(high):  # prompts of one block fit any larger size
        return BLOCK_TOKENS
    powers = [2**i for i in range(31) if low <= 2**i <= high]
    sizes = [low] if low == high else powers
    if len(sizes) != 1:
        raise UsageError(
            f"{where}: hash_ids fit blocks of {low} to {high} tokens; say which with "
            "--trace-block-size"
        )
    return sizes[0]


def _time_unit(rows: Sequence[_Request], where: str) -> str:
    """Return the unit of the times: ms unless that is implausible.

    Times of today, counted from 1970, have 10 digits in s, 13 in ms, and so on. Others are in ms
    unless that makes more than 1,000 requests/s of times with fractions.

    Raises:
        UsageError: in ms, they make an implausible rate: over 100 requests/s (over 10, if they
            have fractions), or fewer than one in 100 s.
    """
    if any(row.of_bailian for row in rows):
        return "s"
    times = [row.time for row in rows if row.time is not None]
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
        raise UsageError(
            f"{where}: times are {_short(gap)} apart on average, {_short(1000 / gap)} requests/s "
            f"in ms and {_short(1e9 / (gap * TIME_UNITS[other]))} in {other}; say which with "
            "--trace-time-unit"
        )
    return "ms"


def _short(number: float) -> str:
    """Return a number with three significant digits, such as ``1,000`` or ``0.0125``."""
    return f"{float(f'{number:.3g}'):,.10g}"
