"""Evidence about two versions, each piece with a verdict, and the answer that follows from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from batchbench.batching.machine import Difference
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

    Attributes:
        metric: its name in results, such as ``forward_passes`` or ``output_throughput``.
        strategy: the strategy it belongs to; None if to none, or to several.
        base: its value; None if the side has none.
        change: new / base − 1 as a share, in the metric's own direction: −0.05 of a throughput is
            a loss, of a latency a gain. None if it has no meaning.
        low, high: 95 % interval of ``change``.
        fails: this alone fails the comparison.
        gated: it can fail the comparison.
        floor: share beyond which a change counts.
        smallest: smallest loss, as a share, that this many samples would probably have shown.
        needed: words for the samples or time that would probably be enough: "23 trials", "4 min".
        samples: samples of each side.
        why: the reason for having no verdict, or the rule that failed, in a few words.
    """

    kind: Kind
    metric: str
    strategy: str | None
    base: float | str | None
    new: float | str | None
    verdict: Verdict
    fails: bool = False
    gated: bool = False
    unit: str | None = None
    higher_is_better: bool | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    floor: float | None = None
    smallest: float | None = None
    needed: str | None = None
    samples: tuple[int, int] | None = None
    why: str | None = None

    @property
    def name(self) -> str:
        """Return strategy and metric: ``continuous.forward_passes``."""
        return f"{self.strategy}.{self.metric}" if self.strategy else self.metric

    @property
    def is_undecided(self) -> bool:
        return self.gated and self.verdict is Verdict.UNKNOWN


@dataclass(frozen=True)
class Side:
    """One of the two versions that were compared.

    Attributes:
        label: the user's name for it: a folder, an interpreter, a revision.
        facts: version, commit, machine and so on, by name.
    """

    label: str
    facts: Mapping[str, str | None] = field(default_factory=dict)


class Answer(StrEnum):
    """The answer of a gate."""

    PASSED = "passed"
    FAILED = "failed"
    UNKNOWN = "cannot tell"


CANNOT_TELL = 3
"""The exit code of *cannot tell* under ``--strict``."""


@dataclass(frozen=True)
class Gate:
    """The findings of a comparison.

    Attributes:
        command: compare, duet or check.
        typed: the command line that repeats it.
        settings: settings that differ between the two experiments.
        environment: facts that differ between the two machines or installations.
        notes: lines that the reader should know, such as what was not compared and why.
        unsure: the reason why the whole has no answer, even if there is evidence.
        seconds: time that it took; None if nothing was run.
    """

    command: str
    typed: str
    base: Side
    new: Side
    evidence: Sequence[Evidence]
    settings: Sequence[Difference] = ()
    environment: Sequence[Difference] = ()
    notes: Sequence[str] = ()
    unsure: str | None = None
    seconds: float | None = None

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
        if self.answer is Answer.FAILED:
            failures = [describe(evidence) for evidence in self.failures]
            more = f", and {len(failures) - 3} more" if len(failures) > 3 else ""
            return f"FAILED: {'; '.join(failures[:3])}{more}."
        if self.answer is Answer.UNKNOWN:
            return f"CANNOT TELL: {self.unsure or '; '.join(self._reasons())}."
        return f"passed: {'; '.join(self._passes())}."

    def _reasons(self) -> list[str]:
        if not any(evidence.gated for evidence in self.evidence):
            return ["no metric was gated, so nothing could be shown"]
        return [
            f"{evidence.name} {evidence.why or 'is too uncertain'}"
            + (f" ({spell_interval(evidence)})" if evidence.low is not None else "")
            + (f"; {evidence.needed} would probably be enough" if evidence.needed else "")
            for evidence in self.undecided[:3]
        ]

    def _passes(self) -> Iterator[str]:
        work = [evidence for evidence in self.of(Kind.WORK) if evidence.gated]
        if work:
            same = sum(evidence.verdict is Verdict.SAME for evidence in work)
            yield f"{same} of {len(work)} counts and outputs are the same"
        for evidence in self.evidence:
            if evidence.gated and evidence.kind is not Kind.WORK:
                yield describe(evidence)

    def as_data(self) -> dict[str, Any]:
        return {
            **vars(self),
            "answer": str(self.answer),
            "sentence": self.sentence,
            "base": asdict(self.base),
            "new": asdict(self.new),
            "settings": [difference._asdict() for difference in self.settings],
            "environment": [difference._asdict() for difference in self.environment],
            "shares": ["change", "low", "high", "floor", "smallest"],  # 0.05 of evidence is 5 %
            "evidence": [{"name": evidence.name, **asdict(evidence)} for evidence in self.evidence],
        }


@dataclass(frozen=True)
class MetricQuery:
    """A metric to compare, and the change of it that counts.

    Attributes:
        floor: share of loss beyond which it is slower.
        condition: the condition of ``--fail-if`` for it, which then has the floor.
    """

    metric: Metric
    strategy: str
    floor: float
    gated: bool
    condition: Condition | None = None

    @property
    def log_floor(self) -> float:
        """Return the floor as a log ratio, above 0."""
        if self.condition:
            return self.condition.floor
        higher = self.metric.higher_is_better
        return -math.log1p(-self.floor) if higher else math.log1p(self.floor)

    def change(self, log: float) -> float:
        """Return the change of the metric for a log ratio that is above 0 if new is slower."""
        return math.expm1(-log if self.metric.higher_is_better else log) + 0.0  # no negative zero

    def value(self, log: float) -> float:
        """Return the value of the metric whose logarithm grows as it gets slower."""
        return math.exp(-log if self.metric.higher_is_better else log)

    def evidence(
        self,
        values: tuple[float | None, float | None],
        decision: Decision | None,
        samples: tuple[int, int] | None = None,
        needed: str | None = None,
        why: str | None = None,
    ) -> Evidence:
        """Return the evidence that a decision on log ratios gives, or values without a verdict.

        Args:
            values: of base and new, in the metric's unit.
            decision: None if nothing was decided.
        """
        decided = decision or Decision(Verdict.UNKNOWN, 0)
        logs = [log for log in (decided.low, decided.high) if log is not None]
        ends: list[float | None] = [*sorted(map(self.change, logs))] or [None, None]
        smallest = decided.smallest
        gain_fails = self.condition is not None and not self.condition.is_loss
        bad = Verdict.FASTER if gain_fails else Verdict.SLOWER
        return Evidence(
            Kind.RATIO if self.metric.is_ratio else Kind.TIME,
            self.metric.name,
            self.strategy,
            *values,
            decided.verdict,
            fails=self.gated and decided.verdict is bad,
            gated=self.gated,
            unit=self.metric.unit,
            higher_is_better=self.metric.higher_is_better,
            change=None if decided.estimate is None else self.change(decided.estimate),
            low=ends[0],
            high=ends[-1],
            p_value=decided.p_value,
            floor=self.floor,
            smallest=None if smallest is None else abs(self.change(smallest)),
            needed=needed,
            samples=samples,
            why=why,
        )


def describe(evidence: Evidence) -> str:
    """Return the finding in a few words."""
    if evidence.kind is Kind.WORK:
        if evidence.verdict is Verdict.SAME:
            return f"{evidence.name} is the same"
        values = f"{spell(evidence.base)} → {spell(evidence.new)}"
        return f"{evidence.name} {evidence.why or 'changed'}: {values}"
    spelled = {Verdict.UNKNOWN: "uncertain", Verdict.SAME: "the same"}
    text = f"{evidence.name} is {spelled.get(evidence.verdict, evidence.verdict)}"
    if evidence.change is None:
        return text
    return f"{text}: {percent(evidence.change, 1, '+')} ({spell_interval(evidence)})"


def spell_interval(evidence: Evidence) -> str:
    """Return the interval of the change in words."""
    if evidence.low is None or evidence.high is None:
        return "no interval"
    return f"95 % CI {interval_percent(evidence.low, evidence.high)}"


def spell(value: float | str | None) -> str:
    """Return a value in words; of a digest the beginning, which is enough to identify it."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{32,}", value) else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
