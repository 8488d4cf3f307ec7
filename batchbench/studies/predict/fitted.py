"""Step costs fitted on a result, with the model and engine they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.step_cost import KnownCost
from batchbench.errors import UsageError
from batchbench.reports.prediction import describe_fit, known_cost
from batchbench.reports.result import Result, load_result
from batchbench.reports.result_data import FitQuality
from batchbench.reports.text import percent


@dataclass(frozen=True, eq=False)
class FittedRun:
    result: Result
    known: KnownCost
    quality: FitQuality

    @property
    def model(self) -> ModelSpec:
        return settings.from_json(ModelSpec, self.result.data["config"]["model"], drop_unknown=True)

    @property
    def engine(self) -> str:
        return str(self.result.data["config"]["serving"]["engine"])

    @property
    def place(self) -> str:
        model = self.result.data["model"]
        return f"{model['name']} · {model['device']} {model['dtype']}"

    @property
    def fit(self) -> str:
        return describe_fit(self.quality, "measured")


def error_in_words(error: float) -> str:
    """Return predicted / measured − 1 as ``4.1% too high`` or ``4.1% too low``."""
    size = percent(abs(error), 1)
    if size == "0.0%":
        return "without error"
    return f"{size} too {'high' if error > 0 else 'low'}"


def read_fitted(folder: Path, option: str) -> FittedRun:
    """Read a result and fit the cost of a step on all its trials; errors name ``option``."""
    folder = folder.parent if folder.name == "result.json" else folder
    try:
        result = load_result(folder)
        if result.served:
            raise UsageError(
                "was measured on a server, which does not report its steps; give a result of "
                "batchbench run without --target"
            )
        recordings = (r for trials in result.recordings.values() for r in trials)
        small = result.data.get("small_batches") or ()
        known, quality = known_cost(str(folder), recordings, small)
    except UsageError as error:
        place = option if str(folder) in error.args[0] else f"{option} {folder}:"
        raise UsageError(f"{place} {error}") from error
    return FittedRun(result, known, quality)


def check_engine(fitted: FittedRun, serving: ServingSpec, option: str) -> None:
    if serving.engine != fitted.engine:
        raise UsageError(
            f"{option} {fitted.known.source}: its steps are of the {fitted.engine} engine; add "
            f"--engine {fitted.engine}"
        )
