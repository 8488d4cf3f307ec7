"""Traces as CSV: Azure's LLM inference traces and BurstGPT."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import BinaryIO

from batchbench.errors import UsageError
from batchbench.workloads.traces.rows import (
    BadRow,
    Row,
    WrongError,
    nanoseconds_of,
    read_lines,
    shown,
    tokens_of,
)

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""https://github.com/Azure/AzurePublicDataset, traces of 2023 and 2024."""

BURSTGPT = (
    "Timestamp",
    "Model",
    "Request tokens",
    "Response tokens",
    "Total tokens",
    "Log Type",
)
"""https://github.com/HPMLL/BurstGPT; a failed request has 0 response tokens."""

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


def read_azure(content: BinaryIO, where: str) -> Iterator[Row | BadRow]:
    """Rows of an Azure trace; times without an offset are taken as UTC."""

    def row(cells: Mapping[str, str]) -> Row:
        return Row(
            prompt_tokens=tokens_of("ContextTokens", cells["ContextTokens"]),
            output_tokens=tokens_of("GeneratedTokens", cells["GeneratedTokens"]),
            due_ns=_moment("TIMESTAMP", cells["TIMESTAMP"]),
        )

    return _read(content, where, AZURE, row)


def read_burstgpt(content: BinaryIO, where: str) -> Iterator[Row | BadRow]:
    """Rows of BurstGPT, whose times are seconds."""

    def row(cells: Mapping[str, str]) -> Row:
        if cells["Response tokens"].strip() == "0":
            raise WrongError("Response tokens is 0: the request failed")
        return Row(
            prompt_tokens=tokens_of("Request tokens", cells["Request tokens"]),
            output_tokens=tokens_of("Response tokens", cells["Response tokens"]),
            due_ns=_seconds("Timestamp", cells["Timestamp"]),
        )

    return _read(content, where, BURSTGPT, row)


def _read(
    content: BinaryIO,
    where: str,
    columns: tuple[str, ...],
    parse: Callable[[Mapping[str, str]], Row],
) -> Iterator[Row | BadRow]:
    header: list[str] | None = None
    for number, line in read_lines(content):
        if isinstance(line, BadRow):
            yield line
            continue
        try:
            # A line at a time, so that a stray quote cannot swallow the lines behind it.
            (cells,) = csv.reader([line.decode("utf-8")], strict=True)
            if header is None:
                header = [cell.strip() for cell in cells]
                if missing := [name for name in columns if name not in header]:
                    raise UsageError(
                        f"{where}: line {number}: lacks the column {missing[0]}; "
                        f"the format has {', '.join(columns)}"
                    )
                continue
            if len(cells) != len(header):
                raise WrongError(f"has {len(cells)} columns, the first line {len(header)}")
            yield parse(dict(zip(header, cells, strict=True)))
        except UnicodeDecodeError:
            yield BadRow(number, "is not UTF-8 text")
        except (csv.Error, WrongError) as error:
            yield BadRow(number, str(error))


def _moment(what: str, text: str) -> int:
    """A date and time as ns since 1970, to the last of its digits."""
    found = _TIME.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        zone = (found[4] or "Z").replace("Z", "+00:00")
        moment = datetime.fromisoformat(f"{found[1]}T{found[2]}{zone}").astimezone(UTC)
        seconds = round(moment.timestamp())
    except (ValueError, OverflowError) as error:
        raise WrongError(
            f"{what} is {shown(text)}: must be a time such as 2023-11-16 18:15:46.6805900"
        ) from error
    return nanoseconds_of(what, seconds * 10**9 + int((found[3] or "0").ljust(9, "0")), 1)


def _seconds(what: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", text.strip(), re.ASCII):
        raise WrongError(f"{what} is {shown(text)}: must be seconds, such as 45 or 45.5")
    whole, _, part = text.strip().partition(".")
    return nanoseconds_of(what, int(whole) * 10**9 + int(part[:9].ljust(9, "0")), 1)
