"""Open, check and write files that users name; each is written whole or not at all.

Content is written to a hidden path beside its target and moved there in one step, together with
parent folders that are missing. A process that ends at any moment, by Ctrl-C, SIGKILL or a full
disk, leaves the old content or the new, and no empty folder.

All functions raise UsageError, with the option or the file in the message, unless they say
otherwise. Their argument ``named`` or ``where`` is the beginning of the message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import select
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import BinaryIO

from batchbench.errors import UsageError

Content = bytes | str | Iterable[bytes]
"""Content of a file; text is written as UTF-8 whatever the locale."""

STAGING = ".writing-"
"""Prefix of hidden paths whose content is not complete."""

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask the program to stop."""


PATIENCE_S = 0.5
"""Seconds to wait for the writer of a pipe."""

MIB = 2**20

_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


class ClaimedError(UsageError):
    """Another process writes to the place."""


def reason_of(error: OSError | ValueError) -> str:
    """Return the system's reason; a name that holds a null character is a ValueError."""
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signals that ask the program to stop, and deliver the first at the end.

    Python runs signal handlers only in the main thread; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


@contextmanager
def claimed(place: Path, named: str) -> Iterator[None]:
    """Keep other processes of this machine from writing to ``place`` until the block ends.

    The claim is a lock on a file in the folder for temporary files. The system releases it however
    the process ends, so a killed run never blocks another.
    """
    from filelock import FileLock, Timeout  # its import takes 60 ms

    user = os.getuid() if hasattr(os, "getuid") else ""
    try:
        locks = Path(tempfile.gettempdir()) / f"batchbench-locks-{user}"
        locks.mkdir(mode=0o700, exist_ok=True)
        lock = FileLock(locks / _digest(place))
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ClaimedError(
            f"{named}: another batchbench is writing there; wait for it, or give another name"
        ) from error
    except OSError:  # No folder for temporary files: the final move still replaces no result.
        yield
        return
    try:
        pattern = f"{_staging_prefix(place)}*"  # half-written files of killed processes
        for leftover in [*_topmost_missing(place).parent.glob(pattern), *place.glob(pattern)]:
            _remove(leftover)
        yield
    finally:
        _remove(Path(lock.lock_file))  # Windows keeps an open file
        lock.release()


@contextmanager
def replacing(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a hidden path to write to, and move it to ``target`` if the block succeeds.

    Folders that are missing above the target appear in the same move. With ``folder``, the hidden
    path is a folder that exists, and no folder with content is replaced. Raises OSError.
    """
    top = _topmost_missing(target)
    staging = top.parent / f"{_staging_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}"
    inner = staging / target.relative_to(top)
    try:
        (inner if folder else inner.parent).mkdir(parents=True, exist_ok=True)
        yield inner
        try:
            os.replace(staging, top)
        except OSError as error:
            if top == target or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            target.parent.mkdir(parents=True, exist_ok=True)  # another process made a parent
            os.replace(inner, target)
    finally:
        _remove(staging)


def write_whole(
    folder: Path,
    contents: Mapping[str, bytes | str],
    stale: Collection[str] = (),
    *,
    durable: bool = False,
) -> list[Path]:
    """Write the files of a result into a folder; return their paths.

    A missing folder appears with all files in one move. In a folder that exists, the old first
    file is removed before anything else and the new one comes last, so that it only ever stands
    beside its own files.

    Args:
        contents: files by name; the first tells readers that the others are there.
        stale: files and folders of an older result to remove.
        durable: wait until a power cut could lose nothing, about 10 ms per file.
    """
    try:
        with undisturbed():
            if os.path.lexists(folder):
                _write_within(folder, contents, stale, durable=durable)
            else:
                with replacing(folder, folder=True) as staging:
                    _fill(staging, contents, durable=durable)
                if durable:
                    _sync(folder.parent)
    except OSError as error:
        taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        why = "another run wrote there meanwhile" if taken else reason_of(error)
        raise UsageError(f"--output {folder}: cannot be written: {why}") from error
    return [folder / name for name in contents]


def write_file(file: Path, content: Content) -> None:
    """Write a file whole or not at all."""
    try:
        with undisturbed(), replacing(file) as staging:
            _write(staging, content)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {reason_of(error)}") from error


def _write_within(
    folder: Path, contents: Mapping[str, bytes | str], stale: Collection[str], *, durable: bool
) -> None:
    staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(folder), dir=folder))
    first = next(iter(contents))
    try:
        _fill(staging, contents, durable=durable)
        (folder / first).unlink(missing_ok=True)
        for name in stale:
            _remove(folder / name)
        for name in sorted(contents, key=lambda name: name == first):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
    finally:
        _remove(staging)


def _fill(staging: Path, contents: Mapping[str, bytes | str], *, durable: bool) -> None:
    for name, content in contents.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        _write(staging / name, content)
    for path in [*staging.rglob("*"), staging] if durable else ():
        _sync(path)


def _write(file: Path, content: Content) -> None:
    if isinstance(content, str):
        # The name of a file may hold bytes that are not text.
        content = content.encode("utf-8", "backslashreplace")
    with file.open("wb") as out:
        out.writelines([content] if isinstance(content, bytes) else content)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX can do this for folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _topmost_missing(target: Path) -> Path:
    """Return the target, or the topmost missing folder above it."""
    while not os.path.lexists(target.parent):
        target = target.parent
    return target


def _staging_prefix(target: Path) -> str:
    return f"{STAGING}{_digest(target)[:12]}-"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def default_folders(model: str, study: str = "") -> Iterator[Path]:
    """Yield ``batchbench-results/<time>-<model>``, then the same with 2, 3, … at the end.

    Characters that some system forbids in the name of a file become ``--``. The name of a ``study``
    stands before the model's.
    """
    model = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "--", model).rstrip(". ")
    name = "-".join(filter(None, (f"{datetime.now():%Y%m%d-%H%M%S}", study, model)))
    yield Path("batchbench-results") / name
    yield from (Path("batchbench-results") / f"{name}-{number}" for number in count(2))


def cache_folder() -> Path:
    """Return the folder for files that can be made again; RuntimeError if there is no home."""
    if folder := os.environ.get("BATCHBENCH_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchbench"


# Checks before anything is written


def check_place(place: Path, named: str) -> None:
    """Check that a file or folder of this name can be made; leave nothing behind."""
    top = _topmost_missing(place)
    try:
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                return
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=top.parent) as trial:
            (Path(trial) / place.relative_to(top.parent)).mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{named}: cannot be written: {reason_of(error)}; give another place"
        ) from error


def check_folder(folder: Path, *, overwrite: bool, marker: str = "result.json") -> None:
    """Check that a result can be written to a folder; ``marker`` is a file of every result."""
    check_place(folder / marker, f"--output {folder}")
    if (folder / marker).exists() and not overwrite:
        raise UsageError(f"--output {folder}: holds a result; give another folder or --overwrite")


def check_files(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Check that files of these names can be written in a folder."""
    for file in (folder / name for name in names):
        check_place(file, str(file))
        if file.exists() and not (overwrite and file.is_file()):
            raise UsageError(f"{file}: already exists; give another name or --overwrite")


def check_file(file: Path, option: str) -> None:
    """Check that the file of an option can be written."""
    if os.path.exists(file) and not os.path.isfile(file):  # Path.exists fails on a long name
        what = "is a directory" if file.is_dir() else "is not a file"
        raise UsageError(f"{option} {file}: {what}; give a file, such as report.html")
    check_place(file, f"{option} {file}")


# Reading


def open_binary(file: Path, where: str) -> BinaryIO:
    """Open a file, or a pipe that a process writes to, for reading bytes."""
    try:
        content = open(file, "rb", opener=_open_at_once)  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {reason_of(error)}") from error
    handle = content.fileno()
    is_pipe = stat.S_ISFIFO(os.fstat(handle).st_mode)
    if is_pipe and not select.select([handle], [], [], PATIENCE_S)[0]:
        with suppress(BlockingIOError):  # a process has it open, and has written nothing yet
            os.read(handle, 1)
            content.close()
            raise UsageError(f"{where}: is a pipe that no process writes to; give a file")
    if hasattr(os, "set_blocking"):  # Windows opens a file as it is asked
        os.set_blocking(handle, True)
    return content


def _open_at_once(name: str, flags: int) -> int:
    """Open a file without blocking, since opening a pipe would wait for its writer."""
    return os.open(name, flags | _AT_ONCE)


def read_binary(file: Path, where: str, limit: int) -> bytes:
    """Read a whole file or pipe of at most ``limit`` bytes; skip a byte-order mark."""
    try:
        with open_binary(file, where) as content:
            status, data = os.fstat(content.fileno()), b""
            if status.st_size <= limit:
                data = content.read(-1 if stat.S_ISREG(status.st_mode) else limit + 1)
    except OSError as error:
        raise UsageError(f"{where}: {reason_of(error)}") from error
    if max(status.st_size, len(data)) > limit:
        most = f"{limit / MIB:g} MiB" if limit >= MIB else f"{limit:,} bytes"
        raise UsageError(f"{where}: is longer than {most}; give a smaller file")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_utf8(file: Path, where: str, limit: int) -> str:
    """Read a whole file or pipe of UTF-8 text, as :func:`read_binary` does."""
    try:
        return read_binary(file, where, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text; save it as UTF-8") from error


def check_there(file: Path, where: str) -> None:
    """Check that a file exists; do not open it."""
    try:
        is_folder = stat.S_ISDIR(file.stat().st_mode)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {reason_of(error)}") from error
    if is_folder:
        raise UsageError(f"{where}: is a directory; give a file")
