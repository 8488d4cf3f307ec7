"""Goals of a run: the latency that is good enough, and the price of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_float, setting

LATENCIES = ("ttft", "tpot", "e2el")
"""Latencies that can have a limit, under the names of ``vllm bench serve --goodput``."""

LONGEST_MS = 1e12
"""Largest limit in milliseconds, thirty years."""


@dataclass(frozen=True)
class GoalsSpec:
    """Limits and a price by which a result is judged; they change nothing that is measured.

    ``slo`` has service-level objectives as ``METRIC:MS``, such as ``ttft:500``. A request is good
    if it meets all of them.
    """

    slo: tuple[str, ...] = setting(
        (),
        "Latency limit in milliseconds, such as ttft:500; also tpot:50 or e2el:3000. Repeat for "
        "several limits. Results then show the share and rate of requests that meet all limits.",
        "Goals",
        metavar="METRIC:MS",
    )
    price_per_hour: float | None = setting(
        None,
        "Price of the machine per hour; results then have the cost of a million output tokens.",
        "Goals",
        min=0.0,
        max=1e9,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        parse_slos(self.slo)

    @property
    def limits_ms(self) -> dict[str, float]:
        """Limits in milliseconds, by latency."""
        return parse_slos(self.slo)


def parse_slos(texts: tuple[str, ...]) -> dict[str, float]:
    """Return ``("ttft:500", "tpot:50")`` as limits in milliseconds, by latency.

    Raises:
        UsageError: a text is not of this form, or limits a latency a second time.
    """
    limits: dict[str, float] = {}
    for text in texts:
        place = f"--slo {shown(text)}"
        metric, colon, limit = (part.strip() for part in text.partition(":"))
        if metric not in LATENCIES or not colon:
            raise UsageError(
                f"{place}: must be one of {', '.join(LATENCIES)}, a colon and milliseconds, such "
                "as --slo ttft:500"
            )
        if metric in limits:
            raise UsageError(f"{place}: {metric} has a limit already; drop one of them")
        limits[metric] = parse_float(limit, place, "milliseconds")
        if not 0 < limits[metric] <= LONGEST_MS:
            raise UsageError(
                f"{place}: must be above 0 and at most {LONGEST_MS:g} milliseconds, such as "
                f"{metric}:500"
            )
    return limits


NO_GOALS = GoalsSpec()
