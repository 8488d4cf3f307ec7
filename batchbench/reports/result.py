"""A result: ``result.json`` as data, made from the recordings and observations of a run.

Modules that show a result (frames, pictures, tables, pages) import this one, never the reverse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from batchbench import settings
from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.batching.session import Outcome
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Finding, Verification
from batchbench.errors import UsageError
from batchbench.json_file import json_text, now
from batchbench.reports import metrics
from batchbench.reports.latency import by_length, length_classes, stalls
from batchbench.reports.prediction import beyond, predict_outcome, small_batches_of
from batchbench.reports.result_data import (
    ComparisonData,
    Facts,
    ResultData,
    StrategyData,
    WorkloadFacts,
    metric,
)
from batchbench.reports.result_file import file_of, load_data, mismatches
from batchbench.reports.served import doubts, served_facts, server_words, step_ratio, typical_passes
from batchbench.reports.slo import NO_GOALS, GoalsSpec
from batchbench.reports.statistics import Ratio, paired_ratio
from batchbench.reports.text import label_of, plural
from batchbench.reports.time_budget import explain, rate_of
from batchbench.reports.validity import audit
from batchbench.version import SCHEMA_VERSION, __version__
from batchbench.workloads import Workload
from batchbench.workloads.sampling import Sampling

Recordings = Mapping[str, Sequence[Recording]]


@dataclass(frozen=True, eq=False)
class Result:
    """``result.json`` as data, and the recordings that it was made from, by strategy."""

    data: ResultData
    recordings: Recordings

    @property
    def names(self) -> list[str]:
        """Names of the strategies, the baseline first."""
        return list(self.recordings)

    @property
    def served(self) -> bool:
        """True for a run against a server."""
        return self.data.get("server") is not None

    def label(self, name: str) -> str:
        """Return a strategy's name for tables: a server's static batching is in waves."""
        return label_of(name, has_steps=not self.served)

    @property
    def title(self) -> str:
        """Model, device or server, batch size and workload in one line."""
        data = self.data
        model, workload, serving = data["model"], data["workload"], data["config"]["serving"]
        server, size = data.get("server"), serving["batch_size"]
        if server is not None:
            place = data["config"]["target"]["target"].partition("://")[2].rstrip("/")
            where = f"{server_words(server)} at {place}"
        elif data["simulated"]:
            cost = data.get("cost")
            where = f"simulated on the costs of {cost['source']}" if cost else "simulated"
        else:
            where = f"{model['device']} {model['dtype']}"
        parts = [model["name"], where]
        if serving["engine"] != "slots" and not data["simulated"]:
            parts.append(f"{serving['engine']} engine")
        parts.append(plural(size, "slot") if server is None else f"{size:,} at once")
        parts.append(plural(workload["num_requests"], "request"))
        if workload["arrival_rate"] is not None:
            parts.append(f"{workload['arrival_rate']:.3g} req/s")
        if workload["max_concurrency"] is not None:
            parts.append(f"at most {workload['max_concurrency']:,} at once")
        return " · ".join(parts)


def make_result(outcome: Outcome, goals: GoalsSpec = NO_GOALS) -> Result:
    """Return the result of an experiment that has just run, judged by ``goals``."""
    experiment, texts, cost = outcome.experiment, outcome.texts, outcome.experiment.cost
    trials = [trial for trials in outcome.recordings.values() for trial in trials]
    checked: Any = {"passed": outcome.verification.passed, **asdict(outcome.verification)}
    checked["findings"] = list(checked["findings"])
    facts: Facts = {
        "created_at": now(),
        "command": " ".join([experiment.command(), *settings.words_of(goals, NO_GOALS)]),
        "simulated": experiment.simulated,
        "config": cast(Any, {**experiment.config(), "goals": settings.as_json(goals)}),
        "environment": cast(Any, outcome.environment),
        "model": cast(Any, outcome.model),
        "warm_up": cast(Any, asdict(outcome.warm_up)),
        "small_batches": small_batches_of(outcome.small_batches),
        "workload": workload_facts(outcome.workload),
        "verification": checked,
        "stopped": None if outcome.stopped is None else str(outcome.stopped),
        "outputs": None
        if texts is None
        else [
            {"request": i, "prompt": prompt, "output": output}
            for i, (prompt, output) in enumerate(texts)
        ],
        "cost": {**cost.as_dict(), "extrapolates": beyond(cost, trials)} if cost else None,
        "prediction": None if outcome.server else predict_outcome(outcome),
        **cast("Facts", served_facts(outcome)),
    }
    return _derived(facts, outcome.workload, outcome.recordings)


def remake_result(result: Result) -> Result:
    """Return the same result with everything derived anew from its recordings."""
    recorded = result.data["workload"]
    first = next(iter(result.recordings.values()))[0].requests
    # Prompts are not in a recording; lengths and times are, and no metric needs more.
    lengths = recorded["output_lengths"]
    workload = Workload(
        name=recorded["name"],
        seed=recorded["seed"],
        prompt_ids=np.zeros(first.prompt_tokens.sum(), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(first.prompt_tokens)]),
        output_tokens=first.output_tokens if lengths is None else np.array(lengths, np.int64),
        due_ns=first.due_ns,
        stop_at_eos=lengths is not None,
        max_concurrency=recorded["max_concurrency"],
        sampling=Sampling(**sampled) if (sampled := recorded.get("sampling")) else None,
    )
    facts = {name: result.data.get(name) for name in Facts.__annotations__}
    return _derived(cast("Facts", facts), workload, result.recordings)


def regoaled(result: Result, goals: GoalsSpec) -> Result:
    """Return the same result judged by other goals, with everything derived anew."""
    data = result.data.copy()
    data["config"] = {**data["config"], "goals": settings.as_json(goals)}
    return remake_result(Result(data, result.recordings))


def workload_facts(workload: Workload) -> WorkloadFacts:
    """Return the totals, the digest and the arrivals of a workload."""
    facts: WorkloadFacts = {
        "name": workload.name,
        "seed": workload.seed,
        "closed": workload.closed,
        "num_requests": len(workload),
        "total_input_tokens": int(workload.prompt_tokens.sum()),
        "total_output_tokens": int(workload.output_tokens.sum()),
        "digest": workload.digest,
        "max_concurrency": workload.max_concurrency,
        "arrival_rate": rate_of(workload.due_ns),
        # A recording has the lengths produced, which differ only if texts may end early.
        "output_lengths": workload.output_tokens.tolist() if workload.stop_at_eos else None,
    }
    if workload.sampling:
        facts["sampling"] = asdict(workload.sampling)
    return facts


def _derived(facts: Facts, workload: Workload, recordings: Recordings) -> Result:
    goals = settings.from_json(GoalsSpec, facts["config"]["goals"])
    checked, server = facts["verification"], facts.get("server")
    findings = tuple(Finding(**finding) for finding in checked["findings"])
    counts: dict[str, Any] = {k: value for k, value in checked.items() if k != "passed"}
    verification = Verification(**{**counts, "findings": findings})
    reasons = audit(
        workload,
        recordings,
        verification,
        WarmUp(**facts["warm_up"]),
        facts["stopped"],
        facts["config"]["workload"].get("request_rate"),
        served=server is not None,
    )
    reasons += doubts(facts, recordings)
    baseline, *candidates = recordings
    classes = length_classes(recordings[baseline][0].requests.output_tokens)
    strategies = {name: _strategy(trials, goals, classes) for name, trials in recordings.items()}
    if server is not None:
        for name, strategy in strategies.items():
            strategy["computed_passes"] = typical_passes(server, name)
    comparisons = [
        _comparison(baseline, name, strategies, recordings, facts, workload) for name in candidates
    ]
    data: ResultData = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        **facts,
        "strategies": strategies,
        "comparison": comparisons[-1] if comparisons else None,
        "comparisons": comparisons,
        "explain": explain(recordings, facts["warm_up"].get("duration_s")),
        "validity": {"status": "suspect" if reasons else "valid", "reasons": reasons},
    }
    return Result(data, recordings)


def _strategy(
    trials: Sequence[Recording], goals: GoalsSpec, classes: Sequence[tuple[int, int]]
) -> StrategyData:
    limits, price = goals.limits_ms, goals.price_per_hour
    summaries = [metrics.summary([trial], limits) for trial in trials]
    summary = summaries[0] if len(trials) == 1 else metrics.summary(trials, limits)
    cost = None if price is None else price / 3600 / summary["output_throughput"] * 1e6
    about = trials[0].header.about
    servings = about.get("servings", 1)
    strategy: StrategyData = {
        "trials": summaries,
        "summary": {**summary, "cost_per_million_output_tokens": cost},
        "by_output_length": by_length(trials, classes),
        "stalls": stalls(trials),
        "decode_step": metrics.decode_floor(trials),
        "counters": metrics.counters(trials[0]) if trials[0].has_steps else None,
        "computed_passes": about.get("computed_passes"),
        "output_digest": output_digest(trials[0]),
    }
    if servings > 1:
        strategy["servings"] = servings
    return strategy


def output_digest(recording: Recording) -> str | None:
    """Return the SHA-256 of every request's tokens; None if no model ran."""
    if recording.tokens is None:
        return None
    content = hashlib.sha256(recording.requests.output_tokens.astype("<i8").tobytes())
    content.update(recording.tokens.astype("<i4").tobytes())
    return content.hexdigest()


def ratio_of(
    strategies: Mapping[str, StrategyData], name: str, numerator: str, denominator: str
) -> Ratio | None:
    """Return a metric of one strategy divided by that of another, trial by trial."""
    sides = [strategies[strategy]["trials"] for strategy in (numerator, denominator)]
    return paired_ratio(*([metric(trial, name) for trial in trials] for trials in sides))


def _comparison(
    baseline: str,
    candidate: str,
    strategies: Mapping[str, StrategyData],
    recordings: Recordings,
    facts: Facts,
    workload: Workload,
) -> ComparisonData:
    speedup = ratio_of(strategies, "duration", baseline, candidate)
    assert speedup is not None
    if (server := facts.get("server")) is not None:
        slots = facts["config"]["serving"]["batch_size"]
        steps, source = step_ratio(baseline, candidate, server, slots, workload) or (None, None)
    else:
        # Steps may vary from trial to trial if texts end early, so pairs count here too.
        # None if one of the two schedules by itself and reports no steps.
        sides = (recordings[baseline], recordings[candidate])
        steps = paired_ratio(*([trial.num_steps for trial in trials] for trials in sides))
        source = "schedule" if steps else None
    return {
        "baseline": baseline,
        "candidate": candidate,
        "speedup": speedup.as_dict(),
        "step_ratio": steps.median if steps else None,
        "step_ratio_source": source,
        "efficiency": speedup.median / steps.median if steps else None,
    }


def to_json(result: Result) -> str:
    """Return the text of ``result.json``; a value without meaning is null, never NaN."""
    return json_text(result.data)


def load_result(folder: Path) -> Result:
    """Read a result's folder, or its ``result.json`` with the recordings beside it.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    file, data = file_of(folder), load_data(folder)
    recordings = {
        name: [
            load_recording(file.parent / recording_file(i, trial))
            for trial in range(len(strategy["trials"]))
        ]
        for i, (name, strategy) in enumerate(data["strategies"].items())
    }
    fault = next(mismatches(data, recordings), None)
    if fault is not None:
        raise UsageError(f"{file}: its parts do not belong together: {fault}")
    return Result(data, recordings)


def recording_file(strategy: int, trial: int) -> str:
    return f"recordings/{strategy}-{trial}.npz"


def recording_files(recordings: Recordings) -> dict[str, bytes]:
    """Return the recordings by the paths at which :func:`load_result` finds them."""
    return {
        recording_file(i, trial): save_recording(recording)
        for i, trials in enumerate(recordings.values())
        for trial, recording in enumerate(trials)
    }
