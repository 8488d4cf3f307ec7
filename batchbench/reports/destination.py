"""Where a result goes: named, and checked before the first measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.files import check_place


def default_folders(model: str, study: str = "") -> Iterator[Path]:
    """Yield ``batchbench-results/<time>-<model>``, then the same with 2, 3, … at the end.

    Args:
        model: name of the model, shown with ``/`` as ``--``.
        study: the kind of study, which goes between the two; empty for a plain run.
    """
    parts = (f"{datetime.now():%Y%m%d-%H%M%S}", study, model.replace("/", "--"))
    name = "-".join(part for part in parts if part)
    number = 1
    while True:
        yield Path("batchbench-results") / (name if number == 1 else f"{name}-{number}")
        number += 1


def check_folder(folder: Path, *, overwrite: bool, marker: str = "result.json") -> None:
    """Check that a result can be written to a folder; leave nothing behind.

    Args:
        marker: the file that shows that a folder holds a result.

    Raises:
        UsageError: it cannot be written, or holds a result and ``overwrite`` is not given.
    """
    check_place(folder / marker, f"--output {folder}")
    if (folder / marker).exists() and not overwrite:
        raise UsageError(f"--output {folder}: holds a result; give another folder or --overwrite")


def check_files(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Check that files of these names can be written in a folder; leave nothing behind.

    Raises:
        UsageError: they cannot be written, or one is there and ``overwrite`` is not given.
    """
    for file in (folder / name for name in names):
        check_place(file, str(file))
        if file.exists() and not (overwrite and file.is_file()):
            raise UsageError(f"{file}: is there already; give another name or --overwrite")


def check_file(file: Path, option: str) -> None:
    """Check that a file that an option names can be written.

    Raises:
        UsageError: it cannot be written.
    """
    check_place(file, f"{option} {file}")
    if file.exists() and not file.is_file():
        what = "is a directory" if file.is_dir() else "is no file"
        raise UsageError(f"{option} {file}: {what}; give a file, such as report.html")
