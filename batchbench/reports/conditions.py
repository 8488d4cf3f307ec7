"""What makes a comparison fail: conditions such as ``output_throughput < -5%``, and their rule."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.reports.gauges import GAUGES, Gauge
from batchbench.settings import setting
from batchbench.values import parse_number

_COUNTS = ("_passes", "_steps", "prefill_tokens", "kv_tokens_peak", "outputs")
"""How the names of what is counted exactly end."""

_FORM = re.compile(r"(?P<name>[^<>\s]+)\s*(?P<sign>[<>])=?\s*(?P<percent>[^<>=]+)%")


@dataclass(frozen=True)
class Condition:
    """A change that makes the answer bad where it is shown.

    Attributes:
        text: as it was typed.
        strategy: whose metric; None where any strategy's counts.
        falls: whether it is a fall that fails, and not a rise.
        share: of the change beyond which it fails, above 0.
    """

    text: str
    gauge: Gauge
    strategy: str | None
    falls: bool
    share: float

    @property
    def is_loss(self) -> bool:
        """Whether what fails is for the worse; people may also wish to hear of a gain."""
        return self.falls == self.gauge.higher_is_better

    @property
    def floor(self) -> float:
        """The share as the size of a log ratio."""
        return -math.log1p(-self.share) if self.falls else math.log1p(self.share)


def parse_condition(text: str) -> Condition:
    """``continuous.output_throughput < -5%`` as a condition.

    Raises:
        UsageError: it is not of this form, names no metric, or its sign and threshold disagree.
    """
    option = f"--fail-if '{shown(text)}'"
    found = _FORM.fullmatch(text.strip())
    must = (
        "must be a metric, < or >, and a change in percent, such as 'output_throughput < -5%' or "
        "'continuous.p99_ttft_ms > 10%'"
    )
    if found is None:
        raise UsageError(f"{option}: {must}")
    strategy, metric = _split(found["name"])
    if metric not in GAUGES:
        raise UsageError(f"{option}: {_unknown(metric)}")
    falls, share = found["sign"] == "<", float(parse_number(found["percent"], option, must)) / 100
    if share == 0:
        raise UsageError(
            f"{option}: a change of 0 % leaves nothing between a loss and noise; give the least "
            "that matters, such as 3%"
        )
    if falls != (share < 0):
        sign = "-" if falls else ""
        raise UsageError(
            f"{option}: a {'fall is < and a negative' if falls else 'rise is > and a positive'} "
            f"percentage; write '{shown(found['name'])} {found['sign']} "
            f"{sign}{abs(share) * 100:g}%'"
        )
    if abs(share) < 1e-6:
        raise UsageError(
            f"{option}: must be larger; give the smallest change that matters, such as 3%"
        )
    if falls and share <= -1:
        raise UsageError(f"{option}: nothing falls by 100 % or more; give less, such as -5%")
    return Condition(text.strip(), GAUGES[metric], strategy, falls, abs(share))


def _split(name: str) -> tuple[str | None, str]:
    """Strategy and metric; both may hold dots (``my.policies:Mine``, ``p99.9_ttft_ms``)."""
    for metric in sorted(GAUGES, key=len, reverse=True):
        if name.endswith(f".{metric}"):
            return name.removesuffix(f".{metric}"), metric
    if name in GAUGES:
        return None, name
    strategy, _, metric = name.rpartition(".")
    return strategy or None, metric


def _unknown(metric: str) -> str:
    name = shown(metric)
    if metric.endswith(_COUNTS):
        return f"{name} is counted exactly, and any change of it fails without being asked for"
    near = [name for name in GAUGES if metric in name.split("_") and GAUGES[name].shown]
    near = near or difflib.get_close_matches(metric, GAUGES, 3, 0.5)
    if near:
        return f"no metric is called {name}; near are {', '.join(near)}"
    usual = ", ".join(name for name, each in GAUGES.items() if each.shown)
    return f"no metric is called {name}; there are {usual} and the others of a summary"


def check_margin(floor: float, margin: float) -> None:
    """Raise :class:`UsageError` if a loss could be both slower and the same; both in percent."""
    if margin <= floor:
        raise UsageError(
            f"--margin {margin:g}: must be above --floor {floor:g} (both in percent), or a loss in "
            "between would be both slower and the same"
        )


@dataclass(frozen=True)
class CompareSpec:
    """When two versions differ, and which differences make the answer bad."""

    fail_if: tuple[str, ...] = setting(
        (),
        "Also fail where this change is shown: a metric of a summary (of one strategy: "
        "continuous.p99_ttft_ms), < or >, and a percentage, such as 'output_throughput < -5%'. "
        "Of speedup or efficiency it takes the place of --floor. Give it once a condition.",
        "Gate",
        metavar="CONDITION",
    )
    floor: float = setting(
        5.0,
        "Percent of a speed-up that must be shown to be lost for it to be slower. Less is within "
        "what two builds of one code differ by, between processes and machines of one kind.",
        "Gate",
        min=0.0,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    margin: float = setting(
        10.0,
        "Percent within which a change must be shown to lie, both ways, for it to be the same.",
        "Gate",
        min=0.1,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    confidence: float = setting(
        0.999,
        "Confidence level required to report a change, over all gated metrics together.",
        "Gate",
        min=0.5,
        max=0.999999,
        unit="share",
    )
    allow_improvement: bool = setting(
        False,
        "Pass where counts changed, if every count of that strategy that changed is better.",
        "Gate",
    )
    allow_environment_mismatch: bool = setting(
        False,
        "Gate speed-ups although machine, versions or execution differ. Absolute times are not "
        "compared even then.",
        "Gate",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        seen: dict[tuple[str, str | None, bool], str] = {}
        for condition in self.conditions:
            key = (condition.gauge.name, condition.strategy, condition.falls)
            if key in seen:
                raise UsageError(
                    f"--fail-if '{shown(condition.text)}': '{shown(seen[key])}' says already when "
                    "that fails; give one of them"
                )
            seen[key] = condition.text

    @property
    def conditions(self) -> list[Condition]:
        """What ``fail_if`` says."""
        return [parse_condition(text) for text in self.fail_if]

    @property
    def alpha(self) -> float:
        """Probability of any false alarm, for each side."""
        return 1 - self.confidence
