"""Two installations serve in alternating turns until it is clear whether one is slower.

Each side has one worker process. The two take turns of about 0.2 s and are both replaced every few
seconds, because process-specific effects (memory layout, core) stay the same within a process. The
value of a pair of processes is the ratio of the time of a trial, and the pair is the sample
(docs/regressions.md has the measurements behind this).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.errors import OutOfTimeError
from batchbench.json_file import envelope
from batchbench.reports.statistics import FEWEST, Decision, Rule, Verdict, decide
from batchbench.reports.text import plural
from batchbench.studies.gate.evidence import (
    Evidence,
    Gate,
    MetricQuery,
    Side,
    compare_work,
    describe,
    make_gate,
)
from batchbench.studies.gate.processes import (
    Calibrations,
    ProcessReport,
    Workers,
    draw_core,
    varying_work,
)
from batchbench.studies.gate.spec import METRICS, DuetSpec, check_margin
from batchbench.studies.gate.worker import Calibration, Turn
from batchbench.version import SCHEMA_VERSION

TURN_S = 0.2
"""Seconds of a turn. In longer turns, a burst of other load affects only one side; half of a
shorter turn is warm-up."""

FEWEST_STEPS = 4
"""Minimum number of steps of a turn; the first of them is not timed."""

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

TurnPair = tuple[Turn, Turn]
Reports = tuple[ProcessReport, ProcessReport]
SideCalibrations = tuple[Calibrations, Calibrations] | None
"""Calibrations of base and new from earlier processes; None to measure them."""


class TurnsWatch:
    """The observer of duet, check and baseline save; this base class ignores everything."""

    def begins(self, what: str) -> None:
        """Show the activity that begins."""

    def measured(self, label: str, what: str) -> None:
        """Show a measurement, or the decisions so far."""


# A pair of processes


@dataclass(frozen=True)
class Cut:
    """The division of a trial into turns.

    Two sides, and two sessions, need the same cut, since parts of a workload differ.
    """

    pieces: int  # turns of a trial
    times: int  # trials of a turn; above 1 only for short trials, which are one piece
    cycles: int = 0  # how often a process serves all pieces; 0 if the time limit decides

    @classmethod
    def of(cls, steps: int, trial_s: float, turn_s: float) -> Cut:
        """Cut a trial into turns of about ``turn_s`` seconds."""
        pieces = max(1, min(round(trial_s / turn_s), steps // FEWEST_STEPS))
        if pieces > 1:
            return cls(pieces, 1)
        return cls(1, max(1, round(turn_s / max(trial_s, 1e-9)), math.ceil(FEWEST_STEPS / steps)))

    def sizes(self, steps: int) -> Iterator[int]:
        """Yield the steps of one turn after another, for a trial of ``steps`` steps.

        A turn covers the same part of the workload on both sides even if one needs more steps.
        """
        while True:
            for i in range(self.pieces):
                yield (steps * (i + 1) // self.pieces - steps * i // self.pieces) * self.times


@dataclass(frozen=True)
class Pair:
    """Two fresh processes, one of each installation, that took turns; mappings are by strategy."""

    turns: Mapping[str, Sequence[TurnPair]]  # in order
    passes: Mapping[str, tuple[int, int]]  # steps of a trial, of base and new
    pieces: Mapping[str, int]  # turns of a trial
    seconds: float  # from the start of the processes to their end
    new_first: bool  # the new installation took the first turn of each pair of turns

    def value(self, strategy: str) -> float:
        """Return the log ratio of the time of a trial, new over base.

        For each piece of the trial it takes the median over pairs of turns, and over the pieces
        the mean, weighted by the base's time. Bursts of other load thus have no effect, and a loss
        in few passes, such as prefill, still counts. The first pair of turns is left out because
        caches are cold there.
        """
        count = self.pieces[strategy]
        weight = total = 0.0
        for piece in range(1, count + 1):
            if pairs := self.turns[strategy][piece::count]:
                share = median(base.wall_ns for base, _ in pairs)
                ratio = median(math.log(new.wall_ns / base.wall_ns) for base, new in pairs)
                weight, total = weight + share, total + share * math.exp(ratio)
        return math.log(total / weight)

    def kernel(self) -> float:
        """Return the log ratio of the calibration kernel, which is the same code on both sides."""
        return median(
            math.log(new.kernel_ns / base.kernel_ns)
            for turns in self.turns.values()
            for base, new in turns[1:]
        )

    def busy(self) -> float:
        return fmean(
            turn.is_busy for turns in self.turns.values() for pair in turns[1:] for turn in pair
        )

    def step_ns(self, strategy: str) -> tuple[float, float]:
        pairs = self.turns[strategy][1:]
        return (median(base.step_ns for base, _ in pairs), median(new.step_ns for _, new in pairs))


def calibrate(pair: Pair) -> tuple[Calibrations, Calibrations]:
    def of(i: int) -> Calibrations:
        return {n: Calibration(steps[i], pair.step_ns(n)[i]) for n, steps in pair.passes.items()}

    return of(0), of(1)


def contamination(pairs: Sequence[Pair], floor: float, *, on_cpu: bool) -> str | None:
    """Return the reason why these times cannot be used; None if they can.

    Args:
        floor: largest log ratio of the calibration kernel that is accepted.
        on_cpu: the model runs on the processor, so that processor time should equal wall time.
    """
    if not pairs:
        return None
    # The median: a burst in one pair is noise, which the scatter of the pairs accounts for.
    off = median(pair.kernel() for pair in pairs)
    if abs(off) > floor:
        kernel = "the time of the calibration kernel, the same code on both sides,"
        return f"{kernel} differs by {math.expm1(off):+.1%}"
    if on_cpu and (busy := fmean(pair.busy() for pair in pairs)) > 0.5:
        return f"other processes used the core in {busy:.0%} of the turns"
    return None


@dataclass(frozen=True)
class ProcessPairs:
    """A source of pairs of fresh processes on this machine."""

    sides: tuple[Workers, Workers]
    experiment: Experiment
    also: Sequence[str]
    chance: random.Random = field(default_factory=random.Random)

    def pair(
        self, strategies: Sequence[str], calibrations: SideCalibrations
    ) -> tuple[Pair, Reports]:
        """Return one more pair of processes that served the strategies in turns.

        Without calibrations it counts the work of the other strategies as well.

        Raises:
            OutOfTimeError: the time was up before the pair was finished.
        """
        began = time.monotonic()
        new_first = self.chance.random() < 0.5
        core = draw_core(self.experiment.model.threads or 1, self.chance)
        for workers in self.sides:
            workers.ready()
        hello = [workers.begin() for workers in self.sides]
        # Processes that cannot fork may share a GPU. Both would find its memory free before either
        # had taken any, and each would slow the other's calibration.
        together = all(begun["forks"] for begun in hello)
        opened = []
        for workers, known in zip(self.sides, calibrations or (None, None), strict=True):
            also = [] if calibrations else self.also
            workers.tell_open(self.experiment, strategies, known, also, core)
            if not together:
                opened.append(workers.answer())
        opened = opened or [workers.answer() for workers in self.sides]
        base, new = (answer["lanes"] for answer in opened)
        passes = {name: (base[name]["steps"], new[name]["steps"]) for name in strategies}
        pieces, turns = {}, {}
        for name, steps in passes.items():
            step_s = min(base[name]["step_ns"], new[name]["step_ns"]) / 1e9
            cut = Cut.of(min(steps), min(steps) * step_s, TURN_S)
            pieces[name] = cut.pieces
            turns[name] = self._take_turns(name, steps, cut, new_first=new_first)
        of_base, of_new = (
            ProcessReport(begun, loaded, workers.finish())
            for begun, loaded, workers in zip(hello, opened, self.sides, strict=True)
        )
        pair = Pair(turns, passes, pieces, time.monotonic() - began, new_first)
        return pair, (of_base, of_new)

    def _take_turns(
        self, strategy: str, steps: tuple[int, int], cut: Cut, *, new_first: bool
    ) -> list[TurnPair]:
        """Let the sides alternate for about :data:`PAIR_S`, in whole trials."""
        base, new = self.sides
        turns: list[TurnPair] = []
        spent = 0.0
        for of_base, of_new in zip(*map(cut.sizes, steps), strict=True):
            if new_first:
                after, before = new.turn(strategy, of_new), base.turn(strategy, of_base)
            else:
                before, after = base.turn(strategy, of_base), new.turn(strategy, of_new)
            turns.append((before, after))
            spent += sum(turn.wall_ns + turn.kernel_ns for turn in turns[-1]) / 1e9
            counted = len(turns) - 1
            longest = PAIR_S if counted % cut.pieces == 0 else LONGEST_PAIR_S
            if counted >= FEWEST_TURNS and spent >= longest:
                break
        return turns

    def restart(self) -> None:
        """Make the next pair independent of those before."""
        for workers in self.sides:
            workers.end()


# Series of pairs


@dataclass
class Series:
    """Pairs of processes under one rule, and the decisions on each strategy so far."""

    rule: Rule
    strategies: Sequence[str]  # whose time is compared
    confirming: bool = False  # it is the second series, which confirms the losses of the first
    calibrations: SideCalibrations = None
    pairs: list[Pair] = field(default_factory=list)
    reports: list[Reports] = field(default_factory=list)
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    cut_off: OutOfTimeError | None = None  # the time was up in a pair, which does not count

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
    def slower(self) -> list[str]:
        return [name for name, d in self.decisions.items() if d.verdict is Verdict.SLOWER]

    @property
    def contamination(self) -> str | None:
        on_cpu = bool(self.reports) and all(report.on_cpu for report in self.reports[-1])
        return contamination(self.pairs, self.rule.floor, on_cpu=on_cpu)

    @property
    def pair_s(self) -> float:
        return 1.05 * max((pair.seconds for pair in self.pairs), default=0.0)

    @property
    def queries(self) -> dict[str, MetricQuery]:
        metric, floor = METRICS["output_throughput"], math.expm1(self.rule.floor)
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


def make_rule(floor: float, margin: float, confidence: float) -> Rule:
    """Return the rule on logarithms of time ratios; ``floor`` and ``margin`` are in percent."""
    check_margin(floor, margin)
    return Rule(math.log1p(floor / 100), math.log1p(margin / 100), 1 - confidence)


def rule_of(spec: DuetSpec) -> Rule:
    return make_rule(spec.floor, spec.margin, spec.confidence)


def run_duet(
    source: ProcessPairs,
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
        if count == 2:
            sides = (report.version(Side("")) for report in first.reports[-1])
            work = compare_work(*sides, allow_improvement=spec.allow_improvement)
            if any(evidence.fails for evidence in work):
                break  # times of different work cannot be compared
        if not looked and clock() - began > FIRST_SHARE * spec.max_time:
            looked = True  # once only, because the error of this look is spent
            first.decide(last=True)
            if first.slower:
                break  # the rest of the time is for confirming it
            first.decide()
    result = DuetResult(first)
    if first.slower and not first.contamination and until - clock() > FEWEST * first.pair_s:
        source.restart()
        rule = replace(first.rule, alpha=CONFIRMATION_ALPHA)
        second = Series(rule, first.slower, confirming=True, calibrations=first.calibrations)
        result.confirmation = second
        for _ in _run_pairs(second, source, watch, clock, until):
            pass
    result.seconds = clock() - began
    return result


def _run_pairs(
    series: Series,
    source: ProcessPairs,
    watch: TurnsWatch,
    clock: Callable[[], float],
    until: float,
) -> Iterator[int]:
    """Add pairs until all is decided or another would not end in time; yield their number.

    A pair during which the time is up does not count.
    """
    while True:
        what = f"{'confirming, ' * series.confirming}pair {len(series.pairs) + 1}"
        watch.begins(what)
        try:
            series.add(*source.pair(series.strategies, series.calibrations))
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


def describe_decisions(
    queries: Mapping[str, MetricQuery], decisions: Mapping[str, Decision]
) -> str:
    return "; ".join(
        describe(queries[name].evidence((None, None), decision))
        for name, decision in decisions.items()
    )


# The gate


CUT_OFF_NOTE = "the last {} was not finished when --max-time was up, and does not count"
CHANGED_NOTE = "counts or outputs differ, so times are of different work and were not compared"


def make_duet_gate(
    result: DuetResult, sides: tuple[Side, Side], typed: str, *, allow_improvement: bool
) -> Gate:
    first, seconds = result.first, result.seconds
    if not first.pairs:
        return empty_gate("duet", typed, sides, "pair of processes", first.cut_off, seconds)
    base, new = (report.version(side) for report, side in zip(first.reports[0], sides, strict=True))
    work = compare_work(base, new, allow_improvement=allow_improvement)
    changed = any(evidence.fails for evidence in work)
    times = [] if changed else [_time(result, strategy) for strategy in first.strategies]
    of_sides = zip(
        *(reports for series in result.series for reports in series.reports), strict=True
    )
    varied = [
        f"{label}: {varying}"
        for label, reports in zip(("base", "new"), of_sides, strict=True)
        if (varying := varying_work(reports))
    ]
    late = next((series.cut_off for series in result.series if series.cut_off), None)
    longest = max(series.pair_s for series in result.series)
    return make_gate(
        "duet",
        typed,
        base,
        new,
        [*work, *times],
        notes=list(_notes(result, changed=changed)),
        unsure=next(iter(varied), None) or hung(late, longest, "pair of processes"),
        seconds=seconds,
    )


def empty_gate(
    command: str,
    typed: str,
    sides: Sequence[Side],
    what: str,
    late: OutOfTimeError | None,
    seconds: float,
) -> Gate:
    """Return the gate if not even one ``what`` was finished in time."""
    why = f"no {what} was finished in --max-time ({late}); raise it"
    return Gate(command, typed, sides[0], sides[1], evidence=[], unsure=why, seconds=seconds)


def hung(late: OutOfTimeError | None, longest_s: float, what: str) -> str | None:
    """Return words for a process that may hang: it was silent for longer than any ``what`` ran."""
    if late is None or late.waited_s <= longest_s:
        return None
    return f"{late} when --max-time was up, longer than any {what} took"


def _time(result: DuetResult, strategy: str) -> Evidence:
    series, second = result.first, result.confirmation
    pairs = series.pairs
    query, decision, why = series.queries[strategy], series.decisions[strategy], None
    if fault := series.contamination:
        decision, why = replace(decision, verdict=Verdict.UNKNOWN), f"was not compared: {fault}"
    elif decision.verdict is Verdict.UNKNOWN:
        why = "is still too uncertain after this time"
        if len(pairs) < FEWEST:
            so_far = plural(len(pairs), "pair")
            why = f"cannot be decided from {so_far} of processes; raise --max-time"
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
    needed = None
    if decision.needed is not None:
        minutes = decision.needed * fmean(pair.seconds for pair in pairs) / 60
        needed = f"{decision.needed} pairs of processes, about {max(1, round(minutes))} min"
    rates = []
    for side, report in enumerate(series.reports[0]):
        step_ns = median(pair.step_ns(strategy)[side] for pair in pairs)
        seconds = pairs[0].passes[strategy][side] * step_ns / 1e9
        rates.append(report.opened["workload"]["total_output_tokens"] / seconds)
    return query.evidence((rates[0], rates[1]), decision, (len(pairs), len(pairs)), needed, why)


def _notes(result: DuetResult, *, changed: bool) -> Iterator[str]:
    reports, series = result.first.reports[0], result.first
    if reports[0].hello["file"] == reports[1].hello["file"]:
        yield "both sides run the same files, so this tests only the method"
    if changed:
        yield CHANGED_NOTE
        return
    turns = sum(len(pair.turns[name]) for pair in series.pairs for name in series.strategies)
    confirmed = len(result.confirmation.pairs) if result.confirmation else 0
    more = f", then {confirmed} to confirm" if confirmed else ""
    yield f"{plural(len(series.pairs), 'pair')} of fresh processes, {turns} pairs of turns{more}"
    if any(part.cut_off for part in result.series):
        yield CUT_OFF_NOTE.format("pair")
    for name in series.strategies:
        covered = min((len(pair.turns[name]) - 1) / pair.pieces[name] for pair in series.pairs)
        if covered < 1:
            yield f"a trial takes so long that only its first {covered:.0%} was timed"
    if not all(report.on_cpu for report in reports):
        yield "times are wall times; each turn waits for the device at its end"


def record_of(result: DuetResult, gate: Gate) -> bytes:
    """Return ``duet.json``; a turn is its steps, and its wall, processor and kernel time in ns."""
    series = {"first": result.first, "confirmation": result.confirmation}
    parts = {
        name: one and {"rule": one.rule.as_data(), "pairs": [vars(pair) for pair in one.pairs]}
        for name, one in series.items()
    }
    return make_record(gate, SCHEMA_VERSION, **parts)


def make_record(gate: Gate, schema_version: int, **parts: Any) -> bytes:
    data = {**envelope(schema_version, gate.typed), "gate": gate.as_data(), **parts}
    return (json.dumps(data, allow_nan=False, ensure_ascii=False) + "\n").encode()
