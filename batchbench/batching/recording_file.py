"""The file of a recording: a NumPy ``.npz`` archive of a JSON header and columns of integers.

A file is not trusted. Sizes are taken from the zip directory and compared before anything is
inflated, no pickle is ever read, and the checksum of the content must be right.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft4Validator  # the last draft in which 1.0 is no integer
from numpy.typing import NDArray

from batchbench.batching.recording import (
    ChunkLog,
    GrowthLog,
    Header,
    Ints,
    Recording,
    RequestLog,
    SpanLog,
    WaitLog,
)
from batchbench.errors import UsageError
from batchbench.files import reason_of
from batchbench.json_file import parse_json

FORMAT = 3
"""Version of the file format that :func:`save_recording` writes.

Version 2 can be read too; in it a request starts at the step at which it is admitted.
"""

MOST_MEMBERS = 64
"""Maximum number of members in an archive; a recording has at most 30."""

SURE_BYTES, MOST_RATIO = 64 * 2**20, 100
"""A file may inflate to ``SURE_BYTES`` and this many times its own size. Each log has a column that
takes at least a byte a row when compressed, of at most 72 bytes, and zeros compress 1,000 times."""

MOST_NS = 2**60
"""Largest time, 36 years; sums and differences of two times fit in 64 bits."""

MOST_APART_NS, MOST_APART = 10**6, 1.01
"""Largest difference, in ns and as a ratio, between the clocks of the host and of a GPU."""

MOST_STEPS = 2**31
"""Maximum number of steps in a span, above the longest output; their square fits in 64 bits."""

_TORN = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)
"""Errors that ``zipfile`` raises for a damaged archive."""

_LOGS: dict[str, Any] = {
    "requests": RequestLog,
    "spans": SpanLog,
    "chunks": ChunkLog,
    "waits": WaitLog,
    "growth": GrowthLog,
}

_ROWS = ("ends_ns", "step_ns", "tokens", "token_ends_ns", "begun_ns")
"""Columns that belong to no log."""

_MEMBERS = {
    name: np.dtype({"header": np.uint8, "tokens": np.int32}.get(name, np.int64))
    for name in (
        "header",
        *(f"{log}.{column.name}" for log, kind in _LOGS.items() for column in fields(kind)),
        *_ROWS,
    )
}
"""Members that a file may have, and the type of their values."""


class NotWholeError(ValueError):
    """A fault of a recording's file; the text completes "is not a complete recording:"."""


def save_recording(recording: Recording) -> bytes:
    """Return the recording as a NumPy ``.npz`` archive: a header in JSON, and columns."""
    header = json.dumps({"format": FORMAT, **vars(recording.header)}, allow_nan=False)
    out = io.BytesIO()
    np.savez_compressed(
        out,
        allow_pickle=False,
        header=np.frombuffer(header.encode(), np.uint8),
        **_columns_of(recording),
    )
    return out.getvalue()


def _columns_of(recording: Recording) -> dict[str, NDArray[Any]]:
    columns = {
        f"{name}.{column.name}": getattr(log, column.name)
        for name in _LOGS
        if (log := getattr(recording, name)) is not None
        for column in fields(log)
    }
    rows = {name: getattr(recording, name) for name in _ROWS}
    return columns | {name: row for name, row in rows.items() if row is not None}


def load_recording(file: Path) -> Recording:
    """Read a recording that :func:`save_recording` wrote.

    Raises UsageError if it is missing, damaged, of another format, or breaks a law of the log.
    """
    try:
        if file.exists() and not file.is_file():
            raise NotWholeError("it is a folder, a device or a pipe")
        columns = _read_members(file)
        header = _parse_header(columns.pop("header").tobytes())
        if (version := header.pop("format", None)) not in (2, FORMAT):
            raise UsageError(f"{file}: written by another version; record it again")
        if version == 2 and "requests.admitted" in columns:
            columns["requests.started"] = columns["requests.admitted"]
        recording = _from_columns(header, columns)
        _check_laws(recording)
    except NotWholeError as error:
        raise UsageError(f"{file}: is not a complete recording: {error}") from error
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such recording") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {reason_of(error)}") from error
    return recording


def _read_members(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            _check_members(archive.infolist(), file.stat().st_size)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {name: _read_column(archive, name) for name in names}
    except NotWholeError:
        raise
    except _TORN as error:
        raise NotWholeError("it is not a zip archive, or is damaged") from error


def _check_members(members: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Refuse impossible names and sizes."""
    if len(members) > MOST_MEMBERS:
        raise NotWholeError(
            f"it has {len(members)} members; a recording has at most {MOST_MEMBERS}"
        )
    names = [member.filename for member in members]
    for name in names:
        if name.removesuffix(".npy") not in _MEMBERS or names.count(name) > 1:
            raise NotWholeError(f"it contains {name[:40]!r} twice, or should not contain it")
    if "header.npy" not in names:
        raise NotWholeError("header is missing")
    if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
        raise NotWholeError("it is compressed in an unknown way")
    # Members that share bytes (an overlapping bomb) add up to more than the file.
    if sum(member.compress_size for member in members) > file_bytes:
        raise NotWholeError("its members are larger than the file")
    inflated = sum(member.file_size for member in members)
    if inflated > SURE_BYTES + MOST_RATIO * file_bytes:
        raise NotWholeError(f"it would inflate from {file_bytes:,} to {inflated:,} bytes")


def _read_column(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    content = io.BytesIO(archive.read(f"{name}.npy"))  # which compares the checksum
    try:
        version = np.lib.format.read_magic(content)
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    except Exception as error:  # NumPy evaluates it as a Python literal
        raise NotWholeError(f"{name} has no npy header") from error
    if version != (1, 0) or dtype != _MEMBERS[name] or len(shape) != 1:
        raise NotWholeError(f"{name} is not a row of {_MEMBERS[name]}")
    column = np.frombuffer(bytearray(content.read()), dtype)
    if column.shape != shape:
        raise NotWholeError(f"{name} claims {shape[0]:,} values and has {len(column):,}")
    return column


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError as error:
        raise NotWholeError(f"its header is not readable JSON ({error})") from error
    if not isinstance(header, dict):
        raise NotWholeError("its header is not an object")
    return header


def _from_columns(header: dict[str, Any], columns: Mapping[str, NDArray[Any]]) -> Recording:
    for fault in Draft4Validator(_HEADER).iter_errors(header):
        raise NotWholeError(f"{'.'.join(['header', *map(str, fault.path)])} is wrong")
    logs: dict[str, Any] = {}
    for name, kind in _LOGS.items():
        names = {column.name: f"{name}.{column.name}" for column in fields(kind)}
        if name == "growth" and not columns.keys() & names.values():
            continue
        if missing := names.values() - columns.keys():
            raise NotWholeError(f"{min(missing)} is missing")
        logs[name] = kind(**{column: columns[names[column]] for column in names})
    rows: dict[str, Any] = {name: columns.get(name) for name in _ROWS}
    return Recording(header=Header(**header), **logs, **rows)


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has all of these."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"type": [schema["type"], "null"]}


_NO_MORE = {"additionalProperties": False}
_FLAG, _TEXT = {"type": "boolean"}, {"type": "string"}
_WHOLE, _POSITIVE = ({"type": "integer", "minimum": least} for least in (0, 1))
_AMOUNT, _FROM_0 = ({"type": "number", "minimum": n, "maximum": 1e30} for n in (1e-9, 0))
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}

_READING = _object(
    dtype=_TEXT, weight_bytes=_POSITIVE, step_weight_bytes=_POSITIVE, kv_token_bytes=_POSITIVE
)

_CLIENT = _object(
    loop_p99_ns=_FROM_0, late_p99_ns=_FROM_0, kernel_share=_SHARE, merged_share=_SHARE
)

_ABOUT = {
    "pads_prompts": _FLAG,
    "wall_ns": _WHOLE | {"maximum": MOST_NS},
    "computed_passes": _or_null(_WHOLE),
    "energy_joules": _or_null(_AMOUNT),
    "foreign_cores": _or_null(_FROM_0),
    "memory": _or_null(_object(bytes_per_s=_AMOUNT, reading=_READING | _NO_MORE)),
    "servings": _POSITIVE,
    "differing_requests": {"type": "array", "items": _WHOLE},
    "steps_vary": _FLAG,
    "client": _or_null(_CLIENT),
}
"""Observations that reports compute with."""

_HEADER = _NO_MORE | _object(
    strategy=_TEXT | {"pattern": r"\S"},
    trial=_WHOLE,
    slots=_POSITIVE | {"maximum": 2**20},  # the largest --batch-size
    simulated=_FLAG,
    workload={"type": "object"},
    about={"type": "object", "properties": _ABOUT},
)


# The laws of the log


def _check(holds: bool | np.bool_ | NDArray[np.bool_], fault: str) -> None:
    if not np.all(holds):
        raise NotWholeError(fault)


def _check_laws(r: Recording) -> None:
    """Raise NotWholeError if a recording breaks a law of the log."""
    times = (r.ends_ns, r.step_ns, r.token_ends_ns)
    _check(sum(t is not None for t in times) == 1, "its times are missing, or given in two ways")
    _check((r.begun_ns is None) is r.has_steps, "begun_ns needs token_ends_ns")
    _check(r.growth is None or r.step_ns is not None, "growth needs step_ns")
    _check_columns(r)
    if r.has_steps:
        _check_requests(r)
        _check_chunks(r)
        _check_decoding(r)
        _check_times(r)
    _check(r.duration_ns > 0, "it takes no time")
    # A GPU reports times in 32 bits, so after hours two clocks may differ by a millisecond.
    slack = MOST_APART_NS + r.first_token_ns * MOST_APART
    _check(r.requests.due_ns <= slack, "a request has a token before it is due")
    _check(r.first_token_ns <= r.last_token_ns, "a request's tokens are out of order")


def _check_columns(r: Recording) -> None:
    columns = _columns_of(r)
    for name, (length, least, stop) in _laws_of_columns(r).items():
        if (column := columns.get(name)) is None:
            continue
        _check(len(column) == length, f"{name} has {len(column)} values instead of {length}")
        if len(column) and not least <= column.min() <= column.max() < stop:
            worst = column.min() if column.min() < least else column.max()
            raise NotWholeError(f"{name} holds {worst}; it must be {least} to {stop - 1}")
    s, chunks = r.spans, len(r.chunks.start)
    _check(len(r.requests.slot) > 0, "it has no requests")
    _check((len(s.steps) > 0) is r.has_steps, "it must have either steps or times of tokens")
    _check(r.has_steps or len(r.waits.step) == 0, "it has waits but no steps")
    _check(s.steps.sum(dtype=np.float64) < 2**53, "it has too many steps")
    _check(s.chunks.sum() == chunks, "spans.chunks is not the number of chunks")
    _check((s.chunks == 0) | (s.steps == 1), "a span with chunks has several steps")


def _laws_of_columns(r: Recording) -> Mapping[str, tuple[int, int, int]]:
    """Return the length of each column, its least value, and the value that it stays below."""
    spans, requests, chunks, waits = (
        len(column) for column in (r.spans.steps, r.requests.slot, r.chunks.start, r.waits.step)
    )
    steps, outputs = r.num_steps, int(r.requests.output_tokens.sum())
    unknown = () if r.has_steps else (requests, -1, 0)
    least_ps, most_ps = -(2**63), 2**63
    return {
        "spans.steps": (spans, 1, MOST_STEPS),
        "spans.start_ns": (spans, 0, MOST_NS),
        "spans.decoding": (spans, 0, r.header.slots + 1),
        "spans.waiting": (spans, 0, requests + 1),
        "spans.chunks": (spans, 0, chunks + 1),
        "requests.due_ns": (requests, 0, MOST_NS),
        "requests.prompt_tokens": (requests, 1, MOST_STEPS),
        "requests.output_tokens": (requests, 1, MOST_STEPS),
        "requests.slot": unknown or (requests, 0, r.header.slots),
        "requests.admitted": unknown or (requests, 0, steps),
        "requests.started": unknown or (requests, 0, steps),
        "requests.first": unknown or (requests, 0, steps),
        "requests.last": unknown or (requests, 0, steps),
        "requests.released": unknown or (requests, 0, steps + 1),
        "chunks.request": (chunks, 0, requests),
        "chunks.start": (chunks, 0, MOST_STEPS),
        "chunks.stop": (chunks, 1, MOST_STEPS),
        "waits.step": (waits, 0, steps + 1),
        "waits.start_ns": (waits, 0, MOST_NS),
        "waits.until_ns": (waits, 0, MOST_NS),
        "waits.end_ns": (waits, 0, MOST_NS),
        "waits.waiting": (waits, 0, requests + 1),
        "growth.beyond_ps": (spans, least_ps, most_ps),
        "growth.rest_ps": (spans, least_ps, most_ps),
        "growth.growth_ps": (spans, least_ps, most_ps),
        "ends_ns": (steps, 0, MOST_NS),
        "step_ns": (spans, 1, MOST_NS),
        "tokens": (outputs, 0, 2**31),
        "token_ends_ns": (outputs, 0, MOST_NS),
        "begun_ns": (requests, 0, MOST_NS),
    }


def _check_requests(r: Recording) -> None:
    q = r.requests
    ordered = (q.admitted <= q.started) & (q.started <= q.first) & (q.first <= q.last)
    _check(ordered, "a request's steps are out of order")
    _check(q.last < q.released, "a request is released before its last token")
    order = np.lexsort((q.admitted, q.slot))
    slot, admitted, released = q.slot[order], q.admitted[order], q.released[order]
    alone = (slot[1:] != slot[:-1]) | (released[:-1] <= admitted[1:])
    _check(alone, "a slot holds two requests at once")


def _check_chunks(r: Recording) -> None:
    """Check that each prompt is computed once, from beginning to end, and then yields a token."""
    q, c, count = r.requests, r.chunks, len(r.requests.slot)
    order = np.argsort(c.request, kind="stable")
    step = np.repeat(r.first_steps, r.spans.chunks)[order]
    request, start, stop = c.request[order], c.start[order], c.stop[order]
    _check(start < stop, "a chunk has no token")
    begins = np.diff(request, prepend=-1) > 0
    ends = np.diff(request, append=count) > 0
    _check(np.array_equal(request[begins], np.arange(count)), "a request has no chunk")
    whole = (start[begins] == 0).all() and (stop[ends] == q.prompt_tokens).all()
    follows = (start[1:] == stop[:-1])[~begins[1:]]
    _check(whole and follows, "a prompt is not computed completely and once")
    _check(step[begins] == q.started, "a request and its prompt start at different steps")
    _check(step[ends] == q.first, "a first token does not come from the last step of its prompt")


def _check_decoding(r: Recording) -> None:
    """Check that the decoding rows are those of the requests that hold a slot."""
    q, s, first_steps = r.requests, r.spans, r.first_steps
    rows = np.searchsorted(np.sort(q.first), first_steps)
    rows = rows - np.searchsorted(np.sort(q.released), first_steps, side="right")
    _check((s.decoding == 0) | (s.decoding == rows), "spans.decoding is not the rows that run")
    _check((s.decoding > 0) | (s.chunks > 0), "a step computes nothing")
    decodes = np.where(s.decoding > 0, s.steps, 0)
    before = np.cumsum(decodes) - decodes

    def up_to(step: Ints) -> Ints:
        """Return the number of decode steps up to and including each of these steps."""
        span = r.spans_of(step)
        return before[span] + np.where(decodes[span] > 0, step - first_steps[span] + 1, 0)

    tokens = 1 + up_to(q.last) - up_to(q.first)
    _check(
        tokens == q.output_tokens,
        "the number of tokens of a request differs from what its steps yield",
    )


def _check_times(r: Recording) -> None:
    s, w = r.spans, r.waits
    rising = (np.diff(w.step) >= 0) & (np.diff(w.start_ns) >= 0)
    _check(rising.all() and (w.start_ns <= w.end_ns).all(), "its waits are out of order")
    if r.ends_ns is not None:
        _check(np.diff(r.ends_ns) >= 0, "ends_ns is out of order")
        _check(s.start_ns <= r.ends_ns[r.first_steps], "a span begins after its first step")
    else:
        _check_costs(r)
    _check(s.start_ns[1:] >= r.span_ends_ns[:-1], "spans overlap")
    last = int(r.span_ends_ns[-1])
    wall = r.header.about.get("wall_ns", last)
    _check(last <= wall * MOST_APART + MOST_APART_NS, "about.wall_ns is before the last step")
    waited = w.end_ns <= last * MOST_APART + MOST_APART_NS
    _check(waited, "a wait ends after the last step")


def _check_costs(r: Recording) -> None:
    """Check the times of a simulation, in floats, which cannot overflow."""
    assert r.step_ns is not None
    _check(r.header.about.get("memory") is None, "a simulation measured no memory")
    steps, step_ns = r.spans.steps.astype(np.float64), r.step_ns.astype(np.float64)
    ends = r.spans.start_ns + steps * step_ns
    if r.growth is not None:
        beyond, rest, growth = (column.astype(np.float64) for column in vars(r.growth).values())
        grown = np.abs(growth) * (steps * steps / 2) + np.abs(beyond) + np.abs(rest) * steps
        _check(grown < 2**62, "growth is too large")
        last = 1000 * step_ns + rest + growth * (steps - 1)
        _check(last > 0, "growth makes a step shorter than 0 ns")
        ends += grown / 1000
    _check(ends < MOST_NS, "it takes too long")
