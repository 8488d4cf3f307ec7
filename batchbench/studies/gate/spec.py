"""How long a gate looks, and what counts as a difference."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING

from batchbench import settings
from batchbench.batching.experiment import GENERATE_BATCH, Experiment
from batchbench.batching.presets import PRESETS
from batchbench.errors import UsageError, shown
from batchbench.reports.conditions import check_margin
from batchbench.settings import setting

if TYPE_CHECKING:
    from batchbench.reports.sequential import Rule

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
    from batchbench.reports.sequential import Rule

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
