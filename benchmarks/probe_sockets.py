"""Probe servers of known schedule over real sockets, beside a process that loads the machine.

    .venv/bin/python benchmarks/probe_sockets.py --runs 20 --load

The five kinds of server of ``tests/support/schedules.py`` take turns, each in a process of its own,
with random slots and steps of 15 to 45 ms. The result is ``benchmarks/results/probe/sockets.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.schedules import FIVE, MS, Schedule
from support.servers import Manner, serving

from batchbench.batching.progress import Watch
from batchbench.batching.remote.spec import TargetSpec
from batchbench.studies.probe.ask import probe
from batchbench.studies.probe.judge import Kind

BURN = "while True: pass"


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process until the block ends."""
    started = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def draw(name: str, chance: random.Random) -> Schedule:
    """Draw a server of this kind."""
    slots = 1 if name == "serial" else chance.choice([2, 3, 4, 6, 8, 12])
    step_ns = int(chance.uniform(15, 45) * MS)
    return replace(FIVE[name], slots=slots, step_ns=step_ns, jitter=0.03)


def run(name: str, schedule: Schedule) -> dict[str, object]:
    """Probe a server; return the outcome."""
    facts = f"{schedule.kind},{schedule.slots},{schedule.replicas},{schedule.buffered}"
    with process(__file__, "--serve", f"{facts},{schedule.step_ns}") as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        findings = probe(TargetSpec(target=url), "auto", 60.0, Watch())
    verdict, slots = findings.verdict, schedule.slots * schedule.replicas
    truth = Kind.SERIAL if slots == 1 else Kind(schedule.kind)
    right = verdict.kind is truth and (
        verdict.slots == slots
        or (verdict.slots_is_lower_bound and verdict.slots is not None and verdict.slots < slots)
    )
    outcome = "right" if right else "cannot tell" if verdict.kind is Kind.UNKNOWN else "wrong"
    return {
        "server": name,
        "slots": slots,
        "step_ms": round(schedule.step_ns / MS, 1),
        "verdict": verdict.kind.value,
        "counted": verdict.slots,
        "at_least": verdict.slots_is_lower_bound,
        "reason": verdict.reason,
        "seconds": round(findings.took_s, 1),
        "outcome": outcome,
    }


def serve(facts: str) -> None:
    """Serve until killed."""
    kind, slots, replicas, buffered, step = facts.split(",")
    schedule = replace(
        FIVE["static" if kind == "static" else "continuous"],
        slots=int(slots),
        replicas=int(replicas),
        buffered=buffered == "True",
        step_ns=int(step),
        jitter=0.03,
    )
    with serving(schedule, Manner()) as server:
        print(server.url, flush=True)
        server.join()


def main() -> None:
    """Probe one server after another, and print and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", action="store_true", help="load the machine meanwhile")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    chance, outcomes = random.Random(chosen.seed), []
    names = list(FIVE)
    for number in range(chosen.runs):
        name = names[number % len(names)]
        schedule = draw(name, chance)
        if chosen.load:
            with process("-c", BURN):
                outcome = run(name, schedule)
        else:
            outcome = run(name, schedule)
        outcomes.append(outcome)
        print(number + 1, outcome, flush=True)
    right = sum(outcome["outcome"] == "right" for outcome in outcomes)
    print(f"{right} of {len(outcomes)} right; load average {os.getloadavg()[0]:.1f}")
    data = {"loaded": chosen.load, "load_average": os.getloadavg()[0], "runs": outcomes}
    file = ROOT / "benchmarks" / "results" / "probe" / "sockets.json"
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
