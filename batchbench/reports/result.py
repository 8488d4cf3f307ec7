"""The result: what ``result.json`` holds, built from recordings and nothing else measured.

Names and meaning are fixed: other tools read them (``result.schema.json`` is published with the
package).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import batchbench
from batchbench import settings
from batchbench.batching.recording import Recording
from batchbench.batching.session import Outcome
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Finding, Verification
from batchbench.reports import metrics
from batchbench.reports.audit import audit
from batchbench.reports.latency import Class, by_length, length_classes, stalls
from batchbench.reports.metrics import beside_floor
from batchbench.reports.prediction import beyond, predict_outcome, small_batches_of
from batchbench.reports.result_file import SCHEMA_VERSION, check_recordings, file_of, load_data
from batchbench.reports.slo import NO_GOALS, GoalsSpec, as_config, from_config
from batchbench.reports.statistics import Ratio, paired_ratio
from batchbench.reports.time_budget import explain, rate_of
from batchbench.workloads import Workload

if TYPE_CHECKING:
    import pandas as pd

    from batchbench.api import Plots

_FACTS = (
    "created_at",
    "command",
    "simulated",
    "config",
    "environment",
    "model",
    "warm_up",
    "small_batches",
    "workload",
    "verification",
    "stopped",
    "outputs",
    "cost",
    "prediction",
)
"""What was asked, met and observed; all else in a result is derived from the recordings."""

Recordings = Mapping[str, Sequence[Recording]]


@dataclass(frozen=True, eq=False)
class Result:
    """``result.json`` as data, and the recordings that it was made from."""

    data: Mapping[str, Any]
    recordings: Recordings

    @property
    def names(self) -> list[str]:
        """Strategies, the baseline first."""
        return list(self.recordings)

    @property
    def _place(self) -> str:
        """Where it ran, or that it did not."""
        model, cost = self.data["model"], self.data.get("cost")
        if not self.data["simulated"]:
            return f"{model['device']} {model['dtype']}"
        return f"simulated on the costs of {cost['source']}" if cost else "simulated"

    @property
    def title(self) -> str:
        """Model, device, batch size and workload in a line."""
        model, config = self.data["model"], self.data["config"]
        slots, requests = config["serving"]["batch_size"], self.data["workload"]["num_requests"]
        parts = [
            model["name"],
            self._place,
            f"{slots:,} slot{'s' * (slots != 1)}",
            f"{requests:,} request{'s' * (requests != 1)}",
        ]
        workload = self.data["workload"]
        if workload["arrival_rate"] is not None:
            parts.append(f"{workload['arrival_rate']:.3g} req/s")
        if workload["max_concurrency"] is not None:
            parts.append(f"at most {workload['max_concurrency']:,} at once")
        if config["serving"]["engine"] != "slots" and not self.data["simulated"]:
            parts.insert(2, f"{config['serving']['engine']} engine")
        return " · ".join(parts)

    # For notebooks and scripts; what they need is imported when it is asked for.

    @cached_property
    def requests(self) -> pd.DataFrame:
        """A row a request, trial and strategy: slot, lengths, steps, times and latencies."""
        from batchbench.reports.frames import requests_frame

        return requests_frame(self)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """A row a run of equal steps, trial and strategy."""
        from batchbench.reports.frames import steps_frame

        return steps_frame(self)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row a strategy: medians and pools of its trials, counters, and how it compares."""
        from batchbench.reports.frames import summary_frame

        return summary_frame(self)

    @property
    def plot(self) -> Plots:
        """The pictures: ``result.plot.timeline()`` and so on; each is a matplotlib figure."""
        from batchbench.api import Plots

        return Plots(self)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write what ``batchbench run --output`` writes; the folder.

        Raises:
            UsageError: it cannot be written, or holds a result and ``overwrite`` is not given.
        """
        from batchbench.files import check_folder
        from batchbench.reports.output import write_folder

        folder = Path(folder)
        check_folder(folder, overwrite=overwrite)
        write_folder(folder, self)
        return folder

    def __repr__(self) -> str:
        from batchbench.reports.formats.terminal import sentence

        return f"<batchbench result: {self.title}: {sentence(self)}>"

    def _repr_html_(self) -> str:
        from batchbench.api import render

        return render(self)


def make_result(outcome: Outcome, goals: GoalsSpec = NO_GOALS) -> Result:
    """The result of an experiment that was just conducted, held against ``goals``."""
    words = settings.words_of(goals, NO_GOALS)
    facts = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([outcome.experiment.command(), *words]),
        "simulated": outcome.experiment.simulated,
        "config": {**outcome.experiment.config(), "goals": as_config(goals)},
        "environment": dict(outcome.environment),
        "model": dict(outcome.model),
        "warm_up": asdict(outcome.warm_up),
        "small_batches": small_batches_of(outcome.small_batches),
        "workload": workload_facts(outcome.workload),
        "verification": {
            "passed": outcome.verification.passed,
            **{k: v for k, v in asdict(outcome.verification).items() if k != "findings"},
            "findings": [asdict(finding) for finding in outcome.verification.findings],
        },
        "stopped": None if outcome.stopped is None else str(outcome.stopped),
        "outputs": None
        if outcome.texts is None
        else [
            {"request": i, "prompt": prompt, "output": output}
            for i, (prompt, output) in enumerate(outcome.texts)
        ],
        "cost": _cost(outcome),
        "prediction": predict_outcome(outcome),
    }
    return _derived(facts, outcome.workload, outcome.recordings)


def remake_result(result: Result) -> Result:
    """The same result with everything derived anew from its recordings."""
    data = result.data
    recorded = data["workload"]
    first = next(iter(result.recordings.values()))[0].requests
    # Prompts are not in a recording; lengths and times are, and no figure needs more.
    asked = recorded["output_lengths"]
    workload = Workload(
        name=recorded["name"],
        seed=recorded["seed"],
        prompt_ids=np.zeros(first.prompt_tokens.sum(), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(first.prompt_tokens)]),
        output_tokens=first.output_tokens if asked is None else np.array(asked, np.int64),
        due_ns=first.due_ns,
        stop_at_eos=asked is not None,
        max_concurrency=recorded["max_concurrency"],
    )
    return _derived({key: data.get(key) for key in _FACTS}, workload, result.recordings)


def regoaled(result: Result, goals: GoalsSpec) -> Result:
    """The same result held against other goals, with everything derived anew."""
    config = {**result.data["config"], "goals": as_config(goals)}
    return remake_result(Result({**result.data, "config": config}, result.recordings))


def _cost(outcome: Outcome) -> dict[str, Any] | None:
    """What a step cost in a simulation, and where that goes beyond what taught it."""
    cost = outcome.experiment.cost
    if cost is None:
        return None
    trials = [r for each in outcome.recordings.values() for r in each]
    return {**cost.as_dict(), "extrapolates": beyond(cost, trials)}


def workload_facts(workload: Workload) -> dict[str, Any]:
    """What a result tells of the workload that was served."""
    return {
        "name": workload.name,
        "seed": workload.seed,
        "closed": workload.closed,
        "num_requests": len(workload),
        "total_input_tokens": int(workload.prompt_tokens.sum()),
        "total_output_tokens": int(workload.output_tokens.sum()),
        "digest": workload.digest,
        "max_concurrency": workload.max_concurrency,
        "arrival_rate": rate_of(workload.due_ns),
        # A recording knows what was produced; only where texts end early is this something else.
        "output_lengths": workload.output_tokens.tolist() if workload.stop_at_eos else None,
    }


def _derived(facts: Mapping[str, Any], workload: Workload, recordings: Recordings) -> Result:
    goals = from_config(facts["config"]["goals"])
    checked = facts["verification"]
    verification = Verification(
        **{
            key: checked[key]
            for key in (
                "requests_checked",
                "identical",
                "numerical_ties",
                "wrong",
                "reference",
                "max_logit_gap",
            )
        },
        findings=tuple(Finding(**finding) for finding in checked["findings"]),
    )
    reasons = audit(
        workload,
        recordings,
        verification,
        WarmUp(**facts["warm_up"]),
        facts["stopped"],
        facts["config"]["workload"].get("request_rate"),
    )
    names = list(recordings)
    classes = length_classes(recordings[names[0]][0].requests.output_tokens)
    strategies = {name: _strategy(trials, goals, classes) for name, trials in recordings.items()}
    comparisons = [_comparison(names[0], name, strategies, recordings) for name in names[1:]]
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": batchbench.__version__,
        **facts,
        "strategies": strategies,
        "comparison": comparisons[-1] if comparisons else None,
        "comparisons": comparisons,
        "explain": explain(recordings, facts["warm_up"].get("duration_s")),
        "validity": {"status": "suspect" if reasons else "valid", "reasons": reasons},
    }
    return Result(data, recordings)


def _strategy(
    trials: Sequence[Recording], goals: GoalsSpec, classes: Sequence[Class]
) -> dict[str, Any]:
    limits = goals.limits_ms
    each = [metrics.trial_summary(trial, limits) for trial in trials]
    summary = each[0] if len(trials) == 1 else metrics.summary(trials, limits)
    per_second = summary["output_throughput"]
    assert per_second is not None
    price = goals.price_per_hour
    cost = None if price is None else price / 3600 / per_second * 1e6
    return {
        "trials": each,
        "summary": {**summary, "cost_per_million_output_tokens": cost},
        "by_output_length": by_length(trials, classes),
        "stalls": stalls(trials),
        "decode_step": _decode_step(trials),
        "counters": metrics.counters(trials[0]) if trials[0].has_steps else None,
        "computed_passes": trials[0].header.about.get("computed_passes"),
        "output_digest": output_digest(trials[0]),
    }


def _decode_step(trials: Sequence[Recording]) -> dict[str, Any] | None:
    """A full decode step beside what memory allows, the medians over trials; None if not known."""
    found = [each for trial in trials if (each := beside_floor(trial)) is not None]
    if not found:
        return None
    middle = {
        field: float(np.median([getattr(each, field) for each in found]))
        for field in ("took_ms", "floor_ms", "floor_share", "read_bytes", "bytes_per_s")
    }
    return {"rows": found[0].rows, **middle}


def output_digest(recording: Recording) -> str | None:
    """SHA-256 over every request's tokens; None where no model ran."""
    if recording.tokens is None:
        return None
    content = hashlib.sha256(recording.requests.output_tokens.astype("<i8").tobytes())
    content.update(recording.tokens.astype("<i4").tobytes())
    return content.hexdigest()


def ratio_of(
    strategies: Mapping[str, Any], metric: str, numerator: str, denominator: str
) -> Ratio | None:
    """A metric of one strategy over that of another, pair by pair."""
    above, below = (
        [trial[metric] for trial in strategies[name]["trials"]] for name in (numerator, denominator)
    )
    return paired_ratio(above, below)


def _comparison(
    baseline: str, candidate: str, strategies: Mapping[str, Any], recordings: Recordings
) -> dict[str, Any]:
    speedup = ratio_of(strategies, "duration", baseline, candidate)
    assert speedup is not None
    # The counters' steps; with texts that end early they may vary from trial to trial.
    # None where one of the two schedules for itself and shows no steps.
    steps = paired_ratio(
        [r.num_steps for r in recordings[baseline]], [r.num_steps for r in recordings[candidate]]
    )
    return {
        "baseline": baseline,
        "candidate": candidate,
        "speedup": speedup.as_dict(),
        "step_ratio": steps.median if steps else None,
        "efficiency": speedup.median / steps.median if steps else None,
    }


def to_json(result: Result) -> str:
    """``result.json``; whatever has no meaning is null, never NaN."""
    return json.dumps(result.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def load_result(folder: Path) -> Result:
    """Read a result's folder, or its ``result.json`` with the recordings beside it.

    Raises:
        UsageError: there is no result, or it is torn or of another schema version.
    """
    file, data = file_of(folder), load_data(folder)
    recordings = {
        name: [
            Recording.load(file.parent / recording_file(i, trial))
            for trial in range(len(strategy["trials"]))
        ]
        for i, (name, strategy) in enumerate(data["strategies"].items())
    }
    check_recordings(file, data, recordings)
    return Result(data, recordings)


def recording_file(strategy: int, trial: int) -> str:
    """Where a recording lies in the result's folder."""
    return f"recordings/{strategy}-{trial}.npz"


def recording_files(recordings: Recordings) -> dict[str, bytes]:
    """The recordings by the names under which :func:`load_result` finds them."""
    return {
        recording_file(i, trial): recording.save()
        for i, trials in enumerate(recordings.values())
        for trial, recording in enumerate(trials)
    }
