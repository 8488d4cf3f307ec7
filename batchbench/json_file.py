"""The reader and writer of JSON files.

Every JSON file that a user names is read here, with limits on size, depth and numbers and without
duplicate keys. A broken or hostile one takes little memory and time, and is refused in one line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError
from batchbench.files import read_binary
from batchbench.version import __version__

MOST_BYTES = 64 * 2**20
"""Largest file; a result with the texts of 10,000 long requests has about this size."""

MOST_VALUES = 1_000_000
"""Maximum number of values in a file; one takes up to 180 bytes of memory for 3 bytes of text."""

MOST_DEPTH = 64
"""Maximum depth of nesting. A result has 8 levels; code that walks the data fails before 1,000."""

LARGEST, SMALLEST = 1e50, 1e-50
"""Bounds of numbers other than 0, so that results of arithmetic stay in a double's range."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

_HALF = re.compile("[\ud800-\udfff]")

_TOO_DEEP = f"it is nested more than {MOST_DEPTH} deep"


def now() -> str:
    """Return the present time as every JSON file states it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def envelope(schema_version: int, command: str) -> dict[str, Any]:
    """Return what every JSON file of results begins with."""
    return {
        "schema_version": schema_version,
        "batchbench_version": __version__,
        "created_at": now(),
        "command": command,
    }


def json_text(data: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return JSON for people and programs: indented, with Unicode characters, without NaN."""
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(file: Path, *, constants: bool = False) -> Any:
    """Read a JSON file, or a pipe such as ``<(git show main:baseline.json)``.

    ``constants`` are ``Infinity`` and ``NaN``, which configurations of models hold. A missing file
    is an OSError, any other fault a UsageError.
    """
    if stat.S_ISDIR(file.stat().st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    try:
        return parse_json(read_binary(file, str(file), MOST_BYTES), constants=constants)
    except ValueError as error:
        raise UsageError(f"{file}: is not readable JSON ({error})") from error


def parse_json(content: bytes, *, constants: bool = False) -> Any:
    """Parse JSON in UTF-8; ValueError if it is not, or is beyond the limits of this module."""
    # Checked before the values take memory; commas in texts do not count.
    if _most_values(content) > MOST_VALUES < _most_values(_STRING.sub(b"", content)):
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        data = json.loads(
            content.decode("utf-8-sig"),
            parse_constant=float if constants else _refuse,
            parse_int=_int,
            parse_float=_float,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_values(data, escaped=b"\\u" in content)
    return data


def _most_values(content: bytes) -> int:
    return sum(map(content.count, (b",", b"[", b"{")))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"the number {text[:12]}… is too large")
    return value


def _float(text: str) -> float:
    value = float(text)
    if value and not SMALLEST < abs(value) < LARGEST:
        raise ValueError(f"the number {text[:24]} is out of range")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has the key {max(counts, key=counts.__getitem__)[:40]!r} twice")
    return content


def _check_values(data: Any, *, escaped: bool) -> None:
    """Refuse nesting that is too deep, and unpaired surrogates, which only escapes can write."""
    level, depth = [data], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
                if escaped:
                    inner += value.keys()
            elif isinstance(value, list):
                inner += value
            elif escaped and isinstance(value, str) and _HALF.search(value):
                raise ValueError("it contains half a surrogate pair, which is not a character")
        level, depth = inner, depth + 1
