"""Open and read the files and pipes that a user names; a pipe can be read only once."""

from __future__ import annotations

import io
import os
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO, cast

from batchbench.errors import UsageError
from batchbench.files import reason_of

PATIENCE_S = 0.5
"""Seconds to wait for the writer of a pipe."""

MIB = 2**20
_BUFFER = 2**16


def open_binary(file: Path, where: str, limit: int | None = None) -> BinaryIO:
    """Open a file or pipe for reading bytes; skip a byte-order mark at its beginning.

    Args:
        where: the option and the file; each message begins with it.
        limit: largest number of bytes to read, even if its size is unknown.

    Raises:
        UsageError: it cannot be opened or read, or is too long; later reads may raise this too.
    """
    try:
        # Not blocking, since the opening of a pipe would wait for its writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(file, flags)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {reason_of(error)}") from error
    source = _Source(handle, where, limit)
    try:
        source.begin()
        content = io.BufferedReader(source, _BUFFER)
        # Look ahead, since a pipe cannot go back.
        if content.peek(3)[:3] == b"\xef\xbb\xbf":
            content.read(3)
    except BaseException:
        source.close()
        raise
    return cast(BinaryIO, content)


def read_binary(file: Path, where: str, limit: int) -> bytes:
    """Read a whole file or pipe; skip a byte-order mark at its beginning.

    Raises:
        UsageError: it cannot be read, or is longer than ``limit`` bytes.
    """
    with open_binary(file, where, limit) as content:
        return content.read()


class _Source(io.RawIOBase):
    """An open file, read up to a limit; errors of reading are :class:`UsageError`."""

    def __init__(self, handle: int, where: str, limit: int | None) -> None:
        self._handle, self._where, self._limit = handle, where, limit
        self._first, self._count = b"", 0

    def begin(self) -> None:
        """Refuse folders and long files, and wait for the writer of a pipe."""
        status = os.fstat(self._handle)
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{self._where}: is a directory; give a file")
        if stat.S_ISREG(status.st_mode):
            self._check_length(status.st_size)
        if stat.S_ISFIFO(status.st_mode):
            self._first = self._await_writer()
        if hasattr(os, "set_blocking"):
            os.set_blocking(self._handle, True)

    def _await_writer(self) -> bytes:
        """Return the content of the pipe; nothing if its writer has written nothing yet."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                first = os.read(self._handle, _BUFFER)
            except BlockingIOError:
                return b""
            if first:
                return first
            if time.monotonic() >= until:
                raise UsageError(f"{self._where}: is a pipe to which nobody writes; give a file")
            time.sleep(0.01)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes into the buffer; 0 at the end."""
        place = memoryview(buffer).cast("B")
        if self._first:
            part, self._first = self._first[: len(place)], self._first[len(place) :]
        else:
            try:
                part = os.read(self._handle, len(place))
            except OSError as error:
                raise UsageError(f"{self._where}: {reason_of(error)}") from error
        place[: len(part)] = part
        self._count += len(part)
        self._check_length(self._count)
        return len(part)

    def _check_length(self, length: int) -> None:
        if self._limit is not None and length > self._limit:
            most = f"{self._limit / MIB:g} MiB" if self._limit >= MIB else f"{self._limit:,} bytes"
            raise UsageError(f"{self._where}: is longer than {most}; give a smaller file")

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


def check_there(file: Path, where: str) -> None:
    """Raise :class:`UsageError` if there is no such file; do not open it."""
    try:
        if file.is_dir():
            raise UsageError(f"{where}: is a directory; give a file")
        if not file.exists():
            raise UsageError(f"{where}: no such file or directory")
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {reason_of(error)}") from error
