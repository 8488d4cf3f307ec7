"""Traces as CSV: Azure's LLM inference traces and BurstGPT."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import BinaryIO

from batchbench.errors import UsageError
from batchbench.workloads.traces.rows import (
    BadRow,
    Place,
    Row,
    WrongError,
    nanoseconds_of,
    read_lines,
    shown,
    tokens_of,
    whole_of,
)

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""https://github.com/Azure/AzurePublicDataset, traces of 2023 and 2024."""

BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
"""Columns that are read of https://github.com/HPMLL/BurstGPT; a failed request has 0 response
tokens."""

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d++))?"
    r"(?: ?(?:(?:Z|UTC|GMT)|([+-]\d\d(?::?\d\d)?)))?",
    re.ASCII | re.IGNORECASE,
)

_SECONDS = re.compile(r"(\d++)(?:\.(\d*+))?([eE][+-]?\d{1,3})?", re.ASCII)

_DELIMITERS = ",;\t"


def columns_of(line: str) -> tuple[str, list[str]]:
    """Return the delimiter of a header and the names of its columns, without case and spaces.

    Raises:
        csv.Error: the line is not a row of a table.
    """
    delimiter = max(_DELIMITERS, key=line.count)  # the comma if there is none
    (cells,) = csv.reader([line], delimiter=delimiter, strict=True)
    return delimiter, [plain(cell) for cell in cells]


def plain(column: str) -> str:
    """Return the name of a column without case, spaces and underscores."""
    return re.sub(r"[\s_\ufeff]+", "", column).lower()


def read_azure(content: BinaryIO, where: str) -> Iterator[Row | BadRow]:
    """Yield the rows of an Azure trace; times without an offset are taken as UTC."""

    def row(time: str, context: str, generated: str) -> Row:
        return Row(
            prompt_tokens=tokens_of("ContextTokens", context),
            output_tokens=tokens_of("GeneratedTokens", generated),
            due_ns=_moment("TIMESTAMP", time),
        )

    return _read(content, where, AZURE, row)


def read_burstgpt(content: BinaryIO, where: str) -> Iterator[Row | BadRow]:
    """Yield the rows of BurstGPT, whose times are seconds."""

    def row(time: str, request: str, response: str) -> Row:
        if whole_of(response) == 0:
            raise WrongError("Response tokens is 0: the request failed", "failed requests")
        return Row(
            prompt_tokens=tokens_of("Request tokens", request),
            output_tokens=tokens_of("Response tokens", response),
            due_ns=_seconds("Timestamp", time),
        )

    return _read(content, where, BURSTGPT, row)


def _read(
    content: BinaryIO,
    where: str,
    columns: tuple[str, str, str],
    parse: Callable[[str, str, str], Row],
) -> Iterator[Row | BadRow]:
    names: list[str] | None = None
    delimiter, one, two, three = ",", 0, 0, 0
    for number, line in read_lines(content):
        if isinstance(line, BadRow):
            yield line
            continue
        cells: list[str] = []
        try:
            text = line.decode("utf-8")
            if names is None:
                delimiter, names = columns_of(text)
                one, two, three = _places(names, columns, f"{where}: line {number}")
                continue
            # One line at a time, so that a stray quote does not swallow the next lines.
            (cells,) = csv.reader([text], delimiter=delimiter, strict=True)
            if len(cells) != len(names):
                raise WrongError(f"has {len(cells)} columns, the first line {len(names)}")
            yield parse(cells[one], cells[two], cells[three])
        except UnicodeDecodeError:
            yield BadRow(number, "is not UTF-8 text")
        except csv.Error as error:
            inside = "new-line character" in str(error)
            yield BadRow(number, "has a carriage return in a row" if inside else str(error))
        except WrongError as error:
            if [plain(cell) for cell in cells] == names:  # files joined with cat
                repeated = "repeated headers left out"
                yield BadRow(number, "repeats the header", kind=repeated, harmless=True)
            else:
                yield error.at(Place(number))


def _places(names: Sequence[str], columns: Sequence[str], where: str) -> list[int]:
    """Return the places of the columns in a row.

    Raises:
        UsageError: a column is missing or occurs twice.
    """
    for column in columns:
        count = names.count(plain(column))
        if count > 1:
            raise UsageError(f"{where}: has the column {column} {count} times; keep one of them")
        if not count:
            raise UsageError(
                f"{where}: lacks the column {column}; the format has {', '.join(columns)}"
            )
    return [names.index(plain(column)) for column in columns]


def _moment(what: str, text: str) -> int:
    """Return a date and time as ns since 1970, to the last of its digits."""
    found = _TIME.fullmatch(text.strip(" \t"))
    try:
        if found is None:
            raise ValueError
        zone = found[4] or "+00:00"
        moment = datetime.fromisoformat(f"{found[1]}T{found[2]}{zone}").astimezone(UTC)
        seconds = round(moment.timestamp())
    except (ValueError, OverflowError) as error:
        raise WrongError(
            f"{what} is {shown(text)}: must be a time such as 2023-11-16 18:15:46.6805900"
        ) from error
    part = (found[3] or "0")[:9].ljust(9, "0")
    return nanoseconds_of(what, seconds * 10**9 + int(part), 1)


def _seconds(what: str, text: str) -> int:
    """Return seconds, such as 45, 45.5 or 1e-05, as ns."""
    found = _SECONDS.fullmatch(text.strip(" \t"))
    if found is None:
        raise WrongError(f"{what} is {shown(text)}: must be seconds, such as 45 or 45.5")
    whole = found[1].lstrip("0") or "0"
    if found[3] or len(whole) > 12:
        ns = int(min(Decimal(text.strip(" \t")) * 10**9, Decimal(10**20)).to_integral_value())
    else:
        ns = int(whole) * 10**9 + int((found[2] or "0")[:9].ljust(9, "0"))
    return nanoseconds_of(what, ns, 1)
