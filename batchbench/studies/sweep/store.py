"""The folder of a sweep: finished cells, each written whole or not at all, under its digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.files import STAGING, write_whole
from batchbench.json_file import read_json
from batchbench.reports.result import Result, load_result, recording_files, to_json
from batchbench.studies.sweep.grid import Cell


@dataclass(frozen=True)
class Store:
    """Cells that are finished, in ``cells/<digest>/`` of a sweep's folder.

    A cell that was served is a result's folder without tables and pictures, which ``batchbench
    report`` can add; one that could not be served holds ``failed.json`` with the reason.
    """

    folder: Path

    def tidy(self) -> None:
        """Remove cells that a killed study left half-written; the folder must be claimed."""
        for leftover in self._cells.glob(f"{STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)

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
            return str(read_json(file)["reason"])
        except FileNotFoundError:
            return None
        except (OSError, UsageError, KeyError, TypeError) as error:
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
        self._keep(cell, {"result.json": to_json(result), **recording_files(result.recordings)})

    def keep_failure(self, cell: Cell, reason: str) -> None:
        """Keep the reason why a cell cannot be served."""
        assert cell.experiment is not None
        failure = {"reason": reason, "config": cell.experiment.config()}
        self._keep(cell, {"failed.json": json.dumps(failure, indent=2) + "\n"})

    def forget_failure(self, cell: Cell) -> None:
        """Forget a failure, so that the cell is tried again."""
        if self.holds(cell) and self.failure(cell) is not None:
            shutil.rmtree(self.place(cell))

    def _keep(self, cell: Cell, contents: Mapping[str, bytes | str]) -> None:
        try:
            write_whole(self.place(cell), contents, durable=True)
        except UsageError as error:
            raise UsageError(f"--output {self.folder}: {error}") from error
