"""Measure the time of a pair of processes and the scatter of its value, forked and started.

    .venv/bin/python benchmarks/pair_scatter.py [--pairs 24] [--of-one 1 8]

It runs pairs of this installation against itself, as ``batchbench duet --preset ci`` does.
``--of-one`` is the number of processes forked from one parent that has imported everything; with 1
each process imports everything again. The true value of every pair is 0. Forks of one parent could
share a bias; if so, the means of those groups scatter more than their members do, and F is above 1.
"""

from __future__ import annotations

import argparse
from statistics import fmean, median, stdev

from scipy import stats

from batchbench.batching.experiment import Experiment
from batchbench.studies.gate import processes
from batchbench.studies.gate.duet import ProcessPairs, calibrate
from batchbench.studies.gate.processes import Workers, this_installation

STRATEGY = "continuous"


def scatter(pairs: int, of_one: int) -> None:
    """Run pairs and print what they tell."""
    processes.FORKS_PER_PARENT = of_one
    experiment = Experiment.of(preset="ci")
    values, seconds, known = [], [], None
    with Workers(this_installation(), 1) as base, Workers(this_installation(), 1) as new:
        stage = ProcessPairs((base, new), experiment, [])
        for number in range(pairs):
            pair, _ = stage.pair([STRATEGY], known)
            if number == 1:
                known = calibrate(pair)
            values.append(pair.value(STRATEGY))
            seconds.append(pair.seconds)
    groups = [values[i : i + of_one] for i in range(0, pairs, of_one)]
    groups = [group for group in groups if len(group) > 1]
    told = ""
    if len(groups) > 1:
        found = stats.f_oneway(*groups)
        told = f"; between parents F {found.statistic:.2f} (p {found.pvalue:.2f})"
    print(
        f"{of_one} of one: {pairs} pairs, scatter {stdev(values):.2%}, mean {fmean(values):+.2%}, "
        f"{median(seconds):.1f} s a pair (mean {fmean(seconds):.1f} s){told}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--of-one", type=int, nargs="*", default=[1, 8])
    asked = parser.parse_args()
    for of_one in asked.of_one:
        scatter(asked.pairs, of_one)


if __name__ == "__main__":
    main()
