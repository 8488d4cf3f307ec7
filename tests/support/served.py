"""Results of runs against a server, without a server."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.events import ClientLag
from batchbench.batching.remote.outcome import Agreement, FailedTrial, ServerFacts
from batchbench.batching.session import Outcome
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.reports.result import Result, make_result
from batchbench.workloads import Workload
from support.classic import CLASSIC, SETTLED

TARGET = "http://127.0.0.1:8080"

QUIET = ClientLag(
    reads=680,
    kernel_share=1.0,
    merged_share=0.0,
    loop_p50_ns=20_000,
    loop_p99_ns=200_000,
    late_p99_ns=100_000,
)
"""The client's part in a trial whose times are right."""

SERVER = ServerFacts(
    name="llama.cpp",
    version="b4242",
    slots=8,
    passes={"static": [400] * 4, "continuous": [130, 130, 131, 130]},
    cached_tokens={"static": [0] * 4, "continuous": [0] * 4},
    running_before=0,
    prompt_cache_off=True,
)

SAME = Agreement(by="token ids", requests=32, same=32, differ=0, baseline_repeat=32, first=[])

DIFFERENT = Agreement(
    by="token ids",
    requests=32,
    same=31,
    differ=1,
    baseline_repeat=30,
    first=[
        {
            "request": 5,
            "baseline": "static",
            "baseline_trial": 0,
            "strategy": "continuous",
            "trial": 0,
            "position": 12,
            "expected": "17",
            "found": "99",
        }
    ],
)


def failed_trial(*requests: int) -> FailedTrial:
    """Return the third trial of static, in which these requests were refused."""
    return {
        "strategy": "static",
        "trial": 2,
        "requests": 32,
        "failed": [
            {
                "request": request,
                "kind": "refused",
                "phase": "before its first token",
                "text": "it refuses connections",
                "status": None,
            }
            for request in requests
        ],
    }


def served_trial(
    policy: str,
    trial: int = 0,
    *,
    step_ns: float = 10_000_000,
    client: ClientLag | None = QUIET,
    workload: Workload = CLASSIC,
) -> Recording:
    """Return a trial as a server's client records it: the time of each token, and no steps."""
    batcher = Batcher(policy, SimulatedEngine(round(step_ns)), 8, prefill="mixed")
    ran = batcher.serve(workload, Watch(), trial=trial)
    ends, requests = ran.step_ends_ns, ran.requests
    spans = list(zip(requests.first, requests.last + 1, strict=True))
    about = {"engine": "llama.cpp b4242", "client": None if client is None else asdict(client)}
    return Recording.of_tokens(
        replace(ran.header, simulated=False, about=about),
        workload,
        [list(range(stop - start)) for start, stop in spans],
        [ends[start:stop].tolist() for start, stop in spans],
        ran.admitted_ns.tolist(),
    )


def served_trials(policy: str, **settings: Any) -> list[Recording]:
    """Return four trials of slightly different speed."""
    pace = (10_000_000, 10_100_000, 9_950_000, 10_050_000)
    return [served_trial(policy, i, step_ns=step, **settings) for i, step in enumerate(pace)]


def served_result(
    recordings: Mapping[str, Sequence[Recording]] | None = None,
    *,
    server: ServerFacts = SERVER,
    agreement: Agreement | None = SAME,
    failures: Sequence[FailedTrial] = (),
    verification: Verification = NOT_VERIFIED,
    workload: Workload = CLASSIC,
    target: str = TARGET,
    **serving: Any,
) -> Result:
    """Return the result of a run against a server without running it."""
    if recordings is None:
        recordings = {name: served_trials(name) for name in ("static", "continuous")}
    outcome = Outcome(
        experiment=Experiment.of({"target": target, "queue_size": 32, **serving}),
        workload=workload,
        recordings=recordings,
        verification=verification,
        warm_up=SETTLED,
        model={
            "name": "SmolLM2-135M",
            "load_format": None,
            "note": "",
            "device": None,
            "dtype": None,
            "parameters": None,
        },
        environment={"python": "3.11"},
        texts=None,
        server=server,
        agreement=agreement,
        failures=failures,
    )
    return make_result(outcome)


@functools.cache
def served() -> Result:
    """Return the result of a run against a server without faults."""
    return served_result()
