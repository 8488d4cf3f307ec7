"""The rungs of the ladder: ways to serve one workload, each a single change away from another."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from batchbench import settings
from batchbench.batching.experiment import GENERATE_BATCH, Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.presets import NOTEBOOK
from batchbench.errors import UsageError, shown
from batchbench.settings import setting
from batchbench.workloads.spec import WorkloadSpec

ALL = "all"


@dataclass(frozen=True)
class Rung:
    """One way to serve.

    ``forward`` is the pass that the slots engine makes: ``transformers``, or GPT-2's own on torch's
    kernels (``lean``), on oneDNN's (``packed``) or on the best there are (``own``). ``execution``
    is how its decode passes are computed. ``dtype`` is None where it is the model's.
    """

    name: str
    change: str  # against the rung before it
    policy: str = "continuous"
    engine: str = "slots"
    prefill: str = "mixed"
    forward: str | None = None
    execution: str = "eager"
    dtype: str | None = None


RUNGS: Sequence[Rung] = (
    Rung("notebook-static", "static batches", "static", "notebook", "separate"),
    Rung("notebook", "continuous", "continuous", "notebook", "separate"),
    Rung(GENERATE_BATCH, "transformers' own", GENERATE_BATCH, GENERATE_BATCH, "mixed"),
    Rung("slots", "one lasting cache", prefill="separate", forward="transformers"),
    Rung("mixed", "prompts alongside", forward="transformers"),
    Rung("lean", "own forward pass", forward="lean"),
    Rung("compile", "compiled code", forward="lean", execution="compile"),
    Rung("graph", "CUDA graphs", forward="lean", execution="graph"),
    Rung("packed", "weights packed", forward="packed"),
    Rung("kernels", "own kernels", forward="own"),
    Rung("bfloat16", "half the bytes", forward="own", execution="auto", dtype="bfloat16"),
)
"""From the ground up. ``generate_batch`` stands beside the others: it is somebody else's."""


def choose_rungs(asked: str) -> Sequence[Rung]:
    """The rungs that ``--rungs`` names, from the ground up.

    Raises:
        UsageError: there is no such rung, or one is named twice, or none is.
    """
    if asked == ALL:
        return RUNGS
    names = [name.strip() for name in asked.split(",") if name.strip()]
    known = {rung.name for rung in RUNGS}
    for name in names:
        if name not in known:
            raise UsageError(
                f"--rungs {shown(name)}: no such rung; they are {', '.join(r.name for r in RUNGS)}"
            )
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--rungs {shown(asked)}: name each rung once, such as notebook,packed")
    return [rung for rung in RUNGS if rung.name in names]


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
