"""A baseline: what one version did on one machine, kept to hold later ones against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import batchbench
from batchbench.errors import UsageError
from batchbench.reports.work import Work, work_told

SCHEMA_VERSION = 1
OLD_DAYS = 90
"""A baseline older than this says so: machines, drivers and libraries have moved on."""

_NUMBERS: Mapping[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}
_OBJECT: Mapping[str, Any] = {"type": "object"}
_TEXT: Mapping[str, Any] = {"type": "string"}

SCHEMA: Mapping[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": [
        "schema_version",
        "kind",
        "batchbench_version",
        "created_at",
        "command",
        "config",
        "environment",
        "model",
        "workload",
        "work",
        "cut",
        "lanes",
        "processes",
    ],
    "properties": {
        "kind": {"const": "baseline"},
        "batchbench_version": _TEXT,
        "created_at": {"type": "string", "format": "date-time"},
        "command": _TEXT,
        "config": _OBJECT,
        "environment": {"type": "object", "required": ["packages", "cpu"]},
        "model": {"type": "object", "required": ["name", "device", "dtype"]},
        "workload": {"type": "object", "required": ["digest", "closed", "total_output_tokens"]},
        "work": {"type": "object", "minProperties": 1, "additionalProperties": _OBJECT},
        "cut": {
            "type": "object",
            "required": ["pieces", "times", "cycles"],
            "additionalProperties": {"type": "integer", "minimum": 1},
        },
        "lanes": {"type": "array", "items": _TEXT, "minItems": 1},
        "processes": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "required": ["ratios", "step_ns", "passes", "busy", "seconds"],
                "properties": {
                    "ratios": _NUMBERS,
                    "step_ns": _NUMBERS,
                    "passes": _NUMBERS,
                    "busy": {"type": "number"},
                    "seconds": {"type": "number"},
                },
            },
        },
    },
}


@dataclass(frozen=True)
class Process:
    """What one fresh process measured.

    Attributes:
        ratios: log of the candidate's time over its twin's, by the twin's lane.
        step_ns: median time of a step, by lane.
        passes: steps of a trial, by lane.
        busy: share of the turns in which somebody else had the core.
        seconds: from its start to its end.
    """

    ratios: Mapping[str, float]
    step_ns: Mapping[str, float]
    passes: Mapping[str, int]
    busy: float
    seconds: float


@dataclass(frozen=True)
class Baseline:
    """The file's data, and what is read of it."""

    data: Mapping[str, Any]

    @property
    def processes(self) -> list[Process]:
        """What was measured, process by process."""
        return [Process(**each) for each in self.data["processes"]]

    @property
    def candidate(self) -> str:
        """The strategy that is gated: the first lane; the others are its twins."""
        name: str = self.data["lanes"][0]
        return name

    @property
    def work(self) -> Work:
        """Counters and outputs."""
        return work_told(self.data["work"], self.data)

    @property
    def age_days(self) -> float:
        """Since it was made."""
        made = datetime.fromisoformat(self.data["created_at"])
        return (datetime.now(UTC) - made).total_seconds() / 86400

    @property
    def age(self) -> str:
        """The same in words."""
        days = self.age_days
        if days < 1:
            return f"{days * 24:.1f} hours old"
        old = "; renew it" if days > OLD_DAYS else ""
        return f"{days:.0f} day{'s' * (round(days) != 1)} old{old}"

    @property
    def machine(self) -> str:
        """What it was made on."""
        environment = self.data["environment"]
        name: str = environment.get("gpu") or environment["cpu"]
        return name

    def throughput(self, lane: str) -> float:
        """Tokens a second of the mean process."""
        return throughput(self.processes, lane, self.data["workload"]["total_output_tokens"])


def throughput(processes: Sequence[Process], lane: str, tokens: int) -> float:
    """Useful tokens a second of a lane, by the mean step over processes."""
    step_ns = fmean(each.step_ns[lane] for each in processes)
    return tokens / (processes[0].passes[lane] * step_ns / 1e9)


def speedup(processes: Sequence[Process], twin: str) -> float:
    """How many times faster the candidate is than its twin: the geometric mean over processes."""
    return exp(-fmean(each.ratios[twin] for each in processes))


def to_json(baseline: Baseline) -> str:
    """The file's content."""
    return json.dumps(baseline.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def load_baseline(file: Path) -> Baseline:
    """Read a baseline.

    Raises:
        UsageError: there is none, or it is torn, or of another schema version.
    """
    again = "make one with batchbench baseline save"
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file; {again}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{file}: is a folder; give the file that baseline save wrote") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: is not readable JSON ({error}); {again}") from error
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        what = "a result, for batchbench compare" if _is_result(data) else "no baseline"
        raise UsageError(f"{file}: is {what}; {again}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{file}: has schema version {data.get('schema_version')}, and batchbench "
            f"{batchbench.__version__} reads {SCHEMA_VERSION}; {again}"
        )
    import jsonschema

    fault = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)
    )
    if fault is not None:
        where = ".".join(map(str, fault.absolute_path)) or "it"
        what = f"{where}: {fault.message[:160]}"
        raise UsageError(f"{file}: is not a whole baseline: {what}; {again}")
    found = Baseline(data)
    twins = data["lanes"][1:]
    if any(name not in each.ratios for each in found.processes for name in twins):
        raise UsageError(f"{file}: its processes lack lanes that it names; {again}")
    return found


def _is_result(data: Any) -> bool:
    return isinstance(data, dict) and "strategies" in data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
