"""Result files of other tools, recognized by their content, and llm-d's report, also written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError, shown
from batchbench.files import read_binary
from batchbench.json_file import MOST_BYTES, parse_json
from batchbench.reports.peers import llmd, readers
from batchbench.reports.peers.values import DamagedError, PeerFile

READERS: Sequence[tuple[str, set[str], Callable[[Any], PeerFile]]] = (
    ("vllm bench serve", {"model_id", "completed", "request_throughput"}, readers.read_vllm),
    ("guidellm", {"benchmarks", "metadata"}, readers.read_guidellm),
    ("aiperf", {"aiperf_version"}, readers.read_aiperf),
    ("llm-d's benchmark report", {"version", "run"}, llmd.read_llmd),
    ("llm-d's benchmark report", {"version", "metrics"}, llmd.read_llmd),
)
"""Tools, keys by which their files are recognized, and readers."""

EXPECTED = (
    "give a result of batchbench, vllm bench serve (--save-result), guidellm (benchmarks.json) or "
    "aiperf (profile_export), or llm-d's benchmark report 0.2"
)

_MOST_YAML = 2 * 2**20
"""Largest YAML file; its parser takes 5 s per MiB."""


def read_peer(file: Path) -> PeerFile | None:
    """Read a file of another tool; None for a folder, a missing file and a result of ours.

    Raises:
        UsageError: it is of no tool that is known, damaged, too large, or of a newer version.
    """
    if not os.path.isfile(file):  # False too if the name is too long
        return None
    data = _parse(file, read_binary(file, str(file), MOST_BYTES))
    keys = data.keys() if isinstance(data, dict) else set()
    if "batchbench_version" in keys or "kind" in keys:
        return None
    found = [(tool, read) for tool, needed, read in READERS if needed <= keys]
    if readers.are_records(data):
        found = [("aiperf's records", readers.read_records)]
    if not found:
        raise UsageError(f"{file}: is not a result of batchbench or a tool it knows; {EXPECTED}")
    tool, read = found[0]
    try:
        return read(data)
    except DamagedError as error:
        raise UsageError(f"{file}: is not a complete result of {tool}: {error}") from error


def _parse(file: Path, content: bytes) -> Any:
    """Return the JSON or YAML of a file, or the list of its lines' JSON."""
    try:
        data = parse_json(content, constants=True)
        return [data] if readers.are_records([data]) else data
    except ValueError as error:
        fault = error
    try:
        if content.startswith(b'{"metadata"') and b"\n{" in content:
            return [parse_json(line) for line in content.splitlines() if line.strip()]
        if re.search(rb"(?m)^version:", content) and len(content) <= _MOST_YAML:
            return llmd.parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        fault = error
    raise UsageError(f"{file}: is not readable JSON ({shown(fault, 200)}); {EXPECTED}")
