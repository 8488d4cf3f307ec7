"""The parser of numbers in options, their parts, and lines of files.

All of these are numbers: ``7``, ``+8``, ``1_000``, ``.5``, ``5.``, ``1e3``, ``1.27e+03``, with
blanks around them. Only ASCII digits count; NaN and infinity are refused.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from batchbench.errors import UsageError, shown

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?")

_LARGEST = 300
"""Decimal exponent at which numbers are refused, about the largest of a float."""

UNITS = {
    "": "a number",
    "seconds": "a number of seconds, such as 60",
    "milliseconds": "a number of milliseconds, such as 50",
    "percent": "a percentage, such as 5 or 5%",
    "share": "a share, such as 0.95 or 95%",
}
"""Units of options, with the words for their values in messages."""


def parse_number(text: str, place: str, must: str = f"must be {UNITS['']}") -> Decimal:
    """Return the number that a text writes, exactly.

    Args:
        place: the beginning of the message: the place of the text, and the text.
        must: the rest of the message about a text that is not a number.

    Raises:
        UsageError: it is not a number, or is too large for a float.
    """
    written = text.strip().replace("\N{MINUS SIGN}", "-", 1)
    if not _NUMBER.fullmatch(written):
        raise UsageError(f"{place}: {must}")
    try:
        number = Decimal(written.replace("_", ""))
    except InvalidOperation as error:  # an exponent of 20 digits
        raise UsageError(f"{place}: is too large a number") from error
    if number and number.adjusted() >= _LARGEST:
        raise UsageError(f"{place}: is too large a number")
    return number if number.adjusted() >= -400 else Decimal(0)  # as a float does


def parse_whole(text: str, place: str, must: str = "must be a whole number") -> int:
    """Return the whole number that a text writes: ``100``, ``1e2`` and ``100.0`` are the same.

    Raises:
        UsageError: it is not a whole number.
    """
    number = parse_number(text, place, must)
    if number != number.to_integral_value():
        raise UsageError(f"{place}: {must}")
    return int(number)


def parse_float(text: str, place: str, unit: str = "") -> float:
    """Return the number that a text writes, in a unit of :data:`UNITS`.

    A percentage may carry a ``%``; so may a share, whose ``95%`` is 0.95. One below 1 percent must
    carry it, since ``0.05`` may be the share 0.05, which is 5 percent; so must a share above 1.

    Raises:
        UsageError: it is not a number of this unit.
    """
    must = f"must be {UNITS[unit]}"
    bare = text.strip()
    if unit in ("percent", "share") and bare.endswith("%"):
        number = parse_number(bare[:-1], place, must)
        return float(number if unit == "percent" else number / 100)
    number = parse_number(bare, place, must)
    if unit == "percent" and 0 < number < 1:
        raise UsageError(
            f"{place}: is below 1 percent; write {shown(bare)}% if you mean that, or "
            f"{shown(f'{100 * number:f}'.rstrip('0').rstrip('.'))}% for the share {shown(bare)}"
        )
    if unit == "share" and 1 < number < 100:
        raise UsageError(f"{place}: must be at most 1; write {shown(bare)}% for percent")
    return float(number)
