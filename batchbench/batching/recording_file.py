"""The file of a recording: a NumPy ``.npz`` archive of a JSON header and columns of integers.

A file is not trusted. Sizes are taken from the zip directory and the npy headers and compared
before anything is inflated, no pickle is ever read, and the checksum of the content must be right.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
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

Column = NDArray[Any]

MOST_MEMBERS = 64
"""Maximum number of members in an archive; a recording has at most 30."""

MOST_HEADER_BYTES = 2**20
"""Largest size of a header; batchbench writes 1 to 2 KB."""

SURE_BYTES, MOST_RATIO = 64 * 2**20, 100
"""A file may inflate to ``SURE_BYTES`` and this many times its own size. Each log has a column that
takes at least a byte a row when compressed, of at most 72 bytes, and zeros compress 1,000 times."""

_END = struct.Struct("<4s4H2LH")
"""The end record of a zip archive: its counts and the size of its directory."""

_TORN = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)
"""Errors that ``zipfile`` raises for a damaged archive."""

_UNCOMPRESSED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class NotWholeError(ValueError):
    """A fault of a recording's file; the text completes "is not a complete recording:"."""


def save_recording(recording: Recording) -> bytes:
    """Return the recording as a NumPy ``.npz`` archive: a header in JSON, and columns."""
    header = {f.name: getattr(recording.header, f.name) for f in fields(Header)}
    columns: dict[str, NDArray[Any]] = {}
    for name in _LOGS:
        if (log := getattr(recording, name)) is not None:
            columns |= {f"{name}.{c.name}": getattr(log, c.name) for c in fields(log)}
    for name in _ROWS:
        if getattr(recording, name) is not None:
            columns[name] = getattr(recording, name)
    return _write_columns({"format": FORMAT, **header}, columns)


def load_recording(file: Path) -> Recording:
    """Read a recording that :func:`save_recording` wrote.

    Raises:
        UsageError: the file is missing, damaged, of another format, or breaks a law of the log.
    """
    try:
        header, columns = _read_columns(file, _DTYPES)
        if (version := header.pop("format", None)) not in (2, FORMAT):
            raise UsageError(f"{file}: written by another version; record it again")
        if version == 2 and "requests.admitted" in columns:
            columns["requests.started"] = columns["requests.admitted"]
        recording = _from_columns(header, columns)
        _check_laws(recording)
    except NotWholeError as error:
        raise UsageError(f"{file}: is not a complete recording: {error}") from error
    return recording


def _from_columns(header: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> Recording:
    if fault := header.keys() ^ {f.name for f in fields(Header)}:
        raise NotWholeError(f"its header lacks {min(fault)}, or should not have it")
    logs: dict[str, Any] = {}
    for name, kind in _LOGS.items():
        names = {c.name: f"{name}.{c.name}" for c in fields(kind)}
        if name == "growth" and not columns.keys() & names.values():
            continue
        if missing := names.values() - columns.keys():
            raise NotWholeError(f"{min(missing)} is missing")
        logs[name] = kind(**{column: columns[names[column]] for column in names})
    rows: dict[str, Any] = {name: columns.get(name) for name in _ROWS}
    return Recording(header=Header(**header), **logs, **rows)


_LOGS: dict[str, Any] = {
    "requests": RequestLog,
    "spans": SpanLog,
    "chunks": ChunkLog,
    "waits": WaitLog,
    "growth": GrowthLog,
}

_ROWS = ("ends_ns", "step_ns", "tokens", "token_ends_ns", "begun_ns")
"""Columns that belong to no log."""

_DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{log}.{c.name}": np.dtype(np.int64) for log, kind in _LOGS.items() for c in fields(kind)},
    **dict.fromkeys(_ROWS, np.dtype(np.int64)),
    "tokens": np.dtype(np.int32),
}
"""Columns that a file may have, and the type of their values."""


def _write_columns(header: Mapping[str, Any], columns: Mapping[str, Column]) -> bytes:
    text = json.dumps(header, allow_nan=False).encode()
    out = io.BytesIO()
    np.savez_compressed(
        out, allow_pickle=False, header=np.frombuffer(text, np.uint8), **dict(columns)
    )
    return out.getvalue()


def _read_columns(
    file: Path, dtypes: Mapping[str, np.dtype[Any]]
) -> tuple[dict[str, Any], dict[str, Column]]:
    """Return the header and the columns of an archive.

    Args:
        file: the archive.
        dtypes: the columns that a file may have, and the type of their values.

    Raises:
        UsageError: the file is missing or cannot be opened.
        NotWholeError: the file is damaged, or of another kind.
    """
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotWholeError("it is a folder")
        if not stat.S_ISREG(mode):
            raise NotWholeError("it is a device or a pipe")
        with file.open("rb") as content:
            _check_end(content)
            with zipfile.ZipFile(content) as archive:
                members = _members(archive, os.fstat(content.fileno()).st_size, dtypes)
                header = _read_header(archive, members.pop("header"))
                columns = {n: _read_column(archive, m, n, dtypes[n]) for n, m in members.items()}
                return header, columns
    except NotWholeError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such recording") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {reason_of(error)}") from error
    except _TORN as error:
        raise NotWholeError("the archive is damaged") from error


def _check_end(content: IO[bytes]) -> None:
    """Raise NotWholeError unless the archive ends with a small directory and no comment."""
    size = content.seek(0, os.SEEK_END)
    content.seek(max(size - _END.size, 0))
    tail = content.read()
    if len(tail) < _END.size:
        raise NotWholeError("it is not a zip archive")
    signature, _, _, _, members, directory, _, comment = _END.unpack(tail)
    if signature != b"PK\5\6" or comment:
        raise NotWholeError("it is not a zip archive, or is damaged")
    if members > MOST_MEMBERS or directory > 2**16:
        raise NotWholeError(f"it has {members} members; a recording has at most {MOST_MEMBERS}")


def _members(
    archive: zipfile.ZipFile, file_bytes: int, dtypes: Mapping[str, np.dtype[Any]]
) -> dict[str, zipfile.ZipInfo]:
    """Return the members by column; refuse impossible names and sizes."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename or name not in {"header", *dtypes}:
            raise NotWholeError(
                f"it contains {member.filename[:40]!r}, which is not part of a recording"
            )
        if name in members:
            raise NotWholeError(f"it holds {name} twice")
        if member.flag_bits & 1 or member.compress_type not in (_UNCOMPRESSED, _DEFLATED):
            raise NotWholeError(f"{name} is encrypted, or compressed in an unknown way")
        members[name] = member
    if "header" not in members:
        raise NotWholeError("header is missing")
    # Members that share bytes (an overlapping bomb) add up to more than the file.
    if sum(member.compress_size for member in members.values()) > file_bytes:
        raise NotWholeError("its members are larger than the file")
    inflated = sum(member.file_size for member in members.values())
    if inflated > SURE_BYTES + MOST_RATIO * file_bytes:
        raise NotWholeError(
            f"it would inflate from {file_bytes:,} to {inflated:,} bytes, more than a recording can"
        )
    return members


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, Any]:
    if member.file_size > MOST_HEADER_BYTES:
        raise NotWholeError("its header is too large")
    text = _read_column(archive, member, "header", np.dtype(np.uint8))
    try:
        header = parse_json(text.tobytes())
    except ValueError as error:
        raise NotWholeError(f"its header is not readable JSON ({error})") from error
    if not isinstance(header, dict):
        raise NotWholeError("its header is not an object")
    return header


def _read_column(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, dtype: np.dtype[Any]
) -> Column:
    """Read a column, whose npy header must agree with the size of the member."""
    with archive.open(member) as content:
        try:
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError
            shape, _, kind = np.lib.format.read_array_header_1_0(content)
        except Exception as error:  # NumPy evaluates it as a Python literal
            raise NotWholeError(f"{name} has no npy header of version 1.0") from error
        if kind != dtype or len(shape) != 1:
            raise NotWholeError(f"{name} is not a row of {dtype}")
        size = shape[0] * dtype.itemsize
        if not 0 <= size < member.file_size or member.file_size - size > 2**16:
            raise NotWholeError(f"{name} claims {shape[0]:,} values, which its size contradicts")
        column = np.frombuffer(bytearray(content.read(size)), dtype)
        if len(column) != shape[0] or content.read(1):  # at its end zipfile checks the checksum
            raise NotWholeError(f"{name} claims {shape[0]:,} values and has a different number")
    return column


MOST_SLOTS = 2**20
"""The largest ``--batch-size``."""

MOST_NS = 2**60
"""Largest time, 36 years; sums and differences of two times fit in 64 bits."""

MOST_APART_NS, MOST_APART = 10**6, 1.01
"""Largest difference, in ns and as a ratio, between the clocks of the host and of a GPU."""

MOST_STEPS = 2**31
"""Maximum number of steps in a span, above the longest output; their square fits in 64 bits."""


def _check_laws(recording: Recording) -> None:
    """Raise NotWholeError if a recording breaks a law of the log."""
    r = recording
    _check_header(r.header)
    _check_lengths(r)
    _check(r.requests.output_tokens >= 1, "a request has no output token")
    _check(r.requests.prompt_tokens >= 1, "a request has no prompt")
    _check_range("requests.output_tokens", r.requests.output_tokens, MOST_STEPS)
    _check_range("requests.prompt_tokens", r.requests.prompt_tokens, MOST_STEPS)
    _check_range("requests.due_ns", r.requests.due_ns, MOST_NS)
    tokens = float(r.requests.output_tokens.sum(dtype=np.float64))
    for name, column in (("tokens", r.tokens), ("token_ends_ns", r.token_ends_ns)):
        if column is not None:
            _check(len(column) == tokens, f"{name} differs in length from the requests' outputs")
    if r.tokens is not None:
        _check(r.tokens >= 0, "a token is negative")
    if r.token_ends_ns is not None:
        _check_of_tokens(r)
    else:
        _check_of_steps(r)
    _check(r.duration_ns > 0, "it takes no time")
    # A GPU reports times in 32 bits, so after hours two clocks may differ by a millisecond.
    slack = MOST_APART_NS + r.first_token_ns * MOST_APART
    _check(r.requests.due_ns <= slack, "a request has a token before it is due")
    _check(r.first_token_ns <= r.last_token_ns, "a request's tokens are out of order")


def _check(holds: bool | np.bool_ | NDArray[np.bool_], fault: str) -> None:
    if not np.all(holds):
        raise NotWholeError(fault)


def _check_range(name: str, column: Ints, stop: int, start: int = 0) -> None:
    if len(column) and not start <= column.min() <= column.max() < stop:
        worst = column.min() if column.min() < start else column.max()
        raise NotWholeError(f"{name} holds {worst}; it must be {start} to {stop - 1}")


def _check_header(header: Header) -> None:
    for name, fits in (
        ("strategy", isinstance(header.strategy, str) and header.strategy.strip() != ""),
        ("trial", _is_whole(header.trial)),
        ("slots", _is_whole(header.slots) and 1 <= header.slots <= MOST_SLOTS),
        ("simulated", isinstance(header.simulated, bool)),
        ("workload", isinstance(header.workload, dict)),
        ("about", isinstance(header.about, dict)),
    ):
        _check(fits, f"its header's {name} is wrong")
    about = header.about
    for name, fits in (
        ("pads_prompts", isinstance(about.get("pads_prompts", False), bool)),
        ("wall_ns", _is_whole(about.get("wall_ns", 0)) and about.get("wall_ns", 0) < MOST_NS),
        ("computed_passes", _is_whole(about.get("computed_passes") or 0)),
        ("energy_joules", _is_amount(about.get("energy_joules", 1))),
        ("foreign_cores", _is_amount(about.get("foreign_cores", 1), least=0)),
        ("memory", about.get("memory") is None or _is_memory(about["memory"])),
        ("servings", _is_whole(about.get("servings", 1)) and about.get("servings", 1) > 0),
        ("differing_requests", _are_whole(about.get("differing_requests", []))),
        ("steps_vary", isinstance(about.get("steps_vary", False), bool)),
        ("client", about.get("client") is None or _is_client(about["client"])),
    ):
        _check(fits, f"its header's about.{name} is wrong")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_whole, values))


def _is_amount(value: Any, *, least: float = 1e-9) -> bool:
    """Return True for None and for a number from ``least`` to 1e30."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and least <= value < 1e30)


def _is_memory(memory: Any) -> bool:
    if not isinstance(memory, Mapping) or not isinstance(memory.get("reading"), Mapping):
        return False
    reading = memory["reading"]
    sizes = ("weight_bytes", "step_weight_bytes", "kv_token_bytes")
    return (
        reading.keys() == {"dtype", *sizes}
        and isinstance(reading["dtype"], str)
        and all(_is_whole(reading[name]) and reading[name] > 0 for name in sizes)
        and memory.get("bytes_per_s") is not None
        and _is_amount(memory["bytes_per_s"])
    )


def _is_client(client: Any) -> bool:
    """Return True for the client's part in the times of a trial against a server."""
    if not isinstance(client, Mapping):
        return False
    names = ("loop_p99_ns", "late_p99_ns", "kernel_share", "merged_share")
    known = all(client.get(n) is not None and _is_amount(client[n], least=0) for n in names)
    return known and client["kernel_share"] <= 1 and client["merged_share"] <= 1


def _check_lengths(r: Recording) -> None:
    for name in ("requests", "spans", "chunks", "waits", "growth"):
        log = getattr(r, name)
        lengths = {len(getattr(log, c.name)) for c in fields(log)} if log is not None else {0}
        _check(len(lengths) == 1, f"the columns of its {name} differ in length")
    _check(len(r.requests.slot) > 0, "it has no requests")
    times = (r.ends_ns, r.step_ns, r.token_ends_ns)
    _check(sum(t is not None for t in times) == 1, "its times are missing, or given in two ways")
    _check((r.begun_ns is None) is (r.token_ends_ns is None), "begun_ns needs token_ends_ns")
    requests, spans = len(r.requests.slot), len(r.spans.steps)
    _check(r.begun_ns is None or len(r.begun_ns) == requests, "begun_ns is not one per request")
    _check(r.step_ns is None or len(r.step_ns) == spans, "step_ns is not one per span")
    _check(
        r.growth is None or (r.step_ns is not None and len(r.growth.rest_ps) == spans),
        "growth is not one per span",
    )


def _check_of_tokens(r: Recording) -> None:
    """Check a trial that does not report steps."""
    assert r.token_ends_ns is not None
    assert r.begun_ns is not None
    _check(len(r.spans.steps) == len(r.chunks.start) == len(r.waits.step) == 0, "it has steps")
    for name in ("slot", "admitted", "started", "first", "last", "released"):
        _check(getattr(r.requests, name) == -1, f"requests.{name} is known but steps are not")
    _check_range("token_ends_ns", r.token_ends_ns, MOST_NS)
    _check_range("begun_ns", r.begun_ns, MOST_NS)


def _check_of_steps(r: Recording) -> None:
    """Check a trial that reports its steps."""
    s = r.spans
    _check(len(s.steps) > 0, "it has no step")
    _check_range("spans.steps", s.steps, MOST_STEPS, start=1)
    _check(s.steps.sum(dtype=np.float64) < 2**53, "it has too many steps")
    _check_range("spans.waiting", s.waiting, len(r.requests.slot) + 1)
    _check_range("spans.chunks", s.chunks, len(r.chunks.start) + 1)
    _check(s.chunks.sum() == len(r.chunks.start), "spans.chunks is not the number of chunks")
    _check((s.chunks == 0) | (s.steps == 1), "a span with chunks has several steps")
    _check_requests(r)
    _check_chunks(r)
    _check_decoding(r)
    _check_waits(r)
    _check_times(r)


def _check_requests(r: Recording) -> None:
    q, steps = r.requests, r.num_steps
    _check_range("requests.slot", q.slot, r.header.slots)
    _check_range("requests.admitted", q.admitted, steps)
    ordered = (q.admitted <= q.started) & (q.started <= q.first) & (q.first <= q.last)
    _check(ordered, "a request's steps are out of order")
    _check(q.last < q.released, "a request is released before its last token")
    _check_range("requests.released", q.released, steps + 1)
    order = np.lexsort((q.admitted, q.slot))
    slot, admitted, released = q.slot[order], q.admitted[order], q.released[order]
    alone = (slot[1:] != slot[:-1]) | (released[:-1] <= admitted[1:])
    _check(alone, "a slot holds two requests at once")


def _check_chunks(r: Recording) -> None:
    """Check that each prompt is computed once, from beginning to end, and then yields a token."""
    q, c, count = r.requests, r.chunks, len(r.requests.slot)
    _check_range("chunks.request", c.request, count)
    _check((c.start >= 0) & (c.start < c.stop), "a chunk has no token")
    step = np.repeat(r.first_steps, r.spans.chunks)
    order = np.argsort(c.request, kind="stable")
    request, start, stop, step = c.request[order], c.start[order], c.stop[order], step[order]
    begins = np.concatenate([[True], request[1:] != request[:-1]])[: len(request)]
    ends = np.concatenate([request[1:] != request[:-1], [True]])[: len(request)]
    _check(np.array_equal(request[begins], np.arange(count)), "a request has no chunk")
    whole = (start[begins] == 0).all() and (stop[ends] == q.prompt_tokens).all()
    _check(
        whole and (start[1:] == stop[:-1])[~begins[1:]],
        "a prompt is not computed completely and once",
    )
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


def _check_waits(r: Recording) -> None:
    w = r.waits
    _check_range("waits.step", w.step, r.num_steps + 1)
    _check_range("waits.waiting", w.waiting, len(r.requests.slot) + 1)
    for name in ("start_ns", "until_ns", "end_ns"):
        _check_range(f"waits.{name}", getattr(w, name), MOST_NS)
    rising = (np.diff(w.step) >= 0) & (np.diff(w.start_ns) >= 0)
    _check(rising.all() and (w.start_ns <= w.end_ns).all(), "its waits are out of order")


def _check_times(r: Recording) -> None:
    s = r.spans
    _check_range("spans.start_ns", s.start_ns, MOST_NS)
    if r.ends_ns is not None:
        _check(len(r.ends_ns) == r.num_steps, "ends_ns is not one per step")
        _check_range("ends_ns", r.ends_ns, MOST_NS)
        _check(np.diff(r.ends_ns) >= 0, "ends_ns is out of order")
        _check(s.start_ns <= r.ends_ns[r.first_steps], "a span begins after its first step")
    else:
        _check_costs(r)
    _check(s.start_ns[1:] >= r.span_ends_ns[:-1], "spans overlap")
    last = int(r.span_ends_ns[-1])
    wall = r.header.about.get("wall_ns", last)
    _check(last <= wall * MOST_APART + MOST_APART_NS, "about.wall_ns is before the last step")
    waited = r.waits.end_ns <= last * MOST_APART + MOST_APART_NS
    _check(waited, "a wait ends after the last step")


def _check_costs(r: Recording) -> None:
    """Check the times of a simulation."""
    s = r.spans
    assert r.step_ns is not None
    _check(r.header.about.get("memory") is None, "a simulation measured no memory")
    _check_range("step_ns", r.step_ns, MOST_NS, start=1)
    ends = s.start_ns + s.steps.astype(np.float64) * r.step_ns
    if r.growth is not None:
        g, steps = r.growth, s.steps.astype(np.float64)
        grown = np.abs(g.growth_ps) * (steps * steps / 2)
        grown += (
            np.abs(g.beyond_ps.astype(np.float64)) + np.abs(g.rest_ps.astype(np.float64)) * steps
        )
        _check(grown < 2**62, "growth is too large")
        last = 1000 * r.step_ns.astype(np.float64) + g.rest_ps + g.growth_ps * (steps - 1)
        _check(last > 0, "growth makes a step shorter than 0 ns")
        ends += grown / 1000
    _check(ends < MOST_NS, "it takes too long")
