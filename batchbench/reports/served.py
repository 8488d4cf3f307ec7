"""Reports of a run against a server: names, counts, agreement of outputs, failures, and doubts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any, Literal, cast

import numpy as np

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import Outcome
from batchbench.reports.latency import gaps_ms, ttft_ms
from batchbench.reports.result_file import Facts
from batchbench.reports.server_data import AgreementData, FailureData, ServerData
from batchbench.reports.statistics import Distribution, Ratio, paired_ratio
from batchbench.reports.text import label_of, percent, plural, times
from batchbench.workloads import Workload

LAG, LATE, MERGED, NOISE = 0.10, 0.10, 0.05, 0.05
"""Limits: the client's lag as a share of the median ITL, its delay in sending as a share of the
median TTFT, the share of output that has the time of later output, and the distance from 1 at which
two pairs contradict each other."""

KERNEL = 0.99
"""Share of reads with a kernel stamp from which times are the kernel's."""

MOST_COUNTED = 20_000
"""Requests up to which the steps of a schedule are counted; more take seconds."""

Recordings = Mapping[str, Sequence[Recording]]


class Doubt(StrEnum):
    """A reason to doubt a run against a server, and what to do about it."""

    CACHED = (
        "the server took {tokens:,} of its prompt tokens from a cache, in place of computing them; "
        "turn the server's prompt cache off"
    )
    LAG = (
        "output waited up to {lag:.3g} ms for the client (p99), {share} of the median ITL, and "
        "has no kernel time stamps; give the client a processor of its own"
    )
    MERGED = (
        "{share} of the output came together with later output and has its time; a server or proxy "
        "that buffers does this (turn it off), or a client without a free processor"
    )
    LATE = (
        "requests were sent up to {late:.3g} ms late (p99), {share} of the median TTFT; give the "
        "client a processor of its own"
    )
    BUSY = (
        "the server had {requests} of others when a trial began; run it when nobody else uses the "
        "server"
    )
    CONTRADICT = (
        "pairs of trials contradict each other ({low} to {high} as fast); add --trials, or keep "
        "the machines quiet"
    )
    FAILED = "{failure}; its times are left out"

    def text(self, **values: object) -> str:
        return self.value.format(**values)


# Data of a result


def served_facts(outcome: Outcome) -> dict[str, Any]:
    """Return the parts of a result that only a run against a server has; else nulls."""
    if outcome.server is None:
        return {"server": None, "agreement": None, "failures": None}
    agreement = outcome.agreement
    return {
        "server": {**asdict(outcome.server), "stamps": stamps_of(outcome.recordings)},
        "agreement": None
        if agreement is None
        else {**asdict(agreement), "first": [asdict(first) for first in agreement.first]},
        "failures": [
            {**asdict(trial), "failed": [asdict(request) for request in trial.failed]}
            for trial in outcome.failures
        ],
    }


def stamps_of(recordings: Recordings) -> Literal["kernel", "user"] | None:
    """Return who stamped the arrivals, the kernel or the client; None if it is not known."""
    clients = [_client(r) for trials in recordings.values() for r in trials]
    shares = [client["kernel_share"] for client in clients if client]
    if not shares:
        return None
    return "kernel" if min(shares) >= KERNEL else "user"


def _client(recording: Recording) -> Mapping[str, Any]:
    """Return the client's own part in the times of a trial; empty if it is not known."""
    return cast("Mapping[str, Any]", recording.header.about.get("client") or {})


# Forward passes


def passes_of(server: ServerData | None, name: str) -> list[int | None]:
    """Return the forward passes of each trial of a strategy, by the server's own count."""
    return [] if server is None else server["passes"].get(name, [])


def typical_passes(server: ServerData | None, name: str) -> int | None:
    """Return the median of the server's counts; None if it does not tell all of them."""
    known = [count for count in passes_of(server, name) if count is not None]
    complete = known and len(known) == len(passes_of(server, name))
    return round(float(np.median(known))) if complete else None


def step_ratio(
    baseline: str, candidate: str, server: ServerData, slots: int, workload: Workload
) -> tuple[Ratio, Literal["server", "schedule"]] | None:
    """Return the ratio of forward passes, by the server's count or else of the schedules alone.

    A schedule has steps if all requests are there at the start, their lengths are given, and the
    server does not say that it computes fewer requests at once.
    """
    counted = paired_ratio(passes_of(server, baseline), passes_of(server, candidate))
    if counted is not None:
        return counted, "server"
    if not workload.closed or len(workload) > MOST_COUNTED or (server["slots"] or slots) < slots:
        return None
    steps = [_steps(name, slots, workload) for name in (baseline, candidate)]
    planned = paired_ratio(steps[:1], steps[1:])
    return None if planned is None else (planned, "schedule")


def _steps(name: str, slots: int, workload: Workload) -> int:
    engine = SimulatedEngine()
    budget = max(2048, 2 * slots)
    batcher = Batcher(name, engine, slots, prefill="mixed", max_batched_tokens=budget)
    return batcher.serve(workload, Watch()).num_steps


# Words


def server_words(server: ServerData) -> str:
    """Return the server's name, and its version if it tells it."""
    return " ".join(part for part in (server["name"], server["version"]) if part)


def agreement_words(agreement: AgreementData) -> str:
    """Return the agreement of the strategies' outputs for a sentence."""
    total, first = agreement["requests"], next(iter(agreement["first"]), None)
    if first is None and not agreement["differ"]:
        return f"outputs the same for {agreement['same']:,}/{total:,} requests"
    text = f"outputs differ for {agreement['differ']:,}/{total:,} requests"
    if first is not None:
        unit = "token" if agreement["by"] == "token ids" else "character"
        text += f" (first: request {first['request']:,} from {unit} {first['position']:,} on)"
    repeat = agreement["baseline_repeat"]
    if repeat is not None:
        text += f", and {repeat:,}/{total:,} are the same in all trials of the baseline"
    return text


def failure_words(failure: FailureData) -> str:
    """Return a trial's failures: their number, and the first with its phase and reason."""
    first = failure["failed"][0]
    name = label_of(failure["strategy"], has_steps=False)
    return (
        f"{len(failure['failed']):,} of {failure['requests']:,} requests failed in trial "
        f"{failure['trial'] + 1:,} of {name} (request {first['request']:,} {first['phase']}: "
        f"{first['text']})"
    )


def server_lines(facts: Facts) -> list[str]:
    """Return lines on the server, its counts, and the trials that failed."""
    server = facts.get("server")
    if server is None:
        return []
    slots, size = server["slots"], facts["config"]["serving"]["batch_size"]
    line = f"Server: {server_words(server)}"
    if slots is not None:
        line += f", {plural(slots, 'slot')} by its own word"
        if slots < size:
            line += f", so at most {slots:,} of --batch-size {size:,} run at once"
    stamps = {"kernel": "arrivals stamped by the kernel", "user": "arrivals stamped by the client"}
    if server["stamps"] is not None:
        line += f"; {stamps[server['stamps']]}"
    counts = {name: typical_passes(server, name) for name in server["passes"]}
    told = [f"{label_of(n, has_steps=False)} {c:,}" for n, c in counts.items() if c is not None]
    lines = [f"{line}."]
    if told:
        lines.append(f"Forward passes by the server's own count: {', '.join(told)}.")
    return lines + [f"Failed: {failure_words(f)}." for f in facts.get("failures") or []]


# The audit


def doubts(facts: Facts, recordings: Recordings) -> list[str]:
    """Return the reasons to doubt the times of a run against a server."""
    server = facts.get("server")
    if server is None:
        return []
    found = [
        Doubt.FAILED.text(failure=failure_words(failure)) for failure in facts.get("failures") or []
    ]
    if running := server["running_before"]:
        found.append(Doubt.BUSY.text(requests=plural(running, "request")))
    for name, trials in recordings.items():
        label = label_of(name, has_steps=False)
        cached = [tokens or 0 for tokens in server["cached_tokens"].get(name, [])]
        found += [f"{label}: {doubt}" for doubt in _of_strategy(trials, sum(cached))]
    found += _contradiction(recordings)
    return found


def _of_strategy(trials: Sequence[Recording], cached: int) -> Iterator[str]:
    if cached:
        yield Doubt.CACHED.text(tokens=cached)
    clients = [client for r in trials if (client := _client(r))]
    if not clients:
        return
    itl = Distribution.pooled([gaps_ms(r) for r in trials]).percentile(50)
    ttft = Distribution.of(np.concatenate([ttft_ms(r) for r in trials])).percentile(50)
    worst = {name: max(client[name] for client in clients) for name in _WORST}
    lag, late = worst["loop_p99_ns"] / 1e6, worst["late_p99_ns"] / 1e6
    stamped = min(client["kernel_share"] for client in clients) >= KERNEL
    if not stamped and itl and lag > LAG * itl:
        yield Doubt.LAG.text(lag=lag, share=percent(lag / itl))
    if worst["merged_share"] > MERGED:
        yield Doubt.MERGED.text(share=percent(worst["merged_share"]))
    if ttft and late > LATE * ttft:
        yield Doubt.LATE.text(late=late, share=percent(late / ttft))


_WORST = ("loop_p99_ns", "late_p99_ns", "merged_share")


def _contradiction(recordings: Recordings) -> Iterator[str]:
    baseline, *others = recordings.values()
    for trials in others[-1:]:
        ratios = [b.duration_ns / c.duration_ns for b, c in zip(baseline, trials, strict=True)]
        low, high = min(ratios), max(ratios)
        if low < 1 / (1 + NOISE) and high > 1 + NOISE:
            yield Doubt.CONTRADICT.text(low=times(low), high=times(high))
