"""Compare two versions by their results: the runs of each, their work and their speed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from batchbench.batching.machine import MUST_MATCH_FOR_TIMES, Difference, differences
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.reports.peers import read_peer
from batchbench.reports.peers.values import PeerFile
from batchbench.reports.result_file import load_data
from batchbench.reports.statistics import FEWEST, POWER, Decision, Rule, Verdict, compare_means
from batchbench.reports.text import joined, plural
from batchbench.settings import option_name
from batchbench.studies.gate.evidence import (
    OUTPUTS,
    Evidence,
    Gate,
    Kind,
    MetricQuery,
    Side,
    Version,
    compare_counts,
    compare_work,
    describe,
    in_short,
    make_gate,
    mismatches,
    shown_facts,
)
from batchbench.studies.gate.spec import METRICS, CompareSpec, Condition, Metric

_ENDINGS = (".json", ".jsonl", ".yaml", ".yml")
"""Endings of the files of other tools."""

_PARTS = ("target", "workload", "serving", "model", "trials", "goals")
_MAY_DIFFER = ("trials", "max_time", "verify")
"""Settings in which the runs of one experiment may differ."""

_MOST_RUNS = 10_000  # that are suggested


# Runs


@dataclass(frozen=True, eq=False)
class Run:
    """One result: its label, and the content of its ``result.json``."""

    label: str
    data: Mapping[str, Any]

    @property
    def reasons(self) -> list[str]:
        return list(self.data["validity"]["reasons"])

    @property
    def of_peer(self) -> bool:
        """Return True for the file of another tool."""
        return "peer" in self.data


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one version; at least one."""

    label: str
    runs: Sequence[Run]

    @property
    def first(self) -> Mapping[str, Any]:
        return self.runs[0].data

    @property
    def valid(self) -> list[Run]:
        return [run for run in self.runs if not run.reasons]

    @property
    def version(self) -> Version:
        more = {"created": self.first["created_at"], "runs": str(len(self.runs))}
        side = Side(self.label, {**shown_facts(self.first), **more})
        return Version(side, [run.data for run in self.runs])


def load_runs(path: Path) -> Runs:
    """Load one result (its folder or ``result.json``), or a folder that holds several."""
    try:
        files = _files(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UsageError(f"{path}: cannot be read: {reason_of(error)}") from error
    runs = []
    for file in files:
        peer = read_peer(file)
        data: Mapping[str, Any] = load_data(file) if peer is None else _as_result(peer)
        runs.append(Run(str(file if len(files) > 1 else path), data))
    side = Runs(str(path), runs)
    _check_runs(side)
    return side


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix not in _ENDINGS:
        raise UsageError(
            f"{path}: is not a result.json; give that file, or the folder that holds it"
        )
    if not path.is_dir() or (path / "result.json").exists():
        return [path]
    if folders := sorted(file.parent for file in path.glob("*/result.json")):
        return folders
    if files := sorted(file for file in path.iterdir() if file.suffix in _ENDINGS):
        return files
    raise UsageError(
        f"{path}: holds no result.json, nor do the folders in it; give a folder that batchbench "
        "run wrote, or one that holds several such folders"
    )


def _as_result(file: PeerFile) -> dict[str, Any]:
    """Return the parts of a result that another tool's file holds."""
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


def _check_runs(side: Runs) -> None:
    """Raise UsageError if a side's runs are not of one experiment and one version."""
    first = side.runs[0]
    for run in side.runs[1:]:
        _check_same_question(first, run)
        for setting in differing_settings(first.data["config"], run.data["config"]):
            if setting.name not in _MAY_DIFFER and not first.of_peer:
                raise UsageError(
                    f"{run.label}: is not of the same experiment as {first.label}: "
                    f"{_spell_setting(setting)}; give runs of one experiment in {side.label}"
                )
    for one, other in combinations(side.runs, 2):
        trials = [[s["trials"] for s in run.data["strategies"].values()] for run in (one, other)]
        if not one.data["simulated"] and trials[0] == trials[1]:
            raise UsageError(
                f"{other.label}: holds the same measurement as {one.label}, which would count "
                "twice; remove one of them"
            )


def check_comparable(base: Runs, new: Runs) -> None:
    """Raise UsageError if workload, model or strategies differ, or if runs of the base do.

    Runs of the base must agree on their counts, or there is nothing to compare with.
    """
    _check_same_question(base.runs[0], new.runs[0])
    for run in base.runs[1:]:
        for evidence in compare_counts(base.first, run.data, alike=base.first["simulated"]):
            if evidence.fails:
                raise UsageError(
                    f"{run.label}: its {evidence.name} is {evidence.new}, and {evidence.base} in "
                    f"{base.runs[0].label}; runs of one version must have equal counts, so nothing "
                    f"can be compared with {base.label}"
                )


_KINDS = {
    "peer": "was written by another tool, and {other} by batchbench; show them side by side with "
    "batchbench report {base} {new}",
    "simulated": "is a simulation, and {other} was measured; compare two simulations or two "
    "measurements",
    "server": "was measured on a server, and {other} on our own engine; compare two results with "
    "--target, or two without",
}
"""Keys of a result that only one of two lacks, with the reason why they cannot be compared."""


def _check_same_question(base: Run, new: Run) -> None:
    then, now = base.data, new.data
    for key, reason in _KINDS.items():
        if bool(then.get(key)) != bool(now.get(key)):
            one, other = (base, new) if then.get(key) else (new, base)
            reason = reason.format(other=other.label, base=base.label, new=new.label)
            raise UsageError(f"{one.label}: {reason}")
    of_peer = base.of_peer
    if not of_peer and then["workload"]["digest"] != now["workload"]["digest"]:
        raise UsageError(
            f"{new.label}: has a different workload from {base.label}: "
            f"{_spell_workloads(then['config'], now['config'])}; run both with the same workload "
            "options"
        )
    for what, (theirs, ours) in _named(then, now).items():
        if theirs != ours:
            way = (
                f"measure both with the same {what}" if of_peer else f"run both with {_WAYS[what]}"
            )
            raise UsageError(
                f"{new.label}: has the {what} {ours}, and {base.label} has {theirs}; {way}"
            )


_WAYS = {
    "model": "the same --model",
    "weights": "the same --model, --load-format and --seed",
    "strategies": "the same --strategy",
}


def _named(*results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what must be the same in results, by its name."""
    models = [data["model"] for data in results]
    named = {"model": [model["name"] or "not named" for model in models]}
    if "peer" in results[0]:
        return {**named, "load": [", ".join(data["strategies"]) for data in results]}
    digests = [model.get("weights_digest") for model in models]
    # In another number format the same weights have another digest.
    if all(digests) and len({model["dtype"] for model in models}) == 1:
        named["weights"] = [digest[:12] for digest in digests]
    orders = [list(data["strategies"]) for data in results]
    return {**named, "strategies": [", ".join([o[0], *sorted(o[1:])]) for o in orders]}


def _spell_workloads(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for difference in differing_settings(base, new, ("workload",)):
        return _spell_setting(difference)
    sizes = [config["serving"]["batch_size"] for config in (base, new)]
    classic = all(
        base["workload"].get(name) is None for name in ("long_every", "output_tokens", "trace")
    )
    if classic and sizes[0] != sizes[1]:
        return f"{_spell_setting(Difference('long_every', *sizes))} (its default is --batch-size)"
    return "prompts, lengths or arrival times differ"


def _spell_setting(difference: Difference) -> str:
    values = ["not given" if v is None else str(v) for v in (difference.base, difference.new)]
    return f"{option_name(difference.name)} differs: {' and '.join(values)}"


def differing_settings(
    base: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str] = _PARTS
) -> list[Difference]:
    """Return the settings in which two configurations differ, by the names of their fields."""
    return [one for part in parts for one in differences(base.get(part, {}), new.get(part, {}))]


# Speeds


@dataclass(frozen=True, eq=False)
class Sample:
    """One side of a metric: logarithms of runs or trials that grow as it gets slower."""

    logs: Sequence[float]
    known: float = 0.0  # variance of their mean beyond the one they show
    of_runs: bool = True
    variance: float = 0.0  # of the value of one run

    @property
    def mean(self) -> float:
        return float(np.mean(self.logs))


def judge(
    query: MetricQuery,
    base: Sample,
    new: Sample,
    decision: Decision,
    why: str | None = None,
    needed: str | None = None,
) -> Evidence:
    values = query.value(base.mean), query.value(new.mean)
    return query.evidence(values, decision, (len(base.logs), len(new.logs)), needed, why)


def compare_speeds(
    base: Runs, new: Runs, spec: CompareSpec, unlike: Sequence[Difference]
) -> Iterator[Evidence]:
    """Compare ratios and times of two comparable versions.

    Speed-ups are gated if the environments match or ``spec`` accepts that they do not; times and
    other metrics if a condition names them. Gated metrics share the error of the confidence level,
    and the others share the same amount.
    """
    queries = list(_queries(base, new, spec))
    margin, alpha = math.log1p(spec.margin / 100), 1 - spec.confidence
    for query in queries:
        if unlike and not (spec.allow_environment_mismatch and query.metric.is_ratio):
            yield _refuse(query, base, new, unlike)
        else:
            sharing = sum(other.gated is query.gated for other in queries)
            yield _compare(query, base, new, Rule(query.log_floor, margin, alpha).shared(sharing))


def _queries(base: Runs, new: Runs, spec: CompareSpec) -> Iterator[MetricQuery]:
    strategies, conditions = list(base.first["strategies"]), spec.conditions
    for condition in conditions:
        _check_condition(condition, strategies, base, new)
    for metric in METRICS.values():
        for name in strategies[1:] if metric.of_pair else strategies:
            if _has(base, metric, name) and _has(new, metric, name):
                own = [c for c in conditions if c.metric == metric and c.strategy in (None, name)]
                yield from (MetricQuery(metric, name, c.share, True, c) for c in own)
                if not own and metric.shown:
                    yield MetricQuery(metric, name, spec.floor / 100, metric.name == "speedup")


def _check_condition(
    condition: Condition, strategies: Sequence[str], base: Runs, new: Runs
) -> None:
    option, metric = f"--fail-if '{shown(condition.text)}'", condition.metric
    names = strategies[1:] if metric.of_pair else strategies  # the first is the baseline of pairs
    if not names or condition.strategy not in (None, *names):
        who, way = "no strategy", "name another metric"
        if names:
            who, way = f"only {joined(names)}", "name such a strategy"
        raise UsageError(f"{option}: in these results, {who} can have {metric.name}; {way}")
    names = [condition.strategy] if condition.strategy else names
    for side in (base, new):
        if not any(_has(side, metric, name) for name in names):
            raise UsageError(
                f"{option}: {side.label} holds no {metric.name}; name a metric that it holds, or "
                "run it with the options that this metric needs"
            )


def _has(side: Runs, metric: Metric, strategy: str) -> bool:
    return any(v is not None for run in side.runs for v in _values(metric, strategy, run.data))


def _values(metric: Metric, strategy: str, data: Mapping[str, Any]) -> list[float | None]:
    """Return a value for each trial; None if it has no meaning."""
    trials = data["strategies"][strategy]["trials"]
    if not metric.of_pair:
        return [trial.get(metric.name) for trial in trials]
    comparison = next((c for c in data["comparisons"] if c["candidate"] == strategy), None)
    if comparison is None:  # another tool compares no strategies
        return []
    steps = comparison["step_ratio"] if metric.name == "efficiency" else 1.0
    before = data["strategies"][comparison["baseline"]]["trials"]
    pairs = zip([t["duration"] for t in before], [t["duration"] for t in trials], strict=False)
    return [a / b / steps if b and steps else None for a, b in pairs]


def _refuse(query: MetricQuery, base: Runs, new: Runs, unlike: Sequence[Difference]) -> Evidence:
    """Return values from environments that do not match; a change of times would mislead.

    Raises:
        UsageError: a condition needs a verdict.
    """
    is_ratio = query.metric.is_ratio
    if query.condition is not None:
        way = "give --allow-environment-mismatch" if is_ratio else "compare ratios such as speedup"
        raise UsageError(
            f"--fail-if '{query.condition.text}': {_spell_unlike(unlike)}; compare runs of "
            f"matching environments, or {way}"
        )
    why = f"was not compared: the environments differ in {', '.join(d.name for d in unlike)}"
    if is_ratio:
        why += "; --allow-environment-mismatch compares it anyway"
    samples = _sample(query, base.runs), _sample(query, new.runs)
    evidence = _without_verdict(replace(query, gated=False), *samples, why)
    return evidence if is_ratio else replace(evidence, change=None)


def _spell_unlike(unlike: Sequence[Difference]) -> str:
    facts = ", ".join(f"{d.name} ({_spell(d.base)}, {_spell(d.new)})" for d in unlike)
    return f"the environments differ in {facts}"


def _spell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_spell(inner)}" for name, inner in value.items())
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _sample(query: MetricQuery, runs: Sequence[Run]) -> Sample | None:
    """Return the logarithms of a side; None if a trial has none."""
    sign = -1 if query.metric.higher_is_better else 1
    of_runs = []
    for run in runs:
        values = _values(query.metric, query.strategy, run.data)
        logs = [sign * math.log(v) for v in values if v and v > 0 and math.isfinite(v)]
        if not logs or len(logs) < len(values):
            return None
        of_runs.append(logs)
    if len(of_runs) >= FEWEST:
        means = [float(np.mean(logs)) for logs in of_runs]
        return Sample(means, variance=float(np.var(means, ddof=1)))
    pooled = [log for logs in of_runs for log in logs]
    between = query.metric.between**2
    within = float(np.var(pooled, ddof=1)) if len(pooled) > 1 else 0.0
    of_run = between + within * len(of_runs) / len(pooled)
    return Sample(pooled, between / len(of_runs), False, of_run)


def _compare(query: MetricQuery, base: Runs, new: Runs, rule: Rule) -> Evidence:
    suspect = next((side for side in (base, new) if not side.valid), None)
    then, now = (_sample(query, side.valid or side.runs) for side in (base, new))
    if then is None or now is None:
        return _without_verdict(query, None, None, "has a trial without a value above 0")
    if suspect:
        reason = suspect.runs[0].reasons[0]
        stamped = f"was not compared: {suspect.label} is marked suspect: {reason}"
        return _without_verdict(query, then, now, stamped)
    if base.first["simulated"]:
        change, verdict = now.mean - then.mean, Verdict.SAME
        if abs(change) > rule.floor + 1e-12:  # rounding of sums of logarithms
            verdict = Verdict.SLOWER if change > 0 else Verdict.FASTER
        return judge(query, then, now, Decision(verdict, len(then.logs), change, change, change))
    if list(then.logs) == list(now.logs):  # the same measurement on both sides
        same = Decision(Verdict.SAME, len(then.logs), 0.0, 0.0, 0.0)
        return judge(query, then, now, same, "has the same values to the last digit")
    between = math.sqrt((then.known + now.known) / 2)
    decision = compare_means(then.logs, now.logs, rule, between=between)
    why = needed = None
    if decision.is_sure:
        why = f"--fail-if '{query.condition.text}'" if query.condition else None
    elif query.gated:
        few = min(len(base.valid), len(new.valid))
        why = f"is too uncertain from {plural(few, 'run')} per side"
        needed = _needed(then, now, decision, rule)
    return judge(query, then, now, decision, why, needed)


def _needed(base: Sample, new: Sample, decision: Decision, rule: Rule) -> str | None:
    """Return the trials that are enough, or the runs if no number of trials of one run is."""
    if base.of_runs and new.of_runs:
        return None if decision.needed is None else f"{decision.needed:,} runs per side"
    if decision.needed is not None and decision.needed <= 100:
        return f"{decision.needed} trials per side"
    change = abs(decision.estimate or 0.0)
    distance = max(change - rule.floor, rule.margin - change)
    variance = base.variance + new.variance

    def would_do(runs: int) -> bool:
        nu = 2 * runs - 2
        reach = float(stats.t.isf(rule.alpha, nu) + stats.t.ppf(POWER, nu))
        return reach * math.sqrt(variance / runs) <= distance

    runs = range(FEWEST, _MOST_RUNS + 1)
    index = bisect.bisect_left(runs, True, key=would_do)
    return None if index == len(runs) else f"{runs[index]:,} runs per side"


def _without_verdict(
    query: MetricQuery, base: Sample | None, new: Sample | None, why: str
) -> Evidence:
    if base is None or new is None:
        values = tuple(None if one is None else query.value(one.mean) for one in (base, new))
        return query.evidence((values[0], values[1]), Decision(Verdict.UNKNOWN, 0), why=why)
    return judge(query, base, new, Decision(Verdict.UNKNOWN, 0, new.mean - base.mean), why)


# The gate


def compare_versions(base: Runs, new: Runs, spec: CompareSpec, typed: str) -> Gate:
    check_comparable(base, new)
    sides = base.version, new.version
    unlike = mismatches(*sides, MUST_MATCH_FOR_TIMES)
    speeds = list(compare_speeds(base, new, spec, unlike))
    work = compare_work(*sides, allow_improvement=spec.allow_improvement)
    of_peer, few = base.runs[0].of_peer, min(len(base.runs), len(new.runs))
    doubt = (
        f"{plural(few, 'file')} per side cannot show that a difference is not chance; give folders "
        f"of {FEWEST} or more files per side, and --fail-if for a metric that matters"
    )
    return make_gate(
        "compare",
        typed,
        *sides,
        [*work, *speeds],
        notes=[*_notes(base, new, spec, unlike, work), *_warnings(speeds, base.first["simulated"])],
        settings=differing_settings(base.first["config"], new.first["config"]),
        unsure=doubt if of_peer and few < FEWEST else None,
    )


def _notes(
    base: Runs, new: Runs, spec: CompareSpec, unlike: Sequence[Difference], work: Sequence[Evidence]
) -> Iterator[str]:
    if base.runs[0].of_peer:
        yield (
            "Files of other tools name neither the machine nor the prompts: a difference may come "
            "from either."
        )
        if base.first["peer"] != new.first["peer"]:
            yield "The two tools define some metrics differently: docs/other-tools.md."
        return
    if base.first["simulated"]:
        yield "Both are simulations, whose times are exact."
    elif not base.first["workload"]["closed"]:
        yield (
            "Requests arrive over time, so counts depend on the machine's speed and are not gated."
        )
    silent = [e.strategy for e in work if e.metric == "counters" and not e.gated and e.strategy]
    if silent:
        verb, whose = ("report", "their") if len(silent) > 1 else ("reports", "its")
        yield f"{joined(silent)} {verb} no steps, so {whose} counts were not compared."
    if any(e.metric == OUTPUTS and e.verdict is Verdict.CHANGED and not e.fails for e in work):
        yield (
            "Outputs differ, but precision or environment may decide between two tokens that are "
            "nearly tied; batchbench run verifies outputs against the model alone."
        )
    for side in (base, new):
        if (suspect := len(side.runs) - len(side.valid)) and side.valid:
            yield (
                f"{suspect} of {len(side.runs)} runs of {side.label} are marked suspect: only "
                "their counts and outputs are compared."
            )
    if unlike:
        ratios = "Speed-ups are not gated either; --allow-environment-mismatch gates them."
        if spec.allow_environment_mismatch:
            ratios = "Speed-ups are gated anyway, as requested."
        yield f"T{_spell_unlike(unlike)[1:]}: absolute times are not compared. {ratios}"
    for condition in spec.conditions:
        if not condition.is_loss:
            better = "rise" if condition.metric.higher_is_better else "fall"
            yield (
                f"--fail-if '{condition.text}' fails on an improvement: a {better} of "
                f"{condition.metric.name} is a gain."
            )


def _warnings(speeds: Sequence[Evidence], simulated: bool) -> Iterator[str]:
    """Warn of losses of times that no condition names."""
    lost = [
        e for e in speeds if e.kind is Kind.TIME and not e.gated and e.verdict is Verdict.SLOWER
    ]
    if lost:
        why = "Times of two sessions also differ because of other load on the machine. "
        yield (
            f"Warning: {in_short([*map(describe, lost)])}. {why * (not simulated)}Times are gated "
            "only by --fail-if."
        )
