"""The file ``result.json``: its schema, its checks, and its bounded reader.

``result.schema.json`` is published with the package, because other tools read these names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np

from batchbench.batching.recording import Recording
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.reports.result_data import ResultData
from batchbench.version import SCHEMA_VERSION

SCHEMA_FILE = Path(__file__).with_name("result.schema.json")
SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
METRICS = tuple(SCHEMA["$defs"]["summary"]["properties"])
"""Names of the metrics in a summary."""


def file_of(folder: Path) -> Path:
    return folder if folder.suffix == ".json" else folder / "result.json"


def read_data(folder: Path) -> dict[str, Any]:
    """Read a ``result.json`` of this version without a check of its schema.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    file = file_of(folder)
    hint = "give the folder that batchbench run wrote"
    try:
        data = read_json(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        absent = "is not a folder" if folder.exists() else "no such folder"
        problem = "holds no result.json" if folder.is_dir() else absent
        below = max(folder.glob("*/result.json"), key=lambda f: f.stat().st_mtime, default=None)
        hint = f"the newest in it is {below.parent}" if below else hint
        raise UsageError(f"{folder}: {problem}; {hint}") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {reason_of(error)}; {hint}") from error
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


def load_data(folder: Path) -> ResultData:
    """Read and check ``result.json``, given a result's folder or the file itself.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    data = cast("ResultData", read_data(folder))
    fault = fault_of(data, SCHEMA) or next(_contradictions(data), None)
    if fault is not None:
        raise UsageError(f"{file_of(folder)}: is not a complete result: {fault}")
    return data


def read_time(text: object) -> datetime:
    """Return a time of a result or baseline with its zone; UTC if it names none.

    Raises:
        ValueError: it is not a time in ISO format.
    """
    if not isinstance(text, str):
        raise ValueError(f"{str(text)[:40]} is not a time")
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text[:40]!r} is not a time such as 2026-01-31T12:00:00+00:00"
        ) from error


def _contradictions(data: ResultData) -> Iterator[str]:
    try:
        read_time(data["created_at"])
    except ValueError as error:
        yield f"created_at: {error}"
    strategies = data["strategies"]
    if len({len(strategy["trials"]) for strategy in strategies.values()}) > 1:
        yield "its strategies have different numbers of trials"
    candidates = [comparison["candidate"] for comparison in data["comparisons"]]
    if any(candidates.count(name) != 1 for name in list(strategies)[1:]):
        yield "each strategy but the first must have exactly one comparison"
    if any(comparison["baseline"] not in strategies for comparison in data["comparisons"]):
        yield "a comparison names a baseline that is not one of its strategies"
    yield from _contradictions_of_server(data)
    lengths = data["workload"]["output_lengths"]
    if lengths is not None and len(lengths) != data["workload"]["num_requests"]:
        yield "workload.output_lengths must have one entry per request"


def _contradictions_of_server(data: ResultData) -> Iterator[str]:
    if (server := data.get("server")) is None:
        return
    if not isinstance(data["config"].get("target", {}).get("target"), str):
        yield "it has a server, and its config has no target"
    trials = {name: len(strategy["trials"]) for name, strategy in data["strategies"].items()}
    for counts in (server["passes"], server["cached_tokens"]):
        if any(len(count) != trials.get(name) for name, count in counts.items()):
            yield "its server's counts are not one per trial of each strategy"


def mismatches(data: ResultData, recordings: Mapping[str, Sequence[Recording]]) -> Iterator[str]:
    """Yield the reasons why the recordings beside a result are not its own."""
    first = next(iter(recordings.values()))[0]
    for name, trials in recordings.items():
        for trial, recording in enumerate(trials):
            header, where = recording.header, f"recording {trial} of {name[:40]}"
            if (header.strategy, header.trial) != (name, trial):
                yield f"{where} is of {header.strategy[:40]}, trial {header.trial}"
            if len(recording.requests.slot) != data["workload"]["num_requests"]:
                yield "they have different numbers of requests"
            elif not np.array_equal(recording.requests.prompt_tokens, first.requests.prompt_tokens):
                yield f"{where} has other prompts"
            if recording.has_steps != trials[0].has_steps:
                yield f"{where} has steps and the first has none, or the reverse"
            if (recording.tokens is None) != (first.tokens is None):
                yield f"{where} has tokens and others have none, or the reverse"


_MOST_FAULTS = 50
"""Number of faults among which the deepest is chosen."""


def fault_of(data: Any, schema: Mapping[str, Any]) -> str | None:
    """Return the place of a fault in the data, and the rule that it breaks; None without one."""
    faults = jsonschema.Draft202012Validator(schema).iter_errors(data)
    fault: Any = jsonschema.exceptions.best_match(islice(faults, _MOST_FAULTS))
    if fault is None:
        return None
    text = fault.message
    if fault.validator not in ("required", "additionalProperties") and (
        isinstance(fault.instance, dict | list)
    ):  # the message would begin with all that it holds
        text = f"its {fault.validator} must be {fault.validator_value}"
    return f"{'.'.join(map(str, fault.absolute_path)) or 'it'}: {shown(text)}"
