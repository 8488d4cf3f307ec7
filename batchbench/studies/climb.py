"""What is asked of a ladder: the specs of a run, and which rungs, how often."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

from batchbench import settings
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import NOTEBOOK
from batchbench.settings import setting
from batchbench.studies.ladder.rungs import ALL, RUNGS, choose_rungs
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
    preset: str = NOTEBOOK

    @property
    def served(self) -> Experiment:
        """What is asked but for the rungs: an experiment."""
        return Experiment(self.workload, self.model, self.serving, self.trials, preset=self.preset)

    def command(self) -> str:
        """The command line that climbs it again."""
        words, usual = self.served.command("ladder"), LadderSpec()
        for name, value in asdict(self.ladder).items():
            if value != getattr(usual, name):
                words += " " + shlex.join([settings.option_name(name), str(value)])
        return words

    def config(self) -> dict[str, Any]:
        """All settings as JSON values, spec by spec."""
        return {**self.served.config(), "ladder": asdict(self.ladder)}
