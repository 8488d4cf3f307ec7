"""Progress on standard error: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import mean
from typing import Any

from rich import progress as bars
from rich.console import Console

from batchbench.batching.progress import Progress
from batchbench.cli import output
from batchbench.reports.text import number, plural, spell_option, spell_time
from batchbench.studies.capacity.search import CapacityWatch, Probe
from batchbench.studies.gate.duet import TurnsWatch
from batchbench.studies.sweep.grid import Cell
from batchbench.studies.sweep.run import SweepWatch

TICK_S = 1.0
"""Time between two updates of a wait on a terminal."""

REDRAW_S = 0.1
"""Time between two drawings, which take host time from the measurement."""

PHASES = {
    "loading": "loading the model (a few seconds; a minute for billions of parameters)",
    "warming up": "warming up until times settle (2 to 10 short rounds)",
    "loading torch and timing a matrix product": "loading torch and timing a matrix product "
    "(5 to 15 s)",
    "measuring memory": "measuring memory bandwidth (about a second)",
    "verifying": "verifying outputs against unbatched generation (about as long as a trial)",
}
"""Phases of a run, each with what it does and about how long it takes."""


class PlainDisplay(SweepWatch, CapacityWatch, TurnsWatch):
    """Lines for a log: the start and end of each activity, and progress during long waits.

    Args:
        strategies: number of strategies; 0 to print no line about each trial.
        varying: options by which cells of a sweep differ.
        price_per_hour: price of a machine that runs cells of a sweep.
        max_time: seconds that a comparison in turns may take; 0 if there is no limit.
    """

    def __init__(
        self,
        console: Console,
        strategies: int = 0,
        varying: Sequence[str] = (),
        price_per_hour: float | None = None,
        max_time: float = 0.0,
    ) -> None:
        self._console, self._varying, self._max_time = console, varying, max_time
        self._price, self._machine_s, self._machines = price_per_hour, 0.0, 0
        self._nodes: Sequence[str] = ()  # of the cells that run elsewhere
        self._strategies = strategies
        self._trial, self._trials = 0, 1
        self._seconds: list[float] = []  # of each finished trial
        self._notes: set[str] = set()
        self._cell, self._done, self._cells = "", 0, 0
        self._names: dict[str, str] = {}  # of the cells that run, by their digests
        self._ran = ""
        now = time.monotonic()
        self._made = self._began = self._cell_began = self._printed = self._counted = now
        self._waiting = ExitStack()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_wait()

    def note(self, line: str) -> None:
        if line not in self._notes:  # every cell and probe repeats those of its model
            self._notes.add(line)
            self._print(line)

    def phase(self, name: str) -> None:
        if not self._cell:
            self._print(f"{PHASES.get(name, name)} …")
        self._wait_for(name)

    def _wait_for(self, name: str) -> None:
        self._end_wait()
        if not self._console.quiet:
            self._waiting.enter_context(output.reminding(name, self._console.print))

    def _end_wait(self) -> None:
        self._waiting.close()

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self._end_wait()
        self._trial, self._trials, self._began = trial + 1, trials, time.monotonic()

    def progressed(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - max(self._printed, self._began) < output.SILENCE_S:
            return
        left = (now - self._began) * (progress.requests / max(progress.done, 1) - 1)
        about = f", about {spell_time(left)} left" if progress.done else ""
        where = f"{self._cell}: " if self._cell else ""
        trial = f"trial {self._trial}/{self._trials}  {progress.strategy}"
        self._print(f"{where}{trial}  {progress.done}/{progress.requests} requests{about}")

    def idles(self, progress: Progress) -> None:
        self.progressed(progress)

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        self._seconds.append(time.monotonic() - self._began)
        if self._strategies and not self._cell:
            left = self._strategies * self._trials - len(self._seconds)
            left_s = max(left, 0) * mean(self._seconds)
            about = f", about {spell_time(left_s)} left" if left_s > 2 else ""
            name = f"trial {trial + 1}/{self._trials}  {strategy:<12}"
            self._print(f"{name} {duration_ns / 1e9:.3g} s{about}")

    def cells_begin(self, cells: int, kept: int) -> None:
        self._done, self._cells = kept, cells
        if kept:
            rest = f"{cells - kept} to do" if cells > kept else "nothing to run"
            self._print(f"{kept} of {cells} cells are finished already; {rest}")

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        options = [spell_option(name, cell.chosen[name]) for name in self._varying]
        self._cell = f"cell {number}/{cells}  {', '.join(options) or 'the only one'}"
        self._names[cell.digest], self._cell_began = self._cell, time.monotonic()

    def cells_run(self, nodes: Sequence[str], machines: int) -> None:
        self._machine_s += self._machines * (time.monotonic() - self._counted)
        self._nodes, self._machines, self._counted = nodes, machines, time.monotonic()
        if nodes and self._counted - self._printed > output.SILENCE_S:
            self._print(f"{self._done}/{self._cells} cells done{self._elsewhere()}")

    def _elsewhere(self) -> str:
        """Return where cells run now, and what the machines have cost so far."""
        counts = Counter(self._nodes)
        nodes = [f"{count} on {node}" for node, count in counts.items() if node != "queued"]
        running = f", running {', '.join(nodes)}" if nodes else ""
        queued = f", {counts['queued']} queued" if counts["queued"] else ""
        if self._price is None:
            return running + queued
        seconds = self._machine_s + self._machines * (time.monotonic() - self._counted)
        return f"{running}{queued}, cost {number(self._price * seconds / 3600)} so far"

    def cell_ran(self, cell: Cell, node: str, seconds: float) -> None:
        self._ran = f"{spell_time(seconds)} on {node}"

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        self._end_wait()
        self._done += 1
        took = self._ran or spell_time(time.monotonic() - self._cell_began)
        done = f", {self._done}/{self._cells} done" if self._ran else ""
        left = f", about {spell_time(left_s)} left" if left_s else ""
        outcome = f"failed: {reason}" if reason else took
        self._print(f"{self._names.pop(cell.digest)}: {outcome}{done}{left}{self._elsewhere()}")
        self._cell = self._ran = ""

    def probe_ends(self, probe: Probe) -> None:
        count = len(probe.trials)
        self._print(
            f"{probe.strategy:<12} {probe.rate:>9.4g} req/s  {100 * probe.attainment.value:5.1f} % "
            f"within, {plural(count, 'trial')}: {probe.verdict}"
        )

    def begins(self, what: str) -> None:
        if self._printed == self._made:
            most = f", at most {spell_time(self._max_time)} in all" if self._max_time else ""
            self._print(f"{what}{most} …")
        self._wait_for(what)

    def measured(self, label: str, what: str) -> None:
        self._print(f"{label:<12} {what}".rstrip())

    def _print(self, line: str) -> None:
        self._end_wait()
        self._printed = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveDisplay(PlainDisplay):
    """Bars on a terminal: one for each strategy, one for the cells of a sweep."""

    def __init__(self, console: Console, strategies: int = 0, **known: Any) -> None:
        super().__init__(console, **known)
        text = bars.TextColumn
        self._bars = bars.Progress(
            text("[bold]{task.description}"),
            text("{task.fields[trial]}"),
            text("[cyan]{task.fields[slots]}"),
            bars.BarColumn(bar_width=None),
            text("{task.fields[status]}", justify="right"),
            console=console,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._tasks: dict[str, bars.TaskID] = {}
        self._phase, self._drawn = "", 0.0

    def __enter__(self) -> LiveDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._bars.stop()

    def _set(self, name: str, done: int, total: int | None, **fields: Any) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, trial="", slots="", status="")
        self._bars.update(self._tasks[name], completed=done, total=total, **fields)
        self._drawn = time.monotonic()
        self._bars.refresh()

    def _remove(self, name: str) -> None:
        with suppress(KeyError):
            self._bars.remove_task(self._tasks.pop(name))

    def phase(self, name: str) -> None:
        self._remove(self._phase)
        self._phase = f"{name} …"
        self._set(self._phase, 0, None)
        self._end_wait()
        self._waiting.enter_context(output.reminding(name, self._tick, TICK_S))

    def _tick(self, line: str) -> None:
        if self._phase in self._tasks:
            self._set(self._phase, 0, None, status=line.rpartition(", ")[2])

    def begins(self, what: str) -> None:
        self.phase(what)

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        super().trial_begins(strategy, trial, trials)
        self._remove(self._phase)

    def progressed(self, progress: Progress) -> None:
        if time.monotonic() - self._drawn < REDRAW_S:
            return
        status = f"{progress.tokens / max(progress.now_ns / 1e9, 1e-9):,.0f} tok/s"
        used, slots = progress.slots_in_use, progress.slots
        if progress.idle_until_ns is not None:
            status = f"idle to {progress.idle_until_ns / 1e9:,.1f} s"
        self._set(
            progress.strategy,
            progress.done,
            progress.requests,
            trial=f"trial {self._trial}/{self._trials}",
            slots=f"{used:>4}/{slots} slots" if slots > 16 else "■" * used + "□" * (slots - used),
            status=f"{progress.done}/{progress.requests} {status}",
        )

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        super().trial_ends(strategy, trial, duration_ns)
        if strategy in self._tasks:
            task, status = self._tasks[strategy], f"{duration_ns / 1e9:.3g} s"
            total = self._bars.tasks[self._bars.task_ids.index(task)].total
            self._bars.update(task, completed=total, slots="", status=status)
            self._bars.refresh()

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        super().cell_begins(number, cells, cell)
        self._set("cells", self._done, cells, trial=f"{number}/{cells}")

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        super().cell_ends(cell, reason, left_s)
        left = f"about {spell_time(left_s)} left" if left_s else ""
        self._set("cells", self._done, self._cells, status=left)


def make_display(*, quiet: bool, **known: Any) -> PlainDisplay:
    """Return the :class:`PlainDisplay` for the kind of standard error, silent if ``quiet``."""
    console = Console(stderr=True, quiet=quiet)
    live = sys.stderr.isatty() and not console.is_dumb_terminal and not quiet
    return (LiveDisplay if live else PlainDisplay)(console, **known)
