"""The interactive page's scheduler, run by Node, against batchbench's own, step for step."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import CHROMIUM, Browser

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Watch
from batchbench.batching.step_cost import StepCost
from batchbench.reports.latency import e2el_ms, ttft_ms
from batchbench.reports.metrics import counters
from batchbench.workloads import Workload

PAGE = Path(__file__).resolve().parents[1] / "docs" / "interactive"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node here")

_ANSWER = """
const batching = require(process.argv[1]);
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answers = cases.map(({ requests, options }) => {
  const steps = batching.serve(requests, options);
  return { steps, summary: batching.summarise(requests, steps, options.slots) };
});
console.log(JSON.stringify(answers));
"""


def in_node(program: str, *words: str, stdin: str = "") -> Any:
    assert NODE is not None
    command = [NODE, "-e", program, str(PAGE / "scheduler.js"), *words]
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class _Logged(SimulatedEngine):
    """The simulated engine, with the plan of every step."""

    def begin(self, workload: Workload) -> None:
        super().begin(workload)
        self.plans: list[tuple[int, Plan, int]] = []

    def run(self, plan: Plan) -> int:
        start = self.clock.now()
        launched = super().run(plan)
        assert launched == 1
        self.plans.append((start, plan, self.clock.now()))
        return launched


def made_case(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a workload and the options of serving it."""
    slots, count = int(rng.integers(1, 10)), int(rng.integers(1, 40))
    prefill = str(rng.choice(["separate", "mixed"]))
    cost = {"step": int(rng.integers(1, 2_000_000))}
    cost |= {name: int(rng.integers(0, 100_000)) for name in ("row", "prompt")}
    timed = rng.random() < 0.6
    gaps = rng.exponential(rng.choice([10_000, 3_000_000, 60_000_000]), count)
    due = np.cumsum(gaps).astype(int) if timed else np.zeros(count, int)
    requests = [
        {"prompt": int(rng.integers(1, 30)), "output": int(rng.integers(1, 40)), "due": int(at)}
        for at in due - due[0]
    ]
    options = {
        "policy": str(rng.choice(["static", "continuous"])),
        "slots": slots,
        "prefill": prefill,
        "budget": slots + int(rng.integers(1, 40)),
        "maxWait": int(rng.choice([0, 0, 1_000, 30_000_000])),
        "cost": cost,
    }
    return {"requests": requests, "options": options}


def ours(case: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Serve a case with batchbench, one step at a time; return its steps and a summary."""
    requests, options = case["requests"], case["options"]
    cost = options["cost"]
    engine = _Logged(StepCost(cost["step"], row_ns=cost["row"], prompt_ns=cost["prompt"]))
    workload = Workload.of(
        "case",
        [[0] * r["prompt"] for r in requests],
        [r["output"] for r in requests],
        due_ns=[r["due"] for r in requests],
    )
    batcher = Batcher(
        options["policy"],
        engine,
        options["slots"],
        prefill=options["prefill"],
        max_batched_tokens=options["budget"],
        max_wait_ns=options["maxWait"],
        max_repeat=1,
    )
    recording = batcher.serve(workload, Watch())
    occupant: dict[int, int] = {}
    steps = []
    for start, plan, end in engine.plans:
        occupant |= {slot: request.index for request, slot in plan.admitted}
        chunks = [
            {"request": c.request.index, "slot": c.slot, "start": c.start, "stop": c.stop}
            for c in plan.chunks
        ]
        rows = [
            {"request": occupant[slot], "slot": slot, "grows": bool(grows)}
            for slot, grows in zip(plan.slots.tolist(), plan.growing.tolist(), strict=True)
        ]
        steps.append({"start": start, "end": end, "chunks": chunks, "rows": rows})
    counted = counters(recording)
    latencies = e2el_ms(recording) * 1e6
    return steps, {
        "steps": counted["forward_passes"],
        "duration": steps[-1]["end"],
        "tokens": sum(r["output"] for r in requests),
        "utilisation": counted["useful_slot_steps"] / counted["slot_steps"],
        "finishedSlotSteps": counted["finished_slot_steps"],
        "meanTtft": float(np.mean(ttft_ms(recording))) * 1e6,
        "meanLatency": float(latencies.mean()),
        "p99Latency": float(np.percentile(latencies, 99)),
    }


def test_every_step_is_batchbenchs_own() -> None:
    rng = np.random.default_rng(20261129)
    cases = [made_case(rng) for _ in range(400)]
    answers = in_node(_ANSWER, stdin=json.dumps(cases))
    for case, answer in zip(cases, answers, strict=True):
        steps, summary = ours(case)
        told = [{k: v for k, v in step.items() if k != "waiting"} for step in answer["steps"]]
        assert told == steps, case
        assert answer["summary"] == pytest.approx(summary, rel=1e-9), case


def test_the_classic_workload_takes_400_and_130_steps() -> None:
    """The counts of ``batchbench simulate --batch-size 8 --queue-size 32``."""
    program = """
    const batching = require(process.argv[1]);
    const requests = batching.classic(
      { count: 32, every: 8, long: 100, short: 10, prompt: 7 });
    const cost = { step: 1e6, row: 0, prompt: 0 };
    console.log(JSON.stringify(["static", "continuous"].map(policy =>
      batching.summarise(requests, batching.serve(
        requests, { policy, slots: 8, prefill: "mixed", cost }), 8))));
    """
    static, continuous = in_node(program)
    assert (static["steps"], continuous["steps"]) == (400, 130)
    assert (static["utilisation"], continuous["utilisation"]) == (
        0.2125,
        pytest.approx(0.65385, 1e-4),
    )


def test_arrivals_have_exactly_the_rate_asked_for() -> None:
    program = """
    const batching = require(process.argv[1]);
    console.log(JSON.stringify(batching.classic(
      { count: 101, every: 4, long: 9, short: 3, prompt: 1, rate: 20, seed: 5 })));
    """
    requests = in_node(program)
    due = [r["due"] for r in requests]
    assert due == sorted(due)
    assert (due[0], due[-1]) == (0, 5_000_000_000)
    assert len(set(np.diff(due))) > 90
    assert [r["output"] for r in requests[:5]] == [9, 3, 3, 3, 9]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_answers_at_once_at_any_width() -> None:
    pytest.importorskip("websocket")
    page = PAGE / "index.html"
    answer = "document.getElementById('answer').textContent"
    with Browser() as browser:
        for width, dark in ((400, True), (1400, False)):
            browser.show(page, width=width, dark=dark)
            assert browser.complaints == []
            assert all(request.startswith("file:") for request in browser.requests)
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask(answer) == (
                "Continuous batching is 3.08 times as fast as static batching."
            )
            browser.ask(
                "(() => { const one = document.forms[0].elements.long; one.value = 10;"
                "one.dispatchEvent(new Event('input', {bubbles: true})); return 0 })()"
            )
            assert browser.ask(answer) == "Continuous batching is as fast as static batching."
            text = browser.ask("document.body.innerText")
            assert "--long-tokens 10 " in text
            assert not re.search(r"\b(NaN|undefined|null|Infinity)\b", text)
