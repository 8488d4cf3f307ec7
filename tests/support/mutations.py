"""Small changes that spoil files: of JSON by its structure, of a recording by its columns."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st


class Change(NamedTuple):
    """One change, as numbers that are taken modulo the number of choices."""

    place: int
    kind: int
    value: int


changes = st.lists(
    st.builds(Change, st.integers(0, 10**9), st.integers(0, 63), st.integers(0, 63)),
    min_size=1,
    max_size=2,
)

VALUES: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**19, 10**400),
    *(0.5, -0.5, 1e-5, 1e-49, 1e-320, 1e49, 1e308, -1e308, float("nan"), float("inf")),
    *("", " ", "x", "static", "continuous", "\n", "\x1b[31m", "\u202e", "\ud800", "[/b]", "[red]"),
    *("%s{}", "a" * 2000, "0001-01-01T00:00:00+23:59", "9999-12-31", "../../etc/passwd", "\0"),
    *([], [None], [1, 2, 3], ["x"] * 3, {}, {"a": 1}, {"static": None}, {"median": 1}),
)


def spoil_json(data: Any, spoiled: Sequence[Change]) -> bytes:
    """Return the text of a JSON document after some changes of its structure."""
    data = copy.deepcopy(data)
    text = ""
    for change in spoiled:
        if not data:
            break
        parent, key = _place_in(data, change.place)
        text = _CHANGES[change.kind % len(_CHANGES)](parent, key, change.value) or text
    whole = json.dumps(data)
    if text:  # a duplicated key, which no dictionary can hold
        whole = whole[:-1] + text + "}"
    return whole.encode()


def _place_in(data: Any, place: int) -> tuple[Any, Any]:
    """Return the container and the key of a value within a document.

    Each step down chooses among a container's own values, so that a short part that stands beside
    a long one is reached as often.
    """
    parent, key = data, next(iter(data))
    while True:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        place, chosen = divmod(place, len(keys))
        key = list(keys)[chosen]
        place, stays = divmod(place, 4)
        if not isinstance(parent[key], dict | list) or not parent[key] or not stays:
            return parent, key
        parent = parent[key]


def _drop(parent: Any, key: Any, value: int) -> None:
    del parent[key]


def _replace(parent: Any, key: Any, value: int) -> None:
    parent[key] = copy.deepcopy(VALUES[value % len(VALUES)])


def _rename(parent: Any, key: Any, value: int) -> None:
    if isinstance(parent, dict):
        new = ("", "x", f"{key} ", "[/b]", "\ud800", "a" * 500)[value % 6]
        parent[new] = parent.pop(key)


def _twice(parent: Any, key: Any, value: int) -> str:
    return f', "command": {json.dumps("x")}'


def _scale(parent: Any, key: Any, value: int) -> None:
    if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] *= (-1, 0, 2, 1000, 10**9, 1e30, 1e-30)[value % 7]


def _nest(parent: Any, key: Any, value: int) -> None:
    for _ in range((1, 3, 70, 300)[value % 4]):
        parent[key] = [parent[key]]


def _lengthen(parent: Any, key: Any, value: int) -> None:
    if isinstance(parent[key], list):
        parent[key] = parent[key][:1] * (0, 1, 2, 1000)[value % 4]
    elif isinstance(parent[key], str):
        parent[key] += "x"


def _add(parent: Any, key: Any, value: int) -> None:
    if isinstance(parent[key], dict):
        parent[key]["surprise"] = copy.deepcopy(VALUES[value % len(VALUES)])
    elif isinstance(parent[key], list):
        parent[key].append(copy.deepcopy(VALUES[value % len(VALUES)]))


_CHANGES: Sequence[Callable[[Any, Any, int], str | None]] = (
    *(_replace, _replace, _replace, _replace, _drop, _rename, _twice, _scale, _scale, _nest),
    *(_lengthen, _add),
)


def spoil_bytes(content: bytes, spoiled: Sequence[Change]) -> bytes:
    """Return the bytes of a file after some were flipped, removed, doubled or overwritten."""
    changed = bytearray(content)
    for place, kind, value in spoiled:
        at = place % max(len(changed), 1)
        match kind % 5:
            case 0 if changed:
                changed[at] ^= 1 << value % 8
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + value]
            case 3:
                changed[at:at] = changed[at : at + value]
            case _:
                changed[at : at + value % 9] = bytes([value * 4 % 256]) * (value % 9)
    return bytes(changed)


NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 1000, 2**31, 2**40, 2**61, 2**63 - 1)


def spoil_recording(content: bytes, spoiled: Sequence[Change]) -> bytes:
    """Return the archive of a recording after some changes of its columns, types and lengths."""
    with np.load(io.BytesIO(content)) as arrays:
        columns: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    for place, kind, value in spoiled:
        name = list(columns)[place % len(columns)]
        column = np.atleast_1d(columns[name])
        if name == "header" and column.dtype == np.uint8 and kind % 4:
            header = json.loads(column.tobytes())
            text = spoil_json(header, [Change(place // len(columns), kind, value)])
            columns[name] = np.frombuffer(text, np.uint8)
            continue
        row = place // len(columns) % max(len(column), 1)
        match kind % 10:
            case 0 | 1 | 2 if len(column):
                columns[name] = column.copy()
                columns[name][row] = np.int64(NUMBERS[value % len(NUMBERS)]).astype(column.dtype)
            case 3 if len(column):
                columns[name] = column.copy()
                columns[name][row] += column.dtype.type((-1, 1, 2, 10)[value % 4])
            case 4:
                columns[name] = column[:row]
            case 5:
                columns[name] = np.concatenate([column, column[: 1 + value % 3]])
            case 6:
                kinds = (np.float64, np.int32, np.uint64, ">i8", "S3", np.bool_)
                columns[name] = column.astype(kinds[value % len(kinds)])
            case 7:
                columns[name] = (column[None], column.reshape(-1, 1), np.array(3))[value % 3]
            case 8:
                del columns[name]
            case _:
                columns[("surprise", "tokens", "ends_ns", "step_ns")[value % 4]] = column
        if len(columns) == 0:
            break
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **columns)
    return out.getvalue()
