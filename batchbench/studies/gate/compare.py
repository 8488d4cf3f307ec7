"""Two versions, held against each other: their work, their speed, and what differs around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchbench.reports.alike import FOR_TIMES, FOR_TOKENS, differing, environment_differences
from batchbench.reports.conditions import CompareSpec
from batchbench.reports.sequential import Verdict
from batchbench.reports.speeds import compare_speeds, spell_unlike
from batchbench.studies.gate.counts import OUTPUTS, Work, compare_work
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Varying, describe
from batchbench.studies.gate.runs import Runs, check_comparable, varying_settings


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
