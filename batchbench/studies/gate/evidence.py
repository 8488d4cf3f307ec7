"""What a comparison of two versions found: evidence, each with its verdict, and what follows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from batchbench.reports.statistics import Decision, Verdict


class Kind(StrEnum):
    """The kinds of evidence, the strongest first."""

    WORK = "work"  # exact counts and outputs: one look is enough
    RATIO = "ratio"  # of two things timed in one run, so that the machine's speed cancels out
    TIME = "time"  # an absolute time or rate


@dataclass(frozen=True)
class Evidence:
    """One quantity of the base and of the new version, and what can be told of it.

    Attributes:
        metric: as results name it, ``forward_passes`` or ``output_throughput``.
        strategy: whose it is; None where it belongs to none, or to several.
        base: its value; None where the side has none.
        change: new / base − 1 as a share, in the metric's own direction: −0.05 of a throughput is
            a loss, of a latency a gain. None where it has no meaning.
        low, high: of ``change``, with 95 % confidence.
        fails: whether this alone makes the answer bad.
        gated: whether it could have.
        floor: share beyond which a change counts.
        smallest: least loss (a share) that so many samples would probably have found.
        needed: what would probably do where it cannot be told: "23 trials", "4 min".
        samples: of each side.
        why: a line: the reason that nothing can be told, or the rule that it failed.
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
        """Metric and strategy: ``continuous.forward_passes``."""
        return f"{self.strategy}.{self.metric}" if self.strategy else self.metric


@dataclass(frozen=True)
class Side:
    """One of the two versions that were compared.

    Attributes:
        label: what the user called it: a folder, an interpreter, a revision.
        facts: what it is, by name: version, commit, created, machine …
    """

    label: str
    facts: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Varying:
    """A setting, or a part of the environment, in which the two sides differ."""

    name: str
    base: Any
    new: Any


class Answer(StrEnum):
    """What a gate says in the end."""

    PASSED = "passed"
    FAILED = "failed"
    UNKNOWN = "cannot tell"


EXIT_CODES = {Answer.PASSED: 0, Answer.FAILED: 1, Answer.UNKNOWN: 0}
CANNOT_TELL = 3
"""The exit code of *cannot tell* where ``--strict`` asks for it."""


@dataclass(frozen=True)
class Gate:
    """All that a comparison found.

    Attributes:
        command: compare, duet or check.
        typed: the command line that does it again.
        settings: in which the two experiments differ; only those.
        environment: in which the two machines or installations differ; only that.
        notes: lines that the reader should know of: what was not compared and why.
        unsure: why the whole cannot be told, although there may be evidence.
        seconds: how long it took; None where nothing was run.
    """

    command: str
    typed: str
    base: Side
    new: Side
    evidence: Sequence[Evidence]
    settings: Sequence[Varying] = ()
    environment: Sequence[Varying] = ()
    notes: Sequence[str] = ()
    unsure: str | None = None
    seconds: float | None = None

    @property
    def failures(self) -> list[Evidence]:
        """The evidence that makes the answer bad."""
        return [each for each in self.evidence if each.fails]

    @property
    def untold(self) -> list[Evidence]:
        """What was gated and cannot be told."""
        return [e for e in self.evidence if e.gated and e.verdict is Verdict.UNKNOWN]

    @property
    def answer(self) -> Answer:
        """Failed where anything fails; passed only where something was gated and all was told."""
        if self.failures:
            return Answer.FAILED
        if self.unsure or self.untold or not any(each.gated for each in self.evidence):
            return Answer.UNKNOWN
        return Answer.PASSED

    def exit_code(self, *, strict: bool) -> int:
        """0 passed, 1 failed; cannot tell is 0, or 3 where asked."""
        if self.answer is Answer.UNKNOWN and strict:
            return CANNOT_TELL
        return EXIT_CODES[self.answer]

    def of(self, kind: Kind) -> list[Evidence]:
        """The evidence of one kind."""
        return [each for each in self.evidence if each.kind is kind]

    @property
    def sentence(self) -> str:
        """The answer in one sentence, with what it rests on."""
        if self.answer is Answer.FAILED:
            told = [describe(each) for each in self.failures]
            more = f", and {len(told) - 3} more" if len(told) > 3 else ""
            return f"FAILED: {'; '.join(told[:3])}{more}."
        if self.answer is Answer.UNKNOWN:
            return f"CANNOT TELL: {self.unsure or '; '.join(self._reasons())}."
        return f"passed: {'; '.join(self._passes())}."

    def _reasons(self) -> list[str]:
        if not any(each.gated for each in self.evidence):
            return ["nothing was gated, so nothing was shown"]
        return [
            f"{each.name} {each.why or 'is too uncertain'}"
            + (f" ({spell_interval(each)})" if each.low is not None else "")
            + (f"; {each.needed} would do" if each.needed else "")
            for each in self.untold[:3]
        ]

    def _passes(self) -> Iterator[str]:
        work = [each for each in self.of(Kind.WORK) if each.gated]
        if work:
            same = sum(each.verdict is Verdict.SAME for each in work)
            yield f"{same} of {len(work)} counts and outputs are the same"
        for each in self.evidence:
            if each.gated and each.kind is not Kind.WORK:
                yield describe(each)

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "command": self.command,
            "typed": self.typed,
            "answer": str(self.answer),
            "sentence": self.sentence,
            "base": asdict(self.base),
            "new": asdict(self.new),
            "settings": [asdict(each) for each in self.settings],
            "environment": [asdict(each) for each in self.environment],
            "shares": ["change", "low", "high", "floor", "smallest"],  # 0.05 of evidence is 5 %
            "evidence": [{"name": each.name, **asdict(each)} for each in self.evidence],
            "notes": list(self.notes),
            "unsure": self.unsure,
            "seconds": self.seconds,
        }


def weigh(
    kind: Kind,
    metric: str,
    strategy: str | None,
    values: tuple[float, float],
    decision: Decision,
    *,
    higher_is_better: bool,
    gated: bool,
    floor: float,
    unit: str | None = None,
    samples: tuple[int, int] | None = None,
    needed: str | None = None,
    why: str | None = None,
) -> Evidence:
    """Evidence from a decision on log ratios, which are above 0 where new is slower.

    Args:
        values: of base and new, as people read them.
        floor: share beyond which a loss counts.
    """
    sign = -1 if higher_is_better else 1

    def share(log: float | None) -> float | None:
        return None if log is None else math.expm1(sign * log)

    ends = sorted(x for x in (share(decision.low), share(decision.high)) if x is not None)
    return Evidence(
        kind,
        metric,
        strategy,
        *values,
        decision.verdict,
        fails=gated and decision.verdict is Verdict.SLOWER,
        gated=gated,
        unit=unit,
        higher_is_better=higher_is_better,
        change=share(decision.estimate),
        low=ends[0] if ends else None,
        high=ends[-1] if ends else None,
        p_value=decision.p_value,
        floor=floor,
        smallest=None if decision.smallest is None else abs(math.expm1(sign * decision.smallest)),
        needed=needed,
        samples=samples or (decision.samples, decision.samples),
        why=why,
    )


def describe(each: Evidence) -> str:
    """One piece of evidence in a few words."""
    if each.kind is Kind.WORK:
        if each.verdict is Verdict.SAME:
            return f"{each.name} is the same"
        return f"{each.name} {each.why or 'changed'}: {spell(each.base)} → {spell(each.new)}"
    spelled = {Verdict.UNKNOWN: "uncertain", Verdict.SAME: "the same"}
    told = f"{each.name} is {spelled.get(each.verdict, each.verdict)}"
    if each.change is None:
        return told
    return f"{told}: {each.change:+.1%} ({spell_interval(each)})"


def spell_interval(each: Evidence) -> str:
    """The interval of the change."""
    if each.low is None or each.high is None:
        return "no interval"
    return f"95 % CI {each.low:+.1%} to {each.high:+.1%}"


def spell_share(log: float) -> str:
    """A log ratio as a change in percent."""
    return f"{math.expm1(log):+.1%}"


def spell(value: float | str | None) -> str:
    """A value as people read it; of a digest the beginning, which tells it from others."""
    if value is None:
        return "N/A"
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{32,}", value) else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
