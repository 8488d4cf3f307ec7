"""The workload file: a TOML file whose keys are the options of a workload, underscored."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError
from batchbench.settings import check_value
from batchbench.workloads.spec import WorkloadSpec
from batchbench.workloads.text import open_binary

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_workload_file(file: Path) -> dict[str, Any]:
    """The settings that a TOML file gives, by field of :class:`WorkloadSpec`.

    Files that it names are sought beside it.

    Raises:
        UsageError: it is no TOML, has an unknown key, or a value that is not of its key.
    """
    where = f"--workload {file}"
    with open_binary(file, where) as content:
        try:
            table = tomllib.load(content)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{where}: is no TOML: {error}") from error
        except OSError as error:
            raise UsageError(f"{where}: {error.strerror}") from error
    hints = typing.get_type_hints(WorkloadSpec)
    known = {field.name: field for field in dataclasses.fields(WorkloadSpec)}
    found = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key}; it takes {', '.join(known)}")
        found[key] = _value(f"{where}: {key} = {value!r}", hints[key], value, file.parent)
        check_value(known[key], found[key], f"{where}: {key} = {value!r}")
    return found


def _value(where: str, hint: Any, value: Any, folder: Path) -> Any:
    """A TOML value as a field of this type holds it."""
    kinds = set(typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
    kinds.discard(type(None))
    (kind,) = kinds
    if kind is Path:
        if isinstance(value, str) and value:
            return folder / value
        raise UsageError(f"{where}: must be the name of a file, in quotes")
    if kind is str and type(value) is int:  # output_tokens = 7
        value = str(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{where}: must be {_KINDS[kind]}")
    family, _, rest = value.partition(":") if kind is str else ("", "", "")
    if family.strip() == "empirical" and rest:
        return f"empirical:{folder / rest}"
    return value
