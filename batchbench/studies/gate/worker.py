"""The process that serves in turns: ``python -P -m batchbench.studies.worker``.

It is told what to do in lines of JSON on standard input and answers each with one on standard
output; whatever else would be printed there goes to standard error. Each installation brings its
own worker, so that a comparison of two installations runs each with all of its own code.

It first imports whatever takes long, seconds of it, and then waits. For each "begin" it forks a
fresh process that answers until it is told to finish, or serves and ends itself where it cannot
fork.

    {"do": "begin"}
        tell who it is
    {"do": "open", "config": …, "lanes": {"continuous": null, …}, "also": ["static", …]}
        make the workload, load the model, warm up, serve once in each lane that comes without
        [steps of a trial, nanoseconds of a step], and once under each strategy of "also"; a lane is
        a strategy, "notebook/continuous" one on that engine; "core": the processor core to stay
        on from then on, or null
    {"do": "turn", "lane": "continuous", "steps": 40}
        run so many steps
    {"do": "finish"}
        tell what work each lane did and what of it varied from trial to trial, and end
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
from dataclasses import astuple, dataclass, replace
from typing import Any, TextIO

import batchbench
from batchbench.batching.batcher import Batcher, Serving
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.errors import BatchbenchError, UsageError
from batchbench.reports.metrics import counters
from batchbench.reports.result import output_digest
from batchbench.studies.gate.turns import Turn
from batchbench.workloads import Workload

PROTOCOL = 2


def main() -> None:
    """Serve, in a fresh process each time that somebody asks."""
    gc.disable()  # what is imported stays; to look through it time and again takes half a second
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _import_all()
    gc.freeze()
    while sys.stdin.readline():  # no more than a line is there until it has been answered
        if not can_fork() or os.fork() == 0:
            _serve(out)
            sys.stderr.flush()
            os._exit(0)  # there is nothing to tidy up
        status = os.waitstatus_to_exitcode(os.wait()[1])
        if status:
            sys.exit(status)


def can_fork() -> bool:
    """Whether a forked process can do all that a fresh one can.

    Not beside a GPU, whose driver does not survive it, and nowhere but on Linux: elsewhere what the
    system's libraries have set up does not survive it either.
    """
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return sys.platform == "linux" and not any(map(os.path.exists, drivers))


def _import_all() -> None:
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import batchbench.batching.engines.torch.build
    import batchbench.batching.session  # noqa: F401


def _serve(out: TextIO) -> None:
    """Answer until told to finish, or until nobody asks any more."""
    worker = Worker()
    _tell(out, worker.hello())
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = worker.answer(asked)
        except BatchbenchError as error:
            answer = {"error": str(error), "usage": isinstance(error, UsageError)}
        except Exception:
            answer = {"error": traceback.format_exc(), "usage": False}
        _tell(out, answer)
        if asked["do"] == "finish" or "error" in answer:
            break


def elsewhere() -> list[object]:
    """Memory of random sizes: while it is kept, what is allocated lies elsewhere each time.

    Forked processes would otherwise all lay out their memory alike, and where a model lies makes it
    a little faster or slower (Curtsinger and Berger 2013, Stabilizer).
    """
    chance = random.SystemRandom()  # any other generator would be a copy of the parent's
    return [
        bytearray(chance.randrange(1, 1 << 16)),
        mmap.mmap(-1, chance.randrange(1, 1 << 9) * mmap.PAGESIZE),
    ]


def _tell(out: TextIO, answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


class Worker:
    """Serves one experiment's workload in one or several lanes."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        self._elsewhere = elsewhere()

    def hello(self) -> dict[str, Any]:
        """What this is."""
        from batchbench.batching.machine import environment

        return {
            "protocol": PROTOCOL,
            "forks": can_fork(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "version": batchbench.__version__,
            "file": batchbench.__file__,
            "environment": environment(),
        }

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        if asked["do"] == "open":
            told = self.open(asked["config"], asked["lanes"], asked["also"])
            stay_on(asked["core"])
            return told
        if asked["do"] == "turn":
            return {"turn": astuple(self._lanes[asked["lane"]].turn(asked["steps"]))}
        lanes = self._lanes.items()
        return {
            "varied": {name: lane.varied for name, lane in lanes},
            "work": {name: lane.work for name, lane in lanes},
        }

    def open(
        self,
        config: Mapping[str, Any],
        lanes: Mapping[str, Sequence[float] | None],
        also: Sequence[str],
    ) -> dict[str, Any]:
        """Make ready; what the work is, and what it runs on.

        Raises:
            UsageError: what is asked cannot be done by this installation, or not here.
        """
        from batchbench.batching.experiment import Experiment
        from batchbench.batching.models import ModelCache
        from batchbench.batching.progress import Watch
        from batchbench.batching.session import Session
        from batchbench.reports.result import workload_facts

        experiment, shelf = Experiment.from_config(config), ModelCache()
        sessions = {}
        for name in lanes:
            # Each lane has an engine of its own, whose cache holds its half-served batch.
            sessions[name] = Session(_asked_by(name, experiment), Watch(), shelf)
            _check_closed(sessions[name].workload)
            sessions[name].warm_up()
        first = next(iter(sessions.values()))
        others = {
            name: work_of(first.batcher(name).serve(first.workload, Watch())) for name in also
        }
        self._lanes = {
            name: Lane(
                sessions[name].batcher(strategy_of(name)),
                sessions[name].workload,
                Known(int(known[0]), known[1]) if known else None,
            )
            for name, known in lanes.items()
        }
        run_kernel()
        # What is there now stays; a collection between trials then has little to look through.
        gc.collect()
        gc.freeze()
        gc.disable()
        return {
            "workload": workload_facts(first.workload),
            "model": first.model,
            "environment": first.environment,
            "lanes": {
                name: {"steps": lane.known.steps, "step_ns": lane.known.step_ns, "work": lane.work}
                for name, lane in self._lanes.items()
            },
            "also": others,
        }


def _check_closed(workload: Workload) -> None:
    if not workload.closed:
        raise UsageError(
            "turns need requests that are all there at the start and of known lengths, so that "
            "both sides take the same steps; drop arrivals and --stop-at-eos"
        )


def stay_on(core: int | None) -> None:
    """Keep this thread, the only one that computes, on a core; where the system can."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def strategy_of(lane: str) -> str:
    """The strategy of a lane: ``continuous`` of ``notebook/continuous``."""
    return lane.rpartition("/")[2]


def _asked_by(lane: str, experiment: Any) -> Any:
    """The experiment with what a lane changes of it."""
    engine, _, strategy = lane.rpartition("/")
    serving = replace(experiment.serving, strategy=strategy)
    if engine:
        serving = replace(serving, engine=engine, prefill="auto", execution="auto")
    return replace(experiment, serving=serving)


KERNEL_BYTES = 16 << 20
"""Hashed by the calibration kernel: 10 ms or more on any core of today."""


@dataclass(frozen=True)
class Known:
    """What an earlier process learnt of a lane: steps of a trial, and what one takes."""

    steps: int
    step_ns: float


class Lane:
    """Serves one closed workload again and again.

    Every trial must do the work of the first, which is held against it each time that one ends:
    ``varied`` names what differed, a fault of ours. ``work`` is None before the first has ended.
    """

    def __init__(self, batcher: Batcher, workload: Workload, known: Known | None = None) -> None:
        self._batcher, self._workload = batcher, workload
        self._trial = 0
        self.work: Mapping[str, Any] | None = None
        self.varied: str | None = None
        self.known = known or self._learn()
        self._begin()

    def turn(self, steps: int) -> Turn:
        """Run so many steps, over the ends of trials where need be."""
        kernel_ns = run_kernel()
        if self._left == 0:
            self._end()
        timed = wall = cpu = 0
        todo = steps
        if self._done:  # the first pass of a trial is timed, cold as it is: it prefills
            self._advance(1)
            todo -= 1
        while todo:
            if self._left == 0:
                self._end()  # the next trial is set up between the times that count
            now = min(todo, self._left)
            began, began_cpu = time.perf_counter_ns(), time.process_time_ns()
            self._advance(now)
            wall += time.perf_counter_ns() - began
            cpu += time.process_time_ns() - began_cpu
            timed, todo = timed + now, todo - now
        return Turn(timed, wall, cpu, kernel_ns)

    def _learn(self) -> Known:
        """Serve once."""
        first = self._batcher.serve(self._workload, Watch(), trial=self._trial)
        self.work = work_of(first)
        return Known(first.num_steps, first.duration_ns / max(first.num_steps, 1))

    def _begin(self) -> None:
        gc.collect()
        self._serving = Serving(self._batcher, self._workload, Watch(), trial=self._trial)
        self._done = 0
        self._left = self.known.steps

    def _advance(self, steps: int) -> None:
        """Run so many steps of the trial, and wait until they are computed."""
        goal = self._done + steps
        while self._done < goal:
            self._serving.advance(goal - self._done)
            self._done = self._serving.steps
        self._batcher.engine.wait()
        self._left = self.known.steps - self._done

    def _end(self) -> None:
        """Close the trial, and begin the next."""
        recording = self._serving.advance()
        if recording is None:
            self.varied = "forward_passes"  # it takes more steps than it did
        else:
            self._hold_against_first(work_of(recording))
        self._trial += 1
        self._begin()

    def _hold_against_first(self, now: Mapping[str, Any]) -> None:
        self.work = self.work or now
        other = [name for name, value in self.work.items() if now[name] != value]
        self.varied = self.varied or (other[0] if other else None)


def work_of(recording: Recording) -> dict[str, Any]:
    """The counters of a trial, flat, and the digest of its outputs."""
    told: Mapping[str, Any] = counters(recording) if recording.has_steps else {}
    if (computed := recording.header.about.get("computed_passes")) is not None:
        told = {**told, "computed_passes": computed}
    return {**told, "output_digest": output_digest(recording)}


def run_kernel() -> int:
    """The calibration kernel: nanoseconds that it took.

    It hashes the same bytes on whatever side it runs and knows nothing of batchbench or torch, so
    that where it differs, something but them makes the difference.
    """
    began = time.perf_counter_ns()
    hashlib.blake2b(_KERNEL).digest()
    return time.perf_counter_ns() - began


_KERNEL = bytes(KERNEL_BYTES)
