"""Rows of a trace: lines and JSON objects read as a stream, and the checks of their values."""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from batchbench.workloads.lengths import LONGEST
from batchbench.workloads.prompts import BLOCK_TOKENS

T = TypeVar("T")

LONGEST_LINE = 2**24
"""Maximum number of bytes in a line; a longer one is invalid and is not held in memory."""

MOST_BLANK_LINES = 10**6
"""Number of successive blank lines after which reading ends."""

_LONGEST_ELEMENT = LONGEST_LINE // 2
"""Maximum number of characters in an element of a JSON array; each may take 4 bytes."""

_MOST_BYTES = 2**26
"""Maximum memory of the values of one line or element, as :func:`_check_size` estimates it."""

_CHUNK = 2**17

_LAST_NS = 2**62


class Row(NamedTuple):
    """A request of a trace.

    ``due_ns`` counts from any moment; it is None if the trace has no times. ``ids`` are the
    prompt's tokens if they are known; ``blocks`` name its blocks of tokens, and equal names mean
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
    """A row that is skipped: its place, such as ``line 7``, the reason, and the kind of reason.

    ``harmless`` ones, such as blank lines, never end the reading.
    """

    number: int
    reason: str
    unit: str = "line"
    kind: str = "invalid rows"
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


class InvalidError(ValueError):
    """A fault of a row; ``kind`` is the group that a summary counts it in."""

    def __init__(self, reason: str, kind: str = "invalid rows") -> None:
        super().__init__(reason)
        self.kind = kind

    def at(self, place: Place) -> BadRow:
        return BadRow(place.number, str(self), place.unit, self.kind)


class UnreadableError(ValueError):
    """A fault that ends the reading of a file even if invalid rows are skipped."""


@dataclass
class Dialect:
    """Properties of a trace that its reader assumed or inferred."""

    block_tokens: int = BLOCK_TOKENS
    inferred: list[str] = field(default_factory=list)  # sentences for the user
    counts: Counter[str] = field(default_factory=Counter)  # skipped parts, by their names
    about: dict[str, Any] = field(default_factory=dict)  # the first line of our own format

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user: assumptions, and parts of the file that were skipped."""
        return (*self.inferred, *(f"{what}: {count:,}" for what, count in self.counts.items()))


# Lines


def read_lines(content: BinaryIO) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield lines and their numbers, from 1; skip blank ones at the end of the file."""
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
                raise UnreadableError(f"line {number}: follows {MOST_BLANK_LINES:,} blank lines")
            continue
        for before in range(number - blank, number):
            yield before, BadRow(before, "is blank", kind="blank lines skipped", harmless=True)
        blank = 0
        yield number, line


def _skip_line(content: BinaryIO, number: int) -> None:
    for _ in range(4):
        rest = content.readline(LONGEST_LINE)
        if not rest or rest.endswith(b"\n"):
            return
    raise UnreadableError(f"line {number}: is longer than {5 * LONGEST_LINE:,} bytes")


# JSON objects: one per line, or the elements of one array

_ARRAY = re.compile(
    rb'\s*+(?:\[|\{(?:\s*+"[^"\\]*+"\s*+:\s*+(?:"(?:[^"\\]|\\.)*+"|[^\s",\[\]{}]++)\s*+,)*+'
    rb'\s*+"data"\s*+:\s*+\[)'
)

_SPACE = re.compile(r"[ \t\r\n]*+")


def is_document(head: bytes) -> bool:
    """Return True for a file that is an array, or an object with an array ``data``."""
    return _ARRAY.match(head) is not None


def first_element(head: bytes) -> object:
    """Return the first element of an array that begins so; None if it is not whole."""
    if not (begin := _ARRAY.match(head)):
        return None
    text = head[begin.end() :].decode("utf-8", "ignore").lstrip()
    try:
        return cast(object, json.JSONDecoder().raw_decode(text)[0])
    except (ValueError, RecursionError):
        return None


def read_rows(
    content: BinaryIO, head: bytes, parse: Callable[[Place, dict[str, Any]], T | None]
) -> Iterator[T | BadRow]:
    """Yield the rows that a function makes of a file's objects, and the bad rows.

    Args:
        head: the beginning of ``content``, which has not been read yet.
        parse: takes the place of an object and the object; returns None for one that is not a
            row, and raises InvalidError for a bad one.
    """
    parser = _Parser()
    is_array = is_document(head)
    for place, data in _read_document(content, parser) if is_array else _lines(content, parser):
        if isinstance(data, BadRow):
            yield data
            continue
        try:
            row = parse(place, data)
        except InvalidError as error:
            yield error.at(place)
        else:
            if row is not None:
                yield row


def _lines(content: BinaryIO, parser: _Parser) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    for number, line in read_lines(content):
        place = Place(number)
        try:
            yield place, line if isinstance(line, BadRow) else parser.object_of(line)
        except InvalidError as error:
            yield place, error.at(place)


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

    def object_of(self, line: bytes) -> dict[str, Any]:
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InvalidError("is not UTF-8 text") from error
        try:
            value, end = self.value_at(text, 0)
        except json.JSONDecodeError as error:
            where = f"at character {error.pos + 1}"
            raise InvalidError(f"is not JSON ({error.msg} {where})") from error
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
        """Return the value at a position of a text, and the position after it.

        Raises:
            JSONDecodeError: there is no whole value.
        """
        _check_size(text, at)
        self._twice = None
        try:
            return self._decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except RecursionError as error:
            raise InvalidError("is not readable JSON: it is nested too deep") from error
        except ValueError as error:  # int() takes at most 4,300 digits
            raise InvalidError("is not readable JSON: a number has too many digits") from error


def _check_size(text: str, at: int) -> None:
    """Raise InvalidError for a text whose values would take too much memory."""
    if len(text) - at < 2**20:
        return
    costs = {",": 40, "[": 100, "{": 300, '"': 32}  # bytes of Python objects for each
    if sum(text.count(sign, at) * cost for sign, cost in costs.items()) > _MOST_BYTES:
        raise InvalidError("is too large: it has too many values")


class _Text:
    """The rest of a file's text, read in pieces."""

    def __init__(self, content: BinaryIO) -> None:
        self._content = content
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        self.text = ""
        self.at = 0

    def more(self) -> bool:
        """Read more, so that the text doubles; return False at the end of the file."""
        if self._ended:
            return False
        if len(self.text) - self.at > _LONGEST_ELEMENT:
            raise InvalidError(f"is longer than {_LONGEST_ELEMENT:,} characters")
        size = max(_CHUNK, len(self.text) - self.at)
        content = self._content.read(size)
        self._ended = len(content) < size
        try:
            self.text = self.text[self.at :] + self._decoder.decode(content, self._ended)
        except UnicodeDecodeError as error:
            raise InvalidError("is not UTF-8 text") from error
        self.at = 0
        return True

    def next_sign(self) -> str:
        """Return the next character that is not a space, or "" at the end of the file."""
        passed = 0
        while passed <= _LONGEST_ELEMENT:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            passed += space.end() - self.at
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""
        raise InvalidError(f"follows {_LONGEST_ELEMENT:,} spaces")

    def take(self, signs: str) -> str:
        """Return the next character, which must be one of ``signs``, and skip it."""
        sign = self.next_sign()
        if not sign or sign not in signs:
            what = shown(sign) if sign else "the end of the file"
            raise InvalidError(f"is not JSON ({what} instead of {' or '.join(signs)})")
        self.at += 1
        return sign

    def value(self, parser: _Parser) -> object:
        """Return the next value; read on until it is whole."""
        self.next_sign()
        while True:
            try:
                value, end = parser.value_at(self.text, self.at)
            except json.JSONDecodeError as error:
                # An error far from the end of the text is not due to a missing piece.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not cut or not self.more():
                    raise InvalidError(f"is not JSON ({error.msg})") from error
                continue
            if end == len(self.text) and self.more():  # 12 may be the beginning of 123
                continue
            self.at = end
            return value


def _read_document(
    content: BinaryIO, parser: _Parser
) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    """Yield the elements of a file's array, or of the array under its key ``data``."""
    text = _Text(content)
    place = Place(1, "row")
    try:
        is_object = text.take("[{") == "{"
        if is_object:
            while text.value(parser) != "data":
                text.take(":")
                text.value(parser)
                text.take(",")
            text.take(":")
            text.take("[")
        ended = text.next_sign() == "]" and bool(text.take("]"))
        while not ended:
            value = text.value(parser)
            try:
                yield place, parser.checked(value)
            except InvalidError as error:
                yield place, error.at(place)
            place = Place(place.number + 1, "row")
            ended = text.take(",]") == "]"
        if is_object:
            _skip_other_keys(text, parser)
        if text.next_sign():
            raise InvalidError("follows the end of the array")
    except InvalidError as error:
        yield place, InvalidError(f"{error}; nothing after it can be read").at(place)


def _skip_other_keys(text: _Text, parser: _Parser) -> None:
    while text.take(",}") == ",":
        if text.value(parser) == "data":
            raise InvalidError("follows a second key data")
        text.take(":")
        text.value(parser)


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


_WHOLE = re.compile(r"\d++(?:\.0*+)?", re.ASCII)


def whole_of(value: object) -> int | None:
    """Return a JSON value or a cell, such as 472, "472" or "472.0", as a whole number.

    Numbers of more than 20 digits become a number above all bounds.
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
    if value is None:
        raise InvalidError(f"{what} is missing: must be a number")
    if type(value) is bool or not isinstance(value, int | float):
        raise InvalidError(f"{what} is {shown(value)}: must be a number")
    if not value >= 0:  # also refuses NaN
        raise InvalidError(f"{what} is {shown(value)}: must be a time of at least 0")
    if not value * unit_ns < _LAST_NS:
        raise InvalidError(f"{what} is {shown(value)}: must be a time within 146 years")
    return value * unit_ns if isinstance(value, int) else round(value * unit_ns)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut to 40 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
