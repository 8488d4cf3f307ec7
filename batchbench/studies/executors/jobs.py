"""Jobs, which are the independent parts of a study, and the interface of executors that run them.

A job returns the files to keep as bytes, so that it can run on another machine: only the process
that submits jobs writes results.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from batchbench.batching.machine import HARDWARE, SOFTWARE, differences, environment, facts_of
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.errors import BatchbenchError, IncompleteError, UsageError
from batchbench.reports.text import spell_time
from batchbench.version import __version__

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start

MOST_RERUNS = 2
"""Number of times that a job which was lost with its machine runs again."""


@dataclass(frozen=True)
class Done:
    """The files of a finished job by name, the most important first."""

    files: Mapping[str, bytes | str]


@dataclass(frozen=True)
class _Reason:
    reason: str


class Failed(_Reason):
    """The reason for which a job cannot be done on any machine; it would fail again."""


class Lost(_Reason):
    """The loss of a job with its machine or process, which says nothing about the job."""


class Unlike(_Reason):
    """The refusal of a machine, with its difference from the machine of the first job."""


Work = Callable[[Watch, ModelCache], Done | Failed]
"""The work of a job. It can be pickled, and gets the models of the process in which it runs."""


@dataclass(frozen=True)
class Job:
    """An independent part of a study; no two jobs have the same ``key``.

    Jobs with the same ``server`` load it, so they run one after another.
    """

    key: str
    work: Work
    server: str | None = None


@dataclass(frozen=True)
class Ended:
    """The end of the job ``key``, with its node, which is empty for this process.

    An exception is the error that the job raised elsewhere.
    """

    key: str
    outcome: Done | Failed | Lost | Unlike | Exception
    node: str = ""
    seconds: float = 0.0

    @property
    def reason(self) -> str | None:
        """Why the job has no files."""
        return self.outcome.reason if isinstance(self.outcome, _Reason) else None


@dataclass(frozen=True)
class Needs:
    """The machines that jobs may use.

    Attributes:
        like: facts that a machine must have.
        same: all machines must be like the first.
        timed: jobs measure times, so a device is a whole GPU or all cores of a node, not a core.
        gpus: jobs may use GPUs.
    """

    like: Mapping[str, Any]
    same: bool = False
    timed: bool = False
    gpus: bool = False


class Executor:
    """Runs jobs somewhere: this one in this process, each as soon as its end is waited for.

    Each job that is submitted comes out of :meth:`wait` once.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch, self._models = watch or Watch(), ModelCache()
        self._job: Job | None = None

    @property
    def free(self) -> int:
        """Number of jobs that can be submitted now."""
        return 0 if self._job else 1

    @property
    def running(self) -> Mapping[str, str]:
        """Node of each job that runs elsewhere, by key; ``queued`` if it has not begun."""
        return {}

    @property
    def machines(self) -> int:
        """Number of machines that are held now and have a price."""
        return 1

    def submit(self, job: Job) -> None:
        """Take a job; ``free`` is not 0."""
        self._job = job

    def wait(self) -> Sequence[Ended]:
        """Wait about a second, or less if a job ends; return the jobs that have ended.

        Raises:
            BatchbenchError: no job can run any more.
        """
        job, self._job = self._job, None
        if job is None:
            return []
        began = time.monotonic()
        outcome = job.work(self._watch, self._models)
        return [Ended(job.key, outcome, seconds=time.monotonic() - began)]

    def close(self) -> None:
        """Stop what still runs, and give the machines back."""


def run_jobs(
    jobs: Sequence[Job],
    executor: Executor,
    begins: Callable[[Job], None] = lambda job: None,
    waited: Callable[[], None] = lambda: None,
) -> Iterator[Ended]:
    """Run jobs, and yield the end of each once, in the order in which they end.

    A job that is lost runs again at most :data:`MOST_RERUNS` times; after that it is yielded as
    :class:`Lost`. A job that a machine refuses waits for another machine, and one whose server is
    in use waits for its end. ``begins`` is called with each job that is submitted, again if it
    runs again, and ``waited`` after each wait.

    Raises:
        Exception: the error that a job raised.
    """
    waiting, submitted, losses = deque(jobs), dict[str, Job](), Counter[str]()

    def startable() -> Job | None:
        busy = {job.server for job in submitted.values()} - {None}
        return next((job for job in waiting if job.server not in busy), None)

    while waiting or submitted:
        while executor.free > 0 and (job := startable()) is not None:
            waiting.remove(job)
            begins(job)
            executor.submit(job)
            submitted[job.key] = job
        for ended in executor.wait():
            job = submitted.pop(ended.key)
            if isinstance(ended.outcome, Exception):
                raise ended.outcome
            losses[ended.key] += isinstance(ended.outcome, Lost)
            lost = isinstance(ended.outcome, Lost) and losses[ended.key] <= MOST_RERUNS
            if lost or isinstance(ended.outcome, Unlike):
                waiting.appendleft(job)
            else:
                yield ended
        waited()


Parts = dict[str, tuple[Mapping[str, bytes | str], str]]
"""The files and the node of each part of a study, by its key."""


def run_parts(jobs: Sequence[Job], executor: Executor, watch: Watch) -> Parts:
    """Run all parts of a study that keeps none of them.

    Raises:
        UsageError: a part cannot be done.
        IncompleteError: a part was lost with its machine, several times.
    """
    ends, shown = Parts(), ""

    def waited() -> None:
        nonlocal shown
        now = ", ".join(f"{key} ({node})" for key, node in executor.running.items())
        if now and now != shown:
            watch.phase(f"running {now}")
        shown = now

    for ended in run_jobs(jobs, executor, waited=waited):
        if isinstance(ended.outcome, Failed):
            raise UsageError(ended.outcome.reason)
        if not isinstance(ended.outcome, Done):
            raise IncompleteError(
                f"{ended.key} was lost {MOST_RERUNS + 1} times with its machine ({ended.reason}); "
                "the same command starts from the beginning"
            )
        if ended.node:
            watch.note(f"{ended.key} ran {spell_time(ended.seconds)} on {ended.node}")
        ends[ended.key] = (ended.outcome.files, ended.node)
    return ends


# Clients of one server


PLACES_S = 60.0
"""Seconds without a free place after which not all clients can run at once."""

LEAVE_S = 10.0


def _join(join: Callable[[], None], watch: Watch, models: ModelCache) -> Done:
    join()
    return Done({})


def clients_on(executor: Executor) -> Start:
    """Return what starts clients as jobs of an executor, all of which run at the same time."""

    @contextmanager
    def start(join: Callable[[], None], count: int) -> Iterator[Callable[[], None]]:
        jobs = {
            f"client {i + 1}": Job(f"client {i + 1}", partial(_join, join)) for i in range(count)
        }
        waiting, since = deque(jobs), time.monotonic()

        def look() -> None:
            nonlocal since
            while waiting and executor.free:
                executor.submit(jobs[waiting.popleft()])
                since = time.monotonic()
            if waiting and time.monotonic() - since > PLACES_S:
                raise IncompleteError(
                    f"--clients {count}: only {count - len(waiting)} can run at once; lower it, or "
                    "let the executor have more machines"
                )
            for ended in executor.wait():
                if isinstance(ended.outcome, Exception):
                    raise ended.outcome
                if not isinstance(ended.outcome, Unlike):
                    reason = ended.reason or "it ended"
                    raise IncompleteError(f"--clients: {ended.key} on {ended.node}: {reason}")
                waiting.append(ended.key)

        try:
            yield look
        finally:  # the driver has hung up
            until = time.monotonic() + LEAVE_S
            while executor.running and time.monotonic() < until:
                executor.wait()

    return start


# Kinds of machines: jobs that measure times compare only on machines of one kind


_FACTS = (*HARDWARE, *SOFTWARE)

KIND = ("batchbench", *(name for name in _FACTS if name not in ("device", "threads")))
"""Facts in which machines of one kind agree; the others are options of a cell."""


def here(*, timed: bool) -> dict[str, Any]:
    """Return the comparable facts of this machine, with ``timed`` those of its first GPU too."""
    facts = facts_of(environment(), {}, batchbench=__version__)
    if timed:
        import torch

        facts |= {"gpu": "none", "cuda": torch.version.cuda}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def unlike(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in words the first fact in which two machines are of different kinds; empty if none.

    A fact that one of them lacks is not compared: a cell on the CPU does not name the GPU.
    """
    for name, one, other in differences(base, new, KIND):
        if one is not None and other is not None:
            return f"its {name.replace('_', ' ')} is {other}, not {one}"
    return ""


def kinds_of(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the kinds of the machines with these environments in words, each with its nodes."""
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    for facts in (facts_of(facts, {}) for facts in environments):
        nodes = next((nodes for kind, nodes in kinds if not unlike(kind, facts)), None)
        if nodes is None:
            kinds.append((facts, nodes := []))
        if facts["hostname"] not in nodes:
            nodes.append(facts["hostname"])
    words = []
    for kind, nodes in kinds:
        name = " ".join(str(kind[part]) for part in ("cpu", "gpu") if kind.get(part))
        torch = f", torch {kind['torch']}" if kind.get("torch") else ""
        words.append(f"{name}{torch} ({', '.join(nodes)})")
    return words


# The process that does the work


class Worker:
    """A process that runs jobs one after another; its jobs share the models.

    Args:
        folder: the working directory of the command, for files and policies that jobs name.
        timed: jobs measure times, so that the machine's GPU is among its facts.
    """

    def __init__(self, folder: str, *, timed: bool) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        self._models = ModelCache()
        self.facts: Mapping[str, Any] = here(timed=timed)

    def about(self) -> Mapping[str, Any]:
        return self.facts

    def run(self, job: Job) -> Ended:
        node, began = str(self.facts["hostname"]), time.monotonic()
        outcome: Done | Failed | Exception
        try:
            outcome = job.work(Watch(), self._models)
        except BatchbenchError as error:
            outcome = error
        except Exception as error:  # its class need not be known where it is read
            text = "".join(traceback.format_exception(error))
            outcome = RuntimeError(f"{job.key} on {node}: {text}")
        return Ended(job.key, outcome, node, time.monotonic() - began)
