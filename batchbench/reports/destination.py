"""Where a result goes: named, and checked before the first measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from batchbench.errors import UsageError


def default_folder(model: str, study: str = "") -> Path:
    """``batchbench-results/<time>-<model>``, with a number behind it where that is taken.

    A ``study`` that is no plain run stands between the two.
    """
    parts = (f"{datetime.now():%Y%m%d-%H%M%S}", study, model.replace("/", "--"))
    name = "-".join(part for part in parts if part)
    folder = Path("batchbench-results") / name
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def check_folder(folder: Path, *, overwrite: bool, marker: str = "result.json") -> list[Path]:
    """See that a result can be written there; the folders that were made for it, inmost first.

    Args:
        marker: the file by which a result is known.

    Raises:
        UsageError: it cannot be written, or holds a result and ``overwrite`` is not given.
    """
    if (folder / marker).exists() and not overwrite:
        raise UsageError(f"--output {folder}: holds a result; give another folder or --overwrite")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        remove_if_empty(made)
        raise UsageError(f"--output {folder}: cannot be written: {why}") from error
    return made


def remove_if_empty(folders: Sequence[Path]) -> None:
    """Take folders away in which nothing was written, inmost first."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_files(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """See that files of these names can be written in a folder; leaves nothing behind.

    Raises:
        UsageError: they cannot be written, or one is there and ``overwrite`` is not given.
    """
    for file in (folder / name for name in names):
        if file.exists() and not (overwrite and file.is_file()):
            raise UsageError(f"{file}: is there already; give another name or --overwrite")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder / names[0]}: cannot be written: {_why(error)}") from error
    finally:
        remove_if_empty(made)


def check_file(file: Path, option: str) -> None:
    """See that a file that an option names can be written, anew or again.

    Raises:
        UsageError: it cannot.
    """
    if file.exists() and not file.is_file():
        what = "is a directory" if file.is_dir() else "is no file"
        raise UsageError(f"{option} {file}: {what}; give a file, such as report.html")
    parent = next(path for path in file.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {file}: cannot be written into {parent}")


def write_files(folder: Path, contents: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Write files by their names, each whole or not at all.

    Raises:
        UsageError: one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        staging = folder / f".writing-{os.getpid()}-{name}"
        try:
            with staging.open("wb") as out:
                out.writelines([content] if isinstance(content, bytes) else content)
            os.replace(staging, folder / name)
        except OSError as error:
            raise UsageError(f"{folder / name}: cannot be written: {_why(error)}") from error
        finally:
            staging.unlink(missing_ok=True)


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
