"""A row of a trace, good or bad, and the checks that all formats share."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from batchbench.workloads.lengths import LONGEST
from batchbench.workloads.prompts import BLOCK_TOKENS

LONGEST_LINE = 2**24
"""Most bytes of a line; a longer one is wrong, and is not kept in memory."""

MOST_BLANK_LINES = 10**6
"""Number of successive blank lines after which reading ends."""

_LAST_NS = 2**62


class Row(NamedTuple):
    """A request of a trace.

    ``due_ns`` counts from any moment; it is None if the trace has no times. ``ids`` are the
    prompt's tokens if they are known; ``blocks`` name its blocks of tokens, equal names meaning
    equal content.
    """

    prompt_tokens: int
    output_tokens: int
    due_ns: int | None = None
    ids: Sequence[int] | None = None
    blocks: Sequence[int] = ()


class Place(NamedTuple):
    """A place in a file: a line, or a row of a JSON array; both count from 1."""

    number: int
    unit: str = "line"


class BadRow(NamedTuple):
    """A row that is left out: its place, such as ``line 7``, the reason, and the kind of reason.

    ``harmless`` ones, such as blank lines, never end the reading.
    """

    number: int
    reason: str
    unit: str = "line"
    kind: str = "wrong rows"
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


class WrongError(ValueError):
    """A fault of a row, in words; ``kind`` names the group that a summary counts it in."""

    def __init__(self, reason: str, kind: str = "wrong rows") -> None:
        super().__init__(reason)
        self.kind = kind

    def at(self, place: Place) -> BadRow:
        """Return the bad row with this fault."""
        return BadRow(place.number, str(self), place.unit, self.kind)


class HopelessError(ValueError):
    """A fault that ends the reading of a file even if wrong rows are left out."""


@dataclass
class Dialect:
    """Properties of a trace that a reader assumed or found, beyond its rows."""

    block_tokens: int = BLOCK_TOKENS
    inferred: list[str] = field(default_factory=list)  # words for the user
    counts: Counter[str] = field(default_factory=Counter)  # parts left out, by their names

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user: assumptions, and parts of the file that were left out."""
        return (*self.inferred, *(f"{what}: {count:,}" for what, count in self.counts.items()))


def read_lines(content: BinaryIO) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield lines and their numbers, from 1; blank ones at the end of the file are skipped.

    Raises:
        HopelessError: a line or a run of blank lines does not end.
    """
    number, blank = 0, 0
    while line := content.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            yield number, BadRow(number, f"is longer than {LONGEST_LINE:,} bytes")
            _skip_line(content, number)
            continue
        if not line.strip():
            blank += 1
            if blank > MOST_BLANK_LINES:
                raise HopelessError(f"line {number}: follows {MOST_BLANK_LINES:,} blank lines")
            continue
        for before in range(number - blank, number):
            yield before, BadRow(before, "is blank", kind="blank lines left out", harmless=True)
        blank = 0
        yield number, line


def _skip_line(content: BinaryIO, number: int) -> None:
    """Read to the end of a line that is too long."""
    for _ in range(4):
        rest = content.readline(LONGEST_LINE)
        if not rest or rest.endswith(b"\n"):
            return
    raise HopelessError(f"line {number}: is longer than {5 * LONGEST_LINE:,} bytes")


def tokens_of(what: str, value: object) -> int:
    """Return a number of tokens, given as a JSON number or as text.

    Raises:
        WrongError: it is not a whole number of tokens.
    """
    if value is None:
        raise WrongError(f"{what} is missing: must be a whole number of tokens")
    number = whole_of(value)
    if number is None:
        raise WrongError(f"{what} is {shown(value)}: must be a whole number of tokens")
    if not 1 <= number <= LONGEST:
        text = shown(value if number > LONGEST else number)
        raise WrongError(f"{what} is {text}: must be at least 1 token and at most {LONGEST}")
    return number


_WHOLE = re.compile(r"\d++(?:\.0*+)?", re.ASCII)


def whole_of(value: object) -> int | None:
    """Return a JSON value or a cell, such as 472, "472" or "472.0", as a whole number.

    Numbers of more than 20 digits become some number above all bounds.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return None
    text = value.strip(" \t")
    if len(text) <= 20 and text.isascii() and text.isdecimal():
        return int(text)
    if not _WHOLE.fullmatch(text):
        return None
    digits = text.partition(".")[0].lstrip("0") or "0"
    return int(digits) if len(digits) <= 20 else 10**20


def nanoseconds_of(what: str, value: object, unit_ns: int) -> int:
    """Return a time in ns.

    Raises:
        WrongError: it is not a number, is negative, or is too large.
    """
    if value is None:
        raise WrongError(f"{what} is missing: must be a number")
    if type(value) is bool or not isinstance(value, int | float):
        raise WrongError(f"{what} is {shown(value)}: must be a number")
    if not value >= 0:  # also refuses NaN
        raise WrongError(f"{what} is {shown(value)}: must be a time of at least 0")
    if not value * unit_ns < _LAST_NS:
        raise WrongError(f"{what} is {shown(value)}: must be a time within 146 years")
    return value * unit_ns if isinstance(value, int) else round(value * unit_ns)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut to 40 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
