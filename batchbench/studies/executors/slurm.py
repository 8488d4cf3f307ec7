"""Jobs as Slurm jobs, through submitit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit

from batchbench.batching.progress import Watch
from batchbench.errors import UsageError, reason_in_short
from batchbench.studies.executors.jobs import (
    Ended,
    Executor,
    Job,
    Lost,
    Needs,
    Unlike,
    Worker,
    unlike,
)

_ASK_S = 30.0
"""Seconds between two questions to Slurm about all jobs; results are looked for all the time."""


def serve(folder: str, needs: Needs, first: Path, job: Job) -> Ended:
    """Run a job on a node of Slurm, if its machine is like the first.

    The file ``first`` has the facts of that machine. If all must be the same, the job that comes
    first adds those of its own.
    """
    worker = Worker(folder, timed=needs.timed)
    like = json.loads(first.read_text("utf-8"))
    if needs.same and "hostname" not in like and not unlike(like, worker.facts):
        own = first.with_name(f"{first.name}.{os.getpid()}-{worker.facts['hostname']}")
        own.write_text(json.dumps(worker.facts), "utf-8")
        with suppress(FileExistsError):  # another job was faster
            os.link(own, first.with_name("agreed.json"))
        like = json.loads(first.with_name("agreed.json").read_text("utf-8"))
    if reason := unlike(like, worker.facts):
        return Ended(job.key, Unlike(reason), str(worker.facts["hostname"]))
    return worker.run(job)


class Slurm(Executor):
    """Runs at most ``parallel`` Slurm jobs at once, each with one job of a study.

    Args:
        folder: folder that all nodes share; it exists only while there are jobs.
        minutes: time limit of a job.
        gpus: number of GPUs of a job that measures times; 0 takes a whole node, without GPUs.
        cluster: ``local`` runs jobs on this machine, for tests.
        grace_s: seconds after which a file of another node must appear on this machine.

    Raises:
        UsageError: this machine has no Slurm.
    """

    def __init__(
        self,
        folder: Path,
        watch: Watch,
        needs: Needs,
        *,
        parallel: int,
        partition: str | None = None,
        minutes: int = 5,
        gpus: int = 0,
        cluster: str = "slurm",
        grace_s: float = 15.0,
    ) -> None:
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError("--executor slurm: there is no sbatch here; run it on a login node")
        self._folder, self._watch, self._parallel = folder.absolute(), watch, parallel
        self._needs, self._slurm, self._grace_s = needs, cluster == "slurm", grace_s
        self._jobs: dict[Any, str] = {}  # keys by the jobs of submitit
        self._over: dict[Any, float] = {}  # jobs without a result, since when
        self._excluded: set[str] = set()
        self._asked_at = time.monotonic()
        # Jobs and files of a killed process.
        left = [file.name.split("_")[0] for file in self._folder.glob("*_submitted.pkl")]
        if left and self._slurm:
            subprocess.run(["scancel", *left], check=False, capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._first = self._folder / "first.json"
        self._first.write_text(json.dumps(needs.like), "utf-8")
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster)
        self._executor.update_parameters(
            name="batchbench",
            timeout_min=minutes,
            gpus_per_node=gpus,
            cpus_per_task=None if needs.timed else 1,
            slurm_partition=partition,
            slurm_exclusive=True if needs.timed and not gpus else None,
        )

    @property
    def free(self) -> int:
        return self._parallel - len(self._jobs)

    @property
    def running(self) -> Mapping[str, str]:
        return {key: self._node(handle) for handle, key in self._jobs.items()}

    def _node(self, handle: Any) -> str:
        known = handle.get_info(mode="cache")
        state = str(known.get("State") or known.get("jobState") or "PENDING")
        return known.get("NodeList", "here") if state == "RUNNING" else state.lower()

    @property
    def machines(self) -> int:
        return sum(self._node(handle) not in ("pending", "unknown") for handle in self._jobs)

    def submit(self, job: Job) -> None:
        try:
            handle = self._executor.submit(serve, os.getcwd(), self._needs, self._first, job)
        except submitit.core.utils.FailedJobError as error:
            raise UsageError(f"--executor slurm: {reason_in_short(error)}") from error
        self._jobs[handle] = job.key

    def wait(self) -> Sequence[Ended]:
        if self._slurm and self._jobs and time.monotonic() - self._asked_at > _ASK_S:
            next(iter(self._jobs)).watcher.update()
            self._asked_at = time.monotonic()
        over = [end for handle in [*self._jobs] for end in self._end(handle)]
        if not over:
            time.sleep(1.0 if self._slurm else 0.05)
        return over

    def _end(self, handle: Any) -> Iterator[Ended]:
        """Yield the end of a job if it has one, and remove its files."""
        if not handle.done():
            return
        node, answer = self._node(handle), None
        if handle.paths.result_pickle.exists():
            try:
                answer = handle.result()
            except submitit.core.utils.FailedJobError as error:  # its node has no batchbench
                reasons = [line for line in str(error).splitlines() if "Error" in line]
                reason = reason_in_short(reasons[-1])
                raise UsageError(f"--executor slurm: {node}: {reason}") from error
        elif time.monotonic() - self._over.setdefault(handle, time.monotonic()) < self._grace_s:
            return
        key = self._jobs.pop(handle)
        lines = (handle.stderr() or f"it is {handle.state.lower()}").strip().splitlines()
        for file in self._folder.glob(f"{handle.job_id}_*"):
            file.unlink(missing_ok=True)
        if answer is None:
            reason = reason_in_short(lines[-1])
            self._watch.note(f"{node} lost a job; what it ran runs again ({reason})")
            yield Ended(key, Lost(reason), node)
            return
        if isinstance(answer.outcome, Unlike) and answer.node not in self._excluded:
            self._excluded.add(answer.node)
            self._watch.note(f"{answer.node} is not used: {answer.outcome.reason}")
            self._executor.update_parameters(slurm_exclude=",".join(sorted(self._excluded)))
        yield answer

    def close(self) -> None:
        for handle in self._jobs:
            handle.cancel(check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # if it holds anything else
            self._folder.parent.rmdir()
