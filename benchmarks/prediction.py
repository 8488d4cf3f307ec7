"""Predicted wall time against measured: 20 varied closed workloads, half of them held out.

    .venv/bin/python benchmarks/prediction.py [--rounds 5] [--model FOLDER] [--requests 24]

Each round serves every workload once under each strategy, in an order that turns round, so that
what else the machine does falls on all alike. The cost of a step is fitted on one half of the
workloads; the other half is predicted and set beside what was measured, in two ways:

wall    fitted on all trials; measured is the median wall time over the rounds;
quiet   on a machine that others use as well, most of what differs from trial to trial is theirs. As
        the steps of a closed workload are the same in every round, the least that each of them took
        in any round, and each pause between them, makes a trial that nobody disturbed. On a machine
        of one's own the two agree.

``--clock processor`` times steps by the processor time of this process instead of the wall's clock:
what others compute meanwhile is then left out (give OMP_NUM_THREADS=1 with it, as the time
of several threads would be added).
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from batchbench.batching.bench import LocalBench
from batchbench.batching.engines import WallClock
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import KnownCost, StepCost
from batchbench.reports.prediction import counts_of, known_cost, predict

COUNT = 20

SMALL = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 4096,
    "n_positions": 512,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""A GPT-2 of 1.4 million parameters, with dummy weights."""


def experiments(model: str, requests: int) -> list[Experiment]:
    """Closed workloads of many shapes: lengths, prompts, batch sizes, ways of prefill, orders."""
    outputs = (
        "uniform:min=4,max=40",
        "lognormal:mean=24,sigma=0.8,max=120",
        "24",
        "exponential:mean=24,max=120",
        "cycle:every=6,long=90,short=8",
    )
    prompts = ("8", "uniform:min=4,max=60", "32", "lognormal:mean=24,sigma=0.6,max=80")
    return [
        Experiment.of(
            {
                "model": model,
                "load_format": "dummy",
                "batch_size": (8, 4, 6, 8, 2)[(i * 3 + i // 5) % 5],
                "queue_size": requests + 4 * (i % 3),
                "output_tokens": outputs[i % 5],
                "prompt_tokens": prompts[i % 4],
                "prefill": ("mixed", "separate")[i // 2 % 2],
                "order": ("fifo", "longest-first", "shortest-first")[i % 3],
                "seed": i,
            }
        )
        for i in range(COUNT)
    ]


class ProcessorClock(WallClock):
    """Processor time of this process."""

    def restart(self) -> None:
        self._zero = time.process_time_ns()

    def now(self) -> int:
        return time.process_time_ns() - self._zero


UNIT = KnownCost("none", StepCost(1e6), (), 0, 0)


def measure(sessions: list[LocalBench], rounds: int) -> list[list[list]]:
    """Recordings by workload, strategy and round."""
    found = [[[] for _ in session.strategies()] for session in sessions]
    for turn in range(rounds):
        for i, session in list(enumerate(sessions))[:: 1 if turn % 2 == 0 else -1]:
            for j, batcher in enumerate(session.strategies()):
                gc.collect()
                gc.disable()
                found[i][j].append(batcher.serve(session.workload, Watch(), trial=turn))
                gc.enable()
        print(f"round {turn + 1}/{rounds}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a folder, or a name as run takes; a small GPT-2 if not")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    asked = parser.parse_args()
    if asked.clock == "processor":
        from batchbench.batching.engines.torch import base

        base.WallClock = ProcessorClock  # of which each engine makes its own
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
        models = ModelCache()
        asked_for = experiments(asked.model or folder, asked.requests)
        sessions = [LocalBench(experiment, Watch(), models) for experiment in asked_for]
    for session in sessions[:3]:
        session.warm_up()
    found = measure(sessions, asked.rounds)
    quiet = [[[undisturbed(trials)] for trials in each] for each in found]
    console = Console(width=110)
    same = sum(
        all(np.array_equal(counts_of(told), counts_of(real)) for real in trials)
        for session, each in zip(sessions, found, strict=True)
        for told, trials in zip(predicted(session, UNIT), each, strict=True)
    )
    console.print(f"simulated and real steps are the same in {same} of {2 * COUNT} cases")
    report(console, "wall", sessions, found)
    report(console, "quiet", sessions, quiet)


def predicted(session: LocalBench, known: KnownCost) -> list[Recording]:
    """Return predicted recordings of a session's workload, one per strategy."""
    return predict(known, session.experiment.serving, session.workload)


def undisturbed(trials: list[Recording]) -> Recording:
    """One trial of the least that each step and each pause took in any of them."""
    ends = np.stack([r.step_ends_ns for r in trials])
    starts = np.stack([r.step_starts_ns for r in trials])
    before = np.concatenate([np.zeros((len(trials), 1), np.int64), ends[:, :-1]], axis=1)
    least_pause, least_step = (starts - before).min(0), (ends - starts).min(0)
    # In a call of several passes one begins where the last ends; calls are cut differently in each
    # trial, by what the clock says, so a pause that only some have is none.
    new_ends = np.cumsum(least_pause + least_step)
    first = trials[0]
    new_starts = (new_ends - least_step)[first.first_steps]
    spans = replace(first.spans, start_ns=new_starts)
    return replace(first, spans=spans, ends_ns=new_ends)


def report(
    console: Console, name: str, sessions: list[LocalBench], found: list[list[list[Recording]]]
) -> None:
    """Fit on the even workloads, predict all, and print predicted beside measured."""
    taught = [r for each in found[::2] for trials in each for r in trials]
    known, quality = known_cost("benchmark", taught)
    table = Table(title=f"{name}: fitted on the even workloads")
    for head in ("workload", "slots", "strategy", "steps", "predicted s", "measured s", "error"):
        table.add_column(head, justify="right")
    errors = {True: [], False: []}
    for i, (session, each) in enumerate(zip(sessions, found, strict=True)):
        for told, trials in zip(predicted(session, known), each, strict=True):
            measured = float(np.median([r.duration_ns for r in trials]))
            error = told.duration_ns / measured - 1
            errors[i % 2 == 1].append(abs(error))
            table.add_row(
                f"{i}{'' if i % 2 else ' (fitted)'}",
                f"{told.header.slots}",
                told.header.strategy,
                f"{told.num_steps:,}",
                f"{told.duration_ns / 1e9:.3f}",
                f"{measured / 1e9:.3f}",
                f"{error:+.1%}",
            )
    console.print(table)
    console.print(known.cost)
    console.print(quality)
    for held_out, which in ((True, "held out"), (False, "fitted")):
        values = errors[held_out]
        median, worst = np.median(values), max(values)
        console.print(f"{name}, {which}: median {median:.1%}, worst {worst:.1%} of {len(values)}\n")


if __name__ == "__main__":
    main()
