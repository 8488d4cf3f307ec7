"""Results of other tools as sides of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError
from batchbench.reports.peers import read_peer
from batchbench.reports.peers.values import PeerFile
from batchbench.reports.result_file import load_data
from batchbench.reports.statistics import FEWEST
from batchbench.reports.text import plural

ENDINGS = (".json", ".jsonl", ".yaml", ".yml")

Side = tuple[str, Mapping[str, Any]]
"""A label, and data as :func:`load` returns it."""


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder that may be results of other tools."""
    return sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)


def load(path: Path) -> Mapping[str, Any]:
    """Return our result, or the parts of one that another tool's file holds."""
    peer = read_peer(path)
    return load_data(path) if peer is None else _as_result(peer)


def _as_result(file: PeerFile) -> dict[str, Any]:
    sizes = ("completed", "total_input_tokens", "total_output_tokens")
    return {
        "peer": file.tool,
        "batchbench_version": None,
        "created_at": file.created,
        "simulated": False,
        "environment": {},
        "validity": {"reasons": []},
        "model": {"name": file.model, "dtype": None},
        "workload": {"closed": True},
        "config": {
            "target": {"tool": file.title, "server": file.backend},
            "workload": {name: [run.summary[name] for run in file.runs] for name in sizes},
            "serving": {"engine": None},
        },
        "strategies": {
            run.name: {"trials": [run.summary], "counters": {}, "output_digest": None}
            for run in file.runs
        },
        "comparisons": [],
    }


def check_same_load(base: Side, new: Side) -> None:
    """Raise UsageError if one side is ours, or the two name different models or loads."""
    (then, old), (now, data) = base, new
    if "peer" not in old or "peer" not in data:
        ours, theirs = (then, now) if "peer" in data else (now, then)
        raise UsageError(
            f"{theirs}: is of another tool, and {ours} of batchbench; show them side by side with "
            f"batchbench report {then} {now}"
        )
    named = {"model": [one["model"]["name"] or "not named" for one in (old, data)]}
    named["load"] = [", ".join(one["strategies"]) for one in (old, data)]
    for what, (ours, theirs) in named.items():
        if ours != theirs:
            raise UsageError(
                f"{now}: its {what} is {theirs}, and that of {then} is {ours}; measure both with "
                f"the same {what}"
            )


def doubt(base: int, new: int) -> str | None:
    """Return the reason why so many files per side give no answer; None if they may."""
    if (few := min(base, new)) >= FEWEST:
        return None
    return (
        f"{plural(few, 'file')} per side cannot show that a difference is not chance; give folders "
        f"of {FEWEST} or more files per side, and --fail-if for a metric that matters"
    )


def notes(base: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Files of other tools name neither the machine nor the prompts: a difference may come from "
        "either."
    )
    if base["peer"] != new["peer"]:
        yield "The two tools define some metrics differently: docs/other-tools.md."
