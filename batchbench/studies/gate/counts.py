"""Exact counts of the work of two versions, compared by strategy; and how a gate is made.

Counts need no statistics: a single comparison is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchbench.batching.machine import MUST_MATCH_FOR_OUTPUTS, Difference, differences, facts_of
from batchbench.errors import UsageError
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Side

OUTPUTS = "outputs"
"""The metric name of a strategy's output tokens."""

_FIXED = ("prefill_tokens", "useful_slot_steps")
"""Counts that the workload determines: fewer of them mean missing work, not an improvement."""

_COMPOSITION = ("prefill_passes", "mixed_passes", "decode_passes", "prompt_slot_steps")
"""Parts of ``forward_passes``: they are better only if their sum is."""

_WHOLE = "forward_passes"


@dataclass(frozen=True)
class Counts:
    """The counts and outputs of one version.

    Attributes:
        counters: counts of each strategy by name, as in ``result.json``; None for a strategy that
            schedules by itself and reports no steps.
        digests: digest of all output tokens of each strategy; None if no model ran.
        closed: all requests were there at the start with given lengths, so that counts depend on
            the schedule alone.
        simulated: times are of a virtual clock.
        dtype: number format of the model; None if no model ran.
    """

    counters: Mapping[str, Mapping[str, int] | None]
    digests: Mapping[str, str | None]
    closed: bool
    simulated: bool
    dtype: str | None

    @classmethod
    def of_result(cls, data: Mapping[str, Any]) -> Counts:
        counters = {}
        for name, strategy in data["strategies"].items():
            counts, computed = strategy["counters"], strategy.get("computed_passes")
            if counts is not None and computed is not None:
                counts = {**counts, "computed_passes": computed}
            counters[name] = counts
        return cls(
            counters=counters,
            digests={
                name: strategy["output_digest"] for name, strategy in data["strategies"].items()
            },
            closed=data["workload"]["closed"],
            simulated=data["simulated"],
            dtype=data["model"]["dtype"],
        )

    @classmethod
    def of_work(cls, work: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> Counts:
        """Return the counts of worker processes.

        Args:
            work: counters and ``output_digest`` in one mapping, by strategy.
            about: ``workload`` and ``model``, as in a result.
        """
        return cls(
            counters={
                name: {key: count for key, count in counts.items() if key != "output_digest"}
                or None
                for name, counts in work.items()
            },
            digests={name: counts["output_digest"] for name, counts in work.items()},
            closed=about["workload"]["closed"],
            simulated=False,
            dtype=about["model"]["dtype"],
        )


def counts_fail(base: Counts, new: Counts, *, allow_improvement: bool) -> bool:
    """Return True if a count fails; outputs may differ by a numerical tie."""
    evidence = compare_counts(base, new, alike=False, allow_improvement=allow_improvement)
    return any(one.fails for one in evidence)


def compare_counts(
    base: Counts, new: Counts, *, alike: bool, allow_improvement: bool = False
) -> list[Evidence]:
    """Compare counts and outputs of each strategy of the base.

    Counts are gated if the workload is closed; in a simulation also if it is not, provided that
    both have the same step cost. Outputs are gated if the same tokens must result to the bit:
    closed workload, matching environments, float32. Otherwise precision can decide between two
    tokens, and a difference is only reported.

    Args:
        alike: the environments (for simulations: the costs) match.
        allow_improvement: a strategy may change if each count of it that changed is better.

    Raises:
        UsageError: a strategy of the base is missing.
    """
    if missing := [name for name in base.counters if name not in new.counters]:
        raise UsageError(
            f"strategy {missing[0]}: the base has it and the new version does not; run both with "
            f"--strategy {','.join(base.counters)}"
        )
    closed = base.closed and new.closed
    exact = closed or (base.simulated and new.simulated and alike)
    to_the_bit = closed and alike and base.dtype == new.dtype == "float32"
    evidence: list[Evidence] = []
    for name, counters in base.counters.items():
        evidence += _compare_counters(name, counters, new.counters[name], exact, allow_improvement)
        evidence += _compare_outputs(
            name, base.digests.get(name), new.digests.get(name), to_the_bit
        )
    return evidence


def _compare_counters(
    strategy: str,
    base: Mapping[str, int] | None,
    new: Mapping[str, int] | None,
    exact: bool,
    allow_improvement: bool,
) -> Iterator[Evidence]:
    if base is None or new is None:
        both = base is new
        yield Evidence(
            Kind.WORK,
            "counters",
            strategy,
            None if base is None else "counted",
            None if new is None else "counted",
            Verdict.UNKNOWN if both else Verdict.CHANGED,
            fails=exact and not both,
            gated=exact and not both,
            why="cannot be compared: the strategy schedules by itself and reports no steps"
            if both
            else "exist on one side only",
        )
        return
    changed = {key for key in base.keys() & new.keys() if base[key] != new[key]}
    allowed = allow_improvement and all(_is_better(key, base, new) for key in changed)
    for key in {**base, **new}:
        evidence = Evidence(
            Kind.WORK, key, strategy, base.get(key), new.get(key), Verdict.SAME, gated=exact
        )
        if key not in base or key not in new:  # one of the two is of a version that counts more
            side = "base" if key not in base else "new version"
            why = f"was not counted by the {side}"
            evidence = replace(evidence, verdict=Verdict.UNKNOWN, gated=False, why=why)
        elif base[key]:
            evidence = replace(evidence, change=new[key] / base[key] - 1)
        if key in changed:
            why = _spell_change(base[key], new[key], exact, allowed)
            fails = exact and not allowed
            evidence = replace(evidence, verdict=Verdict.CHANGED, fails=fails, why=why)
        yield evidence


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


# The gate


@dataclass(frozen=True)
class Version:
    """A version as the gate compares it, with counts and environment facts of each of its runs."""

    side: Side
    counts: Sequence[Counts]
    facts: Sequence[Mapping[str, Any]]


_ITSELF = ("batchbench", "git_commit")
"""Facts of the versions that are compared, which are meant to differ."""


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
    simulated = base.counts[0].simulated or new.counts[0].simulated
    chosen = None if simulated else names
    mismatched: dict[str, Difference] = {}
    for facts in (*new.facts, *base.facts[1:]):
        for difference in differences(base.facts[0], facts, chosen):
            mismatched.setdefault(difference.name, difference)
    return list(mismatched.values())


def make_gate(
    command: str,
    typed: str,
    sides: tuple[Version, Version],
    times: Callable[[], Sequence[Evidence]] | Sequence[Evidence],
    *,
    allow_improvement: bool,
    notes: Callable[[Sequence[Evidence]], Sequence[str]],
    settings: Sequence[Difference] = (),
    unsure: str | None = None,
    seconds: float | None = None,
) -> Gate:
    """Return the gate of two versions: their work first, then their times.

    Args:
        typed: the command line that repeats it.
        times: evidence on times; as a function it is called only if the work is the same.
        notes: a function of the evidence on the work.
    """
    base, new = sides
    alike = not mismatches(base, new, MUST_MATCH_FOR_OUTPUTS)
    runs = [
        compare_counts(base.counts[0], counts, alike=alike, allow_improvement=allow_improvement)
        for counts in new.counts
    ]
    # For each count the run that differs most counts; among equals max takes the first run.
    work = [max(count, key=_gravity) for count in zip(*runs, strict=True)]
    changed = any(evidence.fails for evidence in work)
    if callable(times):
        times = [] if changed else times()
    return Gate(
        command,
        typed,
        base.side,
        new.side,
        [*work, *times],
        settings,
        [d for d in differences(base.facts[0], new.facts[0]) if d.name not in _ITSELF],
        notes(work),
        unsure,
        seconds,
    )


def _gravity(evidence: Evidence) -> tuple[bool, bool]:
    return evidence.fails, evidence.verdict is Verdict.CHANGED
