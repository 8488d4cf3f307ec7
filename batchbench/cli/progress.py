"""Progress of a study of many runs: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchbench.batching.progress import Progress
from batchbench.reports.text import spell_option, spell_time
from batchbench.studies.bench import CapacityWatch, Probe
from batchbench.studies.sweep.grid import Cell
from batchbench.studies.sweep.run import Asked, SweepWatch


class PlainSweep(SweepWatch):
    """A line a finished cell; in between, silence."""

    def __init__(self, console: Console, grid: Asked) -> None:
        self._console, self._grid = console, grid
        self._told: set[str] = set()
        self._number = self._cells = 0
        self._began = 0.0

    def __enter__(self) -> PlainSweep:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to restore."""

    def note(self, line: str) -> None:
        if line not in self._told:  # every cell says where its model is from
            self._told.add(line)
            self._print(line)

    def cells_begin(self, cells: int, kept: int) -> None:
        if kept:
            still = f"{cells - kept} to do" if cells > kept else "nothing to do but the report"
            self._print(f"{kept} of {cells} cells are finished already; {still}")

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        self._number, self._cells, self._began = number, cells, time.monotonic()

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        spent = spell_time(time.monotonic() - self._began)
        came = f"failed: {reason}" if reason else spent
        left = "" if not left_s else f", about {spell_time(left_s)} left"
        self._print(f"cell {self._number}/{self._cells}  {self._name(cell)}: {came}{left}")

    def _name(self, cell: Cell) -> str:
        names = self._grid.varying
        told = ", ".join(spell_option(name, cell.chosen[name]) for name in names)
        return told or "the one cell"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveSweep(PlainSweep):
    """The plain lines scroll by above a bar: cells, time left, and what is served now."""

    def __init__(self, console: Console, grid: Asked) -> None:
        super().__init__(console, grid)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._cell = self._doing = ""
        self._left_s: float | None = None
        self._drawn = 0.0

    def __enter__(self) -> LiveSweep:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def phase(self, name: str) -> None:
        self._doing = f"{name} …"
        self._draw()

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        super().cell_begins(number, cells, cell)
        self._cell = self._name(cell)
        self._draw()

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        super().cell_ends(cell, reason, left_s)
        self._left_s = left_s
        self._draw()

    def progressed(self, progress: Progress) -> None:
        # As for one run, ten pictures a second: drawing is host time that the measurement pays for.
        if time.monotonic() - self._drawn > 0.1:
            self._doing = (
                f"{progress.strategy}, trial {progress.trial + 1}: "
                f"{progress.done}/{progress.requests} requests"
            )
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True, justify="right")
        left = "" if not self._left_s else f"about {spell_time(self._left_s)} left"
        bar = ProgressBar(total=max(self._cells, 1), completed=max(self._number - 1, 0))
        grid.add_row(Text(f"cell {self._number}/{self._cells}", style="bold"), bar, left)
        lines = Table.grid()
        lines.add_row(grid)
        lines.add_row(Text(f"{self._cell}: {self._doing}", style="dim", overflow="ellipsis"))
        self._live.update(lines, refresh=True)


def make_sweep_display(grid: Asked, *, quiet: bool) -> PlainSweep:
    """The display that suits standard error; silent where asked."""
    console = make_console(quiet=quiet)
    if sys.stderr.isatty() and not console.is_dumb_terminal and not quiet:
        return LiveSweep(console, grid)
    return PlainSweep(console, grid)


class CapacityDisplay(CapacityWatch):
    """A line a verdict."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()

    def note(self, line: str) -> None:
        if line not in self._told:  # every probe makes its workload
            self._told.add(line)
            self._print(line)

    def phase(self, name: str) -> None:
        self._print(f"{name} …")

    def probe_ends(self, probe: Probe) -> None:
        count = len(probe.trials)
        self._print(
            f"{probe.strategy:<12} {probe.rate:>9.4g} req/s  {100 * probe.attainment.value:5.1f} % "
            f"within, {count} trial{'s' * (count > 1)}: {probe.verdict}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_console(*, quiet: bool) -> Console:
    """Standard error; silent where asked."""
    return Console(stderr=True, quiet=quiet)
