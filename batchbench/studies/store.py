"""The folder of a sweep: finished cells, each written whole or not at all, under its digest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two sweeps in one folder are then up to whoever starts them
    fcntl = None  # type: ignore[assignment]

from batchbench.errors import UsageError
from batchbench.reports.result import Result, load_result, recording_files, to_json
from batchbench.studies.grid import Cell

_WRITING = ".writing-"


@dataclass(frozen=True)
class Store:
    """Cells that are finished, in ``cells/<digest>/`` of a sweep's folder.

    A cell that was served is a result's folder without tables and pictures, which ``batchbench
    report`` can add; one that could not be served holds ``failed.json`` with the reason.
    """

    folder: Path

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Hold the folder for one sweep at a time; what a killed one left half-written goes.

        Raises:
            UsageError: another sweep is at work there.
        """
        self._cells.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._cells, os.O_RDONLY) if fcntl else None
        try:
            if handle is not None:
                # The system lets go of it when the process ends, however that happens.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in [*self.folder.glob(f"{_WRITING}*"), *self._cells.glob(f"{_WRITING}*")]:
                shutil.rmtree(left, ignore_errors=True)
            yield self
        except BlockingIOError as error:
            raise UsageError(
                f"--output {self.folder}: another sweep is writing there; wait for it, or give "
                "another folder"
            ) from error
        finally:
            if handle is not None:
                os.close(handle)

    @property
    def _cells(self) -> Path:
        return self.folder / "cells"

    def __len__(self) -> int:
        """Number of cells, of whichever grids."""
        return sum(not place.name.startswith(".") for place in self._cells.glob("*"))

    def place(self, cell: Cell) -> Path:
        """Where the cell is kept once it is finished."""
        return self._cells / cell.digest

    def holds(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return cell.experiment is not None and self.place(cell).is_dir()

    def failure(self, cell: Cell) -> str | None:
        """Why the cell could not be served, if so."""
        file = self.place(cell) / "failed.json"
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: is not readable; remove {file.parent}") from error

    def load(self, cell: Cell) -> Result:
        """The result of a cell that was served."""
        try:
            return load_result(self.place(cell))
        except UsageError as error:
            raise UsageError(
                f"{error}; remove {self.place(cell)} to have the cell run again"
            ) from error

    def keep(self, cell: Cell, result: Result) -> None:
        """Keep a result with its recordings."""
        self._keep(
            cell, {"result.json": to_json(result).encode(), **recording_files(result.recordings)}
        )

    def keep_failure(self, cell: Cell, reason: str) -> None:
        """Keep the reason why a cell cannot be served."""
        assert cell.experiment is not None
        told = {"reason": reason, "config": cell.experiment.config()}
        self._keep(cell, {"failed.json": json.dumps(told, indent=2).encode() + b"\n"})

    def forget_failure(self, cell: Cell) -> None:
        """So that the cell is tried again."""
        if self.holds(cell) and self.failure(cell) is not None:
            shutil.rmtree(self.place(cell))

    def _keep(self, cell: Cell, contents: Mapping[str, bytes]) -> None:
        """On the disk to the last byte before the folder gets the name that says it is whole."""
        try:
            staging = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self._cells))
            staging.chmod(0o755)  # mkdtemp's are for nobody else
            for name, content in contents.items():
                file = staging / name
                file.parent.mkdir(exist_ok=True)
                with file.open("wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
            for folder in {(staging / name).parent for name in contents} | {staging}:
                _settle(folder)
            staging.rename(self.place(cell))
            _settle(self._cells)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UsageError(f"--output {self.folder}: cannot be written: {why}") from error


def _settle(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that for folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
