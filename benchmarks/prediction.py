"""Predicted wall time against measured: 20 varied closed workloads, half of them held out.

    .venv/bin/python benchmarks/prediction.py [--rounds 5] [--model toy-gpt2] [--requests 24]

Each round serves every workload once under each strategy, in an order that turns round, so that
what else the machine does falls on all alike. The cost of a step is fitted on the trials of one
half of the workloads; the other half is predicted and set beside the median of its measured times.
"""

import argparse
import gc
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from batchbench.batching.conduct import Session
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import Shelf
from batchbench.batching.watch import Watch
from batchbench.reports.fitting import counts_of, known_cost
from batchbench.reports.prediction import predict

COUNT = 20


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


def measure(sessions: list[Session], rounds: int) -> list[list[list]]:
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
    parser.add_argument("--model", default="toy-gpt2")
    parser.add_argument("--requests", type=int, default=24)
    asked = parser.parse_args()
    models, sessions = Shelf(), []
    for experiment in experiments(asked.model, asked.requests):
        # One seed of weights, so that the model is loaded once.
        workload = replace(experiment.workload)
        sessions.append(Session(replace(experiment, workload=workload), Watch(), models))
    for session in sessions[:3]:
        session.warm_up()
    found = measure(sessions, asked.rounds)
    taught = [r for i in range(0, COUNT, 2) for trials in found[i] for r in trials]
    known, quality = known_cost("benchmark", taught)
    table = Table(title=f"{asked.model}, {asked.rounds} rounds; fitted on the even workloads")
    for name in ("workload", "strategy", "steps", "same steps", "predicted s", "measured s"):
        table.add_column(name, justify="right")
    table.add_column("error", justify="right")
    errors = {True: [], False: []}
    for i, session in enumerate(sessions):
        told = predict(known, session.experiment.serving, session.workload)
        for recording, trials in zip(told, found[i], strict=True):
            measured = float(np.median([r.duration_ns for r in trials]))
            error = recording.duration_ns / measured - 1
            errors[i % 2 == 1].append(abs(error))
            same = all(np.array_equal(counts_of(recording), counts_of(r)) for r in trials)
            table.add_row(
                f"{i}{'' if i % 2 else ' (fitted)'}",
                recording.header.strategy,
                f"{recording.num_steps:,}",
                "yes" if same else "NO",
                f"{recording.duration_ns / 1e9:.3f}",
                f"{measured / 1e9:.3f}",
                f"{error:+.1%}",
            )
    console = Console(width=100)
    console.print(table)
    console.print(known.cost)
    console.print(quality)
    for held_out, name in ((True, "held out"), (False, "fitted")):
        each = errors[held_out]
        console.print(f"{name}: median {np.median(each):.1%}, worst {max(each):.1%} of {len(each)}")


if __name__ == "__main__":
    main()
