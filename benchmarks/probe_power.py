"""Measure the probe on simulated servers of known schedule: right, cannot tell, or wrong.

    .venv/bin/python benchmarks/probe_power.py                    # the set on which limits were set
    .venv/bin/python benchmarks/probe_power.py --set held-out     # servers and seeds of their own
    .venv/bin/python benchmarks/probe_power.py --set ticks        # replicas behind a timer
    .venv/bin/python benchmarks/probe_power.py --show 137         # one server in full

Each server is drawn at random: its schedule, slots, speed, cost of rows and prompts, chunks,
timers, jitter, network, hiccups, other people's requests, limits and replicas. The held-out set is
drawn from wider ranges with other seeds. A verdict is *wrong* if it names another kind than the
server's, or a number of slots that the server does not have. The result is written to
``benchmarks/results/probe/``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.probe_server import Kind, observe

from batchbench.studies.probe.judge import Kind as Verdict
from batchbench.studies.probe.judge import judge

SLOTS = (1, 1, 2, 3, 4, 5, 6, 8, 8, 12, 16, 24, 32, 48, 64)


def draw(random: np.random.Generator, *, wider: bool) -> Kind:
    """Draw a server."""
    policy = str(random.choice(["continuous"] * 5 + ["static"] * 4 + ["slices"]))
    slots = int(random.integers(1, 65)) if wider else int(random.choice(SLOTS))
    fastest, slowest = (3.0, 400.0) if wider else (5.0, 200.0)
    step = float(np.exp(random.uniform(np.log(fastest), np.log(slowest))))

    def sometimes(probability: float, value: float) -> float:
        return value if random.random() < probability else 0.0

    slower = 4 if wider and random.random() < 0.3 else 1
    replicas = 1
    if random.random() < 0.2:
        replicas = int(random.integers(2, 5 if wider else 4))
    return Kind(
        policy=policy,
        slots=slots,
        step=step,
        growth=float(random.uniform(0, 0.3 if wider else 0.15)),
        prefill=step * float(random.uniform(0, 1)) * slower,
        separate=bool(random.random() < 0.3),
        window=sometimes(0.4, float(random.uniform(5, 200 if wider else 100))),
        quantum=int(random.choice([1, 1, 2, 8])),
        chunk=int(random.choice([1] * 8 + [2, 4, 0, 0] + ([3, 5, 7, 10] if wider else []))),
        tick=sometimes(0.1, step * float(random.uniform(0.05, 1.5 if wider else 1.0))),
        jitter=float(random.uniform(0.002, 0.2 if wider else 0.1)),
        network=float(np.exp(random.uniform(np.log(0.02), np.log(3 if wider else 1)))),
        skew=float(random.uniform(0, 0.1 if wider else 0.05)),
        latency=float(np.exp(random.uniform(np.log(0.1), np.log(50 if wider else 20)))),
        hiccup=sometimes(0.3, float(random.uniform(0, 0.1 if wider else 0.05))),
        others=sometimes(0.25, float(random.uniform(0.1, 4 if wider else 2))),
        others_tokens=int(random.integers(10, 200 if wider else 80)),
        limit=int(sometimes(0.08, float(random.integers(1, 40)))),
        replicas=replicas,
        routing=str(random.choice(["turns", "random", "least"])),
        early_end=sometimes(0.15, float(random.uniform(0, 0.4))),
        context=None,
        tells=bool(random.random() < 0.2),
    )


def is_wrong(kind: Kind, verdict: Verdict, slots: int | None, bound: bool) -> bool:
    """Tell whether a verdict says something false of a server."""
    if verdict is Verdict.UNKNOWN:
        return False
    everywhere = kind.slots * kind.replicas
    truth = Verdict(kind.policy) if kind.policy != "slices" else Verdict.UNKNOWN
    truth = Verdict.SERIAL if everywhere == 1 else truth
    if truth is not verdict or slots is None:
        return True
    return slots > everywhere or (not bound and slots != everywhere)


def describe(kind: Kind) -> dict[str, Any]:
    """Return what a server differs in from the simplest."""
    usual = asdict(Kind())
    found = {name: value for name, value in asdict(kind).items() if value != usual[name]}
    return {n: round(v, 2) if isinstance(v, float) else v for n, v in found.items()}


def unshared(kind: Kind, random: np.random.Generator) -> Kind:
    """Return the hardest of servers: nothing shares a batch, but arrivals coincide by a timer."""
    return replace(
        kind,
        tick=kind.tick or kind.step * float(random.uniform(0.03, 1.5)),
        replicas=max(2, kind.replicas),
        policy=str(random.choice(["static", "static", "slices"])),
        slots=max(2, kind.slots),
    )


def name_of(kind: Kind) -> str:
    """Return the row of the table that a server belongs to."""
    name = "serial" if kind.slots == 1 else kind.policy
    name = name if kind.replicas == 1 else f"replicas, {name}"
    if kind.chunk == 0:
        name += ", buffered"
    return f"{name}, busy" if kind.others else name


def main() -> None:
    """Probe the servers of a set, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("setting", "held-out", "ticks"), default="setting")
    parser.add_argument("--servers", type=int, default=600)
    parser.add_argument("--show", type=int)
    parser.add_argument("--why", default="", help="print why it cannot tell, of such servers")
    chosen = parser.parse_args()
    wider = chosen.set == "held-out"
    first = 7_000_000 if wider else 0
    numbers = range(chosen.servers) if chosen.show is None else [chosen.show]
    rows: dict[str, Counter[str]] = {}
    wrong, seconds, exact = [], [], Counter[str]()
    for number in numbers:
        random = np.random.default_rng(first + number)
        kind = draw(random, wider=wider)
        if chosen.set == "ticks":
            kind = unshared(kind, random)
        seen, took = observe(kind, seed=first + number)
        verdict = judge(seen)
        bad = is_wrong(kind, verdict.kind, verdict.slots, verdict.slots_is_lower_bound)
        told = verdict.kind is not Verdict.UNKNOWN
        outcome = "wrong" if bad else "right" if told else "cannot tell"
        rows.setdefault(name_of(kind), Counter())[outcome] += 1
        if told and not bad:
            exact["at least" if verdict.slots_is_lower_bound else "exact"] += 1
        seconds.append(took)
        if chosen.why and chosen.why in name_of(kind) and outcome == "cannot tell":
            print(number, name_of(kind), verdict.reason)
        if bad or chosen.show is not None:
            wrong.append(
                {
                    "number": number,
                    "server": asdict(kind),
                    "verdict": verdict.kind,
                    "slots": verdict.slots,
                    "bound": verdict.slots_is_lower_bound,
                }
            )
            print(number, describe(kind), verdict.kind, verdict.slots, file=sys.stderr)
            if chosen.show is not None:
                print(verdict, file=sys.stderr)
    show(rows, seconds, exact)
    if chosen.show is None:
        write(chosen.set, rows, wrong, seconds, exact)


def show(rows: dict[str, Counter[str]], seconds: Sequence[float], exact: Counter[str]) -> None:
    """Print the table."""
    outcomes = ("right", "cannot tell", "wrong")
    print(f"{'server':<36}{'right':>8}{'cannot tell':>13}{'wrong':>8}")
    for name in sorted(rows):
        print(
            f"{name:<36}"
            + "".join(f"{rows[name][o]:>{w}}" for o, w in zip(outcomes, (8, 13, 8), strict=True))
        )
    total = sum(rows.values(), Counter[str]())
    print(
        f"{'all':<36}"
        + "".join(f"{total[o]:>{w}}" for o, w in zip(outcomes, (8, 13, 8), strict=True))
    )
    print(
        f"slots: {exact['exact']} exact, {exact['at least']} at least; seconds: median "
        f"{np.median(seconds):.0f}, p99 {np.percentile(seconds, 99):.0f}, most {max(seconds):.0f}"
    )


def write(
    name: str,
    rows: dict[str, Counter[str]],
    wrong: Sequence[object],
    seconds: Sequence[float],
    exact: Counter[str],
) -> None:
    """Write the result."""
    folder = ROOT / "benchmarks" / "results" / "probe"
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "set": name,
        "servers": {key: dict(rows[key]) for key in sorted(rows)},
        "slots": dict(exact),
        "seconds": {"median": float(np.median(seconds)), "most": max(seconds)},
        "wrong": wrong,
    }
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
