"""An experiment: what is asked, as frozen specs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.models import ModelSpec
from batchbench.batching.policies import make_policy
from batchbench.batching.queue import ORDERS
from batchbench.errors import UsageError
from batchbench.settings import setting
from batchbench.workloads.spec import WorkloadSpec

GENERATE_BATCH = "generate_batch"
"""transformers' own continuous batching: a strategy that schedules for itself."""

ENGINES = ("slots", "notebook")
TOKEN_BUDGET = 2048
PREFILLS = ("auto", "separate", "mixed")


@dataclass(frozen=True)
class ServingSpec:
    """How the workload is served."""

    batch_size: int = setting(
        8, "Number of slots: requests computed together.", "Serving", min=1, max=2**20
    )
    strategy: str = setting(
        "static,continuous",
        "Strategies to compare, the first being the baseline: static, continuous, generate_batch "
        "(transformers' own continuous batching), or a class of yours as package.module:Policy.",
        "Serving",
        metavar="NAMES",
    )
    order: str = setting("fifo", "How the queue is sorted.", "Serving", choices=tuple(ORDERS))
    engine: str = setting(
        "slots",
        "slots: one preallocated cache; notebook: left padding, past key-values rebuilt at each "
        "change of the batch.",
        "Serving",
        choices=ENGINES,
    )
    prefill: str = setting(
        "auto",
        "mixed: newcomers' prompts ride along with the running requests (chunked prefill; slots "
        "engine only); separate: they get a pass of their own; auto: mixed where the engine can.",
        "Serving",
        choices=PREFILLS,
    )
    max_batched_tokens: int | None = setting(
        None,
        "Most tokens that one pass computes with mixed prefill.",
        "Serving",
        min=2,
        default_text=f"{TOKEN_BUDGET}, or twice the batch size if that is more",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.strategies:
            raise UsageError("--strategy: name at least one, such as static,continuous")
        if len(set(self.strategies)) < len(self.strategies):
            raise UsageError(f"--strategy {self.strategy}: names a strategy twice")
        for name in self.policies:
            make_policy(name)
        if self.prefill == "mixed" and self.engine == "notebook":
            raise UsageError(
                "--prefill mixed: the notebook engine computes prompts apart; "
                "take --prefill separate or --engine slots"
            )
        if self.mixes_prefill and self.token_budget <= self.batch_size:
            raise UsageError(
                f"--max-batched-tokens {self.token_budget}: must be above the batch size "
                f"({self.batch_size}), or no prompt could ever join a full batch; raise it, or take "
                "--prefill separate"
            )

    @property
    def mixes_prefill(self) -> bool:
        """Whether pieces of prompts may ride along with the running requests."""
        return self.prefill == "mixed" or (self.prefill == "auto" and self.engine != "notebook")

    @property
    def token_budget(self) -> int:
        """Most tokens that one pass computes with mixed prefill."""
        return self.max_batched_tokens or max(TOKEN_BUDGET, 2 * self.batch_size)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The names in ``strategy``."""
        return tuple(name.strip() for name in self.strategy.split(",") if name.strip())

    @property
    def policies(self) -> tuple[str, ...]:
        """Those of ``strategies`` that are policies of our own scheduler."""
        return tuple(name for name in self.strategies if name != GENERATE_BATCH)


@dataclass(frozen=True)
class TrialsSpec:
    """How often, how long, and how carefully."""

    trials: int = setting(
        4,
        "Times that each strategy serves the workload, in pairs of alternating order.",
        "Measuring",
        min=1,
        max=10_000,
    )
    verify: str = setting(
        "all",
        "Requests whose tokens are checked against the model alone: all, none or a number.",
        "Measuring",
        metavar="all|N|none",
    )
    max_time: float | None = setting(
        None,
        "Seconds that the trials may take: no pair is begun that would end later.",
        "Measuring",
        min=0.001,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.verify_limit is not None and self.verify_limit < 0:
            raise UsageError(
                f"--verify {self.verify}: must be all, none or how many requests to check"
            )

    @property
    def verify_limit(self) -> int | None:
        """How many requests to check; None means all, below 0 that it says something else."""
        if self.verify in ("all", "none"):
            return None if self.verify == "all" else 0
        return int(self.verify) if self.verify.isdecimal() else -1


@dataclass(frozen=True)
class Experiment:
    """What is asked, composed of specs and never written after parsing."""

    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    serving: ServingSpec = field(default_factory=ServingSpec)
    trials: TrialsSpec = field(default_factory=TrialsSpec)
    simulated: bool = False

    def config(self) -> dict[str, dict[str, Any]]:
        """All settings as JSON values, spec by spec."""
        return {
            part.name: {
                f.name: str(value) if isinstance(value, Path) else value
                for f in fields(spec)
                for value in [getattr(spec, f.name)]
            }
            for part in fields(self)
            if part.name != "simulated"
            for spec in [getattr(self, part.name)]
        }

    def command(self) -> str:
        """The command line that runs it again: only what differs from the defaults."""
        words = ["batchbench", "simulate" if self.simulated else "run"]
        defaults = Experiment(trials=TrialsSpec(trials=1)) if self.simulated else Experiment()
        for part in ("serving", "workload", "model", "trials"):
            words += spell_options(getattr(self, part), getattr(defaults, part))
        return shlex.join(words)


def spell_options(spec: Any, usual: Any) -> list[str]:
    """The options of a spec that differ from the usual one, as words of a command line."""
    words = []
    for f in fields(spec):
        value = getattr(spec, f.name)
        always = f.name in ("batch_size", "queue_size")
        if value is True:
            words.append(settings.option_name(f.name))
        elif value != getattr(usual, f.name) or always:
            words += [settings.option_name(f.name), str(value)]
    return words
