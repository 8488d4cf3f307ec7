"""The file of a recording: a NumPy ``.npz`` archive of a JSON header and columns of integers.

It is read without trust. Sizes are taken from the zip directory and the npy headers and compared
before anything is inflated, no pickle is ever read, and the content's checksum must be right.
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
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.files import reason_of
from batchbench.json_file import parse_json

Column = NDArray[Any]

MOST_MEMBERS = 64
"""Largest number of members of an archive; a recording has at most 30."""

MOST_HEADER_BYTES = 2**20
"""Largest size of a header; those that we write take 1 to 2 KB."""

SURE_BYTES, MOST_RATIO = 64 * 2**20, 100
"""A file may inflate to ``SURE_BYTES`` and this many times its own size. Each log has a column that
takes at least a byte a row when compressed, of at most 72 bytes, and zeros compress 1,000 times."""

_END = struct.Struct("<4s4H2LH")
"""The record that ends a zip archive: its counts and the size of its directory."""

_TORN = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)
"""Errors that ``zipfile`` raises for a damaged archive."""

_UNCOMPRESSED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class NotWholeError(ValueError):
    """A fault of a recording's file, in words that complete "is not a whole recording:"."""


def write_columns(header: Mapping[str, Any], columns: Mapping[str, Column]) -> bytes:
    """Return the content of the archive."""
    text = json.dumps(header, allow_nan=False).encode()
    out = io.BytesIO()
    np.savez_compressed(
        out, allow_pickle=False, header=np.frombuffer(text, np.uint8), **dict(columns)
    )
    return out.getvalue()


def read_columns(
    file: Path, dtypes: Mapping[str, np.dtype[Any]]
) -> tuple[dict[str, Any], dict[str, Column]]:
    """Read an archive: its header and the columns that it has.

    Args:
        dtypes: the columns that a file may have, and the type of their values.

    Raises:
        UsageError: the file is missing or cannot be opened.
        NotWholeError: the file is torn, or of another kind.
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
                return header, {
                    name: _read_column(archive, member, name, dtypes[name])
                    for name, member in members.items()
                }
    except NotWholeError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such recording") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {reason_of(error)}") from error
    except _TORN as error:
        raise NotWholeError("the archive is torn") from error


def _check_end(content: IO[bytes]) -> None:
    """Raise NotWholeError unless the archive ends with a small directory and no comment."""
    size = content.seek(0, os.SEEK_END)
    content.seek(max(size - _END.size, 0))
    tail = content.read()
    if len(tail) < _END.size:
        raise NotWholeError("it is not a zip archive")
    signature, _, _, _, members, directory, _, comment = _END.unpack(tail)
    if signature != b"PK\5\6" or comment:
        raise NotWholeError("it is not a zip archive, or is torn")
    if members > MOST_MEMBERS or directory > 2**16:
        raise NotWholeError(f"it has {members} members; a recording has at most {MOST_MEMBERS}")


def _members(
    archive: zipfile.ZipFile, file_bytes: int, dtypes: Mapping[str, np.dtype[Any]]
) -> dict[str, zipfile.ZipInfo]:
    """Return the members by column; refuse impossible names and sizes."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename or name not in {"header", *dtypes}:
            raise NotWholeError(f"it holds {member.filename[:40]!r}, which no recording has")
        if name in found:
            raise NotWholeError(f"it holds {name} twice")
        if member.flag_bits & 1 or member.compress_type not in (_UNCOMPRESSED, _DEFLATED):
            raise NotWholeError(f"{name} is encrypted, or compressed in an unknown way")
        found[name] = member
    if "header" not in found:
        raise NotWholeError("header is missing")
    # Members that share bytes (an overlapping bomb) add up to more than the file.
    if sum(member.compress_size for member in found.values()) > file_bytes:
        raise NotWholeError("its members are larger than the file")
    inflated = sum(member.file_size for member in found.values())
    if inflated > SURE_BYTES + MOST_RATIO * file_bytes:
        raise NotWholeError(
            f"it would inflate from {file_bytes:,} to {inflated:,} bytes, as no recording does"
        )
    return found


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
    """Read one column, whose npy header must agree with the size of the member."""
    with archive.open(member) as content:
        try:
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError("another version of npy")
            shape, _, kind = np.lib.format.read_array_header_1_0(content)
        except Exception as error:  # NumPy evaluates it as a Python literal
            raise NotWholeError(f"{name} has no npy header of version 1.0") from error
        if kind != dtype or len(shape) != 1:
            raise NotWholeError(f"{name} is not a row of {dtype}")
        size = shape[0] * dtype.itemsize
        if not 0 <= size < member.file_size or member.file_size - size > 2**16:
            raise NotWholeError(f"{name} claims {shape[0]:,} values and has another size")
        column = np.frombuffer(bytearray(content.read(size)), dtype)
        if len(column) != shape[0] or content.read(1):  # reading to the end checks the checksum
            raise NotWholeError(f"{name} claims {shape[0]:,} values and has others")
    return column
