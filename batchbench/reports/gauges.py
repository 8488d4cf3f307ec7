"""What times can be compared by: each figure's name, unit, and which way is better; no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gauge:
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

GAUGES = {
    gauge.name: gauge
    for gauge in (
        Gauge("speedup", "×", True, is_ratio=True, shown=True),
        Gauge("efficiency", None, True, is_ratio=True, shown=True),
        Gauge("output_throughput", "tok/s", True, shown=True),
        Gauge("request_throughput", "req/s", True, shown=True),
        Gauge("total_token_throughput", "tok/s", True),
        Gauge("duration", "s", False, shown=True),
        Gauge("request_goodput", "req/s", True),
        Gauge("slo_attainment", None, True),
        Gauge("energy_joules", "J", False),
        Gauge("joules_per_output_token", "J", False),
        *(
            Gauge(
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
