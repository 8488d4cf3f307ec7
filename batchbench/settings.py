"""How a field of a spec says its option name, help text, bounds and choices.

Each spec is a frozen dataclass whose fields are made with :func:`setting`; the command line derives
its options from them and :func:`check` holds the same bounds for callers from Python.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from batchbench.errors import UsageError

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
) -> Any:
    """A dataclass field that carries its option's help text, bounds and choices."""
    about = Setting(help, panel, min, max, tuple(choices), metavar, default_text)
    return dataclasses.field(default=default, metadata={_KEY: about})


def about(field: dataclasses.Field[Any]) -> Setting:
    """The :class:`Setting` of a field made with :func:`setting`."""
    found: Setting = field.metadata[_KEY]
    return found


def option_name(field_name: str) -> str:
    """``batch_size`` → ``--batch-size``."""
    return "--" + field_name.replace("_", "-")


def check(spec: Any) -> None:
    """Raise :class:`UsageError` for the first field of a spec that breaks its bounds or choices."""
    for field in dataclasses.fields(spec):
        known, value = about(field), getattr(spec, field.name)
        if value is None:
            continue
        asked = f"{option_name(field.name)} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{asked}: must be a finite number")
        if known.min is not None and value < known.min:
            raise UsageError(f"{asked}: must be at least {known.min}")
        if known.max is not None and value > known.max:
            raise UsageError(f"{asked}: must be at most {known.max}")
        if known.choices and value not in known.choices:
            raise UsageError(f"{asked}: must be one of {', '.join(known.choices)}")


def words_of(spec: Any, usual: Any, always: Collection[str] = ()) -> list[str]:
    """What to type for a spec: its options that differ from ``usual``, and those named."""
    words: list[str] = []
    for field in dataclasses.fields(spec):
        value, option = getattr(spec, field.name), option_name(field.name)
        if value == getattr(usual, field.name) and field.name not in always:
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for each in value for word in (option, str(each))]
        else:
            words += [option, str(value)]
    return words
