"""Specs: dataclasses whose fields become options; convert them to and from text and JSON.

Each spec is a frozen dataclass whose fields are made with :func:`setting`. The command line derives
its options from them, and :func:`check` applies the same bounds to calls from Python. A value that
is not valid raises UsageError; the argument ``place`` is the beginning of its message, such as
``--batch-size 0``, and ``must`` the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from batchbench.errors import UsageError, shown

_KEY = "batchbench"

UNITS = {
    "": "a number",
    "seconds": "a number of seconds, such as 60",
    "milliseconds": "a number of milliseconds, such as 50",
    "percent": "a percentage, such as 5 or 5%",
    "share": "a share, such as 0.95 or 95%",
}
"""Units of options, with the words for their values in messages."""


@dataclass(frozen=True)
class Setting:
    """The metadata of a spec's field: its help text, bounds and choices."""

    help: str
    panel: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    default_text: str | None = None  # the meaning of None, for the help
    excludes: tuple[str, ...] = ()  # fields that state the same in another way
    resets: tuple[str, ...] = ()  # fields that lose their meaning when this one is set
    unit: str = ""  # a key of UNITS, for numbers
    omit_default: bool = False  # not in JSON at its default, which earlier versions then read
    variable: str | None = None  # environment variable of a secret


def setting(default: Any, help: str, panel: str, **known: Any) -> Any:
    """Return a dataclass field that is an option; ``known`` are fields of :class:`Setting`.

    A secret, which has a ``variable``, is not in the spec's text, JSON, words or comparisons. The
    command line moves its value into that environment variable, so that no spec holds it.
    """
    shown, metadata = "variable" not in known, {_KEY: Setting(help, panel, **known)}
    return dataclasses.field(default=default, metadata=metadata, repr=shown, compare=shown)


def kept(spec: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a spec, without secrets."""
    return [field for field in dataclasses.fields(spec) if about(field).variable is None]


def about(field: dataclasses.Field[Any]) -> Setting:
    """Return the :class:`Setting` of a field made with :func:`setting`."""
    known: Setting = field.metadata[_KEY]
    return known


def option_name(field_name: str) -> str:
    """Return ``--batch-size`` for ``batch_size``."""
    return "--" + field_name.replace("_", "-")


def layered(specs: Iterable[type], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by field name, each from the last layer that has it.

    A preset, a file and the options of a command line are such layers. A setting removes those of
    the layers below that it excludes or resets: ``--output-tokens 7`` removes a preset's cycle of
    long and short outputs.
    """
    rivals: dict[str, set[str]] = {}
    for spec in specs:
        for field in dataclasses.fields(spec):
            known = about(field)
            rivals.setdefault(field.name, set()).update(known.excludes, known.resets)
            for other in known.excludes:
                rivals.setdefault(other, set()).add(field.name)
    values: dict[str, Any] = {}
    for layer in layers:
        removed = {rival for name in layer for rival in rivals.get(name, ())} - layer.keys()
        values = {n: value for n, value in values.items() if n not in removed} | {**layer}
    return values


# Values of fields

Spec = TypeVar("Spec")


def make_spec(spec: Any, values: Mapping[str, Any]) -> Any:
    """Return a spec with those of the values that are its fields; the rest are defaults."""
    names = {field.name for field in dataclasses.fields(spec)}
    return spec(**{name: value for name, value in values.items() if name in names})


def omitted(spec: type) -> dict[str, Any]:
    """Return the defaults of the fields that :func:`as_json` leaves out at their defaults."""
    return {f.name: f.default for f in dataclasses.fields(spec) if about(f).omit_default}


def as_json(spec: Any) -> dict[str, Any]:
    """Return the fields of a spec as JSON values, which :func:`from_json` reads."""
    values: dict[str, Any] = {}
    for field in kept(spec):
        value = getattr(spec, field.name)
        if not (about(field).omit_default and value == field.default):
            value = list(value) if isinstance(value, tuple) else value
            values[field.name] = str(value) if isinstance(value, Path) else value
    return values


def from_json(spec: type[Spec], values: Mapping[str, Any], *, drop_unknown: bool = False) -> Spec:
    """Return the spec whose :func:`as_json` is given; missing fields get their defaults."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, spec))}
    if (unknown := values.keys() - names) and not drop_unknown:
        raise UsageError(
            f"{option_name(min(unknown))}: this batchbench has no such option; "
            "the result is from a newer one"
        )
    own = {name: value for name, value in values.items() if name in names}
    return spec(**typed(spec, own))


@functools.cache
def hints_of(spec: type) -> dict[str, Any]:
    """Return the types of a spec's fields; uncached, this takes half the time of ``--help``."""
    return typing.get_type_hints(spec)


def kind_of(hint: Any) -> type:
    """Return the type of a field's values that are not None: ``int`` for ``int | None``."""
    if typing.get_origin(hint) is tuple:
        return tuple
    kinds: set[type] = set(typing.get_args(hint) or {hint}) - {type(None)}
    (kind,) = kinds
    return kind


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "the name of a file or folder",
    tuple: "a list of texts",
}


def written(value: object) -> str:
    """Return a value for a message, as Python and TOML write it."""
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def typed(
    spec: type,
    values: Mapping[str, Any],
    place: Callable[[str, Any], str] = lambda name, value: f"{option_name(name)} {written(value)}",
) -> dict[str, Any]:
    """Return values from JSON, TOML or a Python call in the types of the spec's fields.

    A path may be a text, a text a whole number or a list of texts, a whole number a float without
    a fraction, and a tuple a list.

    ``place`` takes the name and the value of a field.
    """
    hints = hints_of(spec)
    return {
        name: _converted(hints[name], value, place(name, value)) for name, value in values.items()
    }


def _converted(hint: Any, value: Any, place: str) -> Any:
    kind = kind_of(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        if kind is tuple:
            return tuple(value)
        if kind is str and value:
            return ",".join(value)
    if kind is str and (type(value) is int or isinstance(value, Path)):  # output_tokens=7
        return str(value)
    if not isinstance(value, bool):  # which is a number in Python
        if kind is int and isinstance(value, numbers.Integral):  # NumPy's, too
            return int(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is float and isinstance(value, numbers.Real):
            with contextlib.suppress(OverflowError):  # an integer of 400 digits
                return float(value)
    if kind in (int, float) or not isinstance(value, kind):
        raise UsageError(f"{place}: must be {_KINDS[kind]}")
    return value


def parse(spec: type, field: dataclasses.Field[Any], text: str) -> Any:
    """Return the value that a text on a command line gives to a field."""
    kind, option = kind_of(hints_of(spec)[field.name]), option_name(field.name)
    place = f"{option} {shown(text)}"
    if not text.strip():
        raise UsageError(f"{option} '{shown(text)}': is empty; give a value, or drop {option}")
    value: Any = Path(text) if kind is Path else text
    if kind is int:
        value = parse_whole(text, place)
    elif kind is float:
        value = parse_float(text, place, about(field).unit)
    if kind is not tuple:
        check_value(field, value, place)
    return value


def check(spec: Any) -> None:
    """Check the bounds and choices of all fields, and that no field excludes another."""
    fields = dataclasses.fields(spec)
    for field in fields:
        value = getattr(spec, field.name)
        check_value(field, value, f"{option_name(field.name)} {shown(value)}")
    changed = {field.name for field in fields if getattr(spec, field.name) != field.default}
    for field in fields:
        for other in about(field).excludes:
            if {field.name, other} <= changed:
                one, two = option_name(field.name), option_name(other)
                raise UsageError(f"{one} and {two} exclude each other: give one of them")


def check_value(field: dataclasses.Field[Any], value: Any, place: str) -> None:
    """Check a value against a field's bounds and choices."""
    known = about(field)
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{place}: must be a finite number")
    unit = " percent" if known.unit == "percent" else ""
    if known.min is not None and value < known.min:
        raise UsageError(f"{place}: must be at least {_without_zero(known.min)}{unit}")
    if known.max is not None and value > known.max:
        raise UsageError(f"{place}: must be at most {_without_zero(known.max)}{unit}")
    if known.choices and value not in known.choices:
        raise UsageError(f"{place}: must be one of {', '.join(known.choices)}")


def _without_zero(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def words_of(spec: Any, usual: Any) -> list[str]:
    """Return the words to type for a spec: options that differ from ``usual``."""
    words: list[str] = []
    for field in kept(spec):
        value, option = getattr(spec, field.name), option_name(field.name)
        if value == getattr(usual, field.name):
            continue
        if about(field).unit == "percent":
            words += [option, f"{value}%"]
        elif value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for item in value for word in (option, str(item))]
        else:
            words += [option, str(value)]
    return words


@contextlib.contextmanager
def python_names(names: Collection[str] = ("overwrite",)) -> Iterator[None]:
    """Let errors of a Python call name its arguments, such as ``overwrite=True``, not options."""
    try:
        yield
    except UsageError as error:
        # Places are positional arguments: there is no argument ``output``.
        message = str(error).removeprefix("--output ")
        message = re.sub(r"^(--[a-z][a-z-]*) (?=\S+:)", r"\1=", message)
        for name in names:
            argument = "overwrite=True" if name == "overwrite" else name
            message = re.sub(rf"{option_name(name)}(?![\w-])", argument, message)
        raise type(error)(message) from error


# Numbers as text: 7, +8, 1_000, .5, 5., 1e3 and 1.27e+03, with blanks around them. Only ASCII
# digits count; NaN and infinity are refused.

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?")


def parse_number(text: str, place: str, must: str = f"must be {UNITS['']}") -> Decimal:
    """Return the number that a text writes, exactly; refuse one too large for a float."""
    digits = text.strip().replace("\N{MINUS SIGN}", "-", 1)
    if not _NUMBER.fullmatch(digits):
        raise UsageError(f"{place}: {must}")
    try:
        number = Decimal(digits.replace("_", ""))
    except InvalidOperation:  # an exponent of 20 digits
        number = Decimal("1e300")
    if number and number.adjusted() >= 300:  # about the largest of a float
        raise UsageError(f"{place}: is too large a number")
    return number if number.adjusted() >= -400 else Decimal(0)  # as a float does


def parse_whole(text: str, place: str, must: str = "must be a whole number") -> int:
    """Return the whole number that a text writes: ``100``, ``1e2`` and ``100.0`` are the same."""
    number = parse_number(text, place, must)
    if number != number.to_integral_value():
        raise UsageError(f"{place}: {must}")
    return int(number)


def parse_float(text: str, place: str, unit: str = "") -> float:
    """Return the number that a text writes, in a unit of :data:`UNITS`.

    A percentage may carry a ``%``; so may a share, whose ``95%`` is 0.95. One below 1 percent must
    carry it, since ``0.05`` may be the share 0.05, which is 5 percent; so must a share above 1.
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
