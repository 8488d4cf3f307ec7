"""The file ``result.json``: its schema, its checks, and its bounded reader.

``result.schema.json`` is published with the package, because other tools read these names. It alone
lists all of them; the types here are those of the parts that several modules share, and a test
compares them with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import jsonschema
import numpy as np

from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.version import SCHEMA_VERSION

SCHEMA_FILE = Path(__file__).with_name("result.schema.json")
SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
METRICS = tuple(SCHEMA["$defs"]["summary"]["properties"])
"""Names of the metrics in a summary."""

Summary = dict[str, Any]
"""Metrics of one trial, or of all: the median duration and the pooled latencies."""

Counters = dict[str, int]
"""Exact counts of the work of a trial, from its plans alone."""


class Speedup(TypedDict):
    median: float
    ci95: list[float] | None


class StrategyData(TypedDict):
    trials: list[Summary]
    summary: Summary
    counters: Counters | None
    computed_passes: NotRequired[int | None]
    servings: NotRequired[int]
    output_digest: str | None
    by_output_length: list[dict[str, Any]]
    stalls: list[dict[str, Any]]
    decode_step: NotRequired[dict[str, Any] | None]


class Comparison(TypedDict):
    baseline: str
    candidate: str
    speedup: Speedup
    step_ratio: float | None
    step_ratio_source: NotRequired[Literal["server", "schedule"] | None]
    efficiency: float | None


class Validity(TypedDict):
    status: Literal["valid", "suspect"]
    reasons: list[str]


class Facts(TypedDict):
    """Options and observations of a run, which its recordings do not hold."""

    created_at: str
    command: str
    simulated: bool
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    warm_up: dict[str, Any]
    small_batches: NotRequired[list[list[int]] | None]
    workload: dict[str, Any]
    verification: dict[str, Any]
    stopped: str | None
    outputs: list[dict[str, Any]] | None
    cost: NotRequired[dict[str, Any] | None]
    prediction: NotRequired[dict[str, Any] | None]
    server: NotRequired[dict[str, Any] | None]
    agreement: NotRequired[Agreement | None]
    failures: NotRequired[list[FailedTrial] | None]


class ResultData(Facts):
    schema_version: int
    batchbench_version: str
    strategies: dict[str, StrategyData]
    comparison: Comparison | None
    comparisons: list[Comparison]
    explain: dict[str, Any]
    validity: Validity


# Reading


def file_of(folder: Path) -> Path:
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
        absent = "is not a folder" if folder.exists() else "no such folder"
        problem = "holds no result.json" if folder.is_dir() else absent
        below = max(folder.glob("*/result.json"), key=lambda f: f.stat().st_mtime, default=None)
        hint = "give the folder that batchbench run wrote"
        hint = f"the newest in it is {below.parent}" if below else hint
        raise UsageError(f"{folder}: {problem}; {hint}") from error
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
    server = data.get("server")
    if server is None:
        return
    if not isinstance(data["config"].get("target", {}).get("target"), str):
        yield "it has a server, and its config has no target"
    for counts in (server["passes"], server["cached_tokens"]):
        for name, trials in counts.items():
            if name not in data["strategies"] or len(trials) != len(
                data["strategies"][name]["trials"]
            ):
                yield "its server's counts are not one per trial of each strategy"


def check_recordings(
    file: Path, data: ResultData, recordings: Mapping[str, Sequence[Recording]]
) -> None:
    """Raise UsageError if the recordings beside a result are not its own."""
    fault = next(_mismatches(data, recordings), None)
    if fault is not None:
        raise UsageError(f"{file}: its parts do not belong together: {fault}")


def _mismatches(data: ResultData, recordings: Mapping[str, Sequence[Recording]]) -> Iterator[str]:
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
                yield f"{where} has steps and the first has none, or the reverse"
            if (recording.tokens is None) != (first.tokens is None):
                yield f"{where} has tokens and others have none, or the reverse"


# The check against a schema

_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}

_MOST_FAULTS = 50
"""Number of faults among which the deepest is chosen."""


def fault_of(data: Any, schema: Mapping[str, Any]) -> str | None:
    """Return the fault of the data, as "name is value; it must be …"; None if it has none."""
    faults = jsonschema.Draft202012Validator(schema).iter_errors(data)
    fault: Any = jsonschema.exceptions.best_match(islice(faults, _MOST_FAULTS))
    if fault is None:
        return None
    place, rule = ".".join(map(str, fault.absolute_path)), fault.validator_value
    at = place or "it"
    if fault.validator == "required":
        missing = next(name for name in rule if name not in fault.instance)
        return f"{place}{'.' if place else ''}{missing} is missing"
    if fault.validator == "additionalProperties" and isinstance(fault.instance, dict):
        known = fault.schema.get("properties", {})
        unknown = next((name for name in fault.instance if name not in known), "")
        return f"{at} has {unknown[:40]!r}, which is not known"
    return f"{at} is {_value(fault.instance)}; it must be {_rule(fault.validator, rule)}"


def _rule(validator: str, rule: Any) -> str:
    if validator == "type":
        return " or ".join(_KINDS[name] for name in ([rule] if isinstance(rule, str) else rule))
    if validator == "enum":
        return f"one of {', '.join(map(str, rule))}"
    return {
        "minimum": f"at least {rule}",
        "exclusiveMinimum": f"above {rule}",
        "maximum": f"at most {rule}",
        "const": json.dumps(rule),
        "pattern": f"of the form {rule}",
        "minItems": f"a list of at least {rule}",
        "maxItems": f"a list of at most {rule}",
        "minProperties": "an object that is not empty",
    }.get(validator, "as the schema says")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{…}" if value else "{}"
    if isinstance(value, list):
        return "[…]" if value else "[]"
    return shown(json.dumps(value, ensure_ascii=False))
