"""Where a result goes: named, and checked before the first measurement."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
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
