"""Two installations serve in alternating turns until it is clear whether one is slower.

Each side has one worker process. The two take turns of about 0.2 s and are both replaced every few
seconds, because process-specific effects (memory layout, core) stay the same within a process. The
value of a pair of processes is the ratio of the time of a trial, and the pair is the sample
(docs/regressions.md has the measurements behind this).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import expm1, log1p
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from batchbench.batching.experiment import Experiment
from batchbench.errors import OutOfTimeError
from batchbench.json_file import now
from batchbench.reports.statistics import FEWEST, Decision, Rule, Verdict, decide
from batchbench.reports.text import plural
from batchbench.studies.gate.counts import counts_fail, make_gate
from batchbench.studies.gate.evidence import Evidence, Gate, MetricQuery, Side, describe
from batchbench.studies.gate.processes import (
    Calibrations,
    ProcessReport,
    Workers,
    draw_core,
    varying_work,
)
from batchbench.studies.gate.spec import METRICS, DuetSpec, check_margin
from batchbench.studies.gate.turns import Cut, Pair, TurnPair, contamination
from batchbench.studies.gate.worker import Calibration
from batchbench.version import SCHEMA_VERSION, __version__

TURN_S = 0.2
"""Seconds of a turn. In longer turns, a burst of other load affects only one side; half of a
shorter turn is warm-up."""

PAIR_S = 5.0
"""Minimum seconds of turns before both processes are replaced."""

LONGEST_PAIR_S = 20.0
"""Seconds of turns after which a pair ends within a trial; only its beginning is then compared."""

FEWEST_TURNS = 3
"""Minimum number of turns of a pair, without the first, which is left out."""

FIRST_SHARE = 0.65
"""Share of the time for finding a loss; the rest is for confirming it."""

CONFIRMATION_ALPHA = 0.05
"""Error probability of the confirming series, which makes only one decision."""

Reports = tuple[ProcessReport, ProcessReport]
SideCalibrations = tuple[Calibrations, Calibrations] | None
"""Calibrations of base and new from earlier processes; None to measure them."""


class TurnsWatch:
    """The observer of duet, check and baseline save; this base class ignores everything."""

    def begins(self, what: str) -> None:
        """Show the activity that begins."""

    def measured(self, label: str, what: str) -> None:
        """Show a measurement, or the decisions so far."""


@dataclass
class Series:
    """Pairs of processes under one rule, and the decisions on each strategy so far.

    Attributes:
        strategies: those whose time is compared.
        confirming: it is the second series, which confirms the losses of the first.
        reports: of base and new, for each pair.
        cut_off: set if the time was up during a pair, which then does not count.
    """

    rule: Rule
    strategies: Sequence[str]
    confirming: bool = False
    calibrations: SideCalibrations = None
    pairs: list[Pair] = field(default_factory=list)
    reports: list[Reports] = field(default_factory=list)
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    cut_off: OutOfTimeError | None = None

    def add(self, pair: Pair, reports: Reports) -> None:
        self.pairs.append(pair)
        self.reports.append(reports)
        if len(self.pairs) == 2:  # by now all work was counted in two processes a side
            self.calibrations = calibrate(pair)
        self.decide()

    def decide(self, *, last: bool = False) -> None:
        """Decide on each strategy; ``last`` spends the error kept for the end."""
        self.decisions = {
            strategy: decide([pair.value(strategy) for pair in self.pairs], self.rule, last=last)
            for strategy in self.strategies
        }

    @property
    def contamination(self) -> str | None:
        on_cpu = bool(self.reports) and all(report.on_cpu for report in self.reports[-1])
        return contamination(self.pairs, self.rule.floor, on_cpu=on_cpu)

    @property
    def pair_s(self) -> float:
        return 1.05 * max((pair.seconds for pair in self.pairs), default=0.0)

    @property
    def queries(self) -> dict[str, MetricQuery]:
        metric, floor = METRICS["output_throughput"], expm1(self.rule.floor)
        return {name: MetricQuery(metric, name, floor, True) for name in self.strategies}


@dataclass
class DuetResult:
    """Measurements of a duet; ``confirmation`` is a second series, of strategies with a loss."""

    first: Series
    confirmation: Series | None = None
    seconds: float = 0.0

    @property
    def series(self) -> list[Series]:
        return [self.first, *([self.confirmation] if self.confirmation else [])]


class PairSource(Protocol):
    """A source of pairs of processes."""

    def pair(
        self, strategies: Sequence[str], calibrations: SideCalibrations, *, with_others: bool
    ) -> tuple[Pair, Reports]:
        """Return one more pair of processes that served the strategies in turns.

        Args:
            with_others: count the work of the other strategies as well.

        Raises:
            OutOfTimeError: the time was up before the pair was finished.
        """

    def restart(self) -> None:
        """Make the next pair independent of those before."""


@dataclass(frozen=True)
class ProcessPairs:
    """Pairs of fresh processes on this machine."""

    sides: tuple[Workers, Workers]
    experiment: Experiment
    also: Sequence[str]
    chance: random.Random = field(default_factory=random.Random)

    def pair(
        self, strategies: Sequence[str], calibrations: SideCalibrations, *, with_others: bool
    ) -> tuple[Pair, Reports]:
        began = time.monotonic()
        new_first = self.chance.random() < 0.5
        core = draw_core(self.experiment.model.threads or 1, self.chance)
        for workers in self.sides:
            workers.ready()
        hello = [workers.begin() for workers in self.sides]
        opened = self._open(
            strategies,
            calibrations or (None, None),
            self.also if with_others else [],
            core,
            # Processes that cannot fork may share a GPU. Both would find its memory free before
            # either had taken any, and each would slow the other's calibration.
            together=all(begun["forks"] for begun in hello),
        )
        base, new = (answer["lanes"] for answer in opened)
        passes = {name: (base[name]["steps"], new[name]["steps"]) for name in strategies}
        cuts, turns = {}, {}
        for name, steps in passes.items():
            step_s = min(base[name]["step_ns"], new[name]["step_ns"]) / 1e9
            cuts[name] = Cut.of(min(steps), min(steps) * step_s, TURN_S)
            turns[name] = self._take_turns(name, steps, cuts[name], new_first=new_first)
        reports = [
            ProcessReport(begun, loaded, workers.finish())
            for begun, loaded, workers in zip(hello, opened, self.sides, strict=True)
        ]
        pieces = {name: cut.pieces for name, cut in cuts.items()}
        pair = Pair(turns, passes, pieces, time.monotonic() - began, new_first)
        return pair, (reports[0], reports[1])

    def _open(
        self,
        strategies: Sequence[str],
        calibrations: tuple[Calibrations | None, Calibrations | None],
        also: Sequence[str],
        core: int | None,
        *,
        together: bool,
    ) -> list[Mapping[str, Any]]:
        """Let both sides load the model and warm up; return their answers."""
        answers = []
        for workers, known in zip(self.sides, calibrations, strict=True):
            workers.tell_open(self.experiment, strategies, known, also, core)
            if not together:
                answers.append(workers.answer())
        return answers or [workers.answer() for workers in self.sides]

    def _take_turns(
        self, strategy: str, steps: tuple[int, int], cut: Cut, *, new_first: bool
    ) -> list[TurnPair]:
        """Let the sides alternate for about :data:`PAIR_S`, in whole trials."""
        base, new = self.sides
        turns: list[TurnPair] = []
        spent = 0.0
        for size in zip(*map(cut.sizes, steps), strict=True):
            if new_first:
                taken = new.turn(strategy, size[1]), base.turn(strategy, size[0])
                turns.append((taken[1], taken[0]))
            else:
                turns.append((base.turn(strategy, size[0]), new.turn(strategy, size[1])))
            spent += sum(turn.wall_ns + turn.kernel_ns for turn in turns[-1]) / 1e9
            counted = len(turns) - 1
            longest = PAIR_S if counted % cut.pieces == 0 else LONGEST_PAIR_S
            if counted >= FEWEST_TURNS and spent >= longest:
                break
        return turns

    def restart(self) -> None:
        for workers in self.sides:
            workers.end()


def make_rule(floor: float, margin: float, confidence: float) -> Rule:
    """Return the rule on logarithms of time ratios; ``floor`` and ``margin`` are in percent."""
    check_margin(floor, margin)
    return Rule(log1p(floor / 100), log1p(margin / 100), 1 - confidence)


def rule_of(spec: DuetSpec) -> Rule:
    return make_rule(spec.floor, spec.margin, spec.confidence)


def run_duet(
    source: PairSource,
    strategies: Sequence[str],
    spec: DuetSpec,
    watch: TurnsWatch,
    clock: Callable[[], float] = time.monotonic,
) -> DuetResult:
    """Run pairs until all is decided or the time is up; confirm losses with a second series."""
    began = clock()
    until = began + spec.max_time
    first = Series(rule_of(spec).shared(len(strategies)), strategies)
    looked = False
    for count in _run_pairs(first, source, watch, clock, until):
        counts = (report.counts for report in first.reports[-1])
        if count == 2 and counts_fail(*counts, allow_improvement=spec.allow_improvement):
            break  # times of different work cannot be compared
        if not looked and clock() - began > FIRST_SHARE * spec.max_time:
            looked = True  # once only, because the error of this look is spent
            if is_slower_at_last(first):
                break  # the rest of the time is for confirming it
    result = DuetResult(first)
    slower = [name for name, d in first.decisions.items() if d.verdict is Verdict.SLOWER]
    if slower and not first.contamination and until - clock() > FEWEST * first.pair_s:
        source.restart()
        result.confirmation = Series(
            replace(first.rule, alpha=CONFIRMATION_ALPHA),
            slower,
            confirming=True,
            calibrations=first.calibrations,
        )
        for _ in _run_pairs(result.confirmation, source, watch, clock, until):
            pass
    result.seconds = clock() - began
    return result


def is_slower_at_last(series: Series) -> bool:
    series.decide(last=True)
    if any(decision.verdict is Verdict.SLOWER for decision in series.decisions.values()):
        return True
    series.decide()
    return False


def _run_pairs(
    series: Series, source: PairSource, watch: TurnsWatch, clock: Callable[[], float], until: float
) -> Iterator[int]:
    """Add pairs until all is decided or another would not end in time; yield their number.

    A pair during which the time is up does not count.
    """
    while True:
        what = f"{'confirming, ' if series.confirming else ''}pair {len(series.pairs) + 1}"
        watch.begins(what)
        try:
            series.add(
                *source.pair(
                    series.strategies, series.calibrations, with_others=not series.calibrations
                )
            )
        except OutOfTimeError as late:
            series.cut_off = late
            if series.pairs:
                series.decide(last=True)
            return
        up = clock() + series.pair_s > until
        if up:
            series.decide(last=True)
        progress = describe_decisions(series.queries, series.decisions)
        fault = series.contamination
        watch.measured(what, f"{progress}; {fault}" if fault else progress)
        yield len(series.pairs)
        # Two pairs at least, so that work is counted in two processes of each side.
        is_sure = not fault and all(d.is_sure for d in series.decisions.values())
        if up or (is_sure and len(series.pairs) > 1):
            return


def calibrate(pair: Pair) -> tuple[Calibrations, Calibrations]:
    base, new = (
        {
            name: Calibration(steps[side], pair.step_ns(name)[side])
            for name, steps in pair.passes.items()
        }
        for side in (0, 1)
    )
    return base, new


def describe_decisions(
    queries: Mapping[str, MetricQuery], decisions: Mapping[str, Decision]
) -> str:
    findings = [queries[name].evidence((None, None), d) for name, d in decisions.items()]
    return "; ".join(map(describe, findings))


# The gate


def make_duet_gate(
    result: DuetResult,
    labels: tuple[str, str],
    pythons: tuple[Path, Path],
    typed: str,
    *,
    allow_improvement: bool,
) -> Gate:
    first = result.first
    if not first.pairs:
        base, new = (
            Side(label, {"python": str(python)})
            for label, python in zip(labels, pythons, strict=True)
        )
        late = first.cut_off
        return empty_gate("duet", typed, base, new, "pair of processes", late, result.seconds)
    base_version, new_version = (
        report.version(label, python=str(python))
        for report, label, python in zip(first.reports[0], labels, pythons, strict=True)
    )
    late = next((series.cut_off for series in result.series if series.cut_off), None)
    longest = max(series.pair_s for series in result.series)
    return make_gate(
        "duet",
        typed,
        (base_version, new_version),
        lambda: [_time(result, strategy) for strategy in first.strategies],
        allow_improvement=allow_improvement,
        notes=lambda work: list(_notes(result, work)),
        unsure=_varied(result) or hung(late, longest, "pair of processes"),
        seconds=result.seconds,
    )


def empty_gate(
    command: str,
    typed: str,
    base: Side,
    new: Side,
    what: str,
    late: OutOfTimeError | None,
    seconds: float,
) -> Gate:
    """Return the gate if not even one ``what`` was finished in time."""
    why = f"no {what} was finished in --max-time ({late}); raise it"
    return Gate(command, typed, base, new, evidence=[], unsure=why, seconds=seconds)


def hung(late: OutOfTimeError | None, longest_s: float, what: str) -> str | None:
    """Return words for a process that may hang: it was silent for longer than any ``what`` ran."""
    if late is None or late.waited_s <= longest_s:
        return None
    return f"{late} when --max-time was up, longer than any {what} took"


CUT_OFF_NOTE = "the last {} was not finished when --max-time was up, and does not count"
CHANGED_NOTE = "counts or outputs differ, so times are of different work and were not compared"


def _varied(result: DuetResult) -> str | None:
    for side, label in enumerate(("base", "new")):
        reports = [pair[side] for series in result.series for pair in series.reports]
        if varying := varying_work(reports):
            return f"{label}: {varying}"
    return None


def _time(result: DuetResult, strategy: str) -> Evidence:
    series, second = result.first, result.confirmation
    query, decision, why = series.queries[strategy], series.decisions[strategy], None
    if decision.verdict is Verdict.UNKNOWN:
        why = "is too uncertain in this time"
        if len(series.pairs) < FEWEST:
            pairs_so_far = plural(len(series.pairs), "pair")
            why = f"cannot be decided from {pairs_so_far} of processes; raise --max-time"
    if fault := series.contamination:
        decision, why = replace(decision, verdict=Verdict.UNKNOWN), f"was not compared: {fault}"
    elif decision.verdict is Verdict.SLOWER:
        again = second.decisions.get(strategy) if second else None
        if again is None:
            why = "was slower in one series, and there was no time for a second to confirm it"
        elif (second and second.contamination) or again.verdict is not Verdict.SLOWER:
            why = "was slower in one series, and a second did not confirm it"
            if again.estimate is not None:
                why += f" ({query.change(again.estimate):+.1%} there)"
        if why:
            decision = replace(decision, verdict=Verdict.UNKNOWN)
    pairs = series.pairs
    needed = None
    if decision.needed is not None:
        minutes = decision.needed * sum(pair.seconds for pair in pairs) / len(pairs) / 60
        needed = f"{decision.needed} pairs of processes, about {max(1, round(minutes))} min"
    rates = []
    for side, report in enumerate(series.reports[0]):
        step_ns = median(pair.step_ns(strategy)[side] for pair in pairs)
        seconds = pairs[0].passes[strategy][side] * step_ns / 1e9
        rates.append(report.opened["workload"]["total_output_tokens"] / seconds)
    return query.evidence((rates[0], rates[1]), decision, (len(pairs), len(pairs)), needed, why)


def _notes(result: DuetResult, work: Sequence[Evidence]) -> Iterator[str]:
    reports, series = result.first.reports[0], result.first
    if reports[0].hello["file"] == reports[1].hello["file"]:
        yield "both sides run the same files, so this tests only the method"
    if any(evidence.fails for evidence in work):
        yield CHANGED_NOTE
        return
    turns = sum(len(pair.turns[name]) for pair in series.pairs for name in series.strategies)
    confirmed = len(result.confirmation.pairs) if result.confirmation else 0
    more = f", then {confirmed} to confirm" if confirmed else ""
    pairs = plural(len(series.pairs), "pair")
    yield f"{pairs} of fresh processes, {turns} pairs of turns{more}"
    if any(part.cut_off for part in result.series):
        yield CUT_OFF_NOTE.format("pair")
    for name in series.strategies:
        if (covered := min(pair.covers(name) for pair in series.pairs)) < 1:
            yield f"a trial takes so long that only its first {covered:.0%} were timed"
    if not all(report.on_cpu for report in reports):
        yield "times are wall times; each turn waits for the device at its end"


def record_of(result: DuetResult, gate: Gate) -> bytes:
    series = {"first": result.first, "confirmation": result.confirmation}
    parts = {
        name: one and {"rule": one.rule.as_data(), "pairs": [pair.as_data() for pair in one.pairs]}
        for name, one in series.items()
    }
    return make_record(gate, SCHEMA_VERSION, **parts)


def make_record(gate: Gate, schema_version: int, **parts: Any) -> bytes:
    data = {
        "schema_version": schema_version,
        "batchbench_version": __version__,
        "created_at": now(),
        "gate": gate.as_data(),
        **parts,
    }
    return (json.dumps(data, allow_nan=False, ensure_ascii=False) + "\n").encode()
