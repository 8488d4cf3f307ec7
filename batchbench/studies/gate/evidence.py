"""Evidence about two versions, each piece with a verdict, and the gate that follows from it.

Exact counts of the work are compared here, without statistics: a single comparison is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from batchbench.batching.machine import MUST_MATCH_FOR_OUTPUTS, Difference, differences, facts_of
from batchbench.errors import UsageError
from batchbench.reports.statistics import Decision, Verdict
from batchbench.reports.text import MISSING, interval_percent, percent
from batchbench.studies.gate.spec import Condition, Metric


class Kind(StrEnum):
    """The kinds of evidence, strongest first."""

    WORK = "work"  # exact counts and outputs: one comparison is enough
    RATIO = "ratio"  # of two times of one run, so that machine speed cancels out
    TIME = "time"  # an absolute time or rate


@dataclass(frozen=True)
class Evidence:
    """A quantity of the base and of the new version, and its verdict.

    Shares are new / base − 1 in the metric's own direction: −0.05 of a throughput is a loss, of a
    latency a gain. They are None if they have no meaning.
    """

    kind: Kind
    metric: str  # its name in results, such as forward_passes or output_throughput
    strategy: str | None  # that it belongs to; None if to none, or to several
    base: float | str | None
    new: float | str | None
    verdict: Verdict
    fails: bool = False  # this alone fails the comparison
    gated: bool = False  # it can fail the comparison
    unit: str | None = None
    higher_is_better: bool | None = None
    change: float | None = None  # as a share, with its 95 % interval
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    floor: float | None = None  # share beyond which a change counts
    smallest: float | None = None  # loss that this many samples would probably have shown
    needed: str | None = None  # samples or time that would probably be enough: "23 trials"
    samples: tuple[int, int] | None = None  # of each side
    why: str | None = None  # the reason for having no verdict, or the rule that failed

    @property
    def name(self) -> str:
        """Return strategy and metric: ``continuous.forward_passes``."""
        return f"{self.strategy}.{self.metric}" if self.strategy else self.metric

    @property
    def is_undecided(self) -> bool:
        return self.gated and self.verdict is Verdict.UNKNOWN

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        return f"95 % CI {interval_percent(self.low, self.high)}"


def describe(evidence: Evidence) -> str:
    """Return the finding in a few words."""
    name, verdict = evidence.name, evidence.verdict
    if evidence.kind is Kind.WORK:
        if verdict is Verdict.SAME:
            return f"{name} is the same"
        return f"{name} {evidence.why or 'changed'}: {spell(evidence.base)} → {spell(evidence.new)}"
    spelled = {Verdict.UNKNOWN: "uncertain", Verdict.SAME: "the same"}
    text = f"{name} is {spelled.get(verdict, verdict)}"
    if evidence.change is None:
        return text
    return f"{text}: {percent(evidence.change, 1, '+')} ({evidence.interval})"


def in_short(texts: Sequence[str]) -> str:
    """Return the first three texts, and how many more there are."""
    more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
    return "; ".join(texts[:3]) + more


def spell(value: float | str | None) -> str:
    """Return a value in words; of a digest the beginning, which is enough to identify it."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{32,}", value) else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


@dataclass(frozen=True)
class MetricQuery:
    """A metric to compare, and the change of it that counts."""

    metric: Metric
    strategy: str
    floor: float  # share of loss beyond which it is slower
    gated: bool
    condition: Condition | None = None  # of --fail-if, which then has the floor

    @property
    def log_floor(self) -> float:
        """Return the floor as a log ratio, above 0."""
        falls = self.condition.falls if self.condition else self.metric.higher_is_better
        return -math.log1p(-self.floor) if falls else math.log1p(self.floor)

    def change(self, log: float) -> float:
        """Return the change of the metric for a log ratio that is above 0 if new is slower."""
        return math.expm1(-log if self.metric.higher_is_better else log) + 0.0  # no negative zero

    def value(self, log: float) -> float:
        """Return the value of the metric whose logarithm grows as it gets slower."""
        return math.exp(-log if self.metric.higher_is_better else log)

    def evidence(
        self,
        values: tuple[float | None, float | None],
        decision: Decision,
        samples: tuple[int, int] | None = None,
        needed: str | None = None,
        why: str | None = None,
    ) -> Evidence:
        """Return the evidence that a decision on log ratios gives.

        Args:
            values: of base and new, in the metric's unit.
        """
        bounds = [log for log in (decision.low, decision.high) if log is not None]
        ends: list[float | None] = [*sorted(map(self.change, bounds))] or [None]
        gain_fails = self.condition is not None and not self.condition.is_loss
        bad = Verdict.FASTER if gain_fails else Verdict.SLOWER
        return Evidence(
            Kind.RATIO if self.metric.is_ratio else Kind.TIME,
            self.metric.name,
            self.strategy,
            *values,
            decision.verdict,
            fails=self.gated and decision.verdict is bad,
            gated=self.gated,
            unit=self.metric.unit,
            higher_is_better=self.metric.higher_is_better,
            change=None if decision.estimate is None else self.change(decision.estimate),
            low=ends[0],
            high=ends[-1],
            p_value=decision.p_value,
            floor=self.floor,
            smallest=None if decision.smallest is None else abs(self.change(decision.smallest)),
            needed=needed,
            samples=samples,
            why=why,
        )


# The gate


@dataclass(frozen=True)
class Side:
    """One of the two versions that were compared."""

    label: str  # the user's name for it: a folder, an interpreter, a revision
    facts: Mapping[str, str | None] = field(default_factory=dict)  # version, commit, machine …


class Answer(StrEnum):
    """The answer of a gate."""

    PASSED = "passed"
    FAILED = "failed"
    UNKNOWN = "cannot tell"


CANNOT_TELL = 3
"""The exit code of *cannot tell* under ``--strict``."""


@dataclass(frozen=True)
class Gate:
    """The findings of a comparison."""

    command: str  # compare, duet or check
    typed: str  # the command line that repeats it
    base: Side
    new: Side
    evidence: Sequence[Evidence]
    settings: Sequence[Difference] = ()  # that differ between the two experiments
    environment: Sequence[Difference] = ()  # facts that differ between the two machines
    notes: Sequence[str] = ()  # such as what was not compared and why
    unsure: str | None = None  # the reason why the whole has no answer, even if there is evidence
    seconds: float | None = None  # that it took; None if nothing was run

    @property
    def failures(self) -> list[Evidence]:
        return [evidence for evidence in self.evidence if evidence.fails]

    @property
    def undecided(self) -> list[Evidence]:
        return [evidence for evidence in self.evidence if evidence.is_undecided]

    @property
    def answer(self) -> Answer:
        """Return FAILED if anything fails, PASSED only if all that is gated has a verdict."""
        if self.failures:
            return Answer.FAILED
        if self.unsure or self.undecided or not any(e.gated for e in self.evidence):
            return Answer.UNKNOWN
        return Answer.PASSED

    def exit_code(self, *, strict: bool) -> int:
        if self.answer is Answer.UNKNOWN:
            return CANNOT_TELL if strict else 0
        return int(self.answer is Answer.FAILED)

    def of(self, kind: Kind) -> list[Evidence]:
        return [evidence for evidence in self.evidence if evidence.kind is kind]

    @property
    def sentence(self) -> str:
        """Return the answer and its reasons in one sentence."""
        if self.failures:
            return f"FAILED: {in_short([describe(evidence) for evidence in self.failures])}."
        gated = [evidence for evidence in self.evidence if evidence.gated]
        if self.answer is Answer.UNKNOWN:
            reasons = [
                f"{evidence.name} {evidence.why or 'is too uncertain'}"
                + (f" ({evidence.interval})" if evidence.low is not None else "")
                + (f"; {evidence.needed} would probably be enough" if evidence.needed else "")
                for evidence in self.undecided[:3]
            ]
            none = "" if gated else "no metric was gated, so nothing could be shown"
            return f"CANNOT TELL: {self.unsure or none or '; '.join(reasons)}."
        work = [evidence.verdict for evidence in gated if evidence.kind is Kind.WORK]
        same = f"{work.count(Verdict.SAME)} of {len(work)} counts and outputs are the same"
        passes = [describe(evidence) for evidence in gated if evidence.kind is not Kind.WORK]
        return f"passed: {'; '.join([same, *passes] if work else passes)}."

    def as_data(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "answer": str(self.answer),
            "sentence": self.sentence,
            "settings": [difference._asdict() for difference in self.settings],
            "environment": [difference._asdict() for difference in self.environment],
            "shares": ["change", "low", "high", "floor", "smallest"],  # 0.05 of evidence is 5 %
            "evidence": [{"name": evidence.name, **asdict(evidence)} for evidence in self.evidence],
        }


@dataclass(frozen=True, eq=False)
class Version:
    """A version as the gate compares it, and its runs: results, or what holds the same keys."""

    side: Side
    runs: Sequence[Mapping[str, Any]]


def as_result(
    about: Mapping[str, Any], work: Mapping[str, Mapping[str, Any]], version: str
) -> dict[str, Any]:
    """Return the reports of worker processes as the parts of a result that are compared.

    Args:
        about: ``workload``, ``model`` and ``environment``, as in a result.
        work: counters and ``output_digest`` in one mapping, by strategy.
    """
    strategies = {}
    for name, told in work.items():
        counters = {key: count for key, count in told.items() if key != "output_digest"}
        strategies[name] = {"counters": counters or None, "output_digest": told["output_digest"]}
    return {
        **{part: about[part] for part in ("workload", "model", "environment")},
        "batchbench_version": version,
        "simulated": False,
        "config": {"serving": {"engine": None}},
        "strategies": strategies,
    }


def shown_facts(data: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the facts that identify a version in a report."""
    environment = data["environment"]
    machine = environment.get("gpu") or environment.get("cpu")
    return {
        "batchbench": data["batchbench_version"],
        "commit": environment.get("git_commit"),
        "machine": "simulated" if data["simulated"] else machine,
    }


def facts_of_result(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts on which times and outputs of a result depend."""
    if data["simulated"]:
        cost = data.get("cost") or {}
        # The run that the cost was fitted on, and its range, change no time.
        about = {"source", "extrapolates", "rows_seen", "most_prompt_tokens_seen", "longest_seen"}
        return {"cost of a step": {k: v for k, v in cost.items() if k not in about} or "one unit"}
    server = data.get("server") or {}
    told = {f"server {name}": server[name] for name in ("name", "version", "slots") if server}
    engine = data["config"]["serving"]["engine"]
    return facts_of(data["environment"], data["model"], engine=engine, **told)


def mismatches(base: Version, new: Version, names: Sequence[str]) -> list[Difference]:
    """Return the facts among ``names`` in which any run differs from the first of the base.

    For simulations all facts count.
    """
    first = facts_of_result(base.runs[0])
    simulated = base.runs[0]["simulated"] or new.runs[0]["simulated"]
    found: dict[str, Difference] = {}
    for run in (*new.runs, *base.runs[1:]):
        for difference in differences(first, facts_of_result(run), None if simulated else names):
            found.setdefault(difference.name, difference)
    return list(found.values())


_ITSELF = ("batchbench", "git_commit")
"""Facts of the versions that are compared, which are meant to differ."""


def make_gate(
    command: str, typed: str, base: Version, new: Version, evidence: Sequence[Evidence], **more: Any
) -> Gate:
    """Return the gate of two versions; ``more`` are its settings, notes and so on."""
    facts = differences(facts_of_result(base.runs[0]), facts_of_result(new.runs[0]))
    environment = [difference for difference in facts if difference.name not in _ITSELF]
    return Gate(command, typed, base.side, new.side, evidence, environment=environment, **more)


# Work

OUTPUTS = "outputs"
"""The metric name of a strategy's output tokens."""

_FIXED = ("prefill_tokens", "useful_slot_steps")
"""Counts that the workload determines: fewer of them mean missing work, not an improvement."""

_COMPOSITION = ("prefill_passes", "mixed_passes", "decode_passes", "prompt_slot_steps")
"""Parts of ``forward_passes``: they are better only if their sum is."""

_WHOLE = "forward_passes"


def compare_work(base: Version, new: Version, *, allow_improvement: bool) -> list[Evidence]:
    """Compare the first run of the base with all of the new version.

    For each count, the run that differs most counts.
    """
    alike = not mismatches(base, new, MUST_MATCH_FOR_OUTPUTS)
    runs = [
        compare_counts(base.runs[0], run, alike=alike, allow_improvement=allow_improvement)
        for run in new.runs
    ]
    # Among equals, max takes the first run.
    return [
        max(count, key=lambda one: (one.fails, one.verdict is Verdict.CHANGED))
        for count in zip(*runs, strict=True)
    ]


def compare_counts(
    base: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    alike: bool,
    allow_improvement: bool = False,
) -> list[Evidence]:
    """Compare counts and outputs of each strategy of the base.

    Counts are gated if the workload is closed; in a simulation also if it is not, provided that
    both have the same step cost. Outputs are gated if the same tokens must result to the bit:
    closed workload, matching environments, float32. Otherwise precision can decide between two
    tokens, and a difference is only reported.

    Args:
        base, new: results, or their parts as :func:`as_result` returns them.
        alike: the environments (for simulations: the costs) match.
        allow_improvement: a strategy may change if each count of it that changed is better.

    Raises:
        UsageError: a strategy of the base is missing.
    """
    strategies = base["strategies"]
    if missing := [name for name in strategies if name not in new["strategies"]]:
        raise UsageError(
            f"strategy {missing[0]}: the base has it and the new version does not; run both with "
            f"--strategy {','.join(strategies)}"
        )
    closed = base["workload"]["closed"] and new["workload"]["closed"]
    exact = closed or (base["simulated"] and new["simulated"] and alike)
    to_the_bit = closed and alike and base["model"]["dtype"] == new["model"]["dtype"] == "float32"
    evidence: list[Evidence] = []
    for name, strategy in strategies.items():
        other = new["strategies"][name]
        counters = _counters(strategy), _counters(other)
        evidence += _compare_counters(name, *counters, exact, allow_improvement)
        digests = strategy["output_digest"], other["output_digest"]
        evidence += _compare_outputs(name, *digests, to_the_bit)
    return evidence


def _counters(strategy: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Return the counts of a strategy; None if it schedules by itself and reports no steps."""
    counters: Mapping[str, int] | None = strategy["counters"]
    computed = strategy.get("computed_passes")
    if counters is None or computed is None:
        return counters
    return {**counters, "computed_passes": computed}


def _compare_counters(
    strategy: str,
    base: Mapping[str, int] | None,
    new: Mapping[str, int] | None,
    exact: bool,
    allow_improvement: bool,
) -> Iterator[Evidence]:
    if base is None or new is None:
        neither = base is new
        why = "exist on one side only"
        if neither:
            why = "cannot be compared: the strategy schedules by itself and reports no steps"
        yield Evidence(
            Kind.WORK,
            "counters",
            strategy,
            None if base is None else "counted",
            None if new is None else "counted",
            Verdict.UNKNOWN if neither else Verdict.CHANGED,
            fails=exact and not neither,
            gated=exact and not neither,
            why=why,
        )
        return
    changed = {key for key in base.keys() & new.keys() if base[key] != new[key]}
    allowed = allow_improvement and all(_is_better(key, base, new) for key in changed)
    for key in {**base, **new}:
        verdict, both = Verdict.SAME, key in base and key in new
        reason: str | None = None
        change: float | None = None
        if not both:  # one of the two is of a version that counts more
            verdict = Verdict.UNKNOWN
            reason = f"was not counted by the {'base' if key not in base else 'new version'}"
        elif base[key]:
            change = new[key] / base[key] - 1
        if key in changed:
            verdict, reason = Verdict.CHANGED, _spell_change(base[key], new[key], exact, allowed)
        yield Evidence(
            Kind.WORK,
            key,
            strategy,
            base.get(key),
            new.get(key),
            verdict,
            fails=key in changed and exact and not allowed,
            gated=both and exact,
            change=change,
            why=reason,
        )


def _is_better(key: str, base: Mapping[str, int], new: Mapping[str, int]) -> bool:
    if key in _FIXED:
        return False
    if key in _COMPOSITION:
        return new.get(_WHOLE, 0) < base.get(_WHOLE, 0)
    return new[key] < base[key]


def _spell_change(base: int, new: int, exact: bool, allowed: bool) -> str:
    share = f" ({new / base - 1:+.1%})" if base else ""
    text = f"{'grew' if new > base else 'fell'} by {abs(new - base):,}{share}"
    if not exact:
        return f"{text}; with timed arrivals this may depend on the machine's speed"
    return f"{text}, an allowed improvement" if allowed else text


def _compare_outputs(
    strategy: str, base: str | None, new: str | None, gated: bool
) -> Iterator[Evidence]:
    if base is None and new is None:
        return
    same, why = base == new, None
    if base is None or new is None:
        why = "exist on one side only"
    elif not same:
        why = "differ" if gated else "differ, perhaps only by numerical ties"
    yield Evidence(
        Kind.WORK,
        OUTPUTS,
        strategy,
        base and base[:12],
        new and new[:12],
        Verdict.SAME if same else Verdict.CHANGED,
        fails=gated and not same,
        gated=gated,
        why=why,
    )
