"""The reader of traces: it finds the format and streams rows into columns."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.workloads.prompts import BLOCK_TOKENS, Encode
from batchbench.workloads.request import Ragged
from batchbench.workloads.traces.contents import described, format_of, is_hopeless
from batchbench.workloads.traces.documents import read_sharegpt
from batchbench.workloads.traces.mooncake import read_mooncake
from batchbench.workloads.traces.opening import open_trace
from batchbench.workloads.traces.own import read_own
from batchbench.workloads.traces.rows import BadRow, Dialect, HopelessError, Row
from batchbench.workloads.traces.tables import read_azure, read_burstgpt

Ints = NDArray[np.int64]

MEMORY_STEP = 2**26
"""Growth of columns, in bytes, between two checks of the memory that is left."""

_MOST_WRONG_ROWS = 50_000
"""Number of wrong rows at the beginning after which reading ends."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a trace as columns, ``[requests]`` each, in the order of their times.

    ``due_ns`` counts from the first request; it is None if the trace has no times. ``prompts`` are
    the tokens of prompts if they are known, ``blocks`` the names of their blocks of
    ``block_tokens`` tokens.
    """

    format: str
    prompt_tokens: Ints
    output_tokens: Ints
    due_ns: Ints | None
    prompts: Ragged | None
    blocks: Ragged | None
    about: Mapping[str, Any]  # what our own format tells of the workload
    whole: bool  # no row was left out, at the end or as a bad one
    block_tokens: int = BLOCK_TOKENS
    remarks: tuple[str, ...] = ()  # words for the user: assumptions, and parts left out


@dataclass(frozen=True)
class _Asked:
    """The options of :func:`read_trace` that a format may need."""

    where: str
    encode: Encode
    block_tokens: int | None
    time_unit: str | None


def read_trace(
    file: Path,
    encode: Encode,
    *,
    format: str | None = None,
    limit: int | None = None,
    on_bad_row: Callable[[BadRow], None] | None = None,
    block_tokens: int | None = None,
    time_unit: str | None = None,
) -> Trace:
    """Read a trace row by row; memory grows only with the columns.

    The file may be compressed (gzip, bzip2, xz, zstd), and UTF-8, UTF-16 or UTF-32.

    Args:
        encode: text to token ids, for traces that hold texts.
        format: one of ``TRACE_FORMATS``; None finds it by the content.
        limit: number of right rows after which the reading ends.
        on_bad_row: called with each row that is left out. Without it, the first wrong row ends the
            reading; harmless ones, such as blank lines, do not.
        block_tokens: tokens of a block of a Mooncake trace; None infers it.
        time_unit: unit of the times of a Mooncake trace, of ``TIME_UNITS``; None infers it.

    Raises:
        UsageError: it cannot be read, has no known format, has a wrong row, or has no rows.
    """
    where = f"--trace {file}"
    asked = _Asked(where, encode, block_tokens, time_unit)
    about: dict[str, Any] = {}
    dialect = Dialect()
    with open_trace(file, where) as (content, head, archive):
        format = _format(head, where, archive, format)
        _check_asked(asked, format)
        rows = _rows(content, head, format, asked, dialect, about)
        try:
            columns, whole = _columns_of(rows, where, limit, on_bad_row, dialect)
        except HopelessError as error:
            raise UsageError(f"{where}: {error}") from error
    if not len(columns):
        right = "right " * (not whole)
        raise UsageError(
            f"{where}: holds no {right}row of the format {format}; give a file with requests"
        )
    return columns.trace(format, about, whole=whole, dialect=dialect)


def _format(head: bytes, where: str, archive: str, format: str | None) -> str:
    """Return the format that is given, or else that of the content.

    Raises:
        UsageError: the format is unknown.
    """
    if is_hopeless(head) or not (format := format or format_of(head)):
        raise UsageError(f"{where}: is {archive and f'{archive} of '}{described(head)}")
    return format


def _check_asked(asked: _Asked, format: str) -> None:
    """Raise UsageError for an option that this format does not take."""
    for option, value in (
        ("--trace-block-size", asked.block_tokens),
        ("--trace-time-unit", asked.time_unit),
    ):
        if value is not None and format != "mooncake":
            raise UsageError(
                f"{option} {value}: is for Mooncake traces, and {asked.where} is of the format "
                f"{format}; drop it"
            )


def _rows(
    content: BinaryIO,
    head: bytes,
    format: str,
    asked: _Asked,
    dialect: Dialect,
    about: dict[str, Any],
) -> Iterator[Row | BadRow]:
    if format == "sharegpt":
        return read_sharegpt(content, head, asked.encode, dialect)
    if format == "mooncake":
        return read_mooncake(
            content,
            head,
            asked.where,
            asked.encode,
            dialect,
            block_tokens=asked.block_tokens,
            time_unit=asked.time_unit,
        )
    if format == "batchbench":
        return read_own(content, head, asked.where, about)
    return (read_azure if format == "azure" else read_burstgpt)(content, asked.where)


def _columns_of(
    rows: Iterator[Row | BadRow],
    where: str,
    limit: int | None,
    on_bad_row: Callable[[BadRow], None] | None,
    dialect: Dialect,
) -> tuple[_Columns, bool]:
    """Return the columns of the right rows, and True if they are all rows of the file."""
    columns, wrong = _Columns(), 0
    for row in rows:
        if limit is not None and len(columns) == limit:
            return columns, False
        if isinstance(row, Row):
            columns.append(row)
            if not columns.fit_memory():
                raise UsageError(
                    f"{where}: its first {len(columns):,} requests fill the memory; take fewer "
                    "with --queue-size"
                )
            continue
        if row.harmless:
            dialect.counts[row.kind] += 1
        else:
            wrong += 1
            if on_bad_row is None:
                raise UsageError(
                    f"{where}: {row}; mend it, or leave such rows out with --on-bad-row skip"
                )
            if wrong == _MOST_WRONG_ROWS and not len(columns):
                raise UsageError(f"{where}: its first {wrong:,} rows are all wrong, such as {row}")
        if on_bad_row is not None:
            on_bad_row(row)
    return columns, not wrong


@dataclass
class _Columns:
    """Columns that grow; 8 bytes a number, 4 a token id."""

    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    output_tokens: array[int] = field(default_factory=lambda: array("q"))
    due_ns: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("i"))
    blocks: array[int] = field(default_factory=lambda: array("q"))
    block_counts: array[int] = field(default_factory=lambda: array("q"))
    with_ids: bool = False
    next_check: int = field(default_factory=lambda: MEMORY_STEP)

    def __len__(self) -> int:
        return len(self.output_tokens)

    def append(self, row: Row) -> None:
        """Keep a row; all of a trace have ids, or none has."""
        self.with_ids = row.ids is not None
        self.prompt_tokens.append(row.prompt_tokens)
        self.output_tokens.append(row.output_tokens)
        if row.due_ns is not None:
            self.due_ns.append(row.due_ns)
        if row.ids is not None:
            self.ids.extend(row.ids)
        if row.blocks:
            self._fill_block_counts(len(self) - 1)
            self.blocks.extend(row.blocks)
            self.block_counts.append(len(row.blocks))

    def fit_memory(self) -> bool:
        """Return False if the columns are larger than the memory that is left."""
        size = 24 * len(self) + 4 * len(self.ids) + 8 * len(self.blocks)
        if size < self.next_check:
            return True
        self.next_check = size + MEMORY_STEP
        return size < psutil.virtual_memory().available

    def _fill_block_counts(self, rows: int) -> None:
        """Add a count of 0 for earlier rows; traces without blocks have no such column."""
        self.block_counts.extend(bytes(rows - len(self.block_counts)))

    def trace(
        self, format: str, about: Mapping[str, Any], *, whole: bool, dialect: Dialect
    ) -> Trace:
        """Return the trace of these columns, sorted by time."""
        if self.blocks:
            self._fill_block_counts(len(self))
        prompt, output, due, counts = (
            np.frombuffer(column, np.int64)
            for column in (self.prompt_tokens, self.output_tokens, self.due_ns, self.block_counts)
        )
        prompts = Ragged.of(np.frombuffer(self.ids, np.int32), prompt) if self.with_ids else None
        blocks = Ragged.of(np.frombuffer(self.blocks, np.int64), counts) if self.blocks else None
        if len(due) and format != "batchbench":  # ours counts from the start of the trial
            due -= due.min()  # in the array that was filled
        if (due[1:] < due[:-1]).any():
            order = np.argsort(due, kind="stable")
            due, prompt, output = due[order], prompt[order], output[order]
            prompts, blocks = (r and r.take(order) for r in (prompts, blocks))
        return Trace(
            format,
            prompt,
            output,
            due if len(due) else None,
            prompts,
            blocks,
            about,
            whole,
            dialect.block_tokens,
            dialect.remarks,
        )
