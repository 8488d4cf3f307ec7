"""The present version against a kept baseline: its work exactly, its speed beside its twins."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import expm1, log1p
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from batchbench.batching.experiment import Experiment
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.reports.statistics import Decision, Rule, Verdict, compare_means
from batchbench.studies.gate import baseline
from batchbench.studies.gate.baseline import (
    SCHEMA_VERSION,
    Baseline,
    Cut,
    Process,
    Seen,
    speedup,
    throughput,
)
from batchbench.studies.gate.counts import compare_work
from batchbench.studies.gate.duet import (
    TOKENS_DEPEND_ON,
    TurnsWatch,
    facts,
    gate_of_nothing,
    no_time_for,
)
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Side, Varying, weigh
from batchbench.studies.gate.processes import Installation, Workers
from batchbench.studies.gate.spec import CheckSpec, check_margin
from batchbench.studies.reproduce import pinned
from batchbench.studies.sweep.grid import named_files
from batchbench.version import __version__

FIRST_LOOK, NEXT_LOOK = 8, 4
"""Processes before the first verdict, and between one and the next."""

MACHINE = (
    *("cpu", "gpu", "cpu_cores", "threads"),
    *("cpu_kernels", "device", "dtype", "execution"),
)
"""What makes a machine another one, on which ratios may differ for its own reasons."""

BUSY = 0.5
"""Share of the turns in which others had the core above which nothing can be told."""


@dataclass
class Observed:
    """Processes of one session, and what they have in common.

    ``cut_off`` is set if the time was up during a process, which does not count.
    """

    processes: list[Process] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    cut_off: OutOfTimeError | None = None

    def add(self, seen: Seen) -> None:
        """One more process."""
        self.processes.append(seen.process)
        self.seen.append(seen)

    @property
    def first(self) -> Seen:
        """The process that counted the work."""
        return self.seen[0]

    @property
    def known(self) -> Mapping[str, Any] | None:
        """What later processes need not learn, once all work was counted twice."""
        if len(self.seen) < 2:
            return None
        process = self.processes[0]
        return {lane: [steps, process.step_ns[lane]] for lane, steps in process.passes.items()}

    @property
    def longest_s(self) -> float:
        """Return the seconds of the longest process."""
        return max(process.seconds for process in self.processes)

    @property
    def hung(self) -> str | None:
        """Return words for a process that may hang: it was silent for longer than others ran."""
        late = self.cut_off
        if late is None or late.waited_s <= self.longest_s:
            return None
        return f"{late} when --max-time was up, longer than any process took"

    @property
    def varied(self) -> str | None:
        """What was not the same in all processes, a fault of ours."""
        for seen in self.seen:
            if seen.varied:
                return f"{seen.varied} varies from trial to trial"
            for name, work in seen.work.items():
                first = self.first.work.get(name, work)
                if other := next((key for key in work if work[key] != first.get(key)), None):
                    return f"{name}.{other} varies from process to process"
        return None


def here() -> Installation:
    """The installation that runs this."""
    return Installation("here", Path(sys.executable), own=True)


def observe(
    experiment: Experiment,
    observed: Observed,
    count: int,
    cut: Cut | None,
    watch: TurnsWatch,
    chance: random.Random,
    until: float = math.inf,
) -> Iterator[int]:
    """Run fresh processes until there are ``count``, or until ``time.monotonic`` is ``until``.

    Yields the number of processes after each.
    """
    with Workers(here(), experiment.model.threads or 1, until) as workers:
        while len(observed.processes) < count:
            watch.begins(f"process {len(observed.processes) + 1}")
            usual = observed.first.cut if observed.seen else cut
            try:
                seen = baseline.observe_process(workers, experiment, observed.known, usual, chance)
            except OutOfTimeError as late:
                observed.cut_off = late
                return
            observed.add(seen)
            yield len(observed.processes)


# Baselines


def make_baseline(experiment: Experiment, processes: int, watch: TurnsWatch) -> Baseline:
    """Measure what later versions are to be held against.

    Raises:
        UsageError: it cannot be measured here.
    """
    observed = Observed()
    for number in observe(experiment, observed, processes, None, watch, random.Random()):
        ratios = observed.processes[-1].ratios.items()
        faster = ", ".join(f"{np.exp(-v):.2f}× as fast as {name}" for name, v in ratios)
        watch.measured(f"process {number}", faster)
    if observed.varied:
        raise UsageError(f"{observed.varied}: no baseline can be made of work that is not steady")
    seen = observed.first
    told, model = seen.told, seen.told["model"]
    return Baseline(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "baseline",
            "batchbench_version": __version__,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": experiment.command("baseline save"),
            "config": pinned(experiment, model).config(),
            "files": named_files(experiment),
            "environment": told["environment"],
            "model": model,
            "workload": told["workload"],
            "work": dict(seen.work),
            "cut": {
                "pieces": seen.cut.pieces,
                "times": seen.cut.times,
                "cycles": seen.cut.cycles,
            },
            "lanes": baseline.lanes_of(experiment),
            "processes": [baseline.as_data(process) for process in observed.processes],
        }
    )


# Checks


def conduct_check(
    baseline: Baseline,
    file: Path,
    spec: CheckSpec,
    watch: TurnsWatch,
    observed: Observed | None = None,
) -> Gate:
    """Run the baseline's experiment in fresh processes until the answer is clear or time is up.

    Args:
        observed: collects the values of each process, for :func:`record_of`.

    Raises:
        UsageError: it cannot be run here, or the workload or the weights differ.
    """
    began = time.monotonic()
    data = baseline.data
    experiment = Experiment.from_config(data["config"])
    if spec.preset is not None and experiment.preset != spec.preset:
        raise UsageError(
            f"--preset {spec.preset}: {file} was made with --preset {experiment.preset}; make one "
            f"with batchbench baseline save --preset {spec.preset}"
        )
    observed = Observed() if observed is None else observed
    cut, chance = Cut(**data["cut"]), random.Random()
    decisions: dict[str, Decision] = {}
    rule, looks, differing = Rule(), 0, []
    until = began + spec.max_time
    for count in observe(experiment, observed, 10_000, cut, watch, chance, until):
        if count == 1:
            _check_same_question(file, data, observed.first)
            differing = list(_differences(data, observed.first))
            rule = rule_of(spec, len(baseline.data["lanes"]) - 1, other=_is_other(differing))
        last = time.monotonic() + 1.05 * observed.longest_s > until
        if count == 2 and _works_differ(baseline, observed.first, spec.allow_improvement):
            break  # ratios would answer another question
        if last or (count >= FIRST_LOOK and (count - FIRST_LOOK) % NEXT_LOOK == 0):
            looks += 1
            decisions = decide_ratios(baseline.processes, observed.processes, rule, looks)
            against = {f"beside {twin}:": decision for twin, decision in decisions.items()}
            watch.told(f"process {count}", against, None)
            if last or all(decision.is_sure for decision in decisions.values()):
                break
        else:
            watch.measured(f"process {count}", "")
    if not observed.processes:
        base = Side(str(file), {"created": data["created_at"], "machine": baseline.machine})
        here_now = Side("this installation", {"batchbench": __version__})
        why = no_time_for("process", observed.cut_off)
        spent_s = time.monotonic() - began
        return gate_of_nothing("check", typed(file, spec), base, here_now, why, spent_s)
    if observed.cut_off:
        decisions = decide_ratios(baseline.processes, observed.processes, rule, looks + 1)
    return _gate(baseline, file, spec, observed, decisions, differing, rule, began)


FLOOR, FLOOR_ELSEWHERE, MARGIN = 10.0, 20.0, 1.5
"""Losses in percent up to which nothing is called slower, on the baseline's machine and on another,
and the margin of *same* in floors. Between two sessions of one machine half an hour
apart the ratio to the notebook engine moved by 7 % (docs/regressions.md)."""


def rule_of(spec: CheckSpec, ratios: int, *, other: bool) -> Rule:
    """The rule for each of so many ratios; ``other``: the machine is not the baseline's."""
    floor = spec.floor if spec.floor is not None else FLOOR_ELSEWHERE if other else FLOOR
    margin = spec.margin if spec.margin is not None else MARGIN * floor
    check_margin(floor, margin)
    rule = Rule(log1p(floor / 100), log1p(margin / 100), 1 - spec.confidence)
    return rule.shared(ratios)


def decide_ratios(
    base: Sequence[Process], new: Sequence[Process], rule: Rule, look: int
) -> dict[str, Decision]:
    """What the ``look``-th look tells of each ratio.

    The first look may spend half of α, the next a quarter, and so on, so that however many there
    are, all together spend no more than α (spending functions: Lan and DeMets 1983).
    """
    spending = replace(rule, alpha=rule.alpha / 2**look)
    return {
        twin: compare_means([p.ratios[twin] for p in base], [p.ratios[twin] for p in new], spending)
        for twin in base[0].ratios
    }


def _check_same_question(file: Path, data: Mapping[str, Any], seen: Seen) -> None:
    for what, kept, now in (
        ("workload", data["workload"]["digest"], seen.told["workload"]["digest"]),
        ("weights", data["model"].get("weights_digest"), seen.told["model"]["weights_digest"]),
    ):
        if kept != now:
            raise UsageError(
                f"{file}: its {what} {'are' if what == 'weights' else 'is'} not what the same "
                "settings give here, so there is nothing to compare; make a new baseline with "
                "batchbench baseline save"
            )


def _differences(data: Mapping[str, Any], seen: Seen) -> Iterator[Varying]:
    """In what the two sessions' machines and software differ."""
    kept = facts(data["batchbench_version"], data["environment"], data["model"])
    now = facts(seen.hello["version"], seen.told["environment"], seen.told["model"])
    for name in {**kept, **now}:
        if kept.get(name) != now.get(name):
            yield Varying(name, kept.get(name), now.get(name))


def _is_other(differing: Sequence[Varying]) -> bool:
    return any(each.name in MACHINE for each in differing)


def _works_differ(baseline: Baseline, seen: Seen, allow_improvement: bool) -> bool:
    found = compare_work(
        baseline.work,
        seen.counted,
        alike=False,
        allow_improvement=allow_improvement,
    )
    return any(each.fails for each in found)


def _gate(
    baseline: Baseline,
    file: Path,
    spec: CheckSpec,
    observed: Observed,
    decisions: Mapping[str, Decision],
    differing: Sequence[Varying],
    rule: Rule,
    began: float,
) -> Gate:
    seen, data = observed.first, baseline.data
    alike = not any(each.name in TOKENS_DEPEND_ON for each in differing)
    work = compare_work(
        baseline.work,
        seen.counted,
        alike=alike,
        allow_improvement=spec.allow_improvement,
    )
    changed = any(each.fails for each in work)
    times: list[Evidence] = []
    notes = [f"the baseline is {baseline.age}, made on {baseline.machine}"]
    if changed:
        notes.append("the work differs, so times would answer another question, and none is told")
    else:
        times = [
            *_ratios(baseline, observed, decisions, rule),
            _absolute(baseline, observed, rule),
        ]
        notes.append(
            f"{len(observed.processes)} fresh processes here, {len(baseline.processes)} in the "
            "baseline"
        )
    if observed.cut_off:
        notes.append("the last process was not finished when --max-time was up, and does not count")
    if _is_other(differing) and spec.floor is None:
        notes.append(
            f"the machine is not the baseline's: losses count beyond {FLOOR_ELSEWHERE:g} % only"
        )
    commit = data["environment"].get("git_commit")
    return Gate(
        command="check",
        typed=typed(file, spec),
        base=Side(
            str(file),
            {
                "created": data["created_at"],
                "batchbench": data["batchbench_version"],
                "commit": commit,
                "machine": baseline.machine,
            },
        ),
        new=Side(
            "this installation",
            {
                "batchbench": seen.hello["version"],
                "commit": seen.told["environment"].get("git_commit"),
                "machine": seen.told["environment"].get("gpu") or seen.told["environment"]["cpu"],
            },
        ),
        evidence=[*work, *times],
        environment=differing,
        notes=notes,
        unsure=observed.varied or observed.hung,
        seconds=time.monotonic() - began,
    )


def record_of(observed: Observed, gate: Gate) -> bytes:
    """Return the content of ``check.json``: the gate, and the values of each process."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "gate": gate.as_data(),
        "processes": [baseline.as_data(process) for process in observed.processes],
    }
    return (json.dumps(data, allow_nan=False, ensure_ascii=False) + "\n").encode()


def typed(file: Path, spec: CheckSpec) -> str:
    """The command line that does it again."""
    import shlex

    from batchbench import settings

    usual = CheckSpec(baseline=file)
    words = ["batchbench", "check", *settings.words_of(replace(spec, baseline=file), usual)]
    return shlex.join([*words, "--baseline", str(file)])


NAMES = {"speedup": "speedup", "notebook": "speedup_over_notebook"}


def _ratios(
    baseline: Baseline, observed: Observed, decisions: Mapping[str, Decision], rule: Rule
) -> Iterator[Evidence]:
    busy = fmean(process.busy for process in observed.processes)
    on_cpu = str(observed.first.told["model"]["device"]) == "cpu"
    for twin, decision in decisions.items():
        told, why = decision, None
        if on_cpu and busy > BUSY:
            told = replace(decision, verdict=Verdict.UNKNOWN)
            why = f"others had the core in {busy:.0%} of the turns"
        elif not decision.is_sure:
            why = "is too uncertain in this time"
        yield weigh(
            Kind.RATIO,
            NAMES["notebook"] if "/" in twin else NAMES["speedup"],
            baseline.candidate,
            (speedup(baseline.processes, twin), speedup(observed.processes, twin)),
            told,
            higher_is_better=True,
            gated=True,
            floor=expm1(rule.floor),
            unit="×",
            samples=(len(baseline.processes), len(observed.processes)),
            needed=f"{decision.needed} processes a side" if decision.needed else None,
            why=why,
        )


def _absolute(baseline: Baseline, observed: Observed, rule: Rule) -> Evidence:
    """Told, never gated: between two sessions a machine may be another 10 % faster or slower."""
    lane, tokens = baseline.candidate, baseline.data["workload"]["total_output_tokens"]
    logs = [
        [float(np.log(p.step_ns[lane] * p.passes[lane])) for p in processes]
        for processes in (baseline.processes, observed.processes)
    ]
    return weigh(
        Kind.TIME,
        "output_throughput",
        lane,
        (baseline.throughput(lane), throughput(observed.processes, lane, tokens)),
        compare_means(logs[0], logs[1], rule),
        higher_is_better=True,
        gated=False,
        floor=expm1(rule.floor),
        unit="tok/s",
        samples=(len(logs[0]), len(logs[1])),
        why="is of another session, so it is told and gates nothing",
    )
