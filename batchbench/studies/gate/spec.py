"""How long a gate looks, and what counts as a difference."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING

from batchbench import settings
from batchbench.batching.experiment import GENERATE_BATCH, Experiment
from batchbench.batching.presets import PRESETS
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_number, setting

if TYPE_CHECKING:
    from batchbench.reports.statistics import Rule


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


_PANEL = "Deciding"


@dataclass(frozen=True)
class DuetSpec:
    """How long to look, and what counts as a difference."""

    max_time: float = setting(
        300.0,
        "Seconds that all of it may take, the start of the processes included.",
        _PANEL,
        min=20,
        max=1e9,
        unit="seconds",
    )
    floor: float = setting(
        1.0,
        "Percent of loss that must be exceeded before anything is called slower.",
        _PANEL,
        min=0.0,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    margin: float = setting(
        5.0,
        "Percent of loss that must be ruled out before anything is called the same.",
        _PANEL,
        min=0.1,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    confidence: float = setting(
        0.999,
        "Probability with which equal versions are not called slower, all looks together.",
        _PANEL,
        min=0.5,
        max=0.999999,
        unit="share",
    )
    timed: str | None = setting(
        None,
        "Strategies whose time is compared and gated; of the others only the work is.",
        _PANEL,
        metavar="NAMES",
        default_text="the last of --strategy",
    )
    allow_improvement: bool = setting(
        False, "Fewer passes, or less computed in vain, is no failure.", _PANEL
    )

    def __post_init__(self) -> None:
        settings.check(self)
        check_margin(self.floor, self.margin)


@dataclass(frozen=True)
class CheckSpec:
    """With what this version is compared, how long to look, and what counts as a difference."""

    baseline: Path | None = setting(
        None, "The file that batchbench baseline save wrote.", "Base", metavar="FILE"
    )
    preset: str | None = setting(
        None,
        "Refuse a baseline that was made with another preset.",
        "Base",
        metavar="NAME",
        choices=tuple(PRESETS),
    )
    max_time: float = setting(
        240.0,
        "Seconds that all of it may take, the start of the processes included.",
        _PANEL,
        min=20,
        max=1e9,
        unit="seconds",
    )
    floor: float | None = setting(
        None,
        "Percent of loss that must be exceeded before anything is called slower.",
        _PANEL,
        min=0.0,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
        default_text="10, on a machine that is not the baseline's 20",
    )
    margin: float | None = setting(
        None,
        "Percent of loss that must be ruled out before anything is called the same.",
        _PANEL,
        min=0.1,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
        default_text="1.5 times the floor",
    )
    confidence: float = setting(
        0.999,
        "Probability with which equal versions are not called slower, all looks together.",
        _PANEL,
        min=0.5,
        max=0.999999,
        unit="share",
    )
    allow_improvement: bool = setting(
        False, "Fewer passes, or less computed in vain, is no failure.", _PANEL
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.floor is not None and self.margin is not None:
            check_margin(self.floor, self.margin)
        if self.baseline is None:
            raise UsageError(
                "--baseline: name the file to compare with; batchbench baseline save makes one"
            )


@dataclass(frozen=True)
class BaselineSpec:
    """What a baseline is made of, and where it goes."""

    processes: int = setting(
        12,
        "Fresh processes that are measured; each is a sample.",
        "Measuring",
        min=8,
        max=1000,
    )
    output: Path = setting(Path("baseline.json"), "File of the baseline.", "Output", metavar="FILE")
    overwrite: bool = setting(False, "Replace a baseline that is there.", "Output")
    quiet: bool = setting(False, "No progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


def rule_of(spec: DuetSpec) -> Rule:
    """The same in logarithms of a time's ratio."""
    from batchbench.reports.statistics import Rule

    return Rule(log1p(spec.floor / 100), log1p(spec.margin / 100), 1 - spec.confidence)


def lanes_of(experiment: Experiment, timed: str | None) -> tuple[list[str], list[str]]:
    """Strategies whose time is compared, and the others.

    Raises:
        UsageError: ``timed`` names one that is not served, or one that has no turns to take.
    """
    ours = list(experiment.serving.policies)
    if not ours:
        raise UsageError(
            f"--strategy {GENERATE_BATCH}: schedules for itself and cannot take turns; add one of "
            "ours, such as continuous"
        )
    names = [name.strip() for name in timed.split(",") if name.strip()] if timed else ours[-1:]
    for name in names:
        if name not in ours:
            raise UsageError(
                f"--timed {shown(name)}: is not among --strategy {','.join(ours)}; add it"
            )
    return names, [name for name in ours if name not in names]
