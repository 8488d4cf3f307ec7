"""Progress of a study of many runs: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from batchbench.batching.progress import Progress, Watch
from batchbench.reports.text import spell_option, spell_time
from batchbench.studies.capacity.probe import CapacityWatch, Probe
from batchbench.studies.gate.duet import TurnsWatch
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


class PlainDisplay(Watch):
    """A line for each thing that begins or ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._trials = 1

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to restore."""

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def phase(self, name: str) -> None:
        self._console.print(f"{name} …", highlight=False)

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self._trials = trials

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        self._console.print(
            f"trial {trial + 1}/{self._trials}  {strategy:<12} {duration_ns / 1e9:.3g} s",
            highlight=False,
            markup=False,
        )


class LiveDisplay(Watch):
    """A lane for each strategy: slots in use, progress over requests, tokens/s now."""

    def __init__(self, console: Console, strategies: tuple[str, ...], trials: int) -> None:
        self._console, self._strategies, self._trials = console, strategies, trials
        self._phase = ""
        self._lanes: dict[str, Progress] = {}
        self._rates: dict[str, _Rate] = {}
        self._trial = dict.fromkeys(strategies, 0)
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def phase(self, name: str) -> None:
        self._phase = f"{name} …"
        self._draw()

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self._phase = ""
        self._trial[strategy] = trial + 1
        self._rates[strategy] = _Rate()

    def progressed(self, progress: Progress) -> None:
        self._lanes[progress.strategy] = progress
        # Ten pictures a second: drawing is host time that the measurement pays for.
        if time.monotonic() - self._drawn > 0.1:
            self._rates[progress.strategy].update(progress)
            self._draw()

    def idles(self, progress: Progress) -> None:
        self.progressed(progress)

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        self._lanes[strategy].now_ns = duration_ns
        self._lanes[strategy].idle_until_ns = None
        self._lanes[strategy].slots_in_use = 0
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True, max_width=20)
        for _ in range(2):
            grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=8)
        for _ in range(2):
            grid.add_column(no_wrap=True, justify="right")
        for name in self._strategies:
            if name in self._lanes:
                grid.add_row(*self._lane(name))
        self._live.update(Group(grid, Text(self._phase, style="dim")), refresh=True)

    def _lane(self, name: str) -> list[Text | ProgressBar]:
        lane = self._lanes[name]
        in_use = Text(_slots(lane.slots_in_use, lane.slots), style="cyan")
        idle = lane.idle_until_ns
        rate = self._rates[name].per_second or lane.tokens / max(lane.now_ns / 1e9, 1e-9)
        return [
            Text(name, style="bold"),
            Text(f"trial {self._trial[name]}/{self._trials}"),
            in_use,
            ProgressBar(total=lane.requests, completed=lane.done),
            Text(f"{lane.done}/{lane.requests}"),
            Text(f"{rate:,.0f} tok/s" if idle is None else f"idle to {idle / 1e9:,.1f} s"),
        ]


class _Rate:
    """Tokens a second since the last look, at least a quarter of a second ago."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._tokens, self._ns = 0, 0

    def update(self, progress: Progress) -> None:
        passed = progress.now_ns - self._ns
        if passed > 250_000_000:
            self.per_second = (progress.tokens - self._tokens) / (passed / 1e9)
            self._tokens, self._ns = progress.tokens, progress.now_ns


def _slots(used: int, slots: int) -> str:
    """Slots as squares, or as numbers where there are too many."""
    if slots > 16:
        return f"{used:>4}/{slots} slots"
    return "■" * used + "□" * (slots - used)


def make_display(
    strategies: tuple[str, ...], trials: int, *, quiet: bool
) -> PlainDisplay | LiveDisplay:
    """The display that suits standard error; silent where asked."""
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal and not quiet:
        return LiveDisplay(Console(stderr=True), strategies, trials)
    return PlainDisplay(console)


class TurnsDisplay(TurnsWatch):
    """Says what was measured after each pair of processes, and what can be told so far.

    On a terminal a line beneath says what is going on; elsewhere there are only the others.
    """

    def __init__(self, console: Console, max_time: float) -> None:
        self._console, self._max_time = console, max_time
        self._began = time.monotonic()
        self._status = _status(console) if console.is_terminal else None

    def __enter__(self) -> TurnsDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def begins(self, what: str) -> None:
        """What is going on from now on."""
        if self._status:
            spent = time.monotonic() - self._began
            self._status.update(f"{what} · {spell_time(spent)} of {spell_time(self._max_time)}")

    def measured(self, label: str, what: str) -> None:
        """A measurement, or the decisions so far."""
        line = f"{label:<12} {what}".rstrip()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _status(console: Console) -> Status:
    return Status("", console=console, spinner="line" if console.options.ascii_only else "dots")


def make_turns_display(max_time: float, *, quiet: bool) -> TurnsDisplay:
    """The display that suits standard error; silent where asked."""
    return TurnsDisplay(make_console(quiet=quiet), max_time)
