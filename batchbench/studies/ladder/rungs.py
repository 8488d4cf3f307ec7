"""The rungs of the ladder: ways to serve one workload, each with a single change from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.settings import setting

ALL = "all"


@dataclass(frozen=True)
class Rung:
    """One way to serve.

    ``forward`` is the forward pass of the slots engine: ``transformers``, or batchbench's own on
    torch's kernels (``lean``), on oneDNN's (``packed``) or on the best available (``own``).
    ``dtype`` is None for the model's own.
    """

    name: str
    change: str  # from the rung before it
    policy: str = "continuous"
    engine: str = "slots"
    prefill: str = "mixed"
    forward: str | None = None
    execution: str = "eager"
    dtype: str | None = None


RUNGS: Sequence[Rung] = (
    Rung("notebook-static", "static batches", "static", "notebook", "separate"),
    Rung("notebook", "continuous", "continuous", "notebook", "separate"),
    Rung("generate_batch", "transformers' own", "generate_batch", "generate_batch", "mixed"),
    Rung("slots", "one lasting cache", prefill="separate", forward="transformers"),
    Rung("mixed", "mixed prefill", forward="transformers"),
    Rung("lean", "own forward pass", forward="lean"),
    Rung("compile", "compiled code", forward="lean", execution="compile"),
    Rung("graph", "CUDA graphs", forward="lean", execution="graph"),
    Rung("packed", "packed weights", forward="packed"),
    Rung("kernels", "own kernels", forward="own", execution="auto"),
    Rung("bfloat16", "half the bytes", forward="own", execution="auto", dtype="bfloat16"),
)
"""All rungs, the slowest first; ``generate_batch`` is not a change of ours but another system."""


def choose_rungs(text: str) -> Sequence[Rung]:
    """Return the rungs that ``--rungs`` names, in the order of :data:`RUNGS`."""
    if text == ALL:
        return RUNGS
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [rung.name for rung in RUNGS]
    for name in names:
        if name not in known:
            raise UsageError(f"--rungs {shown(name)}: no such rung; choose from {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--rungs {shown(text)}: name each rung once, such as notebook,packed")
    return [rung for rung in RUNGS if rung.name in names]


@dataclass(frozen=True)
class LadderSpec:
    """The rungs to compare, and how often each serves the workload."""

    rungs: str = setting(
        ALL,
        "Engines to compare: all that this device supports, or some of "
        f"{', '.join(rung.name for rung in RUNGS)}.",
        "Measuring",
        metavar="NAMES",
    )
    rounds: int = setting(
        3,
        "Number of rounds. In each, all rungs serve the workload in turn, and the next round "
        "reverses their order. Intervals need at least 3.",
        "Measuring",
        min=1,
        max=1000,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        choose_rungs(self.rungs)
