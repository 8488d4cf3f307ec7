"""The worker process that serves in turns: ``python -P -m batchbench.studies.worker``.

It reads requests from standard input and writes one answer to each on standard output, both as
lines of JSON; anything else that would be printed there goes to standard error. Each installation
runs its own worker, so that a comparison of two runs each with all of its own code. The words of
the protocol must not change, because the driver may be another version of batchbench.

The worker first imports what takes seconds, then waits. For each "begin" it forks a fresh process,
which answers until "finish". Where it cannot fork, it serves itself and ends.

    {"do": "begin"}
        identify the installation
    {"do": "open", "config": …, "lanes": {"continuous": null, …}, "also": ["static", …], "core": 3}
        make the workload, load the model, and warm up. A lane is a strategy, or a strategy on
        another engine ("notebook/continuous"); its value is [steps of a trial, ns of a step] from
        an earlier process, or null to serve one trial and measure them. Serve the strategies of
        "also" once. Stay on processor core "core" from then on, unless it is null
    {"do": "turn", "lane": "continuous", "steps": 40}
        serve so many steps
    {"do": "finish"}
        report the work of each lane and what varied from trial to trial, and end
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from batchbench import version
from batchbench.batching.batcher import Batcher, Serving
from batchbench.batching.bench import LocalBench
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import environment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.errors import BatchbenchError, UsageError
from batchbench.reports.metrics import counters
from batchbench.reports.result import output_digest, workload_facts
from batchbench.workloads import Workload

PROTOCOL = 2

BUSY = 1.2
"""Ratio of wall time to processor time of a turn above which another process had the core."""


class Calibration(NamedTuple):
    """Steps of a trial and time of a step, measured in an earlier process or in a first trial."""

    steps: int
    step_ns: float


class Turn(NamedTuple):
    """Times of one turn.

    The first step after another process had the machine is not timed, unless it is the first of a
    trial.
    """

    steps: int  # timed steps
    wall_ns: int  # of these steps
    cpu_ns: int  # of the process within it
    kernel_ns: int  # of the calibration kernel before the turn

    @property
    def step_ns(self) -> float:
        return self.wall_ns / self.steps

    @property
    def is_busy(self) -> bool:
        return self.wall_ns > BUSY * self.cpu_ns


def main() -> None:
    """Serve, in a fresh process for each "begin"."""
    gc.disable()  # imported objects stay; collections among them would take half a second
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import batchbench.batching.engines.torch.build
    import batchbench.batching.session  # noqa: F401

    gc.freeze()
    while sys.stdin.readline():  # the driver writes no further line before the answer
        if sys.platform != "linux" or not can_fork() or os.fork() == 0:
            _serve(out)
            sys.stderr.flush()
            os._exit(0)  # without clean-up, which takes time
        status = os.waitstatus_to_exitcode(os.wait()[1])
        if status:
            sys.exit(status)


def can_fork() -> bool:
    """Return True on Linux without a GPU: drivers and other systems' libraries survive no fork."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return sys.platform == "linux" and not any(map(os.path.exists, drivers))


def _serve(out: TextIO) -> None:
    worker = Worker()
    print(json.dumps(worker.hello()), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = worker.answer(request)
        except BatchbenchError as error:
            answer = {"error": str(error), "usage": isinstance(error, UsageError)}
        except Exception:
            answer = {"error": traceback.format_exc(), "usage": False}
        print(json.dumps(answer), file=out, flush=True)
        if request["do"] == "finish" or "error" in answer:
            break


def randomize_memory_layout() -> list[object]:
    """Allocate blocks of random size, which shift later allocations for as long as they live.

    Forked processes would otherwise have the same memory layout, and layout makes a model a little
    faster or slower (Curtsinger and Berger 2013, Stabilizer).
    """
    random_sizes = random.SystemRandom()  # any other generator would be a copy of the parent's
    return [
        bytearray(random_sizes.randrange(1, 1 << 16)),
        mmap.mmap(-1, random_sizes.randrange(1, 1 << 9) * mmap.PAGESIZE),
    ]


class Worker:
    """The server of one experiment's workload under one or several strategies."""

    def __init__(self) -> None:
        self._runs: dict[str, PausableRun] = {}
        self._memory = randomize_memory_layout()

    def hello(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "forks": can_fork(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "version": version.__version__,
            "file": str(Path(version.__file__).with_name("__init__.py")),
            "environment": environment(),
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            opened = self._open(request["config"], request["lanes"], request["also"])
            if request["core"] is not None and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {request["core"]})
            return opened
        if request["do"] == "turn":
            return {"turn": self._runs[request["lane"]].turn(request["steps"])}
        return {
            "varied": {name: run.varied for name, run in self._runs.items()},
            "work": {name: run.work for name, run in self._runs.items()},
        }

    def _open(
        self,
        config: Mapping[str, Any],
        strategies: Mapping[str, Sequence[float] | None],
        also: Sequence[str],
    ) -> dict[str, Any]:
        experiment, models = Experiment.from_config(config), ModelCache()
        sessions = {}
        for name in strategies:
            engine, _, strategy = name.rpartition("/")
            serving = replace(experiment.serving, strategy=strategy)
            if engine:
                serving = replace(serving, engine=engine, prefill="auto", execution="auto")
            # Each has its own engine, whose cache holds the half-served batch between turns.
            sessions[name] = LocalBench(replace(experiment, serving=serving), Watch(), models)
            if not sessions[name].workload.closed:
                raise UsageError(
                    "alternating turns need all requests at the start and fixed output lengths, so "
                    "that both sides take the same steps; drop arrivals and --stop-at-eos"
                )
            sessions[name].warm_up()
        first = next(iter(sessions.values()))
        others = {
            name: work_of(first.batcher(name).serve(first.workload, Watch())) for name in also
        }
        self._runs = {
            name: PausableRun(
                sessions[name].batcher(name.rpartition("/")[2]),
                sessions[name].workload,
                Calibration(int(known[0]), known[1]) if known else None,
            )
            for name, known in strategies.items()
        }
        run_kernel()
        # Present objects stay, so that a collection between trials has little to look through.
        gc.collect()
        gc.freeze()
        gc.disable()
        return {
            "workload": workload_facts(first.workload),
            "model": first.model,
            "environment": first.environment,
            "lanes": {
                name: {**run.calibration._asdict(), "work": run.work}
                for name, run in self._runs.items()
            },
            "also": others,
        }


class PausableRun:
    """A closed workload that is served again and again, and stops between any two steps.

    Attributes:
        work: counters and output digest of the first trial; None before it has ended.
        varied: the first counter that differed in a later trial, which is a fault of batchbench.
    """

    def __init__(
        self, batcher: Batcher, workload: Workload, calibration: Calibration | None = None
    ) -> None:
        self._batcher, self._workload = batcher, workload
        self._trial = 0
        self.work: Mapping[str, Any] | None = None
        self.varied: str | None = None
        if calibration is None:
            first = batcher.serve(workload, Watch(), trial=0)
            self.work = work_of(first)
            calibration = Calibration(first.num_steps, first.duration_ns / max(first.num_steps, 1))
        self.calibration = calibration
        self._begin()

    def turn(self, steps: int) -> Turn:
        kernel_ns = run_kernel()
        if self._left == 0:
            self._end()
        timed = wall = cpu = 0
        todo = steps
        if self._done:  # the first step of a trial is timed although caches are cold: it prefills
            self._advance(1)
            todo -= 1
        while todo:
            if self._left == 0:
                self._end()  # the next trial is set up outside the timed intervals
            now = min(todo, self._left)
            began, began_cpu = time.perf_counter_ns(), time.process_time_ns()
            self._advance(now)
            wall += time.perf_counter_ns() - began
            cpu += time.process_time_ns() - began_cpu
            timed, todo = timed + now, todo - now
        return Turn(timed, wall, cpu, kernel_ns)

    def _begin(self) -> None:
        gc.collect()
        self._serving = Serving(self._batcher, self._workload, Watch(), trial=self._trial)
        self._done = 0

    @property
    def _left(self) -> int:
        return self.calibration.steps - self._done

    def _advance(self, steps: int) -> None:
        """Serve so many steps of the trial, and wait until they are computed."""
        goal = self._done + steps
        while self._done < goal:
            self._serving.advance(goal - self._done)
            self._done = self._serving.steps
        self._batcher.engine.wait()

    def _end(self) -> None:
        recording = self._serving.advance()
        if recording is None:
            self.varied = "forward_passes"  # it takes more steps than the first trial
        else:
            work = work_of(recording)
            self.work = self.work or work
            differing = (name for name, value in self.work.items() if work[name] != value)
            self.varied = self.varied or next(differing, None)
        self._trial += 1
        self._begin()


def work_of(recording: Recording) -> dict[str, Any]:
    work: Mapping[str, Any] = counters(recording) if recording.has_steps else {}
    if (computed := recording.header.about.get("computed_passes")) is not None:
        work = {**work, "computed_passes": computed}
    return {**work, "output_digest": output_digest(recording)}


_KERNEL = bytes(16 << 20)
"""Input of the calibration kernel, which takes 10 ms or more on any current core."""


def run_kernel() -> int:
    """Run the calibration kernel and return its time in ns.

    It hashes the same bytes on each side and uses neither batchbench nor torch. If its time
    differs, the cause is the machine.
    """
    began = time.perf_counter_ns()
    hashlib.blake2b(_KERNEL).digest()
    return time.perf_counter_ns() - began
