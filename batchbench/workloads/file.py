"""The workload file: a TOML file whose keys are the options of a workload, underscored."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError, shown
from batchbench.inputs import read_binary
from batchbench.settings import check_value, hints_of, kind_of
from batchbench.workloads.spec import WorkloadSpec

LIMIT = 2**16
"""Largest size of a workload file, which has about twenty keys."""

_MOST_DOTS = 100
"""Most dots of a line: the parser's time grows with the square of a dotted key's parts."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_workload_file(file: Path) -> dict[str, Any]:
    """The settings that a TOML file gives, by field of :class:`WorkloadSpec`.

    Files that it names are sought beside it.

    Raises:
        UsageError: it is no TOML, has an unknown key, or a value that is not of its key.
    """
    where = f"--workload {file}"
    try:
        text = read_binary(file, where, LIMIT).decode("utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            if line.count(".") > _MOST_DOTS and not line.lstrip().startswith("#"):
                raise UsageError(f"{where}: line {number}: has more than {_MOST_DOTS} dots")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not TOML: {shown(error, 200)}") from error
    hints = hints_of(WorkloadSpec)
    known = {field.name: field for field in dataclasses.fields(WorkloadSpec)}
    found = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {shown(key)}; it takes {', '.join(known)}")
        place = f"{where}: {key} = {_spelled(value)}"
        found[key] = _value(place, hints[key], value, file.parent)
        check_value(known[key], found[key], place)
    return found


def _spelled(value: object) -> str:
    """Return a value for a message, as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _value(where: str, hint: Any, value: Any, folder: Path) -> Any:
    """A TOML value as a field of this type holds it."""
    kind: Any = kind_of(hint)
    if kind is Path:
        if isinstance(value, str) and value:
            return folder / value
        raise UsageError(f"{where}: must be the name of a file, in quotes")
    if kind is str and type(value) is int:  # output_tokens = 7
        value = str(value)
    if kind is int and type(value) is float and value.is_integer():  # queue_size = 1e2
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 10**300:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{where}: must be {_KINDS[kind]}")
    family, _, rest = value.partition(":") if kind is str else ("", "", "")
    if family.strip() == "empirical" and rest:
        return f"empirical:{folder / rest}"
    return value
