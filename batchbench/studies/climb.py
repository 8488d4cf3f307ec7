"""What is asked of a ladder: the specs of a run, and which rungs, how often."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from batchbench import settings
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec, spell_options
from batchbench.batching.models import ModelSpec
from batchbench.settings import setting
from batchbench.studies.rungs import ALL, RUNGS, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

_PANEL = "Measuring"


@dataclass(frozen=True)
class LadderSpec:
    """Which rungs, and how often each is climbed."""

    rungs: str = setting(
        ALL,
        f"Rungs to climb: all that this device offers, or some of "
        f"{', '.join(rung.name for rung in RUNGS)}.",
        _PANEL,
        metavar="NAMES",
    )
    rounds: int = setting(
        3,
        "Times that each rung serves the workload; rungs take turns, in alternating order.",
        _PANEL,
        min=1,
        max=1000,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        choose_rungs(self.rungs)


@dataclass(frozen=True)
class Climb:
    """What is asked of a ladder, composed of specs."""

    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    serving: ServingSpec = field(default_factory=ServingSpec)
    trials: TrialsSpec = field(default_factory=TrialsSpec)
    ladder: LadderSpec = field(default_factory=LadderSpec)

    def command(self) -> str:
        """The command line that climbs it again."""
        usual, words = Climb(), ["batchbench", "ladder"]
        for part in ("serving", "workload", "model", "trials", "ladder"):
            words += spell_options(getattr(self, part), getattr(usual, part))
        return shlex.join(words)

    def config(self) -> dict[str, dict[str, Any]]:
        """All settings as JSON values, spec by spec."""
        served = Experiment(self.workload, self.model, self.serving, self.trials).config()
        return {**served, "ladder": {"rungs": self.ladder.rungs, "rounds": self.ladder.rounds}}
