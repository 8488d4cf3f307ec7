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
        of_pair: a ratio of two strategies, of which the baseline has none.
        between: standard deviation of its logarithm that a fresh process adds to what its trials
            show.
        shown: whether it is looked at where nobody asked for it.
    """

    name: str
    unit: str | None
    higher_is_better: bool
    is_ratio: bool = False
    of_pair: bool = False
    between: float = 0.20
    shown: bool = False


_LATENCIES = ("queue", "ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", "median", "std", "p90", "p99", "p99.9")

# How much a fresh process adds was seen on a shared machine: to a ratio of strategies by the layout
# of memory and by who runs after whom; to a time by the clock and the neighbours of another session
# (one step took 4.7, 8.0 and 6.1 ms within an hour); and to the share of the floor by both.
GAUGES = {
    gauge.name: gauge
    for gauge in (
        Gauge("speedup", "×", True, is_ratio=True, of_pair=True, between=0.02, shown=True),
        Gauge("efficiency", None, True, is_ratio=True, of_pair=True, between=0.02, shown=True),
        Gauge("floor_share", None, True, is_ratio=True, between=0.05, shown=True),
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
"""By name; those of a pair are a comparison's in ``result.json``, the others a summary's."""
