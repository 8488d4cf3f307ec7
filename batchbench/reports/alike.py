"""Which facts about two machines and installations must be the same, and for what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchbench.studies.gate.evidence import Varying

FOR_TOKENS = (
    *("device", "cpu", "threads", "gpu", "gpu_driver", "cuda", "torch", "transformers", "numpy"),
    *("dtype", "engine", "execution", "cpu_kernels"),
)
"""What the last bit of a logit depends on, and with it a token that is nearly tied."""

FOR_TIMES = (*FOR_TOKENS, "cpu_cores", "gpu_memory_bytes", "python")
"""What times depend on. Name and kernel of the host are not among them: a CI has many of a kind."""

_ITSELF = ("batchbench", "git_commit")
"""The versions that are compared, which are meant to differ."""

_PASSING = ("gpu_clock_mhz", "packages")


def flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its packages among its facts."""
    packages: Mapping[str, Any] = environment.get("packages", {})
    return {**environment, **packages}


def facts_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """All that a result tells of its machine, its installation and how it computed.

    A simulation depends on none of that, only on what a step costs.
    """
    if data["simulated"]:
        cost = data.get("cost") or {}
        # Which run taught it, and what that run saw, change no time.
        told = {"source", "extrapolates", "rows_seen", "most_prompt_tokens_seen", "longest_seen"}
        return {"cost of a step": {k: v for k, v in cost.items() if k not in told} or "one unit"}
    model, found = data["model"], flat(data["environment"])
    if found.get("python"):
        found["python"] = ".".join(str(found["python"]).split(".")[:2])
    found |= {name: model.get(name) for name in ("device", "dtype", "execution")}
    return {**found, "engine": data["config"]["serving"]["engine"]}


def environment_differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[Varying]:
    """Every fact in which two results' environments differ; the versions themselves are none."""
    facts = facts_of(base) | facts_of(new)
    return _varying(base, new, [n for n in facts if n not in _ITSELF + _PASSING])


def differing(
    base: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]
) -> list[Varying]:
    """Of the facts that must be the same for times or for tokens, those that are not.

    Args:
        names: :data:`FOR_TIMES` or :data:`FOR_TOKENS`; of simulations their cost stands for both.
    """
    simulated = base["simulated"] or new["simulated"]
    return environment_differences(base, new) if simulated else _varying(base, new, names)


def _varying(
    base: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]
) -> list[Varying]:
    then, now = facts_of(base), facts_of(new)
    return [
        Varying(name, then.get(name), now.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]
