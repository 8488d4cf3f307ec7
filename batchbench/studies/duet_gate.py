"""What a duet found, as a gate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from math import expm1
from statistics import median
from typing import Any

import batchbench
from batchbench.errors import OutOfTimeError
from batchbench.reports.alike import FOR_TOKENS
from batchbench.reports.result_file import SCHEMA_VERSION
from batchbench.reports.sequential import FEWEST, Verdict
from batchbench.studies.gate.counts import compare_work, work_told
from batchbench.studies.gate.duet import Findings, Opened, Run, is_on_cpu
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Side, Varying, weigh
from batchbench.studies.gate.processes import Installation


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
        "batchbench_version": batchbench.__version__,
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
