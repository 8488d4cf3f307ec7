"""What times can be compared by: each figure's name, unit, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A figure of one strategy.

    Attributes:
        name: as ``result.json`` names it.
        is_ratio: of two things timed in one run, so that the machine's speed cancels out; else it
            is an absolute time or rate.
        shown: whether it is looked at where nobody asked for it.
    """

    name: str
    unit: str | None
    higher_is_better: bool
    is_ratio: bool = False
    shown: bool = False


_LATENCIES = ("queue", "ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", "median", "std", "p90", "p99", "p99.9")

MEASURES = {
    measure.name: measure
    for measure in (
        Measure("speedup", "×", True, is_ratio=True, shown=True),
        Measure("efficiency", None, True, is_ratio=True, shown=True),
        Measure("output_throughput", "tok/s", True, shown=True),
        Measure("request_throughput", "req/s", True, shown=True),
        Measure("total_token_throughput", "tok/s", True),
        Measure("duration", "s", False, shown=True),
        Measure("request_goodput", "req/s", True),
        Measure("slo_attainment", None, True),
        Measure("energy_joules", "J", False),
        Measure("joules_per_output_token", "J", False),
        *(
            Measure(
                f"{statistic}_{latency}_ms",
                "ms",
                False,
                shown=statistic in ("median", "p99") and latency != "queue",
            )
            for latency in _LATENCIES
            for statistic in _STATISTICS
        ),
    )
}
"""By name; *speedup* and *efficiency* are those of a comparison, the others of a summary."""
