"""Goals: what latency is good enough, and what the machine costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_float, setting

LATENCIES = ("ttft", "tpot", "e2el")
"""What a service-level objective may limit, under the names of ``vllm bench serve --goodput``."""


LONGEST_MS = 1e12
"""Largest limit in milliseconds, thirty years."""


@dataclass(frozen=True)
class GoalsSpec:
    """What a result is held against; it changes nothing of what is measured.

    ``slo`` holds service-level objectives as ``METRIC:MS``, such as ``ttft:500``: a request is
    good if it meets all of them.
    """

    slo: tuple[str, ...] = setting(
        (),
        "Latency limit in milliseconds, such as ttft:500; also tpot:50 or e2el:3000. Repeat for "
        "several limits. Adds the share and the rate of requests that meet all of them.",
        "Goals",
        metavar="METRIC:MS",
    )
    price_per_hour: float | None = setting(
        None,
        "Price of the machine per hour; adds the cost of a million output tokens.",
        "Goals",
        min=0.0,
        max=1e9,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        parse_slos(self.slo)

    @property
    def limits_ms(self) -> dict[str, float]:
        """Limit of each latency that has one, in milliseconds."""
        return parse_slos(self.slo)


def parse_slos(texts: tuple[str, ...]) -> dict[str, float]:
    """``("ttft:500", "tpot:50")`` as limits by latency.

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


def as_config(goals: GoalsSpec) -> Mapping[str, object]:
    """The goals as JSON values."""
    return {"slo": list(goals.slo), "price_per_hour": goals.price_per_hour}


def from_config(config: Mapping[str, object]) -> GoalsSpec:
    """The goals that :func:`as_config` wrote."""
    slo, price = config["slo"], config["price_per_hour"]
    assert isinstance(slo, list)
    assert price is None or isinstance(price, int | float)
    return GoalsSpec(tuple(slo), price)
