"""The reader of traces: it finds the format and streams rows into columns."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from batchbench.errors import UsageError
from batchbench.workloads.prompts import Encode
from batchbench.workloads.request import Ints, Ragged
from batchbench.workloads.traces.formats import READERS, format_of
from batchbench.workloads.traces.opening import open_trace, other_kind, unknown_text
from batchbench.workloads.traces.rows import Row, Source

MEMORY_STEP = 2**26
"""Growth of columns, in bytes, between two checks of the memory that is left."""

_MOST_INVALID_ROWS = 50_000
"""Number of invalid rows at the beginning after which reading ends."""


class BadRow(NamedTuple):
    """A row that is skipped: its place, such as ``line 7``, the reason, and the kind of reason."""

    number: int
    reason: str
    unit: str
    kind: str
    harmless: bool

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


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
    about: Mapping[str, Any]  # the first line of our own format
    whole: bool  # False if a row was skipped, at the end or as an invalid one
    block_tokens: int
    remarks: tuple[str, ...]  # sentences for the user: assumptions, and skipped parts


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
        encode: text to token ids, for traces with texts.
        format: one of ``TRACE_FORMATS``; None finds it by the content.
        limit: number of valid rows after which reading ends.
        on_bad_row: called with each row that is skipped. Without it, the first invalid row ends
            the reading; harmless ones, such as blank lines, do not.
        block_tokens, time_unit: those of a Mooncake trace; None infers them.
    """
    where = f"--trace {file}"
    with open_trace(file, where) as (text, first, archive):
        head = first.decode("utf-8", "surrogateescape")
        fault = other_kind(first)
        if fault or not (format := format or format_of(head)):
            of_archive = archive and f"{archive} of "
            raise UsageError(f"{where}: is {of_archive}{fault or unknown_text(head)}")
        for option, value in (
            ("--trace-block-size", block_tokens),
            ("--trace-time-unit", time_unit),
        ):
            if value is not None and format != "mooncake":
                raise UsageError(
                    f"{option} {value}: is for Mooncake traces, and {where} is of the format "
                    f"{format}; drop it"
                )
        source = Source(where, text, head, encode, block_tokens, time_unit)
        columns, whole = _columns_of(source, format, limit, on_bad_row)
    if not len(columns):
        valid = "" if whole else "valid "
        raise UsageError(
            f"{where}: contains no {valid}rows of the format {format}; give a file with requests"
        )
    return columns.trace(source, format, whole=whole)


def _columns_of(
    source: Source, format: str, limit: int | None, on_bad_row: Callable[[BadRow], None] | None
) -> tuple[_Columns, bool]:
    """Return the columns of the valid rows, and True if they are all rows of the file."""
    columns, invalid = _Columns(), 0
    for number, row in READERS[format](source):
        if limit is not None and len(columns) == limit:
            return columns, False
        if isinstance(row, Row):
            columns.append(row)
            if not columns.fit_memory():
                raise UsageError(
                    f"{source.where}: its first {len(columns):,} requests fill the memory; take "
                    "fewer with --queue-size"
                )
            continue
        bad = BadRow(number, str(row), source.unit, row.kind, row.harmless)
        if bad.harmless:
            source.counts[bad.kind] += 1
        else:
            invalid += 1
            if on_bad_row is None:
                raise UsageError(
                    f"{source.where}: {bad}; correct it, or skip such rows with --on-bad-row skip"
                )
            if invalid == _MOST_INVALID_ROWS and not len(columns):
                raise UsageError(
                    f"{source.where}: its first {invalid:,} rows are all invalid, such as {bad}"
                )
        if on_bad_row is not None:
            on_bad_row(bad)
    return columns, not invalid


class _Columns:
    """Columns that grow; 8 bytes per number, 4 per token id."""

    def __init__(self) -> None:
        self.prompt_tokens, self.output_tokens, self.due_ns = array("q"), array("q"), array("q")
        self.blocks, self.block_counts = array("q"), array("q")
        self.ids, self.with_ids = array("i"), False
        self.next_check = MEMORY_STEP

    def __len__(self) -> int:
        return len(self.output_tokens)

    def append(self, row: Row) -> None:
        self.with_ids = row.ids is not None
        self.prompt_tokens.append(row.prompt_tokens)
        self.output_tokens.append(row.output_tokens)
        if row.due_ns is not None:
            self.due_ns.append(row.due_ns)
        self.ids.extend(row.ids or ())
        self.blocks.extend(row.blocks)
        self.block_counts.append(len(row.blocks))

    def fit_memory(self) -> bool:
        """Return False if the columns are larger than the memory that is left."""
        size = 32 * len(self) + 4 * len(self.ids) + 8 * len(self.blocks)
        if size < self.next_check:
            return True
        self.next_check = size + MEMORY_STEP
        return size < psutil.virtual_memory().available

    def trace(self, source: Source, format: str, *, whole: bool) -> Trace:
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
        skipped = (f"{what}: {count:,}" for what, count in source.counts.items())
        return Trace(
            format=format,
            prompt_tokens=prompt,
            output_tokens=output,
            due_ns=due if len(due) else None,
            prompts=prompts,
            blocks=blocks,
            about=source.about,
            whole=whole,
            block_tokens=source.size_of_blocks,
            remarks=(*source.inferred, *skipped),
        )
