"""Kinds of machines: jobs that measure times compare only on machines of one kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchbench.batching.machine import HARDWARE, SOFTWARE, differences, environment, facts_of
from batchbench.version import __version__

_OF_A_CELL = ("device", "threads")
"""Facts that are options of a cell."""

KIND = ("batchbench", *(name for name in (*HARDWARE, *SOFTWARE) if name not in _OF_A_CELL))
"""Facts in which machines of one kind agree."""


def here(*, timed: bool) -> dict[str, Any]:
    """Return the comparable facts of this machine.

    With ``timed`` they include the first GPU that this process may use, or ``none``.
    """
    facts = facts_of(environment(), {}, batchbench=__version__)
    if timed:
        import torch

        facts |= {"gpu": "none", "cuda": torch.version.cuda}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def unlike(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in words the first fact in which two machines are of different kinds; empty if none.

    A fact that one of them lacks is not compared: a cell on the CPU does not name the GPU.
    """
    for name, one, other in differences(base, new, KIND):
        if one is not None and other is not None:
            return f"its {name.replace('_', ' ')} is {other}, not {one}"
    return ""


def kinds_of(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the kinds of the machines with these environments in words, each with its nodes."""
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    for facts in (facts_of(facts, {}) for facts in environments):
        nodes = next((nodes for kind, nodes in kinds if not unlike(kind, facts)), None)
        if nodes is None:
            kinds.append((facts, nodes := []))
        if facts["hostname"] not in nodes:
            nodes.append(facts["hostname"])
    return [
        " ".join(str(kind[name]) for name in ("cpu", "gpu") if kind.get(name))
        + (f", torch {kind['torch']}" if kind.get("torch") else "")
        + f" ({', '.join(nodes)})"
        for kind, nodes in kinds
    ]
