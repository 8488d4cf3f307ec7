"""A row of a trace, good or bad, and what all formats check of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from batchbench.workloads.lengths import LONGEST

LONGEST_LINE = 2**26
"""Bytes of a line; a longer one is wrong, and is not held in memory."""

_LAST_NS = 2**62


class Row(NamedTuple):
    """A request as a trace tells it.

    ``due_ns`` counts from any moment, None where the trace tells no times. ``ids`` are the prompt's
    tokens where they are known; ``blocks`` name its blocks of 512 tokens, equal names meaning equal
    content.
    """

    prompt_tokens: int
    output_tokens: int
    due_ns: int | None = None
    ids: Sequence[int] | None = None
    blocks: Sequence[int] = ()


class BadRow(NamedTuple):
    """A row that is wrong: its place, such as ``line 7``, and what is wrong with it."""

    number: int
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


class WrongError(ValueError):
    """What is wrong with a row, in words."""


def read_lines(content: BinaryIO) -> Iterator[tuple[int, bytes | BadRow]]:
    """Lines and their numbers, from 1; empty ones at the end are left out, others are wrong."""
    number, empty = 0, 0
    while line := content.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := content.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            line = b"\0"  # no format takes it
        if not line.strip():
            empty += 1
            continue
        for before in range(number - empty, number):
            yield before, BadRow(before, "is empty")
        empty = 0
        yield number, line


def tokens_of(what: str, value: Any) -> int:
    """A number of tokens, given as a JSON number or as text.

    Raises:
        WrongError: it is none.
    """
    if isinstance(value, str) and value.isascii() and value.strip().isdecimal():
        value = int(value[:20])
    if type(value) is not int:
        raise WrongError(f"{what} is {shown(value)}: must be a whole number of tokens")
    if not 1 <= value <= LONGEST:
        raise WrongError(
            f"{what} is {shown(value)}: must be at least 1 token and at most {LONGEST}"
        )
    return value


def nanoseconds_of(what: str, value: float, unit_ns: int) -> int:
    """A time in ns.

    Raises:
        WrongError: it is negative, or no number that a clock could show.
    """
    if type(value) is bool or not isinstance(value, int | float):
        raise WrongError(f"{what} is {shown(value)}: must be a number")
    if not 0 <= value * unit_ns < _LAST_NS:  # NaN, too, is not
        raise WrongError(f"{what} is {shown(value)}: must be a time of at least 0")
    return value * unit_ns if isinstance(value, int) else round(value * unit_ns)


def shown(value: Any) -> str:
    """A value, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
