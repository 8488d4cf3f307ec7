"""What a result teaches: its model and engine, and the cost of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from batchbench.batching.experiment import ServingSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.step_cost import KnownCost
from batchbench.errors import UsageError
from batchbench.reports.prediction import Quality, known_cost
from batchbench.reports.result import Result, load_result

Spec = TypeVar("Spec")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A result, and what its steps cost."""

    result: Result
    known: KnownCost
    quality: Quality

    @property
    def model(self) -> ModelSpec:
        """The model as the run was asked for it."""
        return read_spec(ModelSpec, self.result.data["config"]["model"])

    @property
    def engine(self) -> str:
        """The engine whose steps were timed."""
        return str(self.result.data["config"]["serving"]["engine"])

    @property
    def place(self) -> str:
        """Model and device in a line."""
        model = self.result.data["model"]
        return f"{model['name']} · {model['device']} {model['dtype']}"


def read_teacher(folder: Path, option: str) -> Teacher:
    """Read a result and fit the cost of a step on all its trials.

    Raises:
        UsageError: there is no result, or its steps teach nothing; names ``option``.
    """
    folder = folder.parent if folder.name == "result.json" else folder
    try:
        result = load_result(folder)
        trials = (r for each in result.recordings.values() for r in each)
        small = result.data.get("small_batches") or ()
        known, quality = known_cost(str(folder), trials, small)
    except UsageError as error:
        raise UsageError(
            f"{option} {error}" if str(folder) in error.args[0] else f"{option} {folder}: {error}"
        ) from error
    return Teacher(result, known, quality)


def check_engine(teacher: Teacher, serving: ServingSpec, option: str) -> None:
    """Raise UsageError where the steps were another engine's."""
    if serving.engine != teacher.engine:
        raise UsageError(
            f"{option} {teacher.known.source}: its steps are the {teacher.engine} engine's; add "
            f"--engine {teacher.engine}"
        )


def read_spec(kind: type[Spec], config: Mapping[str, object]) -> Spec:
    """A spec from what ``Experiment.config`` told of it; settings it does not know are dropped."""
    found: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in config:
            value = config[field.name]
            path = "Path" in str(field.type) and isinstance(value, str)
            found[field.name] = Path(str(value)) if path else value
    return kind(**found)
