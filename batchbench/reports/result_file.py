"""The reader of ``result.json``: bounded, checked against the published schema and its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.reports.schema import fault_of

SCHEMA_VERSION = 1

SCHEMA_FILE = Path(__file__).with_name("result.schema.json")


def file_of(folder: Path) -> Path:
    """Return the path of ``result.json``, of a result's folder or the file itself."""
    return folder if folder.suffix == ".json" else folder / "result.json"


def read_data(folder: Path) -> dict[str, Any]:
    """Read a ``result.json`` of this version without a check of its schema.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    file = file_of(folder)
    try:
        data = read_json(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        absent = "is no folder" if folder.exists() else "no such folder"
        what = "holds no result.json" if folder.is_dir() else absent
        raise UsageError(f"{folder}: {what}; give the folder that batchbench run wrote") from error
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read: {reason_of(error)}; give the folder that batchbench run wrote"
        ) from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UsageError(f"{file}: is not a result of batchbench")
    if data.get("kind") == "baseline":
        raise UsageError(f"{file}: is a baseline; give it to batchbench check --baseline {file}")
    if data["schema_version"] != SCHEMA_VERSION or isinstance(data["schema_version"], bool):
        version, by = (str(data.get(key))[:40] for key in ("schema_version", "batchbench_version"))
        raise UsageError(
            f"{file}: has schema version {version}, this batchbench reads {SCHEMA_VERSION}; read "
            f"it with batchbench {by}"
        )
    return data


def load_data(folder: Path) -> dict[str, Any]:
    """Read and check ``result.json``, of a result's folder or the file itself.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    data = read_data(folder)
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    fault = fault_of(data, schema) or next(_contradictions(data), None)
    if fault is not None:
        raise UsageError(f"{file_of(folder)}: is not a whole result: {fault}")
    return data


def read_time(text: object) -> datetime:
    """Return a time of a result or baseline with its zone; UTC if none is given.

    Raises:
        ValueError: it is not a time in ISO format.
    """
    if not isinstance(text, str):
        raise ValueError(f"{str(text)[:40]} is not a time")
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text[:40]!r} is not a time such as 2026-01-31T12:00:00+00:00"
        ) from error


def _contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield words for valid parts of a result that do not fit together."""
    try:
        read_time(data["created_at"])
    except ValueError as error:
        yield f"created_at: {error}"
    strategies = data["strategies"]
    if len({len(each["trials"]) for each in strategies.values()}) > 1:
        yield "its strategies have different numbers of trials"
    candidates = [compared["candidate"] for compared in data["comparisons"]]
    if any(candidates.count(name) != 1 for name in list(strategies)[1:]):
        yield "comparisons are not one for each strategy but the first"
    if any(compared["baseline"] not in strategies for compared in data["comparisons"]):
        yield "comparisons name a baseline that is not one of its strategies"
    lengths = data["workload"]["output_lengths"]
    if lengths is not None and len(lengths) != data["workload"]["num_requests"]:
        yield "workload.output_lengths are not one a request"


def check_recordings(
    file: Path, data: Mapping[str, Any], recordings: Mapping[str, Sequence[Recording]]
) -> None:
    """Raise UsageError if a result and the recordings beside it do not belong together."""
    fault = next(_strangers(data, recordings), None)
    if fault is not None:
        raise UsageError(f"{file}: its parts do not belong together: {fault}")


def _strangers(
    data: Mapping[str, Any], recordings: Mapping[str, Sequence[Recording]]
) -> Iterator[str]:
    first = next(iter(recordings.values()))[0]
    if len(first.requests.slot) != data["workload"]["num_requests"]:
        yield "they have different numbers of requests"
    for name, trials in recordings.items():
        for trial, recording in enumerate(trials):
            header, where = recording.header, f"recording {trial} of {name[:40]}"
            if (header.strategy, header.trial) != (name, trial):
                yield f"{where} is of {header.strategy[:40]}, trial {header.trial}"
            if len(recording.requests.slot) != len(first.requests.slot):
                yield "they have different numbers of requests"
            elif not np.array_equal(recording.requests.prompt_tokens, first.requests.prompt_tokens):
                yield f"{where} has other prompts"
            if recording.has_steps != trials[0].has_steps:
                yield f"{where} shows its steps, or does not, unlike the first"
            if (recording.tokens is None) != (first.tokens is None):
                yield f"{where} has tokens where others have none"
