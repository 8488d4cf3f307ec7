"""JSON objects of a file: one a line, or the elements of one array, read as a stream."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

from batchbench.workloads.traces.rows import (
    LONGEST_LINE,
    BadRow,
    Place,
    WrongError,
    read_lines,
    shown,
)

T = TypeVar("T")

_CHUNK = 2**17

_LONGEST_ELEMENT = LONGEST_LINE // 2
"""Most characters of an element of an array; each may take 4 bytes."""

_MOST_BYTES = 2**26
"""Most memory of the values of one line or element, as :func:`_check_size` estimates it."""

_ENDS = "nothing after it can be read"

_ARRAY = re.compile(
    rb'\s*+(?:\[|\{(?:\s*+"[^"\\]*+"\s*+:\s*+(?:"(?:[^"\\]|\\.)*+"|[^\s",\[\]{}]++)\s*+,)*+'
    rb'\s*+"data"\s*+:\s*+\[)'
)

_SPACE = re.compile(r"[ \t\r\n]*+")


def is_document(head: bytes) -> bool:
    """Return True for a file that is an array, or an object with an array ``data``."""
    return _ARRAY.match(head) is not None


def first_element(head: bytes) -> object:
    """Return the first element of an array of which this is the beginning; None if it ends later.

    Args:
        head: a beginning that is short enough to be parsed whole.
    """
    if not (begin := _ARRAY.match(head)):
        return None
    text = head[begin.end() :].decode("utf-8", "ignore").lstrip()
    try:
        return cast(object, json.JSONDecoder().raw_decode(text)[0])
    except (ValueError, RecursionError):
        return None


def read_objects(content: BinaryIO, head: bytes) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    """Yield the objects of a file with their places.

    Args:
        head: the beginning of ``content``, which has not been read yet.

    Raises:
        HopelessError: the rest cannot be read.
    """
    parser = _Parser()
    if is_document(head):
        yield from _read_document(content, parser)
        return
    for number, line in read_lines(content):
        place = Place(number)
        if isinstance(line, BadRow):
            yield place, line
            continue
        try:
            yield place, parser.object_of(line)
        except WrongError as error:
            yield place, error.at(place)


def read_rows(
    content: BinaryIO, head: bytes, parse: Callable[[Place, dict[str, Any]], T]
) -> Iterator[T | BadRow]:
    """Yield the rows that a function makes of a file's objects, and the bad rows.

    Args:
        head: the beginning of ``content``, which has not been read yet.
        parse: takes the place of an object and the object; raises WrongError for a bad row.

    Raises:
        HopelessError: the rest cannot be read.
    """
    for place, found in read_objects(content, head):
        if isinstance(found, BadRow):
            yield found
            continue
        try:
            yield parse(place, found)
        except WrongError as error:
            yield error.at(place)


class _Parser:
    """A JSON parser that refuses keys that occur twice, and deep or heavy values."""

    def __init__(self) -> None:
        self._twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs) and self._twice is None:
            keys = [key for key, _ in pairs]
            self._twice = next(key for key in keys if keys.count(key) > 1)
        return found

    def object_of(self, line: bytes) -> dict[str, Any]:
        """Return the object that a line holds."""
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise WrongError("is not UTF-8 text") from error
        try:
            value, end = self.value_at(text, 0)
        except json.JSONDecodeError as error:
            where = f"at character {error.pos + 1}"
            raise WrongError(f"is not JSON ({error.msg} {where})") from error
        if end != len(text):
            raise WrongError(f"is not JSON (more text after its end at character {end + 1})")
        return self.checked(value)

    def checked(self, value: object) -> dict[str, Any]:
        """Return the value read last if it is an object without a key that occurs twice."""
        if self._twice is not None:
            raise WrongError(f"has the key {shown(self._twice)} twice in one object")
        if not isinstance(value, dict):
            raise WrongError(f"is {shown(value)}: must be a JSON object")
        return value

    def value_at(self, text: str, at: int) -> tuple[object, int]:
        """Return the value at a position of a text, and the position after it.

        Raises:
            JSONDecodeError: there is no whole value.
            WrongError: the value is nested too deep, or too large.
        """
        _check_size(text, at)
        self._twice = None
        try:
            return self._decoder.raw_decode(text, at)
        except RecursionError as error:
            raise WrongError("is not JSON that can be read: it is nested too deep") from error
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # int() takes at most 4,300 digits
            raise WrongError(
                "is not JSON that can be read: a number has too many digits"
            ) from error


def _check_size(text: str, at: int) -> None:
    """Raise WrongError for a text whose values would take too much memory."""
    if len(text) - at < 2**20:
        return
    costs = {",": 40, "[": 100, "{": 300, '"': 32}  # bytes of Python objects for each
    if sum(text.count(sign, at) * cost for sign, cost in costs.items()) > _MOST_BYTES:
        raise WrongError("is too large: it holds too many values")


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
            raise WrongError(f"is longer than {_LONGEST_ELEMENT:,} characters")
        size = max(_CHUNK, len(self.text) - self.at)
        content = self._content.read(size)
        self._ended = len(content) < size
        try:
            self.text = self.text[self.at :] + self._decoder.decode(content, self._ended)
        except UnicodeDecodeError as error:
            raise WrongError("is not UTF-8 text") from error
        self.at = 0
        return True

    def next_sign(self) -> str:
        """Return the next character that is no space, or "" at the end of the file."""
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
        raise WrongError(f"follows {_LONGEST_ELEMENT:,} spaces")

    def take(self, signs: str) -> str:
        """Return the next character, which must be one of ``signs``, and skip it."""
        sign = self.next_sign()
        if not sign or sign not in signs:
            what = shown(sign) if sign else "the end of the file"
            raise WrongError(f"is not JSON ({what} instead of {' or '.join(signs)})")
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
                    raise WrongError(f"is not JSON ({error.msg})") from error
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
            _open_data(text, parser)
        ended = text.next_sign() == "]" and bool(text.take("]"))
        while not ended:
            value = text.value(parser)
            try:
                yield place, parser.checked(value)
            except WrongError as error:
                yield place, error.at(place)
            place = Place(place.number + 1, "row")
            ended = text.take(",]") == "]"
        if is_object:
            _pass_over_rest(text, parser)
        if text.next_sign():
            raise WrongError("follows the end of the array")
    except WrongError as error:
        yield place, WrongError(f"{error}; {_ENDS}").at(place)


def _open_data(text: _Text, parser: _Parser) -> None:
    """Read an object up to the array under its key ``data``."""
    while text.value(parser) != "data":
        text.take(":")
        text.value(parser)
        text.take(",")
    text.take(":")
    text.take("[")


def _pass_over_rest(text: _Text, parser: _Parser) -> None:
    """Read the keys of an object that follow its array."""
    while text.take(",}") == ",":
        if text.value(parser) == "data":
            raise WrongError("follows a second key data")
        text.take(":")
        text.value(parser)
