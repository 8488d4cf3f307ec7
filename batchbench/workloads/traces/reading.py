"""Reading a trace: its format told, its rows streamed into columns."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.inputs import open_binary
from batchbench.workloads.ragged import Ragged
from batchbench.workloads.spec import TRACE_FORMATS
from batchbench.workloads.traces.documents import Encode, read_mooncake, read_sharegpt
from batchbench.workloads.traces.own import read_own
from batchbench.workloads.traces.rows import BadRow, Row
from batchbench.workloads.traces.tables import AZURE, BURSTGPT, read_azure, read_burstgpt

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace's requests as columns, ``[requests]`` each, in the order of their times.

    ``due_ns`` counts from the first request, None where the trace tells no times. ``prompts`` are
    the tokens of prompts where they are known, ``blocks`` the names of their blocks of 512.
    """

    format: str
    prompt_tokens: Ints
    output_tokens: Ints
    due_ns: Ints | None
    prompts: Ragged | None
    blocks: Ragged | None
    about: Mapping[str, Any]  # what our own format tells of the workload
    whole: bool  # no row was left out, at the end or as a bad one


def read_trace(
    file: Path,
    encode: Encode,
    *,
    format: str | None = None,
    limit: int | None = None,
    on_bad_row: Callable[[BadRow], None] | None = None,
) -> Trace:
    """Read a trace row by row; memory grows with the columns that are kept, and nothing else.

    Args:
        encode: text to token ids, for traces that hold texts.
        format: of ``TRACE_FORMATS``; None tells it by its content.
        limit: rows to read; good ones are counted.
        on_bad_row: is told each wrong row, which is then left out; without it the first one ends
            the reading.

    Raises:
        UsageError: it cannot be read, is of no known format, has a wrong row, or no row at all.
    """
    where = f"--trace {file}"
    about: dict[str, Any] = {}
    columns, bad, more = _Columns(), 0, False
    with open_binary(file, where) as content:
        try:
            format = format or _told_by(content, where)
            for row in _rows(content, where, format, encode, about):
                if isinstance(row, Row):
                    if limit is not None and len(columns) == limit:
                        more = True
                        break
                    columns.append(row)
                else:
                    bad += 1
                    if on_bad_row is None:
                        raise UsageError(
                            f"{where}: {row}; mend it, or leave such rows out with "
                            "--on-bad-row skip"
                        )
                    on_bad_row(row)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UsageError(f"{where}: cannot be read: {why}") from error
    if not len(columns):
        raise UsageError(f"{where}: holds no {'right ' * bool(bad)}row of the format {format}")
    return columns.trace(format, about, whole=not bad and not more)


def _told_by(content: BinaryIO, where: str) -> str:
    """The format, by the first 64 KiB."""
    begin: bytes = content.peek(2**16).lstrip()  # type: ignore[attr-defined]
    if begin.startswith(b"["):
        return "sharegpt"
    if b"batchbench_workload" in begin or b'"output_tokens"' in begin:
        return "batchbench"
    if b'"input_length"' in begin:
        return "mooncake"
    header = begin.partition(b"\n")[0]
    for name, columns in (("azure", AZURE), ("burstgpt", BURSTGPT)):
        if all(column.encode() in header for column in columns[-2:]):
            return name
    raise UsageError(
        f"{where}: is of no known format ({', '.join(TRACE_FORMATS)}); if it is one of them, name "
        "it with --trace-format"
    )


def _rows(
    content: BinaryIO, where: str, format: str, encode: Encode, about: dict[str, Any]
) -> Iterator[Row | BadRow]:
    if format == "sharegpt":
        return read_sharegpt(content, encode)
    if format == "mooncake":
        return read_mooncake(content)
    if format == "batchbench":
        return read_own(content, where, about)
    return (read_azure if format == "azure" else read_burstgpt)(content, where)


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

    def _fill_block_counts(self, rows: int) -> None:
        """Say of rows so far that they name no blocks; without blocks there is no such column."""
        self.block_counts.extend(bytes(rows - len(self.block_counts)))

    def trace(self, format: str, about: Mapping[str, Any], *, whole: bool) -> Trace:
        if self.blocks:
            self._fill_block_counts(len(self))
        prompt, output, due, counts = (
            np.frombuffer(column, np.int64)
            for column in (self.prompt_tokens, self.output_tokens, self.due_ns, self.block_counts)
        )
        prompts = Ragged.of(np.frombuffer(self.ids, np.int32), prompt) if self.with_ids else None
        blocks = Ragged.of(np.frombuffer(self.blocks, np.int64), counts) if self.blocks else None
        if not len(due):
            return Trace(format, prompt, output, None, prompts, blocks, about, whole)
        if format != "batchbench":  # ours counts from the start of the trial
            due -= due.min()  # in the array that was filled
        if (due[1:] < due[:-1]).any():
            order = np.argsort(due, kind="stable")
            due, prompt, output = due[order], prompt[order], output[order]
            prompts, blocks = (r and r.take(order) for r in (prompts, blocks))
        return Trace(format, prompt, output, due, prompts, blocks, about, whole)
