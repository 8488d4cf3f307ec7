"""Worker processes, seen from the one who asks: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench.batching.cores import allowed_cpus
from batchbench.errors import BatchbenchError, OutOfTimeError, UsageError
from batchbench.files import reason_of, undisturbed
from batchbench.studies.gate.turns import Turn
from batchbench.studies.gate.worker import PROTOCOL

PATIENCE_S = 600.0
"""An answer that takes longer will not come."""

ENDING_S = 5.0
"""Seconds that an ended process may take to be gone."""

OF_ONE = 8
"""Fresh processes that are forked from one, before everything is imported anew: what they have in
common must not be all that is ever looked at."""


@dataclass(frozen=True)
class Installation:
    """A Python interpreter with batchbench.

    Attributes:
        label: how messages call it: base, new.
        python: the interpreter; of a virtual environment the one in its ``bin``.
        own: it is the one that runs this program, so that it finds batchbench where this did.
    """

    label: str
    python: Path
    own: bool = False

    def environment(self, threads: int | None) -> dict[str, str]:
        """Environment variables, the same on both sides but for where Python looks for modules."""
        found = {**os.environ, "PYTHONHASHSEED": "0"}
        if threads is not None:
            found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        for name in ("PYTHONHOME", "PYTHONSTARTUP", *(() if self.own else ("PYTHONPATH",))):
            found.pop(name, None)
        return found


class Workers:
    """Fresh processes of one installation, one after another; none outlives the ``with`` block.

    Where the system can, :data:`OF_ONE` of them are forked from one process that has imported
    everything (:mod:`batchbench.studies.gate.worker`), which takes seconds.

    Args:
        until: the time, on ``time.monotonic``, from which no answer is waited for.
    """

    def __init__(
        self, installation: Installation, threads: int | None, until: float = math.inf
    ) -> None:
        self.installation, self._threads, self._until = installation, threads, until
        self._running: _Running | None = None
        self._left = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End whatever runs; what begins next imports everything anew."""
        if self._running:
            self._running.end()
            self._running = None

    def ready(self) -> None:
        """Let one import everything, where the next has none to come from; without waiting."""
        if self._left == 0:
            self.end()
        if self._running is None:
            with undisturbed():  # an unregistered process would never be ended
                self._running = _Running(self.installation, self._threads)
            self._left = OF_ONE

    def begin(self) -> Mapping[str, Any]:
        """A fresh process that answers from now on; who it is.

        Raises:
            UsageError: it cannot be started, or has no batchbench that can be compared with this.
            OutOfTimeError: it had not answered when the time was up.
        """
        self.ready()
        self._left -= 1
        python = self.installation.python
        self.tell({"do": "begin"})
        try:
            told = self._answer()
        except OutOfTimeError:
            raise
        except BatchbenchError as error:
            raise UsageError(
                f"{python}: has no batchbench that can take turns ({error}); install this or a "
                "later version there"
            ) from error
        if told.get("protocol") != PROTOCOL:
            raise UsageError(
                f"{python}: its batchbench {told.get('version')} takes turns in another way than "
                "this one; compare neighbouring versions"
            )
        if not told["forks"]:
            self._left = 0
        return told

    def tell(self, asked: Mapping[str, Any]) -> None:
        """Ask, without waiting for the answer."""
        assert self._running is not None
        self._running.write(json.dumps(asked) + "\n")

    def answer(self) -> Mapping[str, Any]:
        """What it answers.

        Raises:
            UsageError: it cannot do what is asked.
            OutOfTimeError: it had not answered when the time was up.
            BatchbenchError: it broke.
        """
        told = self._answer()
        if "error" not in told:
            return told
        message = f"{self.installation.label}: {told['error']}"
        raise UsageError(message) if told["usage"] else BatchbenchError(message)

    def turn(self, lane: str, steps: int) -> Turn:
        """Let it run so many steps."""
        self.tell({"do": "turn", "lane": lane, "steps": steps})
        return Turn(*self.answer()["turn"])

    def finish(self) -> Mapping[str, Any]:
        """Let it end; what it tells of the work that was done."""
        self.tell({"do": "finish"})
        return self.answer()

    def _answer(self) -> Mapping[str, Any]:
        assert self._running is not None
        label, asked_at = self.installation.label, time.monotonic()
        left = max(0.0, self._until - asked_at)
        try:
            line = self._running.lines.get(timeout=min(PATIENCE_S, left))
        except queue.Empty:
            if left < PATIENCE_S:
                waited = time.monotonic() - asked_at
                why = f"{label} had been silent for {waited:.0f} s"
                raise OutOfTimeError(why, waited) from None
            raise BatchbenchError(f"{label}: no answer in {PATIENCE_S:g} s") from None
        if not line:
            why = self._running.last_words()
            raise BatchbenchError(f"{label}: ended by itself: {why}")
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise BatchbenchError(f"{label}: answered with no JSON object: {line[:80]!r}")
        return told


class _Running:
    """An operating system's process and its pipes; ``lines`` are what it says, empty at the end."""

    def __init__(self, installation: Installation, threads: int | None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by end
        try:
            # -P: the folder that one stands in, a checkout perhaps, must not come before what is
            # installed.
            self._process = subprocess.Popen(
                [str(installation.python), "-P", "-m", "batchbench.studies.gate.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=installation.environment(threads),
                encoding="utf-8",
                start_new_session=True,  # so that what it forks ends with it
            )
        except OSError as error:
            self._errors.close()
            raise UsageError(
                f"{installation.python}: cannot be started: {reason_of(error)}"
            ) from error
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, line: str) -> None:
        """Say something."""
        with contextlib.suppress(OSError):  # it has ended: the answer will say why
            self._process.stdin.write(line)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def end(self) -> None:
        """End it and all that it forked, and tidy up."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        # Until it is waited for, its number is nobody else's.
        if hasattr(os, "killpg") and self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._wait()
        self._reader.join(ENDING_S)
        if not self._reader.is_alive():  # else something that left the group holds the pipe open
            self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def last_words(self) -> str:
        """What it wrote last to standard error, once it has ended or closed its output."""
        self._wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").split("\n")
        return next((w for w in reversed(words) if w.strip()), f"exit {self._process.returncode}")

    def _wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.put(line)
        self.lines.put("")


def draw_core(threads: int, chance: random.Random) -> int | None:
    """A processor core for all that take turns; None where they compute on several, or it is not
    known which there are.

    On cores of their own, two sides would have other neighbours, beyond what turns can cancel.
    """
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        return None
    return chance.choice(sorted(allowed_cpus()))


def open_all(
    workers: Sequence[Workers], asked: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Make workers ready at the same time; what each tells."""
    for worker, message in zip(workers, asked, strict=True):
        worker.tell({"do": "open", **message})
    return [worker.answer() for worker in workers]
