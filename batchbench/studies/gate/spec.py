"""Options of compare, duet, check and baseline save; metrics, and conditions of ``--fail-if``."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from batchbench import settings
from batchbench.batching.experiment import Experiment
from batchbench.batching.presets import PRESETS
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_number, setting


@dataclass(frozen=True)
class Metric:
    """A measured quantity of one strategy."""

    name: str  # in result.json
    unit: str | None
    higher_is_better: bool
    is_ratio: bool = False  # of two times of one run, so that machine speed cancels out
    of_pair: bool = False  # a ratio of two strategies, which the baseline strategy does not have
    between: float = 0.20  # standard deviation of its logarithm, between processes
    shown: bool = False  # compared even if no option names it


# ``between`` was measured on a shared machine. Ratios of strategies vary with memory layout and the
# order of runs. Times also vary with the clock and with neighbours (one step took 4.7, 8.0 and
# 6.1 ms within an hour). The share of the floor varies with both.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("speedup", "×", True, is_ratio=True, of_pair=True, between=0.02, shown=True),
        Metric("efficiency", None, True, is_ratio=True, of_pair=True, between=0.02, shown=True),
        Metric("floor_share", None, True, is_ratio=True, between=0.05, shown=True),
        Metric("output_throughput", "tok/s", True, shown=True),
        Metric("request_throughput", "req/s", True, shown=True),
        Metric("total_token_throughput", "tok/s", True),
        Metric("duration", "s", False, shown=True),
        Metric("request_goodput", "req/s", True),
        Metric("slo_attainment", None, True),
        Metric("energy_joules", "J", False),
        Metric("joules_per_output_token", "J", False),
        *(
            Metric(f"{statistic}_{latency}_ms", "ms", False, shown=usual and latency != "queue")
            for latency in ("queue", "ttft", "tpot", "itl", "e2el")
            for statistic in ("mean", "median", "std", "p90", "p99", "p99.9")
            for usual in [statistic in ("median", "p99")]
        ),
    )
}
"""Metrics by name; those of a pair are in a result's comparison, the others in its summary."""

_COUNTS = ("_passes", "_steps", "prefill_tokens", "kv_tokens_peak", "outputs")
"""Endings of the names of exact counts."""

_FORM = re.compile(r"(?P<name>[^<>\s]+)\s*(?P<sign>[<>])=?\s*(?P<percent>[^<>=]+)%")


@dataclass(frozen=True)
class Condition:
    """A change that fails the comparison if it is shown."""

    text: str  # as typed
    metric: Metric
    strategy: str | None  # whose metric counts; None for any
    falls: bool  # a fall fails; otherwise a rise fails
    share: float  # size of the change beyond which it fails, above 0

    @property
    def is_loss(self) -> bool:
        """Return False if the change is an improvement, which users may also ask to hear of."""
        return self.falls == self.metric.higher_is_better


def parse_condition(text: str) -> Condition:
    """Parse a condition such as ``continuous.output_throughput < -5%``.

    Raises:
        UsageError: it has another form, an unknown metric, or a sign that contradicts its
            percentage.
    """
    option = f"--fail-if '{shown(text)}'"
    match = _FORM.fullmatch(text.strip())
    must = (
        "must be a metric, < or >, and a change in percent, such as 'output_throughput < -5%' or "
        "'continuous.p99_ttft_ms > 10%'"
    )
    if match is None:
        raise UsageError(f"{option}: {must}")
    # Both may hold dots: my.policies:Mine.p99.9_ttft_ms.
    name = match["name"]
    known = (metric for metric in METRICS if f".{name}".endswith(f".{metric}"))
    metric = max(known, key=len, default=name.rpartition(".")[2])
    strategy = name[: -len(metric) - 1] or None
    if metric not in METRICS:
        raise UsageError(f"{option}: {_unknown(metric)}")
    falls, share = match["sign"] == "<", float(parse_number(match["percent"], option, must)) / 100
    if abs(share) < 1e-6:
        raise UsageError(
            f"{option}: any noise is a change of more than 0 %; give the smallest change that "
            "matters, such as 3%"
        )
    if falls != (share < 0):
        rule = "fall is < and a negative" if falls else "rise is > and a positive"
        right = f"{shown(name)} {match['sign']} {-share * 100:g}%"
        raise UsageError(f"{option}: a {rule} percentage; write '{right}'")
    if falls and share <= -1:
        raise UsageError(f"{option}: nothing falls by 100 % or more; give less, such as -5%")
    return Condition(text.strip(), METRICS[metric], strategy, falls, abs(share))


def _unknown(metric: str) -> str:
    name = shown(metric)
    if metric.endswith(_COUNTS):
        return f"{name} is an exact count; any change of it fails without this option"
    near = [name for name in METRICS if metric in name.split("_") and METRICS[name].shown]
    near = near or difflib.get_close_matches(metric, METRICS, 3, 0.5)
    if near:
        return f"there is no metric {name}; similar ones are {', '.join(near)}"
    usual = ", ".join(name for name, metric in METRICS.items() if metric.shown)
    return f"there is no metric {name}; there are {usual} and the others of a summary"


def check_margin(floor: float, margin: float) -> None:
    """Raise UsageError if a loss could be both slower and the same; both are in percent."""
    if margin <= floor:
        raise UsageError(
            f"--margin {margin:g}: must be above --floor {floor:g} (both in percent), or a loss "
            "between the two would be both slower and the same"
        )


_PANEL = "Gate"


_PERCENT = {"min": 0.0, "max": 90.0, "metavar": "PERCENT", "unit": "percent"}
_MARGIN = {**_PERCENT, "min": 0.1}
_SHARE = {"min": 0.5, "max": 0.999999, "unit": "share"}
_SECONDS = {"min": 20, "max": 1e9, "unit": "seconds"}

_FLOOR_HELP = "A version is called slower if its loss is shown to exceed this percentage."
_MARGIN_HELP = "Two versions are called the same if a loss above this percentage is ruled out."
_CONFIDENCE_HELP = (
    "Probability that equal versions are not called slower, over all tests of a command."
)
_TIME_HELP = "Time limit in seconds, including the start of processes; at least 20."
_ALLOW_HELP = "Let a strategy's counts change if every change is better (fewer passes)."


@dataclass(frozen=True)
class CompareSpec:
    """Thresholds of a comparison of results."""

    fail_if: tuple[str, ...] = setting(
        (),
        "Also fail if this change is shown, such as 'output_throughput < -5%': a metric of the "
        "summary, < or >, and a percentage. It applies to every strategy unless the metric names "
        "one (continuous.p99_ttft_ms). For speedup and efficiency it replaces --floor. Repeat it "
        "for more conditions.",
        _PANEL,
        metavar="CONDITION",
    )
    floor: float = setting(
        5.0,
        "A version is called slower if its loss of speed-up is shown to exceed this percentage. "
        "Two builds of the same code, or two machines of one kind, can differ by a few percent.",
        _PANEL,
        **_PERCENT,
    )
    margin: float = setting(
        10.0,
        "Two versions are called the same if the change is shown to stay within this percentage.",
        _PANEL,
        **_MARGIN,
    )
    confidence: float = setting(
        0.999,
        "Confidence level required to report a change, over all gated metrics together.",
        _PANEL,
        **_SHARE,
    )
    allow_improvement: bool = setting(False, _ALLOW_HELP, _PANEL)
    allow_environment_mismatch: bool = setting(
        False,
        "Gate speed-ups even if machine, software versions or execution differ. Absolute times are "
        "still not compared.",
        _PANEL,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        seen: dict[tuple[str, str | None, bool], str] = {}
        for condition in self.conditions:
            key = (condition.metric.name, condition.strategy, condition.falls)
            if key in seen:
                raise UsageError(
                    f"--fail-if '{shown(condition.text)}': has the same metric and direction as "
                    f"'{shown(seen[key])}'; give one of them"
                )
            seen[key] = condition.text

    @property
    def conditions(self) -> list[Condition]:
        return [parse_condition(text) for text in self.fail_if]


@dataclass(frozen=True)
class DuetSpec:
    """Time limit and thresholds of a duet."""

    max_time: float = setting(300.0, _TIME_HELP, _PANEL, **_SECONDS)
    floor: float = setting(1.0, _FLOOR_HELP, _PANEL, **_PERCENT)
    margin: float = setting(5.0, _MARGIN_HELP, _PANEL, **_MARGIN)
    confidence: float = setting(0.999, _CONFIDENCE_HELP, _PANEL, **_SHARE)
    timed: str | None = setting(
        None,
        "Strategies whose time is compared and gated, separated by commas. For the others only "
        "counts and outputs are compared.",
        _PANEL,
        metavar="NAMES",
        default_text="the last of --strategy",
    )
    allow_improvement: bool = setting(False, _ALLOW_HELP, _PANEL)

    def __post_init__(self) -> None:
        settings.check(self)
        check_margin(self.floor, self.margin)


@dataclass(frozen=True)
class CheckSpec:
    """The baseline of a check, its time limit and thresholds."""

    baseline: Path | None = setting(
        None, "File written by batchbench baseline save.", "Base", metavar="FILE"
    )
    preset: str | None = setting(
        None,
        "Refuse a baseline that was saved with a preset other than this one.",
        "Base",
        metavar="NAME",
        choices=tuple(PRESETS),
    )
    max_time: float = setting(240.0, _TIME_HELP, _PANEL, **_SECONDS)
    floor: float | None = setting(
        None,
        _FLOOR_HELP,
        _PANEL,
        default_text="10, or 20 on another machine than the baseline's",
        **_PERCENT,
    )
    margin: float | None = setting(
        None, _MARGIN_HELP, _PANEL, default_text="1.5 times the floor", **_MARGIN
    )
    confidence: float = setting(0.999, _CONFIDENCE_HELP, _PANEL, **_SHARE)
    allow_improvement: bool = setting(False, _ALLOW_HELP, _PANEL)

    def __post_init__(self) -> None:
        settings.check(self)
        if self.floor is not None and self.margin is not None:
            check_margin(self.floor, self.margin)
        if self.baseline is None:
            raise UsageError(
                "--baseline: name the file to compare with; batchbench baseline save writes one"
            )


@dataclass(frozen=True)
class BaselineSpec:
    """The size of a baseline, and its file."""

    processes: int = setting(
        12,
        "Number of fresh processes to measure, at least 8. Each is one sample.",
        "Measuring",
        min=8,
        max=1000,
    )
    output: Path | None = setting(
        None,
        "File for the baseline; the same as the argument FILE.",
        "Output",
        metavar="FILE",
        default_text="baseline.json",
    )
    overwrite: bool = setting(False, "Replace the file if it exists.", "Output")
    quiet: bool = setting(False, "Show no progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


def taking_turns(experiment: Experiment) -> list[str]:
    """Return the strategies that can take turns.

    Raises:
        UsageError: there is none.
    """
    if ours := list(experiment.serving.policies):
        return ours
    raise UsageError(
        f"--strategy {experiment.serving.strategy}: schedules by itself and cannot take turns; add "
        "another strategy, such as continuous"
    )


def timed_strategies(experiment: Experiment, timed: str | None) -> tuple[list[str], list[str]]:
    """Return the strategies whose time is compared, and the others.

    Args:
        timed: names separated by commas; None for the last strategy.

    Raises:
        UsageError: a name is not among the strategies, or none of them can take turns.
    """
    ours = taking_turns(experiment)
    names = [name.strip() for name in timed.split(",") if name.strip()] if timed else ours[-1:]
    for name in names:
        if name not in ours:
            raise UsageError(
                f"--timed {shown(name)}: is not among --strategy {','.join(ours)}; add it"
            )
    return names, [name for name in ours if name not in names]
