"""Two versions, held against each other: their work, their speed, and what differs around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from batchbench.errors import UsageError, shown
from batchbench.reports.statistics import FEWEST, POWER, Decision, Rule, Verdict, compare_means
from batchbench.studies.gate.counts import (
    FOR_TIMES,
    FOR_TOKENS,
    OUTPUTS,
    Work,
    compare_work,
    differing,
    environment_differences,
)
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Varying, describe, weigh
from batchbench.studies.gate.runs import Run, Runs, check_comparable, varying_settings
from batchbench.studies.gate.spec import GAUGES, CompareSpec, Condition, Gauge

_MOST = 10_000
"""Runs beyond which nobody is told how many would do."""


@dataclass(frozen=True)
class Asked:
    """A figure to compare, and when its change counts.

    Attributes:
        floor: of the loss as a share.
        condition: what ``--fail-if`` says of it, if it does.
    """

    gauge: Gauge
    strategy: str
    floor: float
    gated: bool
    condition: Condition | None = None

    @property
    def kind(self) -> Kind:
        """Ratio or time."""
        return Kind.RATIO if self.gauge.is_ratio else Kind.TIME

    @property
    def log_floor(self) -> float:
        """The floor as a log ratio, above 0."""
        if self.condition:
            return self.condition.floor
        return -math.log1p(-self.floor) if self.gauge.higher_is_better else math.log1p(self.floor)


@dataclass(frozen=True, eq=False)
class _Sample:
    """One side of a figure: logarithms, above which is slower.

    Attributes:
        logs: a value a run, or a value a trial.
        known: variance that their mean has beyond what they show.
        of_runs: whether they are values of runs.
        variance: of the value of one run.
    """

    logs: Sequence[float]
    known: float
    of_runs: bool
    variance: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.logs))


def compare_speeds(
    base: Runs, new: Runs, spec: CompareSpec, unlike: Sequence[Varying]
) -> list[Evidence]:
    """Ratios and times of two comparable versions.

    Speed-ups gate, in like environments or where ``spec`` says that others will do; times, and
    whatever else ``spec`` names, gate where a condition asks for it. Metrics that gate share its
    α, and those that are only shown share one of their own.

    Args:
        unlike: facts that differ and on which times depend.

    Raises:
        UsageError: a condition names what these results do not hold, or what cannot be told of
            unlike environments.
    """
    asked = list(_asked(base, new, spec))
    _check_alike(asked, spec, unlike)
    counts = {gated: sum(one.gated is gated for one in asked) for gated in (True, False)}
    margin = math.log1p(spec.margin / 100)
    found = []
    for one in asked:
        if unlike and not (spec.allow_environment_mismatch and one.gauge.is_ratio):
            found.append(_refused(one, base, new, unlike))
            continue
        rule = Rule(one.log_floor, margin, spec.alpha).shared(counts[one.gated])
        found.append(_compare(one, base, new, rule))
    return found


# What is compared


def _asked(base: Runs, new: Runs, spec: CompareSpec) -> Iterator[Asked]:
    strategies, usual = base.runs[0].strategies, spec.floor / 100
    conditions = spec.conditions
    for condition in conditions:
        _check_condition(condition, strategies, base, new)
    for gauge in GAUGES.values():
        for name in strategies[1:] if gauge.of_pair else strategies:
            if not all(_is_there(gauge, name, side) for side in (base, new)):
                continue
            told = [c for c in conditions if c.gauge == gauge and c.strategy in (None, name)]
            yield from (Asked(gauge, name, c.share, True, c) for c in told)
            if not told and gauge.shown:
                yield Asked(gauge, name, usual, gauge.name == "speedup")


def _check_condition(
    condition: Condition, strategies: Sequence[str], base: Runs, new: Runs
) -> None:
    option, gauge = f"--fail-if '{shown(condition.text)}'", condition.gauge
    if condition.strategy is not None and condition.strategy not in strategies:
        raise UsageError(
            f"{option}: there is no strategy {condition.strategy}; the results have "
            f"{', '.join(strategies)}"
        )
    if gauge.of_pair and (len(strategies) < 2 or condition.strategy == strategies[0]):
        raise UsageError(
            f"{option}: {gauge.name} is that of a strategy over the baseline {strategies[0]}; "
            + (f"name {strategies[1]}" if strategies[1:] else "the results have no other strategy")
        )
    of = strategies[1:] if gauge.of_pair else strategies
    names = of if condition.strategy is None else [condition.strategy]
    for side in (base, new):
        if not any(_is_there(gauge, name, side) for name in names):
            raise UsageError(
                f"{option}: {side.label} holds no {gauge.name}; name a metric that it holds, or "
                "run it with the options that this one needs"
            )


def _is_there(gauge: Gauge, strategy: str, side: Runs) -> bool:
    return any(v is not None for run in side.runs for v in _values(gauge, strategy, run.data))


def _check_alike(asked: Sequence[Asked], spec: CompareSpec, unlike: Sequence[Varying]) -> None:
    if not unlike:
        return
    differ = spell_unlike(unlike)
    for one in asked:
        if one.condition is None or (one.gauge.is_ratio and spec.allow_environment_mismatch):
            continue
        way = (
            "compare runs of like environments, or give --allow-environment-mismatch"
            if one.gauge.is_ratio
            else "compare runs of like environments, or ratios such as speedup"
        )
        raise UsageError(f"--fail-if '{one.condition.text}': {differ}; {way}")


def spell_unlike(unlike: Sequence[Varying]) -> str:
    """In what the environments differ: ``the environments differ in cpu (A, B), torch (2, 3)``."""
    told = ", ".join(f"{v.name} ({_spell(v.base)}, {_spell(v.new)})" for v in unlike)
    return f"the environments differ in {told}"


def _spell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_spell(inner)}" for name, inner in value.items())
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# Values


def _values(gauge: Gauge, strategy: str, data: Mapping[str, Any]) -> list[float | None]:
    """A value a trial; None where it has no meaning."""
    trials = data["strategies"][strategy]["trials"]
    if not gauge.of_pair:
        return [trial.get(gauge.name) for trial in trials]
    (told,) = [each for each in data["comparisons"] if each["candidate"] == strategy]
    steps = told["step_ratio"] if gauge.name == "efficiency" else 1.0
    before = data["strategies"][told["baseline"]]["trials"]
    pairs = zip([t["duration"] for t in before], [t["duration"] for t in trials], strict=False)
    return [a / b / steps if b and steps else None for a, b in pairs]


def _logs(one: Asked, run: Run) -> list[float] | None:
    """Of each trial, above which is slower; None where one has no logarithm."""
    values = _values(one.gauge, one.strategy, run.data)
    sign = -1 if one.gauge.higher_is_better else 1
    logs = [sign * math.log(v) for v in values if v and v > 0 and math.isfinite(v)]
    return logs if logs and len(logs) == len(values) else None


def _sample(one: Asked, runs: Sequence[Run]) -> _Sample | None:
    logs = [_logs(one, run) for run in runs]
    there = [each for each in logs if each is not None]
    if not there or len(there) < len(logs):
        return None
    pooled = [log for each in there for log in each]
    if len(there) >= FEWEST:
        means = [float(np.mean(each)) for each in there]
        return _Sample(means, 0.0, True, float(np.var(means, ddof=1)))
    between = one.gauge.between**2
    within = float(np.var(pooled, ddof=1)) if len(pooled) > 1 else 0.0
    of_run = between + within * len(there) / len(pooled)
    return _Sample(pooled, between / len(there), False, of_run)


# Verdicts


def _compare(one: Asked, base: Runs, new: Runs, rule: Rule) -> Evidence:
    suspect = next((side for side in (base, new) if not side.valid), None)
    then, now = (_sample(one, side.valid or side.runs) for side in (base, new))
    if then is None or now is None:
        return _untold(one, None, None, "has a trial without a value above 0")
    if suspect:
        why = f"cannot be told: {suspect.label} is stamped suspect: {suspect.runs[0].reasons[0]}"
        return _untold(one, then, now, why)
    if base.first["simulated"]:
        return _fails(one, _weighed(one, then, now, _exact(then, now, rule)))
    if list(then.logs) == list(now.logs):  # one measurement, held against itself
        same = Decision(Verdict.SAME, len(then.logs), 0.0, 0.0, 0.0)
        return _weighed(one, then, now, same, "has the same values to the last digit")
    between = math.sqrt((then.known + now.known) / 2)
    decision = compare_means(then.logs, now.logs, rule, between=between)
    if decision.is_sure:
        return _fails(one, _weighed(one, then, now, decision, _failed(one)))
    if not one.gated:
        return _weighed(one, then, now, decision)
    few = min(len(base.valid), len(new.valid))
    uncertain = f"is too uncertain from {few} run{'s' * (few > 1)} a side"
    return _weighed(one, then, now, decision, uncertain, _needed(then, now, decision, rule))


def _weighed(
    one: Asked,
    base: _Sample,
    new: _Sample,
    decision: Decision,
    why: str | None = None,
    needed: str | None = None,
) -> Evidence:
    found = weigh(
        one.kind,
        one.gauge.name,
        one.strategy,
        (_shown(one, base), _shown(one, new)),
        decision,
        higher_is_better=one.gauge.higher_is_better,
        gated=one.gated,
        floor=one.floor,
        unit=one.gauge.unit,
        samples=(len(base.logs), len(new.logs)),
        needed=needed,
        why=why,
    )
    if found.change == found.low == found.high == 0:  # which a sign may have made −0
        return replace(found, change=0.0, low=0.0, high=0.0)
    return found


def _shown(one: Asked, sample: _Sample) -> float:
    """The geometric mean, so that the change is that of the values that stand beside it."""
    return math.exp(-sample.mean if one.gauge.higher_is_better else sample.mean)


def _failed(one: Asked) -> str | None:
    return f"--fail-if '{one.condition.text}'" if one.condition else None


def _fails(one: Asked, found: Evidence) -> Evidence:
    """The evidence, where a condition is a gain: then it is that which fails."""
    if one.condition is None or one.condition.is_loss:
        return found
    return replace(found, fails=found.gated and found.verdict is Verdict.FASTER)


def _exact(base: _Sample, new: _Sample, rule: Rule) -> Decision:
    """Of times that no noise touches."""
    change = new.mean - base.mean
    beyond = abs(change) > rule.floor + 1e-12  # what a sum of logarithms is off by
    told = Verdict.SAME if not beyond else Verdict.SLOWER if change > 0 else Verdict.FASTER
    count = min(len(base.logs), len(new.logs))
    return Decision(told, count, change, change, change)


def _needed(base: _Sample, new: _Sample, decision: Decision, rule: Rule) -> str | None:
    """How many trials would do, or runs where no number of trials of one process would."""
    if base.of_runs and new.of_runs:
        return None if decision.needed is None else f"{decision.needed:,} runs a side"
    if decision.needed is not None and decision.needed <= 100:
        return f"{decision.needed} trials a side"
    change = abs(decision.estimate or 0.0)
    distance = max(change - rule.floor, rule.margin - change)
    variance = base.variance + new.variance

    def would_do(runs: int) -> bool:
        nu = 2 * runs - 2
        reach = float(stats.t.isf(rule.alpha, nu) + stats.t.ppf(POWER, nu))
        return reach * math.sqrt(variance / runs) <= distance

    if not would_do(_MOST):
        return None
    low, high = FEWEST, _MOST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if would_do(middle) else (middle + 1, high)
    return f"{low:,} runs a side"


def _untold(one: Asked, base: _Sample | None, new: _Sample | None, why: str) -> Evidence:
    """Nothing but the values, and why."""
    change = None
    if base is not None and new is not None:
        change = _shown(one, new) / _shown(one, base) - 1
    return Evidence(
        one.kind,
        one.gauge.name,
        one.strategy,
        None if base is None else _shown(one, base),
        None if new is None else _shown(one, new),
        Verdict.UNKNOWN,
        gated=one.gated,
        unit=one.gauge.unit,
        higher_is_better=one.gauge.higher_is_better,
        change=change,
        floor=one.floor,
        why=why,
    )


def _refused(one: Asked, base: Runs, new: Runs, unlike: Sequence[Varying]) -> Evidence:
    """Of unlike environments: the values stay; a change of times is not even reckoned."""
    why = f"was not compared: the environments differ in {', '.join(v.name for v in unlike)}"
    if one.gauge.is_ratio:
        why += "; --allow-environment-mismatch compares it all the same"
    told = _untold(one, _sample(one, base.runs), _sample(one, new.runs), why)
    change = told.change if one.gauge.is_ratio else None
    return replace(told, change=change, gated=False)


def compare_versions(base: Runs, new: Runs, spec: CompareSpec, typed: str) -> Gate:
    """All that can be told of two versions from their results.

    Raises:
        UsageError: they were not asked the same question, or a condition cannot be answered.
    """
    check_comparable(base, new)
    unlike = _unlike(base, new, FOR_TIMES)
    work = _work(base, new, allow_improvement=spec.allow_improvement)
    speeds = compare_speeds(base, new, spec, unlike)
    return Gate(
        command="compare",
        typed=typed,
        base=base.side,
        new=new.side,
        evidence=[*work, *speeds],
        settings=varying_settings(base.first, new.first),
        environment=environment_differences(base.first, new.first),
        notes=[
            *_notes(base, new, spec, unlike, work),
            *_warnings(speeds, simulated=base.first["simulated"]),
        ],
    )


def _unlike(base: Runs, new: Runs, names: Sequence[str]) -> list[Varying]:
    """Facts in which any run differs from the first."""
    found: dict[str, Varying] = {}
    for run in [*new.runs, *base.runs[1:]]:
        for varying in differing(base.first, run.data, names):
            found.setdefault(varying.name, varying)
    return list(found.values())


def _work(base: Runs, new: Runs, *, allow_improvement: bool) -> list[Evidence]:
    """The work of the base and of each new run; of each count the run that differs the most."""
    alike = not _unlike(base, new, FOR_TOKENS)
    first = Work.of(base.first)
    each = [
        compare_work(first, Work.of(run.data), alike=alike, allow_improvement=allow_improvement)
        for run in new.runs
    ]
    # Of equally grave ones max takes the first, whichever run it is of.
    return [max(found, key=_gravity) for found in zip(*each, strict=True)]


def _gravity(each: Evidence) -> tuple[bool, bool]:
    return each.fails, each.verdict is Verdict.CHANGED


def _notes(
    base: Runs, new: Runs, spec: CompareSpec, unlike: Sequence[Varying], work: Sequence[Evidence]
) -> Iterator[str]:
    if base.first["simulated"]:
        yield "Both are simulations: their times are exact, and no noise is weighed."
    elif not base.first["workload"]["closed"]:
        yield (
            "Requests come over time: who waits depends on the machine's speed, so that counts are "
            "observations and fail nothing."
        )
    silent = [e.strategy for e in work if e.metric == "counters" and not e.gated and e.strategy]
    if silent:
        yield f"{', '.join(silent)} shows no steps, so that its work could not be counted."
    if any(e.metric == OUTPUTS and e.verdict is Verdict.CHANGED and not e.fails for e in work):
        yield (
            "Outputs differ where the precision or the environment may decide between two tokens "
            "that are nearly tied; batchbench run verifies them against the model alone."
        )
    for side in (base, new):
        if (doubtful := len(side.runs) - len(side.valid)) and side.valid:
            yield (
                f"{doubtful} of {len(side.runs)} runs of {side.label} stamped suspect: compared on "
                "their work, left out of all times."
            )
    if unlike:
        ratios = (
            "Speed-ups are compared all the same, as asked."
            if spec.allow_environment_mismatch
            else "Speed-ups are not gated either; --allow-environment-mismatch gates them."
        )
        text = spell_unlike(unlike)
        yield f"{text[0].upper()}{text[1:]}: absolute times are not compared. {ratios}"
    for condition in spec.conditions:
        if not condition.is_loss:
            better = "rise" if condition.gauge.higher_is_better else "fall"
            yield (
                f"--fail-if '{condition.text}' can never mean a loss: a {better} of "
                f"{condition.gauge.name} is a gain."
            )


def _warnings(speeds: Sequence[Evidence], *, simulated: bool) -> Iterator[str]:
    """Losses of times that nobody asked to fail on."""
    lost = [
        e for e in speeds if e.kind is Kind.TIME and not e.gated and e.verdict is Verdict.SLOWER
    ]
    if not lost:
        return
    more = f", and {len(lost) - 3} more" if len(lost) > 3 else ""
    why = (
        "Times fail only where --fail-if asks for it."
        if simulated
        else "Times of two sessions also differ by what the machine did meanwhile, so that they "
        "fail only where --fail-if asks for it."
    )
    yield f"Warning: {'; '.join(describe(e) for e in lost[:3])}{more}. {why}"
