"""Opening what a user names: a file, or a pipe, which can be read only once."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from batchbench.errors import UsageError


def open_binary(file: Path, where: str) -> BinaryIO:
    """The file, opened for reading bytes; a byte-order mark at its beginning is passed over.

    Raises:
        UsageError: it cannot be opened; the message begins with ``where``.
    """
    try:
        content = file.open("rb")
        # Looking ahead, for a pipe cannot go back.
        if content.peek(3)[:3] == b"\xef\xbb\xbf":
            content.read(3)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{where}: {why.lower()}") from error
    return content


def check_there(file: Path, where: str) -> None:
    """Raise :class:`UsageError` where there is nothing to read; reads nothing of it."""
    try:
        if file.is_dir():
            raise UsageError(f"{where}: is a directory; give a file")
        if not file.exists():
            raise UsageError(f"{where}: no such file or directory")
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
