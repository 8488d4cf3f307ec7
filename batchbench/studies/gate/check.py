"""Compare the present version with a saved baseline: counts exactly, speed by ratios.

A check runs the baseline's experiment in fresh processes and compares the ratios of the candidate
to its reference strategies by the rule of ``compare`` for several runs: the process is the sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import expm1, log
from pathlib import Path
from statistics import fmean
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.errors import UsageError
from batchbench.reports.statistics import Decision, Rule, Verdict, compare_means
from batchbench.studies.gate.baseline import (
    SCHEMA_VERSION,
    Baseline,
    Process,
    Session,
    measure_processes,
)
from batchbench.studies.gate.compare import Sample, judge
from batchbench.studies.gate.counts import Version, counts_fail, make_gate, mismatches
from batchbench.studies.gate.duet import (
    CHANGED_NOTE,
    CUT_OFF_NOTE,
    TurnsWatch,
    describe_decisions,
    empty_gate,
    hung,
    make_record,
    make_rule,
)
from batchbench.studies.gate.evidence import Evidence, Gate, MetricQuery, Side
from batchbench.studies.gate.processes import ProcessReport
from batchbench.studies.gate.spec import METRICS, CheckSpec
from batchbench.studies.gate.turns import Cut
from batchbench.version import __version__

FIRST_LOOK, NEXT_LOOK = 8, 4
"""Processes before the first decision, and between two decisions."""

MACHINE = (
    *("cpu", "gpu", "cpu_cores", "threads"),
    *("cpu_kernels", "device", "dtype", "execution"),
)
"""Facts that make another machine, on which ratios may differ without a regression."""

BUSY = 0.5
"""Largest share of turns with other processes on the core at which ratios are used."""

FLOOR, FLOOR_ELSEWHERE, MARGIN = 10.0, 20.0, 1.5
"""Floors in percent, on the baseline's machine and on another, and the margin in floors.

Between two sessions of one machine, half an hour apart, the ratio to the notebook engine moved by
7 % (docs/regressions.md)."""

LABEL = "this installation"


def rule_of(spec: CheckSpec, ratios: int, *, other: bool) -> Rule:
    floor = spec.floor if spec.floor is not None else FLOOR_ELSEWHERE if other else FLOOR
    margin = spec.margin if spec.margin is not None else MARGIN * floor
    return make_rule(floor, margin, spec.confidence).shared(ratios)


def decide_ratios(
    base: Sequence[Process], new: Sequence[Process], rule: Rule, look: int
) -> dict[str, Decision]:
    """Decide on the ratio to each reference at the ``look``-th look.

    The first look may spend half of α, the next a quarter, and so on, so that all looks together
    spend at most α (spending functions: Lan and DeMets 1983).
    """
    spending = replace(rule, alpha=rule.alpha / 2**look)
    return {
        name: compare_means([p.ratios[name] for p in base], [p.ratios[name] for p in new], spending)
        for name in base[0].ratios
    }


def run_check(
    baseline: Baseline, file: Path, spec: CheckSpec, watch: TurnsWatch, typed: str
) -> tuple[Gate, Session]:
    """Run the baseline's experiment in fresh processes until all is decided or the time is up."""
    began = time.monotonic()
    data = baseline.data
    experiment = Experiment.from_config(data["config"])
    if spec.preset is not None and experiment.preset != spec.preset:
        raise UsageError(
            f"--preset {spec.preset}: {file} was made with --preset {experiment.preset}; make one "
            f"with batchbench baseline save --preset {spec.preset}"
        )
    base, session = baseline.version(str(file)), Session()
    decided = _measure(baseline, base, experiment, file, spec, session, watch, began)
    seconds = time.monotonic() - began
    if decided is None:
        here = Side(LABEL, {"batchbench": __version__})
        late = session.cut_off
        return empty_gate("check", typed, base.side, here, "process", late, seconds), session
    new, rule, decisions = decided
    gate = make_gate(
        "check",
        typed,
        (base, new),
        lambda: [*_ratios(baseline, session, decisions, rule), _absolute(baseline, session, rule)],
        allow_improvement=spec.allow_improvement,
        notes=lambda work: list(_notes(baseline, spec, session, (base, new), work)),
        unsure=session.varied or hung(session.cut_off, session.longest_s, "process"),
        seconds=seconds,
    )
    return gate, session


def _measure(
    baseline: Baseline,
    base: Version,
    experiment: Experiment,
    file: Path,
    spec: CheckSpec,
    session: Session,
    watch: TurnsWatch,
    began: float,
) -> tuple[Version, Rule, dict[str, Decision]] | None:
    """Measure processes until all is decided; return None if not even one was finished."""
    until, cut = began + spec.max_time, Cut(**baseline.data["cut"])
    looks, decided = 0, None
    for count in measure_processes(experiment, session, None, cut, watch, until):
        if decided is None:
            _check_same_question(file, baseline.data, session.report)
            new = session.report.version(LABEL)
            references = len(baseline.data["lanes"]) - 1
            rule = rule_of(spec, references, other=is_another_machine(base, new))
            decided = new, rule, dict[str, Decision]()
        last = time.monotonic() + 1.05 * session.longest_s > until
        if count == 2 and counts_fail(
            base.counts[0], new.counts[0], allow_improvement=spec.allow_improvement
        ):
            return decided  # ratios of different work cannot be compared
        progress = session.processes[-1].speedups
        if last or (count >= FIRST_LOOK and (count - FIRST_LOOK) % NEXT_LOOK == 0):
            looks += 1
            decisions = decide_ratios(baseline.processes, session.processes, rule, looks)
            decided = new, rule, decisions
            progress = describe_decisions(_queries(baseline, rule), decisions)
            last = last or all(decision.is_sure for decision in decisions.values())
        watch.measured(f"process {count}", progress)
        if last:
            return decided
    if decided is not None and session.cut_off:
        decisions = decide_ratios(baseline.processes, session.processes, decided[1], looks + 1)
        decided = decided[0], decided[1], decisions
    return decided


def is_another_machine(base: Version, new: Version) -> bool:
    return bool(mismatches(base, new, MACHINE))


def _check_same_question(file: Path, data: Mapping[str, Any], report: ProcessReport) -> None:
    opened = report.opened
    for what, saved, now in (
        ("a different workload", data["workload"]["digest"], opened["workload"]["digest"]),
        (
            "different weights",
            data["model"].get("weights_digest"),
            opened["model"]["weights_digest"],
        ),
    ):
        if saved != now:
            raise UsageError(
                f"{file}: the same settings give {what} here, so nothing can be "
                "compared; make a new baseline with batchbench baseline save"
            )


def _queries(baseline: Baseline, rule: Rule) -> dict[str, MetricQuery]:
    metrics = {
        name: replace(
            METRICS["speedup"], name="speedup_over_notebook" if "/" in name else "speedup"
        )
        for name in baseline.data["lanes"][1:]
    }
    return {
        name: MetricQuery(metric, baseline.candidate, expm1(rule.floor), True)
        for name, metric in metrics.items()
    }


def _ratios(
    baseline: Baseline, session: Session, decisions: Mapping[str, Decision], rule: Rule
) -> Iterator[Evidence]:
    busy = fmean(process.busy for process in session.processes)
    queries = _queries(baseline, rule)
    for name, decision in decisions.items():
        why = None if decision.is_sure else "is too uncertain in this time"
        if session.report.on_cpu and busy > BUSY:
            decision = replace(decision, verdict=Verdict.UNKNOWN)
            why = f"is in doubt: other processes used the core in {busy:.0%} of the turns"
        base, new = (
            Sample([process.ratios[name] for process in processes])
            for processes in (baseline.processes, session.processes)
        )
        needed = f"{decision.needed} processes per side" if decision.needed else None
        yield judge(queries[name], base, new, decision, why, needed)


def _absolute(baseline: Baseline, session: Session, rule: Rule) -> Evidence:
    """Return the throughput, which is never gated: sessions of one machine differ by 10 %."""
    name, tokens = baseline.candidate, baseline.data["workload"]["total_output_tokens"]
    base, new = (
        Sample([log(p.step_ns[name] * p.passes[name] / 1e9 / tokens) for p in processes])
        for processes in (baseline.processes, session.processes)
    )
    query = MetricQuery(METRICS["output_throughput"], name, expm1(rule.floor), False)
    why = "is from another session: reported, not gated"
    return judge(query, base, new, compare_means(base.logs, new.logs, rule), why)


def _notes(
    baseline: Baseline,
    spec: CheckSpec,
    session: Session,
    sides: tuple[Version, Version],
    work: Sequence[Evidence],
) -> Iterator[str]:
    yield f"the baseline was saved {baseline.age} on {baseline.machine}"
    if any(evidence.fails for evidence in work):
        yield CHANGED_NOTE
    else:
        yield (
            f"{len(session.processes)} fresh processes here, {len(baseline.processes)} in the "
            "baseline"
        )
    if session.cut_off:
        yield CUT_OFF_NOTE.format("process")
    if spec.floor is None and is_another_machine(*sides):
        yield f"the machine is not the baseline's, so the floor is {FLOOR_ELSEWHERE:g} %"


def record_of(session: Session, gate: Gate) -> bytes:
    processes = [asdict(process) for process in session.processes]
    return make_record(gate, SCHEMA_VERSION, processes=processes)
