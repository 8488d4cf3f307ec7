"""Worker processes, seen from the one who asks: started, spoken to, ended."""

from __future__ import annotations

import compileall
import contextlib
import io
import json
import math
import os
import queue
import random
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batchbench
from batchbench.batching.machine import allowed_cpus
from batchbench.errors import BatchbenchError, OutOfTimeError, UsageError, shown
from batchbench.files import reason_of, replacing, undisturbed
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
                [str(installation.python), "-P", "-m", "batchbench.studies.worker"],
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


_READY = "ready"


def install_revision(revision: str, cache: Path | None = None) -> tuple[Path, str]:
    """The interpreter of an environment that holds batchbench as of ``revision``, and the commit.

    The environment is kept in a cache by commit. Its batchbench is the package as committed; all
    else it takes from the present environment, so that the two differ in batchbench alone.

    Args:
        revision: whatever git takes for a commit: a branch, a tag, ``HEAD~1``.
        cache: folder of the environments; None for the user's.

    Raises:
        UsageError: there is no repository, no such revision, or it cannot be installed.
    """
    root = repository()
    commit = (
        _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    )
    if not commit:
        raise UsageError(
            f"--base-ref {shown(revision)}: {root} has no such commit; fetch it (in a "
            "shallow clone: git fetch --unshallow), or name one that git log shows"
        )
    folder = (cache or cache_folder()) / f"{commit[:16]}-{_present()}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / _READY).exists():
        _install(root, commit, folder)
    return python, commit


def repository() -> Path:
    """The checkout that batchbench runs from, or the one of batchbench that one stands in.

    Raises:
        UsageError: there is none.
    """
    for root in (Path(batchbench.__file__).parents[1], *(Path.cwd() / "x").parents):
        if (root / ".git").exists() and (root / "batchbench" / "__init__.py").exists():
            return root
    raise UsageError(
        "--base-ref: needs a git checkout of batchbench to stand in; give --base-python instead"
    )


def cache_folder() -> Path:
    """Return the folder of environments, in ``$BATCHBENCH_CACHE`` or else the user's cache.

    Raises:
        UsageError: the user has no home folder.
    """
    given = os.environ.get("BATCHBENCH_CACHE")
    if given:
        return Path(given) / "revisions"
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UsageError(
            "--base-ref: there is no home folder to keep environments in; set BATCHBENCH_CACHE to "
            "a folder"
        ) from error
    return usual / "batchbench" / "revisions"


def _present() -> str:
    """A short name of the present environment, in which the others of a cache are rooted."""
    import hashlib

    about = f"{sys.version}\n{sysconfig.get_path('purelib')}"
    return hashlib.sha256(about.encode()).hexdigest()[:8]


def _install(root: Path, commit: str, folder: Path) -> None:
    """Make the environment whole or not at all."""
    archive = _git(root, "archive", "--format=tar", commit, "batchbench")
    if not archive:
        raise UsageError(f"--base-ref {commit[:12]}: has no package batchbench")
    try:
        with replacing(folder, folder=True) as staging:
            _fill(staging, archive)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete environment
    except OSError as error:
        raise UsageError(
            f"{folder.parent}: cannot be written: {reason_of(error)}; set BATCHBENCH_CACHE to "
            "another folder"
        ) from error


def _fill(staging: Path, archive: bytes) -> None:
    """Make the environment in an empty folder."""
    venv.create(staging, symlinks=os.name != "nt")
    library = next(staging.glob("[Ll]ib/**/site-packages"))
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(library, filter="data")
    # After its own batchbench come all packages of the present environment, with those that its
    # .pth files add. The line is ASCII, since Python reads it in the locale's encoding.
    present = [
        *site.getsitepackages(),
        site.getusersitepackages(),
        sysconfig.get_path("purelib"),
    ]
    lines = [f"import site; site.addsitedir({place!a})\n" for place in dict.fromkeys(present)]
    (library / "present.pth").write_text("".join(lines), encoding="ascii")
    compileall.compile_dir(library / "batchbench", quiet=2)
    (staging / _READY).touch()


def _git(root: Path, *words: str) -> bytes:
    """What git prints; empty where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--base-ref: git cannot be run ({error})") from error
    return done.stdout if done.returncode == 0 else b""
