"""Rows of a trace: lines and JSON objects read as a stream, and the checks of their values."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TextIO, TypeVar

from batchbench.workloads.lengths import LONGEST
from batchbench.workloads.prompts import BLOCK_TOKENS, Encode

T = TypeVar("T")
U = TypeVar("U")

LONGEST_LINE = 2**23
"""Maximum number of characters, which may take 4 bytes each, in a line or an array's element; a
longer one is invalid and is not held in memory."""

MOST_BLANK_LINES = 10**6
"""Number of successive blank lines after which reading ends."""

_MOST_BYTES = 2**26
"""Maximum memory of the values of one line or element, estimated from its punctuation."""

_CHUNK = 2**17

_LAST_NS = 2**62


class Row(NamedTuple):
    """A request of a trace; ``due_ns`` counts from any moment, and is None without times.

    ``ids`` are the prompt's tokens if known; ``blocks`` name its blocks of tokens, and equal names
    mean equal content.
    """

    prompt_tokens: int
    output_tokens: int
    due_ns: int | None = None
    ids: Sequence[int] | None = None
    blocks: Sequence[int] = ()


class InvalidError(ValueError):
    """A fault of a row; ``kind`` is the group that a summary counts it in.

    ``harmless`` ones, such as blank lines, never end the reading.
    """

    def __init__(self, reason: str, kind: str = "invalid rows", *, harmless: bool = False) -> None:
        super().__init__(reason)
        self.kind, self.harmless = kind, harmless


class TraceError(ValueError):
    """A fault that ends the reading of a trace, even if invalid rows are skipped."""


Rows = Iterator[tuple[int, T | InvalidError]]
"""Rows or their faults, with their numbers: lines, or elements of a JSON array, from 1."""


@dataclass
class Source:
    """A trace that is being read: its text, the options, and what its reader assumed or found."""

    text: TextIO
    head: str  # its beginning, which has not been read yet
    encode: Encode
    block_tokens: int | None
    time_unit: str | None
    size_of_blocks: int = BLOCK_TOKENS
    inferred: list[str] = field(default_factory=list)  # sentences for the user
    counts: Counter[str] = field(default_factory=Counter)  # skipped parts, by their names
    about: dict[str, Any] = field(default_factory=dict)  # the first line of our own format

    @cached_property
    def unit(self) -> str:
        """Name of what the numbers of rows count."""
        return "row" if array_begin(self.head) else "line"


def parsed(rows: Rows[T], parse: Callable[[T], U | None]) -> Rows[U]:
    """Yield what a function makes of each row: another row, None if it is none, or its fault."""
    for number, row in rows:
        made: U | InvalidError | None
        try:
            made = row if isinstance(row, InvalidError) else parse(row)
        except InvalidError as error:
            made = error
        if made is not None:
            yield number, made


# Lines


def lines(source: Source) -> Rows[str]:
    """Yield the lines; skip blank ones at the end of the file."""
    number = blank = 0
    while line := source.text.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith("\n"):
            yield number, InvalidError(f"is longer than {LONGEST_LINE:,} characters")
            rests = (source.text.readline(LONGEST_LINE) for _ in range(4))
            if not any(not rest or rest.endswith("\n") for rest in rests):
                raise TraceError(f"line {number}: is longer than {5 * LONGEST_LINE:,} characters")
            continue
        if not line.strip():
            blank += 1
            if blank > MOST_BLANK_LINES:
                raise TraceError(f"line {number}: follows {MOST_BLANK_LINES:,} blank lines")
            continue
        for before in range(number - blank, number):
            yield before, InvalidError("is blank", "blank lines skipped", harmless=True)
        blank = 0
        yield number, _fault_of(line) or line


_UNDECODED = re.compile("[\udc80-\udcff]")


def _fault_of(text: str) -> InvalidError | None:
    undecoded = not text.isascii() and _UNDECODED.search(text)
    return InvalidError("is not UTF-8 text") if undecoded else None


# JSON objects: one per line, or the elements of one array

_ARRAY = re.compile(
    r'\s*+(?:\[|\{(?:\s*+"[^"\\]*+"\s*+:\s*+(?:"(?:[^"\\]|\\.)*+"|[^\s",\[\]{}]++)\s*+,)*+'
    r'\s*+"data"\s*+:\s*+\[)'
)

_SPACE = re.compile(r"[ \t\r\n]*+")


def array_begin(head: str) -> str:
    """Return the text before the elements of a JSON array, or of an object's ``data``, else ""."""
    begin = _ARRAY.match(head)
    return begin[0] if begin else ""


def objects(source: Source) -> Rows[dict[str, Any]]:
    """Yield the objects of a file: one per line, or the elements of its array."""
    if source.unit == "row":
        return _elements(source)
    return parsed(lines(source), _Parser().object_of)


class _Parser:
    """A JSON parser that refuses keys that occur twice, and deep or heavy values."""

    def __init__(self) -> None:
        self._twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs) and self._twice is None:
            keys = [key for key, _ in pairs]
            self._twice = next(key for key in keys if keys.count(key) > 1)
        return content

    def object_of(self, line: str) -> dict[str, Any]:
        text = line.strip()
        try:
            value, end = self.value_at(text, 0)
        except json.JSONDecodeError as error:
            raise InvalidError(f"is not JSON ({error.msg} at character {error.pos + 1})") from error
        if end != len(text):
            raise InvalidError(f"is not JSON (more text after its end at character {end + 1})")
        return self.checked(value)

    def checked(self, value: object) -> dict[str, Any]:
        """Return the value read last if it is an object without a key that occurs twice."""
        if self._twice is not None:
            raise InvalidError(f"has the key {shown(self._twice)} twice in one object")
        if not isinstance(value, dict):
            raise InvalidError(f"is {shown(value)}: must be a JSON object")
        return value

    def value_at(self, text: str, at: int) -> tuple[object, int]:
        """Return the value at a position and its end; JSONDecodeError if it is not whole."""
        costs = {",": 40, "[": 100, "{": 300, '"': 32}  # bytes of Python objects for each
        if len(text) - at >= 2**20 and (
            sum(text.count(sign, at) * cost for sign, cost in costs.items()) > _MOST_BYTES
        ):
            raise InvalidError("is too large: it has too many values")
        self._twice = None
        try:
            return self._decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except RecursionError as error:
            raise InvalidError("is not readable JSON: it is nested too deep") from error
        except ValueError as error:  # int() takes at most 4,300 digits
            raise InvalidError("is not readable JSON: a number has too many digits") from error


class _Document:
    """The rest of a JSON document, read in pieces: ``text`` from ``at`` on is still to parse."""

    def __init__(self, content: TextIO) -> None:
        self._content, self.parser = content, _Parser()
        self.text, self.at = "", 0

    def _more(self) -> bool:
        """Read more, so that the text doubles; return False at the end of the file."""
        kept = self.text[self.at :]
        if len(kept) > LONGEST_LINE:
            raise InvalidError(f"is longer than {LONGEST_LINE:,} characters")
        piece = self._content.read(max(_CHUNK, len(kept)))
        if fault := _fault_of(piece):
            raise fault
        self.text, self.at = kept + piece, 0
        return bool(piece)

    def sign(self) -> str:
        """Return the next character that is not a space, or "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            if space.end() < len(self.text):
                self.at = space.end()
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> object:
        """Return the next value; read on until it is whole."""
        self.sign()
        while True:
            try:
                value, end = self.parser.value_at(self.text, self.at)
            except json.JSONDecodeError as error:
                # An error far from the end of the text is not due to a missing piece.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not cut or not self._more():
                    raise InvalidError(f"is not JSON ({error.msg})") from error
                continue
            if end == len(self.text) and self._more():  # 12 may be the beginning of 123
                continue
            self.at = end
            return value


def _elements(source: Source) -> Rows[dict[str, Any]]:
    """Yield the elements of a file's array, or of the array under its key ``data``."""
    begin = source.text.read(len(array_begin(source.head)))
    document, number = _Document(source.text), 1
    try:
        ended = document.sign() == "]"
        while not ended:
            value = document.value()
            try:
                yield number, document.parser.checked(value)
            except InvalidError as error:
                yield number, error
            number += 1
            sign = document.sign()
            if sign not in (",", "]"):
                what = shown(sign) if sign else "the end of the file"
                raise InvalidError(f"is not JSON ({what} instead of , or ])")
            document.at += sign == ","
            ended = sign == "]"
        document.at += 1
        if "{" in begin:  # other keys may follow
            document.text, document.at = '{"data": 0' + document.text[document.at :], 0
            document.parser.checked(document.value())
        if document.sign():
            raise InvalidError("follows the end of the array")
    except InvalidError as error:
        yield number, InvalidError(f"{error}; nothing after it can be read")


# Values; those that are not valid raise InvalidError


def tokens_of(what: str, value: object) -> int:
    """Return a number of tokens, given as a JSON number or as text."""
    if value is None:
        raise InvalidError(f"{what} is missing: must be a whole number of tokens")
    number = whole_of(value)
    if number is None:
        raise InvalidError(f"{what} is {shown(value)}: must be a whole number of tokens")
    if not 1 <= number <= LONGEST:
        text = shown(value if number > LONGEST else number)
        raise InvalidError(f"{what} is {text}: must be at least 1 token and at most {LONGEST}")
    return number


_WHOLE = re.compile(r"[ \t]*0*+(\d++)?(?<=\d)(?:\.0*+)?[ \t]*", re.ASCII)


def whole_of(value: object) -> int | None:
    """Return 472, "472" or "472.0" as a whole number; more than 20 digits are above all bounds."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return None
    if len(value) <= 20 and value.isascii() and value.isdecimal():  # nearly all cells
        return int(value)
    if not (match := _WHOLE.fullmatch(value)):
        return None
    digits = match[1] or "0"
    return int(digits) if len(digits) <= 20 else 10**20


def nanoseconds_of(what: str, value: object, unit_ns: int = 1) -> int:
    if value is None:
        raise InvalidError(f"{what} is missing: must be a number")
    if type(value) is bool or not isinstance(value, int | float):
        raise InvalidError(f"{what} is {shown(value)}: must be a number")
    if not 0 <= value * unit_ns < _LAST_NS:  # also refuses NaN
        raise InvalidError(f"{what} is {shown(value)}: must be a time from 0 to 146 years")
    return value * unit_ns if isinstance(value, int) else round(value * unit_ns)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut to 40 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
