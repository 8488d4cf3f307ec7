"""Progress of a run: live lanes on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchbench.batching.progress import Progress, Watch


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
