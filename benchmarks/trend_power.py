"""Measure how often batchbench trend finds a step of known size in noise, and one in pure noise.

    .venv/bin/python benchmarks/trend_power.py [--repeats 100] [--histories 200] [--seed 0]

Series are drawn: a level, normal noise, and a step after 60 % of the results. They are judged as
one of the seven series of a history at the defaults (confidence 99 %, floor 2 %). *Found*: a loss
that counts, at most one result off; in brackets how often at the very result. False alarms are
counted over whole histories of seven series of which none changes. Prints Markdown.
"""

import argparse
import math
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from scipy import stats

from batchbench.studies.trend.changes import judge_series
from batchbench.studies.trend.history import Entry, Series, Value

SERIES, CONFIDENCE, FLOOR = 7, 0.99, 0.02
ALPHA = (1 - CONFIDENCE) / 2 / SERIES
METRIC = "output_throughput"


def series_of(logs) -> Series:
    """A series with these logarithms, of so many results in a row."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    entries = [
        Entry(
            Path(str(i)), start + timedelta(days=i), f"commit-{i}", {}, {},
            values={(METRIC, "continuous"): Value(math.exp(log))},
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    return Series(METRIC, "continuous", entries)


def found_in(length: int, noise: float, step: float, repeats: int, random) -> tuple[int, int, int]:
    """Return how often the step was found (within one result; exactly) and the drift reported."""
    at = round(0.6 * length)
    near = exact = drifted = 0
    for _ in range(repeats):
        logs = noise * random.standard_normal(length)
        logs[at:] += math.log1p(-step)
        told = judge_series(series_of(logs), ALPHA, FLOOR)
        places = [told.series.entries.index(c.after) for c in told.changes if c.counts]
        near += any(abs(place - at) <= 1 for place in places)
        exact += at in places
        drifted += told.drift is not None and told.drift.counts
    return near, exact, drifted


def alarms_in(length: int, noise: float, histories: int, random) -> tuple[int, int]:
    """Histories in which anything is significant, and in which anything counts."""
    significant = counted = 0
    for _ in range(histories):
        told = [
            judge_series(series_of(noise * random.standard_normal(length)), ALPHA, FLOOR)
            for _ in range(SERIES)
        ]
        counted += any(
            c.counts for each in told for c in [*each.changes, *([each.drift] * bool(each.drift))]
        )
        significant += any(
            each.changes or (each.drift is not None and each.drift.p_value <= ALPHA)
            for each in told
        )
    return significant, counted


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--histories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random, began = np.random.default_rng(asked.seed), time.perf_counter()
    steps = (0.01, 0.02, 0.03, 0.05)
    print("| results | noise | " + " | ".join(f"step of {step:.0%}" for step in steps) + " |")
    print("| ---: | ---: |" + " ---: |" * len(steps))
    for length in (20, 50):
        for noise in (0.01, 0.02):
            cells = []
            for step in steps:
                near, exact, _ = found_in(length, noise, step, asked.repeats, random)
                cells.append(f"{near / asked.repeats:.0%} ({exact / asked.repeats:.0%})")
            print(f"| {length} | {noise:.0%} | {' | '.join(cells)} |", flush=True)
    print("\n| results | noise | histories | significant | beyond the floor too | at most |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in (20, 50):
        for noise in (0.01, 0.02):
            bad, counted = alarms_in(length, noise, asked.histories, random)
            most = stats.binomtest(counted, asked.histories).proportion_ci(0.9, "exact").high
            print(
                f"| {length} | {noise:.0%} | {asked.histories} | {bad} | {counted} | {most:.1%} |",
                flush=True,
            )
    print(f"\n{asked.repeats} series a cell; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
