"""Reports of a run against a server: names, counts, agreement of outputs, failures, and doubts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, cast

import numpy as np

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Ints, Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial, failure_words
from batchbench.batching.session import Outcome
from batchbench.reports.latency import e2el_ms, gaps_ms, ttft_ms
from batchbench.reports.result_data import ClientData, ClientsData, Facts, ServerData
from batchbench.reports.statistics import Distribution, Ratio, paired_ratio
from batchbench.reports.text import label_of, number, percent, plural, times
from batchbench.reports.time_budget import rate_of
from batchbench.workloads import Workload

LAG, LATE, MERGED, NOISE = 0.10, 0.10, 0.005, 0.05
"""Limits: the client's lag as a share of the median ITL; its delay in sending, or the error of
several clients' clocks, as a share of the median TTFT; the share of output that has the time of
later output; and the distance from 1 at which two pairs contradict each other.

Output that a server sends together has its true time. If the client reads late, it has that of
later output, so both the share and the lag count (``benchmarks/results/stamps.json``: with 1,000
streams, 19 % of the output, whose times were off by up to twice the lag). From 0.9 % on, the p99 of
the ITL was off by more than 10 %, and the median not yet (``benchmarks/client_limits.py``).
"""

KERNEL = 0.99
"""Share of reads with a kernel stamp from which times are the kernel's."""

MOST_COUNTED = 20_000
"""Requests up to which the steps of a schedule are counted; more take seconds."""

Recordings = Mapping[str, Sequence[Recording]]

Data = Mapping[str, Any]
"""A client's own account of a trial, in its recording."""


# Data of a result


def served_facts(outcome: Outcome) -> dict[str, Any]:
    """Return the parts of a result that only a run against a server has; else nulls."""
    if outcome.server is None:
        return {"server": None, "agreement": None, "failures": None}
    stamps, clients = stamps_of(outcome.recordings), clients_of(outcome.recordings)
    return {
        "server": asdict(outcome.server) | {"stamps": stamps, "clients": clients},
        "agreement": outcome.agreement,
        "failures": list(outcome.failures),
    }


def stamps_of(recordings: Recordings) -> Literal["kernel", "user"] | None:
    """Return who stamped the arrivals, the kernel or the client; None if it is not known."""
    clients = [_client(r) for trials in recordings.values() for r in trials]
    shares = [client["kernel_share"] for client in clients if client]
    if not shares:
        return None
    return "kernel" if min(shares) >= KERNEL else "user"


def clients_of(recordings: Recordings) -> ClientsData | None:
    """Return the clients that shared the requests; None if there was one.

    Of n clients, each sent every n-th request.
    """
    trials = [r for of_strategy in recordings.values() for r in of_strategy if _clients(r)]
    if not trials:
        return None
    each: list[ClientData] = []
    for i, parts in enumerate(zip(*map(_clients, trials), strict=True)):
        each.append(
            {
                "node": parts[0]["node"],
                "requests": parts[0]["requests"],
                "rate": _rate([r.admitted_ns[i :: len(_clients(r))] for r in trials]),
                "late_p99_ms": max(part["late_p99_ns"] for part in parts) / 1e6,
                "clock_offset_ms": float(np.median([part["offset_ns"] for part in parts])) / 1e6,
                "clock_within_ms": max(part["within_ns"] for part in parts) / 1e6,
            }
        )
    return {"rate": _rate([trial.admitted_ns for trial in trials]), "each": each}


def _rate(trials_ns: Sequence[Ints]) -> float | None:
    known = [rate for times_ns in trials_ns if (rate := rate_of(times_ns)) is not None]
    return float(np.median(known)) if known else None


def _clients(recording: Recording) -> Sequence[Data]:
    return cast("Sequence[Data]", recording.header.about.get("clients") or ())


def _client(recording: Recording) -> Data:
    """Return the client's own part in the times of a trial; empty if it is not known."""
    return cast("Data", recording.header.about.get("client") or {})


# Forward passes


def passes_of(server: ServerData | None, name: str) -> list[int | None]:
    """Return the forward passes of each trial of a strategy, by the server's own count."""
    return [] if server is None else server["passes"].get(name, [])


def typical_passes(server: ServerData | None, name: str) -> int | None:
    """Return the median of the server's counts; None if it does not report all of them."""
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
    engine, budget = SimulatedEngine(), max(2048, 2 * slots)
    batchers = [
        Batcher(name, engine, slots, prefill="mixed", max_batched_tokens=budget)
        for name in (baseline, candidate)
    ]
    steps = [batcher.serve(workload, Watch()).num_steps for batcher in batchers]
    planned = paired_ratio(steps[:1], steps[1:])
    return None if planned is None else (planned, "schedule")


# Words


def server_words(server: ServerData) -> str:
    """Return the server's name, and its version if it reports one."""
    return " ".join(part for part in (server["name"], server["version"]) if part)


def place_of(data: Mapping[str, Any]) -> str:
    """Return the place where a result's model ran: the server, or device and number format."""
    server: ServerData | None = data.get("server")
    if server is not None:
        return server_words(server)
    return f"{data['model']['device']} {data['model']['dtype']}"


def agreement_words(data: Facts, agreement: Agreement) -> str:
    """Return the agreement of the strategies' outputs for a sentence about a result's data."""
    total, first = agreement["requests"], next(iter(agreement["first"]), None)
    if first is None and not agreement["differ"]:
        return f"both strategies gave the same output for {agreement['same']:,}/{total:,} requests"
    text = f"the strategies' outputs differ for {agreement['differ']:,}/{total:,} requests"
    if first is not None:
        unit = "token" if agreement["by"] == "token ids" else "character"
        text += f" (first: request {first['request']:,} from {unit} {first['position']:,} on)"
    repeat = agreement["baseline_repeat"]
    if repeat is not None:
        text += f", and {repeat:,}/{total:,} are the same in all trials of the baseline"
    if data["workload"].get("sampling"):
        text += ", which is expected, because the server uses its own random numbers"
    return text


def _failure(trial: FailedTrial) -> str:
    label = label_of(trial["strategy"], has_steps=False)
    return failure_words(trial, f"trial {trial['trial'] + 1:,} of {label}")


def server_lines(facts: Facts) -> list[str]:
    """Return lines on the server and its counts, and on the trials that failed."""
    server = facts.get("server")
    if server is None:
        return []
    slots, size = server["slots"], facts["config"]["serving"]["batch_size"]
    parts = [f"Server: {server_words(server)}"]
    if slots is not None:
        few = f", fewer than --batch-size {size:,}" if slots < size else ""
        parts.append(f"it reports {plural(slots, 'slot')}{few}")
    if any(typical_passes(server, name) is not None for name in server["passes"]):
        parts.append("it counts forward passes")
    if server["stamps"] is not None:
        by = {"kernel": "the kernel", "user": "the client"}[server["stamps"]]
        parts.append(f"arrival times taken by {by}")
    if clients := server.get("clients"):
        parts.append(_clients_words(clients))
    failed = [f"Failed: {_failure(trial)}." for trial in facts.get("failures") or []]
    return [f"{'; '.join(parts)}.", *failed]


def _clients_words(clients: ClientsData) -> str:
    each = clients["each"]
    counts = Counter(client["node"] for client in each)
    nodes = ", ".join(f"{count} on {node}" for node, count in counts.items())
    rates = [client["rate"] for client in each if client["rate"] is not None]
    span = f", {number(min(rates))} to {number(max(rates))} requests/s each" if rates else ""
    total = "" if clients["rate"] is None else f" and {number(clients['rate'])} together"
    within = number(max(client["clock_within_ms"] for client in each))
    return f"{len(each)} clients ({nodes}){span}{total}, their clocks within {within} ms"


# The audit

_OWN_PROCESSOR = "give the client a processor of its own"


def doubts(facts: Facts, recordings: Recordings) -> list[str]:
    """Return the reasons to doubt the times of a run against a server; none for our own engine."""
    server = facts.get("server")
    if server is None:
        return []
    failures = facts.get("failures") or []
    found = [f"{_failure(trial)}: its times are left out" for trial in failures]
    if running := server["running_before"]:
        found.append(
            f"the server was serving {plural(running, 'request')} of other clients when a trial "
            "began: run again when nobody else uses the server"
        )
    cached = {
        label_of(name, has_steps=False): sum(tokens or 0 for tokens in trials)
        for name, trials in server["cached_tokens"].items()
        if name in recordings
    }
    found += [
        f"{label}: the server took {tokens:,} prompt tokens from a cache and did not compute them: "
        "turn its prompt cache off"
        for label, tokens in cached.items()
        if tokens
    ]
    found += doubts_of_client(recordings)
    baseline, *others = recordings.values()
    for trials in others[-1:]:
        ratios = [b.duration_ns / c.duration_ns for b, c in zip(baseline, trials, strict=True)]
        low, high = min(ratios), max(ratios)
        if low < 1 / (1 + NOISE) and high > 1 + NOISE:
            found.append(
                f"pairs of trials contradict each other ({times(low)} to {times(high)} as fast): "
                "raise --trials, or keep the machines quiet"
            )
    return found


def doubts_of_client(recordings: Recordings) -> list[str]:
    """Return the doubts in the client's times, each for the strategy in which it is worst."""
    worst: dict[str, tuple[float, str]] = {}
    for name, trials in recordings.items():
        for kind, (share, text) in _doubts_of_client(trials).items():
            text = f"{label_of(name, has_steps=False)}: {text}"
            worst[kind] = max(worst.get(kind, (0.0, "")), (share, text))
    return [text for _, text in worst.values()]


def _slowest(recording: Recording) -> str:
    """Return the name of the client that sent its requests latest; empty if there is one."""
    late = [client["late_p99_ns"] for client in _clients(recording)]
    if not late:
        return ""
    worst = late.index(max(late))
    return f"client {worst + 1} of {len(late)} on {_clients(recording)[worst]['node']}: "


def _doubts_of_client(trials: Sequence[Recording]) -> dict[str, tuple[float, str]]:
    """Return each doubt by its kind: the share that is too large, and the text."""
    found: dict[str, tuple[float, str]] = {}
    clients = [client for r in trials if (client := _client(r))]
    if not clients:
        return found
    itl = Distribution.pooled([gaps_ms(r) for r in trials]).percentile(50)
    ttft = Distribution.of(np.concatenate([ttft_ms(r) for r in trials])).percentile(50)
    lag, late, merged = (
        float(np.median([client[name] for client in clients]))
        for name in ("loop_p99_ns", "late_p99_ns", "merged_share")
    )
    lag, late = lag / 1e6, late / 1e6
    stamped = min(client["kernel_share"] for client in clients) >= KERNEL
    # Tokens that come together have no ITL; their share of the latency is the time of a step.
    steps = [e2el_ms(r) / r.requests.output_tokens for r in trials]
    reads_late = lag > LAG * (itl or float(np.median(np.concatenate(steps))))
    if itl and reads_late and not stamped:
        text = f"output waited up to {number(lag)} ms for the client (p99), {percent(lag / itl)} of"
        text += f" the median ITL, and the kernel gave no time stamps: {_OWN_PROCESSOR}"
        found["lag"] = lag / itl, text
    if merged > MERGED and reads_late:
        text = f"{percent(merged)} of the output was read late, together with later output, and got"
        found["merged"] = merged, f"{text} its time: {_OWN_PROCESSOR}"
    elif merged > MERGED and not itl:
        text = f"the server buffers: {percent(merged)} of the output came together with later"
        text += " output, although the client read in time. TTFT and ITL include the buffering;"
        found["buffered"] = merged, f"{text} turn it off in the server or its proxy"
    # Requests of other workloads wait for a place among those in flight, as they should.
    timed = trials[0].header.strategy == "continuous" and trials[0].requests.due_ns.any()
    if timed and ttft and late > LATE * ttft:
        text = f"{_slowest(trials[-1])}requests were sent up to {number(late)} ms late (p99), "
        text += f"{percent(late / ttft)} of the median TTFT: {_OWN_PROCESSOR}"
        found["late"] = late / ttft, text
    within = [max(c["within_ns"] for c in _clients(r)) / 1e6 for r in trials if _clients(r)]
    if within and ttft and (clocks := float(np.median(within))) > LATE * ttft:
        text = f"the clocks of the clients agree only within {number(clocks)} ms, "
        text += f"{percent(clocks / ttft)} of the median TTFT, so their requests may be early or"
        text += " late by as much: use clients that are closer together"
        found["clocks"] = clocks / ttft, text
    return found
