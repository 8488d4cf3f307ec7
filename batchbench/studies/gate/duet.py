"""Two installations in alternating turns, until it is sure which is slower, or neither.

One long-lived worker process a side, a *process pair*; they take turns of about 0.2 s and are both
replaced every few seconds, since what differs from process to process (where memory lies, which
core it is on) is constant within one. The value of a pair is the ratio of what a trial takes, and
the pair is the sample (docs/regressions.md has the measurements behind this).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import expm1
from statistics import median
from typing import Any, Protocol

from batchbench.batching.experiment import Experiment
from batchbench.errors import OutOfTimeError
from batchbench.reports.result_file import SCHEMA_VERSION
from batchbench.reports.statistics import FEWEST, Decision, Rule, Verdict, decide
from batchbench.studies.gate.counts import FOR_TOKENS, compare_work, work_told
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Side, Varying, weigh
from batchbench.studies.gate.processes import Installation, Workers, draw_core, open_all
from batchbench.studies.gate.spec import DuetSpec, rule_of
from batchbench.studies.gate.turns import Pair, TurnPair, contamination
from batchbench.version import __version__

TURN_S = 0.2
"""Longer, and what others do in bursts falls on one side; shorter, and half of it is warm-up."""

PAIR_S = 5.0
"""Seconds of turns, at least, before both processes are replaced."""

LONGEST_PAIR_S = 20.0
"""Where a trial takes longer than this, only its beginning is compared."""

FEWEST_STEPS, FEWEST_TURNS = 4, 3
"""Of a turn, one of which is not timed; and of a pair, beside the first, which is left out."""

FIRST_SHARE = 0.65
"""Of the time, for the run that finds a loss; the rest is for the one that confirms it."""

CONFIRMING = 0.05
"""Error of the confirming run, which has one question left to answer."""


class TurnsWatch:
    """Told of what happens; this one is silent."""

    def begins(self, what: str) -> None:
        """What is going on from now on."""

    def measured(self, label: str, what: str) -> None:
        """Something was measured of which nothing is decided yet."""

    def told(self, label: str, decisions: Mapping[str, Decision], fault: str | None) -> None:
        """What can be told so far: log ratios of a time, above 0 where new is slower."""


@dataclass(frozen=True)
class Opened:
    """What the two workers of a pair told of themselves and of the work."""

    hello: tuple[Mapping[str, Any], Mapping[str, Any]]
    told: tuple[Mapping[str, Any], Mapping[str, Any]]
    done: tuple[Mapping[str, Any], Mapping[str, Any]]  # work of each lane, and what varied


Learnt = tuple[Mapping[str, tuple[int, float]], Mapping[str, tuple[int, float]]]
"""Of each side, steps of a trial and nanoseconds of a step, by lane."""


@dataclass
class Run:
    """Pairs under one rule, and what they tell of each lane so far.

    ``known`` is what processes need not learn anew; ``cut_off`` is set where the time was up during
    a pair, which does not count.
    """

    rule: Rule
    lanes: Sequence[str]
    confirming: bool = False
    known: Learnt | None = None
    pairs: list[Pair] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    cut_off: OutOfTimeError | None = None

    def add(self, pair: Pair, opened: Opened) -> None:
        """One more pair."""
        self.pairs.append(pair)
        self.opened.append(opened)
        if len(self.pairs) == 2:  # all work is counted in two processes a side
            self.known = learnt(pair)
        self.look()

    def look(self, *, last: bool = False) -> None:
        """Decide anew."""
        self.decisions = {
            lane: decide([pair.value(lane) for pair in self.pairs], self.rule, last=last)
            for lane in self.lanes
        }

    @property
    def contamination(self) -> str | None:
        """Why the times say nothing, if so."""
        if not self.pairs:
            return None
        return contamination(self.pairs, self.rule.floor, on_cpu=is_on_cpu(self.opened[-1]))

    @property
    def is_sure(self) -> bool:
        """Whether there is nothing left to find out."""
        return not self.contamination and all(d.is_sure for d in self.decisions.values())

    @property
    def pair_s(self) -> float:
        """Seconds that one more pair may take."""
        return 1.05 * max((pair.seconds for pair in self.pairs), default=0.0)


@dataclass
class Findings:
    """All that a duet saw; the gate is made of it.

    ``confirmation`` is the second run, of the lanes that were slower in the first.
    """

    first: Run
    confirmation: Run | None = None
    seconds: float = 0.0

    @property
    def runs(self) -> list[Run]:
        """The one or two of them."""
        return [self.first, *([self.confirmation] if self.confirmation else [])]


class Pairs(Protocol):
    """Where pairs come from."""

    def pair(
        self, lanes: Sequence[str], known: Learnt | None, *, with_others: bool
    ) -> tuple[Pair, Opened]:
        """One more pair of processes, which serve ``lanes`` in turns.

        Args:
            known: what earlier processes have learnt of the lanes.
            with_others: count the work of the strategies that are not timed as well.

        Raises:
            OutOfTimeError: the time was up before it was finished.
        """

    def afresh(self) -> None:
        """Let the next pair have nothing in common with those before."""


@dataclass(frozen=True)
class Stage:
    """Pairs of fresh processes on this machine."""

    sides: tuple[Workers, Workers]
    experiment: Experiment
    also: Sequence[str]
    chance: random.Random = field(default_factory=random.Random)

    def pair(
        self,
        lanes: Sequence[str],
        known: Learnt | None,
        *,
        with_others: bool,
    ) -> tuple[Pair, Opened]:
        """Start two processes, let them take turns, and end them."""
        began = time.monotonic()
        threads = self.experiment.model.threads or 1
        new_first = self.chance.random() < 0.5
        core = draw_core(threads, self.chance)
        asked = [
            {
                "config": self.experiment.config(),
                "lanes": {lane: known[i][lane] if known else None for lane in lanes},
                "also": list(self.also) if with_others else [],
                "core": core,
            }
            for i in range(2)
        ]
        both = self.sides
        for workers in both:
            workers.ready()
        hello = [workers.begin() for workers in both]
        told = open_all(both, asked)
        passes = {
            lane: (told[0]["lanes"][lane]["steps"], told[1]["lanes"][lane]["steps"])
            for lane in lanes
        }
        step_ns = {lane: min(t["lanes"][lane]["step_ns"] for t in told) for lane in lanes}
        pieces = {lane: cut(min(passes[lane]), step_ns[lane]) for lane in lanes}
        turns = take_turns(both[0], both[1], passes, pieces, step_ns, new_first=new_first)
        done = [workers.finish() for workers in both]
        seen = Opened((hello[0], hello[1]), (told[0], told[1]), (done[0], done[1]))
        return Pair(turns, passes, pieces, time.monotonic() - began, new_first), seen

    def afresh(self) -> None:
        """End the processes that those of the pairs were forked from."""
        for workers in self.sides:
            workers.end()


def take_turns(
    base: Workers,
    new: Workers,
    passes: Mapping[str, tuple[int, int]],
    pieces: Mapping[str, int],
    step_ns: Mapping[str, float],
    *,
    new_first: bool,
) -> dict[str, list[TurnPair]]:
    """Strict alternation, lane after lane, for about :data:`PAIR_S` a lane, in whole trials."""
    found: dict[str, list[TurnPair]] = {lane: [] for lane in passes}
    for lane, steps in passes.items():
        trial_ns = steps[0] * step_ns[lane]
        sizes = [sizes_of(count, pieces[lane], trial_ns / count) for count in steps]
        spent = 0.0
        while not _is_enough(len(found[lane]) - 1, pieces[lane], spent):
            size = next(sizes[0]), next(sizes[1])
            if new_first:
                second = new.turn(lane, size[1])
                first = base.turn(lane, size[0])
            else:
                first = base.turn(lane, size[0])
                second = new.turn(lane, size[1])
            found[lane].append((first, second))
            spent += sum(turn.wall_ns + turn.kernel_ns for turn in (first, second)) / 1e9
    return found


def _is_enough(counted: int, pieces: int, spent: float) -> bool:
    """Whether a pair may end: after whole trials."""
    if counted < FEWEST_TURNS:
        return False
    if counted % pieces:
        return spent > LONGEST_PAIR_S
    return spent >= PAIR_S


def cut(steps: int, step_ns: float) -> int:
    """How many turns of about :data:`TURN_S` make a trial of so many steps; 1 for short trials."""
    return max(1, min(round(steps * step_ns / (TURN_S * 1e9)), steps // FEWEST_STEPS))


def sizes_of(steps: int, pieces: int, step_ns: float) -> Iterator[int]:
    """Steps of one turn after another; where a trial is short, a turn holds several.

    Each turn of two sides covers the same part of the workload, though one may need more steps for
    it.
    """
    trials = 1
    if pieces == 1:
        trials = max(1, round(TURN_S * 1e9 / (steps * step_ns)), -(-FEWEST_STEPS // steps))
    while True:
        for i in range(pieces):
            yield (steps * (i + 1) // pieces - steps * i // pieces) * trials


def conduct_duet(
    source: Pairs,
    lanes: Sequence[str],
    spec: DuetSpec,
    watch: TurnsWatch,
    clock: Callable[[], float] = time.monotonic,
) -> Findings:
    """Run pairs until all is sure, or the time is up; confirm what is slower with a second run.

    Args:
        lanes: strategies whose time is compared.
        clock: seconds, as the time is counted.

    Raises:
        UsageError: what is asked cannot be done by one of the two.
    """
    began = clock()
    until = began + spec.max_time
    first = Run(rule_of(spec).shared(len(lanes)), lanes)
    looked = False
    for _ in paired(first, source, watch, clock, until):
        differ = len(first.pairs) == 2 and counts_differ(first.opened[-1])
        if differ and not spec.allow_improvement:
            break  # times would answer another question
        if not looked and clock() - began > FIRST_SHARE * spec.max_time:
            looked = True  # once: the error of this look is spent
            if is_slower_at_last(first):
                break  # what is left of the time is for confirming it
    seen = Findings(first)
    slower = [lane for lane, d in first.decisions.items() if d.verdict is Verdict.SLOWER]
    left = until - clock()
    if slower and not first.contamination and left > FEWEST * first.pair_s:
        rule = Rule(first.rule.floor, first.rule.margin, CONFIRMING)
        source.afresh()
        second = Run(rule, slower, confirming=True, known=first.known)
        for _ in paired(second, source, watch, clock, until):
            pass
        seen.confirmation = second
    seen.seconds = clock() - began
    return seen


def is_slower_at_last(run: Run) -> bool:
    """Whether the look that is kept for the end shows a loss already."""
    run.look(last=True)
    if any(decision.verdict is Verdict.SLOWER for decision in run.decisions.values()):
        return True
    run.look()
    return False


def paired(
    run: Run, source: Pairs, watch: TurnsWatch, clock: Callable[[], float], until: float
) -> Iterator[Pair]:
    """Pair after pair, until all is sure or another one would not end in time.

    One during which the time is up does not count.
    """
    while True:
        what = f"{'confirming, ' if run.confirming else ''}pair {len(run.pairs) + 1}"
        watch.begins(what)
        try:
            pair, opened = source.pair(run.lanes, run.known, with_others=run.known is None)
        except OutOfTimeError as late:
            run.cut_off = late
            if run.pairs:
                run.look(last=True)
            return
        run.add(pair, opened)
        up = clock() + run.pair_s > until
        if up:
            run.look(last=True)
        watch.told(what, run.decisions, run.contamination)
        yield run.pairs[-1]
        # The work is counted twice, in different processes, whatever the times say.
        if up or (run.is_sure and len(run.pairs) > 1):
            return


def learnt(pair: Pair) -> Learnt:
    """What a pair tells of each side's lanes."""
    base, new = (
        {lane: (steps[side], pair.step_ns(lane)[side]) for lane, steps in pair.passes.items()}
        for side in (0, 1)
    )
    return base, new


def counts_differ(opened: Opened) -> bool:
    """Whether the two sides do other work for some strategy."""
    base, new = (
        {**told["also"], **done["work"]}
        for told, done in zip(opened.told, opened.done, strict=True)
    )
    return any(
        value != new[name].get(counter)
        for name, work in base.items()
        for counter, value in work.items()
        if counter != "output_digest"  # a tie may stand behind it
    )


def is_on_cpu(opened: Opened) -> bool:
    """Whether the model runs on the processor, on both sides."""
    return all(str(told["model"]["device"]) == "cpu" for told in opened.told)


def make_gate(
    found: Findings,
    sides: tuple[Installation, Installation],
    labels: tuple[str, str],
    typed: str,
    *,
    allow_improvement: bool,
) -> Gate:
    """Weigh work first, then times.

    Args:
        labels: how the user named the two sides.
        typed: the command line that does it again.
    """
    if not found.first.pairs:
        base, new = (
            Side(label, {"python": str(side.python)})
            for label, side in zip(labels, sides, strict=True)
        )
        why = no_time_for("pair of processes", found.first.cut_off)
        return gate_of_nothing("duet", typed, base, new, why, found.seconds)
    opened = found.first.opened[0]
    differing = list(differences(opened))
    alike = not any(each.name in TOKENS_DEPEND_ON for each in differing)
    works = [work_told(_works(opened, side), told) for side, told in enumerate(opened.told)]
    work = compare_work(works[0], works[1], alike=alike, allow_improvement=allow_improvement)
    changed = any(each.fails for each in work)
    times = [] if changed else [_time(found, lane) for lane in found.first.lanes]
    notes = list(_notes(found, changed=changed))
    return Gate(
        command="duet",
        typed=typed,
        base=_side(labels[0], sides[0], opened, 0),
        new=_side(labels[1], sides[1], opened, 1),
        evidence=[*work, *times],
        environment=differing,
        notes=notes,
        unsure=_varied(found) or _hung(found),
        seconds=found.seconds,
    )


def gate_of_nothing(
    command: str, typed: str, base: Side, new: Side, why: str, seconds: float
) -> Gate:
    """The gate where nothing was finished in time, so that nothing can be told."""
    return Gate(command, typed, base, new, evidence=[], unsure=why, seconds=seconds)


def no_time_for(what: str, late: OutOfTimeError | None) -> str:
    """The reason for *cannot tell* where not even one ``what`` was finished."""
    return f"no {what} was finished in --max-time ({late}); raise it"


def _hung(found: Findings) -> str | None:
    """The side that may hang: it owed an answer for longer than any whole pair took."""
    longest = max(run.pair_s for run in found.runs)
    late = next((run.cut_off for run in found.runs if run.cut_off), None)
    if late is None or late.waited_s <= longest:
        return None
    return f"{late} when --max-time was up, longer than any pair of processes took"


TOKENS_DEPEND_ON = (*FOR_TOKENS, "python", "safetensors", "weights_digest")
"""Of what is told of an installation: where these are alike, so are the tokens, to the bit."""


def differences(opened: Opened) -> Iterator[Varying]:
    """In what the two installations differ."""
    base, new = (
        facts(hello["version"], told["environment"], told["model"])
        for hello, told in zip(opened.hello, opened.told, strict=True)
    )
    for name in {**base, **new}:
        if base.get(name) != new.get(name):
            yield Varying(name, base.get(name), new.get(name))


def facts(version: str, environment: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth telling of where something ran, by name."""
    shown = ("os", "hostname", "cpu", "cpu_cores", "cpu_kernels", "gpu", "gpu_driver", "cuda")
    return {
        "batchbench": version,
        "commit": environment.get("git_commit"),
        **{name: environment.get(name) for name in (*shown, "threads", "python")},
        **environment["packages"],
        **{name: model.get(name) for name in ("device", "dtype", "execution", "weights_digest")},
    }


def _works(opened: Opened, side: int) -> dict[str, Any]:
    """The work of each strategy that a process has counted."""
    lanes = opened.done[side]["work"]
    return {**opened.told[side]["also"], **{name: work for name, work in lanes.items() if work}}


def _varied(found: Findings) -> str | None:
    """What one side did not do twice alike: then nothing it did can be held against the other."""
    opened = [opened for run in found.runs for opened in run.opened]
    for side, label in enumerate(("base", "new")):
        first = _works(opened[0], side)
        for each in opened:
            for name, counter in each.done[side]["varied"].items():
                if counter:
                    return f"{label}: {name}.{counter} varies from trial to trial"
            for name, work in _works(each, side).items():
                if name in first and work != first[name]:
                    other = next(key for key in work if work[key] != first[name].get(key))
                    return f"{label}: {name}.{other} varies from process to process"
    return None


def _time(found: Findings, lane: str) -> Evidence:
    """Tokens a second, new against base."""
    run, second = found.first, found.confirmation
    decision, why = run.decisions[lane], None
    if decision.verdict is Verdict.UNKNOWN:
        why = _too_uncertain(run)
    if fault := run.contamination:
        decision, why = replace(decision, verdict=Verdict.UNKNOWN), fault
    elif decision.verdict is Verdict.SLOWER:
        told = second.decisions.get(lane) if second else None
        if told is None or (second and second.contamination) or told.verdict is not Verdict.SLOWER:
            why = "was slower in one run, and a second did not confirm it"
            if told is not None and told.estimate is not None:
                why += f" ({expm1(told.estimate):+.1%} time there)"
            elif told is None:
                why = "was slower in one run, and there was no time for a second to confirm it"
            decision = replace(decision, verdict=Verdict.UNKNOWN)
    pairs = run.pairs
    return weigh(
        Kind.TIME,
        "output_throughput",
        lane,
        _throughput(run, lane),
        decision,
        higher_is_better=True,
        gated=True,
        floor=expm1(run.rule.floor),
        unit="tok/s",
        samples=(len(pairs), len(pairs)),
        needed=_needed(run, decision.needed),
        why=why,
    )


def _too_uncertain(run: Run) -> str:
    if len(run.pairs) < FEWEST:
        return f"cannot be told from {len(run.pairs)} pairs of processes; raise --max-time"
    return "is too uncertain in this time"


def _needed(run: Run, pairs: int | None) -> str | None:
    """How long it would take."""
    if pairs is None:
        return None
    seconds = pairs * sum(pair.seconds for pair in run.pairs) / len(run.pairs)
    return f"{pairs} pairs of processes, about {max(1, round(seconds / 60))} min"


def _throughput(run: Run, lane: str) -> tuple[float, float]:
    """Useful tokens a second of the median step, base and new."""
    rates = []
    for side, told in enumerate(run.opened[0].told):
        steps = run.pairs[0].passes[lane][side]
        step_ns = median(pair.step_ns(lane)[side] for pair in run.pairs)
        rates.append(told["workload"]["total_output_tokens"] / (steps * step_ns / 1e9))
    return rates[0], rates[1]


def _notes(found: Findings, *, changed: bool) -> Iterator[str]:
    opened, run = found.first.opened[0], found.first
    if opened.hello[0]["file"] == opened.hello[1]["file"]:
        yield "both sides are the same files: this tries the method, and compares nothing"
    if changed:
        yield "the work differs, so times would answer another question and are not compared"
        return
    confirmed = len(found.confirmation.pairs) if found.confirmation else 0
    turns = sum(len(pair.turns[lane]) for pair in run.pairs for lane in run.lanes)
    more = f", then {confirmed} to confirm" if confirmed else ""
    yield f"{len(run.pairs)} pairs of fresh processes, {turns} pairs of turns{more}"
    if any(run.cut_off for run in found.runs):
        yield "the last pair was not finished when --max-time was up, and does not count"
    for lane in run.lanes:
        if (covered := min(pair.covers(lane) for pair in run.pairs)) < 1:
            yield f"a trial takes so long that only its first {covered:.0%} were timed"
    if not is_on_cpu(opened):
        yield "times are the wall's, with the device waited for at the end of each turn"


def _side(label: str, installation: Installation, opened: Opened, side: int) -> Side:
    hello, told = opened.hello[side], opened.told[side]
    environment = told["environment"]
    return Side(
        label,
        {
            "python": str(installation.python),
            "batchbench": hello["version"],
            "commit": environment.get("git_commit"),
            "machine": environment.get("gpu") or environment.get("cpu"),
        },
    )


def record_of(found: Findings, gate: Gate) -> bytes:
    """``duet.json``: the gate, and every turn from which it can be decided again."""
    runs = {"first": found.first, "confirmation": found.confirmation}
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "gate": gate.as_data(),
        **{
            name: None
            if run is None
            else {"rule": run.rule.as_data(), "pairs": [pair.as_data() for pair in run.pairs]}
            for name, run in runs.items()
        },
    }
    return (json.dumps(data, allow_nan=False, ensure_ascii=False) + "\n").encode()
