"""Recordings and results as a real clock would have made them, and results of every kind."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import Outcome, conduct
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import NOT_VERIFIED, Finding, Verification
from batchbench.reports.formats.terminal import render
from batchbench.reports.result import Result, make_result
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.validity import audit
from batchbench.studies.reproduce import Check
from batchbench.workloads import Workload
from batchbench.workloads.spec import WorkloadSpec
from support.classic import CLASSIC, SETTLED
from support.served import served

PASSED = Verification(32, 32, 0, 0, "teacher-forced", 0.0)


def measured(
    policy: str,
    trial: int = 0,
    *,
    step_ns: float = 10_000_000,
    share: float = 0.0,
    foreign: float | None = 0.0,
    workload: Workload = CLASSIC,
    order: str = "fifo",
) -> Recording:
    """Return a trial as a real clock would record it: with the time of each step, and tokens.

    ``share`` of the time passes between the steps; ``foreign`` cores were busy with others.
    """
    ran = Batcher(policy, SimulatedEngine(), 8, order=order).serve(workload, Watch(), trial=trial)
    ends = (np.arange(1, ran.num_steps + 1) * step_ns).round().astype(np.int64)
    starts = (ends[ran.first_steps] - step_ns * (1 - share)).round().astype(np.int64)
    steps = ran.spans.steps
    if share:  # a span of one step each, so that time can pass before every step
        spans = replace(
            ran.spans,
            steps=np.ones(ran.num_steps, np.int64),
            start_ns=(ends - step_ns * (1 - share)).round().astype(np.int64),
            decoding=np.repeat(ran.spans.decoding, steps),
            waiting=np.repeat(ran.spans.waiting, steps),
            chunks=np.repeat(ran.spans.chunks, steps),
        )
    else:
        spans = replace(ran.spans, start_ns=starts)
    header = replace(
        ran.header,
        simulated=False,
        about={"engine": "slots", "foreign_cores": foreign},
    )
    tokens = (np.arange(workload.output_tokens.sum()) % 251).astype(np.int32)
    return replace(ran, header=header, spans=spans, ends_ns=ends, step_ns=None, tokens=tokens)


def trials_of(policy: str, **settings: Any) -> list[Recording]:
    """Return four trials of slightly different speed."""
    pace = (10_000_000, 10_100_000, 9_950_000, 10_050_000)
    return [measured(policy, i, step_ns=step, **settings) for i, step in enumerate(pace)]


def reasons(
    static: Sequence[Recording] | None = None,
    *,
    workload: Workload = CLASSIC,
    verification: Verification = PASSED,
    warm_up: WarmUp = SETTLED,
    stopped: str | None = None,
    served: bool = False,
) -> list[str]:
    """Return the reasons of the audit for a run that is clean except for the arguments."""
    recordings = {
        "static": trials_of("static") if static is None else static,
        "continuous": trials_of("continuous"),
    }
    return audit(workload, recordings, verification, warm_up, stopped, served=served)


def result_of(
    recordings: Mapping[str, Sequence[Recording]] | None = None,
    *,
    price: float | None = None,
    slo: tuple[str, ...] = (),
    workload: Workload = CLASSIC,
    verification: Verification = PASSED,
    warm_up: WarmUp = SETTLED,
    texts: Sequence[tuple[str, str]] | None = None,
    stopped: str | None = None,
) -> Result:
    """Return the result of a run without running it."""
    if recordings is None:
        recordings = {"static": trials_of("static"), "continuous": trials_of("continuous")}
    spec = WorkloadSpec(stop_at_eos=workload.stop_at_eos)
    outcome = Outcome(
        experiment=Experiment(workload=spec, serving=ServingSpec()),
        workload=workload,
        recordings=recordings,
        verification=verification,
        warm_up=warm_up,
        model={
            "name": "gpt2",
            "load_format": "dummy",
            "note": "gpt2: dummy weights, as requested",
            "device": "cpu",
            "dtype": "float32",
            "parameters": 124_439_808,
        },
        environment={"python": "3.11"},
        texts=texts,
        stopped=stopped,
    )
    return make_result(outcome, GoalsSpec(slo=slo, price_per_hour=price))


@functools.cache
def clean() -> Result:
    """Return the result of a run without faults."""
    return result_of()


@functools.cache
def simulated() -> Result:
    """Return the result of a simulation."""
    return make_result(conduct(Experiment(simulated=True)))


@functools.cache
def with_findings() -> Result:
    """Return a result with a numerical tie and a wrong output."""
    found = (
        Finding(1, "static", "numerical tie", 3, 0.1, 0.2, "close"),
        Finding(2, "continuous", "wrong", 0, None, None, "not finite"),
    )
    return result_of(
        verification=Verification(32, 30, 1, 1, "teacher-forced", 0.1, found), stopped="interrupted"
    )


@functools.cache
def ending_early() -> Result:
    """Return a result in which some outputs end early."""
    produced = Workload.of("as produced", [[7] * 7] * 32, [9] * 32)
    return result_of(
        {"continuous": [measured("continuous", i, workload=produced) for i in range(3)]},
        workload=replace(CLASSIC, stop_at_eos=True),
        verification=NOT_VERIFIED,
    )


@functools.cache
def over_time() -> Result:
    """Return a result with timed arrivals, whose trials may differ in their steps."""
    due = [i // 4 * 10**6 for i in range(24)]  # a step takes as long
    timed = Workload.of("timed", [[7] * 7] * 24, [9, 4, 4] * 8, due_ns=due)
    orders = ("fifo", "longest-first", "fifo")
    trials = [
        measured("continuous", i, step_ns=1e6, workload=timed, order=order)
        for i, order in enumerate(orders)
    ]
    return result_of({"continuous": trials}, workload=timed)


@functools.cache
def of_one_token() -> Result:
    """Return a result with outputs of one token, which have no TPOT and ITL."""
    single = Workload.of("single", [[7] * 7] * 9, [1] * 9)
    trials = {p: [measured(p, workload=single)] for p in ("static", "continuous")}
    return result_of(trials, workload=single, price=0.0)


@functools.cache
def with_texts() -> Result:
    """Return a result with texts, as with a tokenizer, and a price."""
    return result_of(price=2.5, texts=[(f"p {i}", f"out, “{i}”\n") for i in range(32)])


@functools.cache
def one_strategy() -> Result:
    """Return a result of one strategy and one trial."""
    return result_of({"static": [measured("static")]})


KINDS: tuple[Callable[[], Result], ...] = (
    clean,
    simulated,
    with_findings,
    ending_early,
    over_time,
    of_one_token,
    with_texts,
    one_strategy,
    served,
)


def paced(policy: str, *steps_ms: float) -> list[Recording]:
    """Return trials with steps of the given lengths."""
    return [measured(policy, i, step_ns=ms * 1e6) for i, ms in enumerate(steps_ms)]


def shown(result: Result, width: int) -> str:
    """Return the output on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


HOSTILE = "</script><img src=x onerror=alert(1)>\"'`|*&amp;{{7*7}}\u2028<!--"
"""A name that tries to get out of text, attribute, script, template, table and code."""


def made(batch_size: int = 4, strategy: str = "static,continuous", **workload: Any) -> Result:
    """Return a simulated result."""
    return make_result(
        conduct(
            Experiment(
                workload=WorkloadSpec(**workload),
                serving=ServingSpec(batch_size=batch_size, strategy=strategy),
                trials=TrialsSpec(trials=1),
                simulated=True,
            )
        )
    )


def renamed(result: Result, name: str) -> Result:
    """Return a result in which everything that users name is called ``name``."""
    data = json.loads(json.dumps(result.data))
    data["model"] |= {"name": name, "note": name}
    data["workload"]["name"] = name
    data["command"] = f"batchbench run --model {name}"
    data["config"]["model"]["model"] = name
    data["environment"] |= {"hostname": name, "packages": {name: name}}
    data["validity"] = {"status": "suspect", "reasons": [name]}
    for part in ("strategies", "explain"):
        inner = data[part]["strategies"] if part == "explain" else data[part]
        inner[name] = inner.pop("continuous")
    for fall in data["explain"]["waterfall"]:
        fall["candidate"] = name
    data["comparison"]["candidate"] = name
    recordings = dict(result.recordings)
    recordings[name] = [
        replace(r, header=replace(r.header, strategy=name)) for r in recordings.pop("continuous")
    ]
    return Result(data, recordings)


def verdicts(checks: list[Check] | Any) -> dict[str, str]:
    """Return the verdicts of checks by their names."""
    return {check.name: check.verdict for check in checks}
