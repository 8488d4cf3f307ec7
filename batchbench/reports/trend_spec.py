"""What is asked of a history of results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.settings import setting

METRICS = ("output_throughput", "speedup", "median_e2el_ms", "p99_itl_ms")
"""What is looked at unless something else is asked for."""

_HIGHER = (
    "_throughput",
    "_goodput",
    "slo_attainment",
    "floor_share",
    "speedup",
    "efficiency",
    "step_ratio",
)
_LOWER = ("_ms", "duration", "energy_joules", "joules_per_output_token", "cost_per_million")
_COMPARED = ("speedup", "efficiency", "step_ratio")


def is_compared(metric: str) -> bool:
    """Whether a metric is of two strategies of one run, and so of no one's summary."""
    return metric in _COMPARED


def higher_is_better(metric: str) -> bool:
    """Which way is up.

    Raises:
        UsageError: neither way: it counts what was asked, or is no metric of a result.
    """
    if any(part in metric for part in _HIGHER):
        return True
    if any(part in metric for part in _LOWER) and "arrival" not in metric:
        return False
    raise UsageError(
        f"--metric {shown(metric)}: has no better and worse; give output_throughput, speedup, "
        "p99_ttft_ms or another rate, ratio or time of docs/metrics.md"
    )


@dataclass(frozen=True)
class TrendSpec:
    """What is looked at, when a change is one, and where it is told."""

    metric: tuple[str, ...] = setting(
        METRICS,
        "A metric of a result's summary, or speedup, efficiency, step_ratio; may be repeated. The "
        "more are looked at, the more each must show.",
        "History",
        metavar="NAME",
    )
    strategy: tuple[str, ...] = setting(
        (), "Only this strategy's; may be repeated.", "History", metavar="NAME", default_text="all"
    )
    last: int = setting(
        200, "Look at the newest N results of each series.", "History", min=2, max=10**6
    )
    floor: float = setting(
        2.0,
        "Percent that a change must exceed, beside being significant.",
        "History",
        min=0.0,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    confidence: float = setting(
        0.99,
        "Confidence level required to report a change, over all series together.",
        "History",
        min=0.5,
        max=0.9999,
        unit="share",
    )
    fail_on_loss: bool = setting(
        False,
        "Exit code 1 if the newest change of a series is a loss, or it has lost over its whole "
        "length.",
        "Gate",
    )
    accept: str | None = setting(
        None,
        "Commit (its first letters) up to which all changes are known: they are shown and fail "
        "nothing.",
        "Gate",
        metavar="COMMIT",
        default_text="none",
    )
    strict: bool = setting(
        False, "With --fail-on-loss, exit code 3 where it cannot be told.", "Gate"
    )
    output: Path | None = setting(
        None, "Folder for trend.json and the pictures.", "Output", metavar="DIR"
    )
    markdown: Path | None = setting(
        None,
        "File for a table for a pull request; - is standard output.",
        "Output",
        metavar="FILE",
    )
    json: bool = setting(False, "Print trend.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "Show only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.metric:
            raise UsageError("--metric: give at least one, such as output_throughput")
        for metric in self.metric:
            higher_is_better(metric)
        if self.accept is not None and len(self.accept) < 4:
            raise UsageError(
                f"--accept {shown(self.accept)}: give at least 4 letters of the commit"
            )
        if self.json and str(self.markdown) == "-":
            raise UsageError("--json and --markdown -: give one of them")
