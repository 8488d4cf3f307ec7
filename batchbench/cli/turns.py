"""Progress of a duet or a check, on standard error: a line for each process or pair of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from batchbench.cli.progress import make_console
from batchbench.reports.text import spell_time
from batchbench.studies.gate.duet import TurnsWatch
from batchbench.studies.gate.evidence import spell_share

if TYPE_CHECKING:
    from batchbench.reports.sequential import Decision


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
        """Something was measured of which nothing is decided yet."""
        line = f"{label:<12} {what}".rstrip()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def told(self, label: str, decisions: Mapping[str, Decision], fault: str | None) -> None:
        """What can be told so far: log ratios of a time, above 0 where new is slower."""
        parts = [f"{name} {describe(decision)}" for name, decision in decisions.items()]
        line = f"{label:<12} {'; '.join(parts)}{f'; {fault}' if fault else ''}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _status(console: Console) -> Status:
    return Status("", console=console, spinner="line" if console.options.ascii_only else "dots")


def describe(decision: Decision) -> str:
    """The time of new over base, and the verdict so far."""
    if decision.estimate is None:
        return "nothing yet"
    text = f"time {spell_share(decision.estimate)}"
    if decision.low is not None and decision.high is not None:
        text += f" ({spell_share(decision.low)} to {spell_share(decision.high)})"
    return f"{text}: {decision.verdict}{'' if decision.is_sure else ' yet'}"


def make_turns_display(max_time: float, *, quiet: bool) -> TurnsDisplay:
    """The display that suits standard error; silent where asked."""
    return TurnsDisplay(make_console(quiet=quiet), max_time)
