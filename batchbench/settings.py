"""How a field of a spec says its option name, help text, bounds and choices.

Each spec is a frozen dataclass whose fields are made with :func:`setting`; the command line derives
its options from them and :func:`check` holds the same bounds for callers from Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError, shown
from batchbench.values import UNITS, parse_float, parse_whole

_KEY = "batchbench"


@dataclass(frozen=True)
class Setting:
    """What is known of one field of a spec beyond its type and default."""

    help: str
    panel: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    default_text: str | None = None  # what None means, for the help
    excludes: tuple[str, ...] = ()  # fields that say the same in another way
    resets: tuple[str, ...] = ()  # fields that mean nothing any more once this one is set anew
    unit: str = ""  # a key of values.UNITS, for numbers


def setting(
    default: Any,
    help: str,
    panel: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    default_text: str | None = None,
    excludes: Sequence[str] = (),
    resets: Sequence[str] = (),
    unit: str = "",
) -> Any:
    """Return a dataclass field with its option's help text, bounds, unit, choices and rivals."""
    assert unit in UNITS
    about = Setting(
        help,
        panel,
        min,
        max,
        tuple(choices),
        metavar,
        default_text,
        tuple(excludes),
        tuple(resets),
        unit,
    )
    return dataclasses.field(default=default, metadata={_KEY: about})


def about(field: dataclasses.Field[Any]) -> Setting:
    """The :class:`Setting` of a field made with :func:`setting`."""
    found: Setting = field.metadata[_KEY]
    return found


def option_name(field_name: str) -> str:
    """``batch_size`` → ``--batch-size``."""
    return "--" + field_name.replace("_", "-")


def layered(specs: Iterable[type], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name, each from the last layer that gives it.

    A preset, a file and the options of a command line are such layers: partial settings of several
    specs, whose fields have names of their own. What a layer says in one way takes out what the
    layers below it say in another: ``--output-tokens 7`` leaves nothing of a classic cycle.
    """
    rivals: dict[str, set[str]] = {}
    for spec in specs:
        for field in dataclasses.fields(spec):
            known = about(field)
            rivals.setdefault(field.name, set()).update(known.excludes, known.resets)
            for other in known.excludes:
                rivals.setdefault(other, set()).add(field.name)
    found: dict[str, Any] = {}
    for layer in layers:
        gone = {rival for name in layer for rival in rivals.get(name, ())} - layer.keys()
        found = {name: value for name, value in found.items() if name not in gone} | {**layer}
    return found


def make_spec(spec: Any, given: Mapping[str, Any]) -> Any:
    """A spec with the settings that are its own; the rest as its fields say."""
    names = {field.name for field in dataclasses.fields(spec)}
    return spec(**{name: value for name, value in given.items() if name in names})


@functools.cache
def hints_of(spec: type) -> dict[str, Any]:
    """Return the types of a spec's fields; without the cache they took half of ``--help``."""
    return typing.get_type_hints(spec)


def kind_of(hint: Any) -> type:
    """Return the type of a field's values that are not None: ``int`` for ``int | None``."""
    if typing.get_origin(hint) is tuple:
        return tuple
    (kind,) = set(typing.get_args(hint) or {hint}) - {type(None)}
    found: type = kind
    return found


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "the name of a file or folder",
    tuple: "texts",
}


def parse(spec: type, field: dataclasses.Field[Any], text: str) -> Any:
    """Return the value that a text on a command line gives to a field.

    Raises:
        UsageError: the text is empty, not of the field's kind, or out of its bounds.
    """
    known, kind = about(field), kind_of(hints_of(spec)[field.name])
    place = f"{option_name(field.name)} {shown(text)}"
    value: Any = text
    if not text.strip():
        option = option_name(field.name)
        raise UsageError(f"{option} '{shown(text)}': is empty; give a value, or drop {option}")
    if kind is int:
        value = parse_whole(text, place)
    elif kind is float:
        value = parse_float(text, place, known.unit)
    elif kind is Path:
        value = Path(text)
    if kind is not tuple:
        check_value(field, value, place)
    return value


def typed(spec: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a spec's fields as JSON or a caller writes them, in the types of the fields.

    A path may come as text, several texts as a list, lengths as a number, ``static,continuous``
    as a list of names.

    Raises:
        UsageError: a value is not of its field's kind.
    """
    hints = hints_of(spec)
    return {name: _typed(hints[name], name, value) for name, value in given.items()}


def _typed(hint: Any, name: str, value: Any) -> Any:
    kind = kind_of(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind is str and (type(value) is int or isinstance(value, Path)):  # output_tokens=7
        return str(value)
    if kind is str and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if not isinstance(value, bool):  # which counts as a number; NumPy's numbers do as well
        if kind is int and isinstance(value, numbers.Integral):
            return int(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is float and isinstance(value, numbers.Real):
            with contextlib.suppress(OverflowError):  # an integer of 400 digits
                return float(value)
    if kind in (int, float) or not isinstance(value, kind):
        text = f"'{shown(value)}'" if isinstance(value, str) else shown(value)
        raise UsageError(f"{option_name(name)} {text}: must be {_KINDS[kind]}")
    return value


def check(spec: Any) -> None:
    """Raise :class:`UsageError` for the first field of a spec that breaks what is known of it.

    That is its bounds, its choices, or that another way of saying the same is set too.
    """
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        check_value(field, value, f"{option_name(field.name)} {shown(value)}")
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    for field in dataclasses.fields(spec):
        for other in about(field).excludes:
            pair = (field.name, other)
            if all(getattr(spec, name) != defaults[name] for name in pair):
                one, two = map(option_name, pair)
                raise UsageError(f"{one} and {two} exclude each other: give one of them")


def check_value(field: dataclasses.Field[Any], value: Any, asked: str) -> None:
    """Raise :class:`UsageError` where a value breaks a field's bounds or choices.

    The message begins with ``asked``, which says where the value stands.
    """
    known = about(field)
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{asked}: must be a finite number")
    unit = " percent" if known.unit == "percent" else ""
    if known.min is not None and value < known.min:
        raise UsageError(f"{asked}: must be at least {_spell(known.min)}{unit}")
    if known.max is not None and value > known.max:
        raise UsageError(f"{asked}: must be at most {_spell(known.max)}{unit}")
    if known.choices and value not in known.choices:
        raise UsageError(f"{asked}: must be one of {', '.join(known.choices)}")


def _spell(bound: float) -> str:
    """Return a bound as text, without ``.0``."""
    return str(int(bound)) if bound == int(bound) else str(bound)


def words_of(spec: Any, usual: Any, always: Collection[str] = ()) -> list[str]:
    """What to type for a spec: its options that differ from ``usual``, and those named."""
    words: list[str] = []
    for field in dataclasses.fields(spec):
        value, option = getattr(spec, field.name), option_name(field.name)
        if value == getattr(usual, field.name) and field.name not in always:
            continue
        if about(field).unit == "percent":
            words += [option, f"{value}%"]
        elif value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for each in value for word in (option, str(each))]
        else:
            words += [option, str(value)]
    return words
