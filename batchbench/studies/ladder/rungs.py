"""The rungs of the ladder: ways to serve one workload, each a single change away from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchbench.batching.experiment import GENERATE_BATCH
from batchbench.errors import UsageError, shown

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
