"""Worker processes, from the driver's side: start, query and end them; install a revision."""

from __future__ import annotations

import compileall
import contextlib
import io
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench import version
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import allowed_cpus
from batchbench.errors import BatchbenchError, OutOfTimeError, UsageError, shown
from batchbench.files import cache_folder, reason_of, replacing, undisturbed
from batchbench.studies.gate.evidence import Side, Version, as_result, shown_facts
from batchbench.studies.gate.worker import PROTOCOL, Calibration, Turn

PATIENCE_S = 600.0
"""Maximum wait for an answer."""

ENDING_S = 5.0
"""Maximum wait for a process to end after it was killed."""

FORKS_PER_PARENT = 8
"""Processes forked from one parent before everything is imported again, so that a bias that they
share does not affect all samples."""

Calibrations = Mapping[str, Calibration]  # by strategy


@dataclass(frozen=True)
class Installation:
    """A Python interpreter and its batchbench."""

    label: str  # its name in messages: base, new, here
    python: Path
    own: bool = False  # it is the interpreter of this program, and keeps its PYTHONPATH
    folder: Path | None = None  # whose batchbench comes before any other

    def environment(self, threads: int) -> dict[str, str]:
        """Return environment variables, equal on both sides except for the place of batchbench."""
        of_threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        variables = {**os.environ, **of_threads, "PYTHONHASHSEED": "0"}
        for name in ("PYTHONHOME", "PYTHONSTARTUP", *(() if self.own else ("PYTHONPATH",))):
            variables.pop(name, None)
        if self.folder is not None:
            places = [str(self.folder), variables.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        return variables


def this_installation(label: str = "here") -> Installation:
    return Installation(label, Path(sys.executable), own=True)


@dataclass(frozen=True)
class ProcessReport:
    """A worker's answers to "begin", "open" and "finish"."""

    hello: Mapping[str, Any]
    opened: Mapping[str, Any]
    finished: Mapping[str, Any]

    @cached_property
    def work(self) -> Mapping[str, Mapping[str, Any]]:
        """Return counters and output digest of each strategy that the process has counted."""
        counted = {name: work for name, work in self.finished["work"].items() if work}
        return {**self.opened["also"], **counted}

    @property
    def on_cpu(self) -> bool:
        return str(self.opened["model"]["device"]) == "cpu"

    def version(self, side: Side) -> Version:
        """Return the installation as a side of a gate that has more facts."""
        result = as_result(self.opened, self.work, self.hello["version"])
        return Version(Side(side.label, {**side.facts, **shown_facts(result)}), [result])


def varying_work(reports: Sequence[ProcessReport]) -> str | None:
    """Return words for a count that differed between trials or processes; None if none did."""
    first = reports[0].work
    for report in reports:
        for name, counter in report.finished["varied"].items():
            if counter:
                return f"{name}.{counter} varies from trial to trial"
        for name, work in report.work.items():
            if name in first and work != first[name]:
                other = next(key for key in work if work[key] != first[name].get(key))
                return f"{name}.{other} varies from process to process"
    return None


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Fresh processes of one installation, one after another; none outlives the ``with`` block.

    If the system can fork, :data:`FORKS_PER_PARENT` of them come from one process that has imported
    everything (:mod:`batchbench.studies.gate.worker`), which takes seconds.

    Args:
        until: the time, on ``time.monotonic``, at which waiting for answers ends.
    """

    def __init__(self, installation: Installation, threads: int, until: float = math.inf) -> None:
        self.installation, self._threads, self._until = installation, threads, until
        self._running: _Running | None = None
        self._left = 0

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self._running:
            self._running.end()
            self._running = None

    def ready(self) -> None:
        """Start to import, without waiting, if the next process has no parent to fork from."""
        if self._left == 0:
            self.end()
        if self._running is None:
            with undisturbed():  # an unregistered process would never be ended
                self._running = _Running(self.installation, self._threads)
            self._left = FORKS_PER_PARENT

    def begin(self) -> Mapping[str, Any]:
        """Start a fresh process and return its identification."""
        self.ready()
        self._left -= 1
        python = self.installation.python
        try:
            hello = self.ask({"do": "begin"})
        except OutOfTimeError:
            raise
        except BatchbenchError as error:
            raise UsageError(
                f"{python}: has no batchbench that can take turns ({error}); install this version "
                "or a later one there"
            ) from error
        if hello.get("protocol") != PROTOCOL:
            raise UsageError(
                f"{python}: its batchbench {hello.get('version')} uses a different protocol; "
                "compare versions that are closer to each other"
            )
        if not hello["forks"]:
            self._left = 0
        return hello

    def tell(self, request: Mapping[str, Any]) -> None:
        assert self._running is not None
        self._running.write(json.dumps(request) + "\n")

    def tell_open(
        self,
        experiment: Experiment,
        strategies: Sequence[str],
        calibrations: Calibrations | None,
        also: Sequence[str],
        core: int | None,
    ) -> None:
        lanes = {name: calibrations[name] if calibrations else None for name in strategies}
        request = {"do": "open", "config": experiment.config(), "lanes": lanes}
        self.tell({**request, "also": list(also), "core": core})

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self.tell(request)
        return self.answer()

    def answer(self) -> Mapping[str, Any]:
        """Wait for the answer to the last request.

        Raises:
            UsageError: the process cannot do what was asked.
            OutOfTimeError: it had not answered when the time was up.
            BatchbenchError: it broke.
        """
        assert self._running is not None
        label, began = self.installation.label, time.monotonic()
        left = max(0.0, self._until - began)
        try:
            line = self._running.lines.get(timeout=min(PATIENCE_S, left))
        except queue.Empty:
            if left >= PATIENCE_S:
                raise BatchbenchError(f"{label}: no answer in {PATIENCE_S:g} s") from None
            waited = time.monotonic() - began
            why = f"{label} had not answered for {waited:.0f} s"
            raise OutOfTimeError(why, waited) from None
        if not line:
            raise BatchbenchError(f"{label}: ended by itself: {self._running.last_words()}")
        answer = None
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
        if not isinstance(answer, dict):
            raise BatchbenchError(f"{label}: the answer is not a JSON object: {line[:80]!r}")
        if "error" in answer:
            message = f"{label}: {answer['error']}"
            raise UsageError(message) if answer["usage"] else BatchbenchError(message)
        return answer

    def turn(self, strategy: str, steps: int) -> Turn:
        return Turn(*self.ask({"do": "turn", "lane": strategy, "steps": steps})["turn"])

    def finish(self) -> Mapping[str, Any]:
        return self.ask({"do": "finish"})


class _Running:
    """A process of the operating system and its pipes; ``lines`` is its output, "" at the end."""

    def __init__(self, installation: Installation, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by end
        try:
            # -P: a checkout in the current folder must not come before the installed package.
            self._process = subprocess.Popen(
                [str(installation.python), "-P", "-m", "batchbench.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=installation.environment(threads),
                encoding="utf-8",
                start_new_session=True,  # so that its forks end with it
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
        with contextlib.suppress(OSError):  # it has ended: the answer will say why
            self._process.stdin.write(line)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        # Before it is waited for, no other process can have its number.
        if sys.platform != "win32" and self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._wait()
        self._reader.join(ENDING_S)
        if not self._reader.is_alive():  # otherwise a process outside the group holds the pipe open
            self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def last_words(self) -> str:
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
    """Draw a processor core for all that take turns; None for several threads or unknown cores.

    On separate cores, two sides would have different neighbours, which turns cannot cancel out.
    """
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        return None
    return chance.choice(sorted(allowed_cpus()))


def install_revision(revision: str) -> tuple[Path, str]:
    """Return a folder that holds the package batchbench as of ``revision``, and the commit.

    The folder is kept in a cache, by commit. Put in front of ``PYTHONPATH``, it makes this
    interpreter use that batchbench and, for all else, the packages of the present environment.

    Args:
        revision: anything that git resolves to a commit: a branch, a tag, ``HEAD~1``.

    Raises:
        UsageError: there is no repository, no such revision, or the cache cannot be written.
    """
    root = _repository()
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    commit = found.decode().strip()
    if not commit:
        raise UsageError(
            f"--base-ref {shown(revision)}: {root} has no such commit; fetch it (in a "
            "shallow clone: git fetch --unshallow), or name one that git log shows"
        )
    try:
        folder = cache_folder() / "revisions" / commit[:16]
    except RuntimeError as error:
        raise UsageError(
            "--base-ref: there is no home folder for the cache; set BATCHBENCH_CACHE to a folder"
        ) from error
    if not folder.exists():
        archive = _git(root, "archive", "--format=tar", commit, "batchbench")
        if not archive:
            raise UsageError(f"--base-ref {commit[:12]}: has no package batchbench")
        _extract(archive, folder)
    return folder, commit


def _repository() -> Path:
    """Return the checkout of batchbench that this runs from, or that the current folder is in."""
    for root in (Path(version.__file__).parents[1], Path.cwd(), *Path.cwd().parents):
        if (root / ".git").exists() and (root / "batchbench" / "__init__.py").exists():
            return root
    raise UsageError(
        "--base-ref: needs a git checkout of batchbench; change to one, or give --base-python"
    )


def _extract(archive: bytes, folder: Path) -> None:
    try:
        with replacing(folder, folder=True) as staging:
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(staging, filter="data")
            compileall.compile_dir(staging, quiet=2)
    except OSError as error:
        if folder.exists():  # another process was faster
            return
        raise UsageError(
            f"{folder.parent}: cannot be written: {reason_of(error)}; set BATCHBENCH_CACHE to "
            "another folder"
        ) from error


def _git(root: Path, *words: str) -> bytes:
    """Return what git prints; nothing if it fails."""
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--base-ref: git cannot be run ({error})") from error
    return done.stdout if done.returncode == 0 else b""
