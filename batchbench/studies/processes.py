"""Worker processes, seen from the one who asks: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench.errors import BatchbenchError, UsageError
from batchbench.reports.turns import Turn
from batchbench.studies.worker import PROTOCOL

PATIENCE_S = 600.0
"""An answer that takes longer will not come."""


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


class WorkerProcess:
    """A worker of an installation; ends with the ``with`` block, whatever happens."""

    def __init__(self, installation: Installation, threads: int | None) -> None:
        self._from = installation
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        try:
            # -P: the folder that one stands in, a checkout perhaps, must not come before what is
            # installed.
            self._process = subprocess.Popen(
                [str(installation.python), "-P", "-m", "batchbench.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=installation.environment(threads),
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            why = (error.strerror or str(error)).lower()
            raise UsageError(f"{installation.python}: cannot be started: {why}") from error
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def hello(self) -> Mapping[str, Any]:
        """Who it is, once it has started.

        Raises:
            UsageError: it has no batchbench, or one that cannot be compared with this.
        """
        try:
            told = self._answer()
        except BatchbenchError as error:
            raise UsageError(
                f"{self._from.python}: has no batchbench that can take turns ({error}); install "
                "this or a later version there"
            ) from error
        if told.get("protocol") != PROTOCOL:
            raise UsageError(
                f"{self._from.python}: its batchbench {told.get('version')} takes turns in another "
                "way than this one; compare neighbouring versions"
            )
        return told

    def tell(self, asked: Mapping[str, Any]) -> None:
        """Ask, without waiting for the answer."""
        with contextlib.suppress(OSError):  # it has ended: the answer will say why
            self._process.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def answer(self) -> Mapping[str, Any]:
        """What it answers.

        Raises:
            UsageError: it cannot do what is asked.
            BatchbenchError: it broke.
        """
        told = self._answer()
        if "error" not in told:
            return told
        message = f"{self._from.label}: {told['error']}"
        raise UsageError(message) if told["usage"] else BatchbenchError(message)

    def turn(self, lane: str, steps: int) -> Turn:
        """Let it run so many steps."""
        self.tell({"do": "turn", "lane": lane, "steps": steps})
        return Turn(*self.answer()["turn"])

    def finish(self) -> Mapping[str, Any]:
        """Let it end; what it tells of the work that was done."""
        self.tell({"do": "finish"})
        return self.answer()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def _answer(self) -> Mapping[str, Any]:
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise BatchbenchError(f"{self._from.label}: no answer in {PATIENCE_S:g} s") from None
        if not line:
            raise BatchbenchError(f"{self._from.label}: ended by itself: {self._last_words()}")
        told: Mapping[str, Any] = json.loads(line)
        return told

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").split("\n")
        return next((w for w in reversed(words) if w.strip()), f"exit {self._process.returncode}")


def draw_core(threads: int, chance: random.Random) -> int | None:
    """A processor core for all that take turns; None where they compute on several, or it is not
    known which there are.

    On cores of their own, two sides would have other neighbours, beyond what turns can cancel.
    """
    if threads > 1 or not hasattr(os, "sched_getaffinity"):
        return None
    return chance.choice(sorted(os.sched_getaffinity(0)))


def open_all(
    workers: Sequence[WorkerProcess], asked: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Make workers ready at the same time; what each tells."""
    for worker, message in zip(workers, asked, strict=True):
        worker.tell({"do": "open", **message})
    return [worker.answer() for worker in workers]
