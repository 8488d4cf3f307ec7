"""Measure the gate on this machine: false alarms between equal versions, and losses found.

    .venv/bin/python benchmarks/gate_power.py [--state DIR] [--minutes 90] [--only quiet/none …]
    .venv/bin/python benchmarks/gate_power.py --table      # what was recorded so far, no runs
    .venv/bin/python benchmarks/gate_power.py --simulated  # the rule on simulated pairs, no runs

It builds two separate environments of the present commit (``base`` and ``new`` in the state folder)
and runs ``batchbench duet`` of one against the other: as they are, and with a fault planted into
``new``, each on a quiet machine and beside a process that takes a core for 0.3 to 6 s and leaves it
idle for as long, over and over. Every run leaves a record with all of its turns. A run that has a
record is not repeated, so the benchmark can be stopped and started again.

``check`` is measured in the same way: baselines are saved at the beginning and at the end, so that
they are of different sessions, as they are and with 15 % planted into the slots engine.

The table has the live answers, and those of 2,000 verdicts on pairs drawn with replacement from all
that were recorded of a case, by the program's own rule, with the time that each pair took.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
BUDGET_S = {"quiet": 300.0, "hog": 80.0}
"""Seconds that a duet may take; beside a hog what is to be seen is that it does not fail."""

FAULTS = {
    "none": "",
    # A busy wait in proportion to the step's own time, in every step.
    "step 3 %": "slow_steps(TorchEngine, 0.03)",
    "step 5 %": "slow_steps(TorchEngine, 0.05)",
    "step 10 %": "slow_steps(TorchEngine, 0.10)",
    "slots 15 %": "slow_steps(SlotsEngine, 0.15)",
    "extra pass": "extra_pass(SlotsEngine)",
    "late admission": "late_admission()",
    "padded prefill": "padded_prefill(SlotsEngine)",
}

PLANTED = '''
"""A fault planted by benchmarks/gate_power.py."""
import sys
import time


def slow_steps(engine, share):
    advance = engine._advance

    def slow(self, plan, step):
        began = time.perf_counter_ns()
        advance(self, plan, step)
        ends = time.perf_counter_ns()
        ends += int(share * (ends - began))
        while time.perf_counter_ns() < ends:
            pass

    engine._advance = slow


def extra_pass(engine):
    """Once a trial, the first pass is computed twice."""
    prepare = engine._prepare

    def twice(self, plan):
        prepare(self, plan)
        if not self._log:
            with __import__("torch").inference_mode():
                self._forward(plan, 0)

    engine._prepare = twice


def late_admission():
    """Whoever could join, joins a step later."""
    from batchbench.batching.policies import Continuous

    admit = Continuous.admit

    def late(self, view):
        found, ask = admit(self, view)
        if found and view.running and not getattr(self, "_seen", False):
            self._seen = True
            return (), view.now + 1
        self._seen = False
        return found, ask

    Continuous.admit = late


def padded_prefill(engine):
    """Each prefill computes as many tokens as the context is long."""
    import torch

    forward = engine._forward

    def padded(self, plan, step):
        if plan.chunks:
            ids = torch.zeros(1, self._model.module.config.n_positions, dtype=torch.int64)
            self._model.module(input_ids=ids)
        return forward(self, plan, step)

    engine._forward = padded


class Finder:
    """Plants the fault when the engines have been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "batchbench.studies.gate.worker":
            return None
        sys.meta_path.remove(self)
        from batchbench.batching.engines.torch.base import TorchEngine
        from batchbench.batching.engines.torch.slots import SlotsEngine

        FAULT
        return None


sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Case:
    """One condition and how many live runs it is to have."""

    machine: str
    fault: str
    runs: int
    after: int = 0  # rounds before its first run
    every: int = 1

    @property
    def name(self) -> str:
        return f"{self.machine}/{self.fault}"


CASES = (
    Case("quiet", "none", 12),
    Case("quiet", "step 5 %", 12),
    Case("hog", "none", 12),
    Case("quiet", "extra pass", 1),
    Case("quiet", "late admission", 1),
    Case("quiet", "padded prefill", 1, after=1),
    Case("quiet", "step 10 %", 2, after=3, every=6),
    Case("quiet", "step 3 %", 1, after=5),
)


# Environments


def build(state: Path, name: str) -> Path:
    """An environment of the present commit; its interpreter."""
    folder = state / name
    python = folder / "bin/python"
    if not (folder / "built").exists():
        print(f"building {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", ROOT], check=True)
        (folder / "built").touch()
    return python


def plant(python: Path, fault: str) -> None:
    """Put a fault into an environment, or take it out."""
    library = next((python.parents[1] / "lib").glob("python3*/site-packages"))
    module, hook = library / "planted_fault.py", library / "planted_fault.pth"
    for file in (module, hook):
        file.unlink(missing_ok=True)
    if FAULTS[fault]:
        module.write_text(PLANTED.replace("FAULT\n", f"{FAULTS[fault]}\n"))
        hook.write_text("import planted_fault\n")


class Hog:
    """A process that takes a core, and leaves it, at random."""

    CODE = (
        "import random, time\n"
        "while True:\n"
        "    ends = time.time() + random.uniform(0.3, 6)\n"
        "    while time.time() < ends: sum(range(10000))\n"
        "    time.sleep(random.uniform(0.3, 6))\n"
    )

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        if self._wanted:
            self._process = subprocess.Popen([sys.executable, "-c", self.CODE])

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            self._process.kill()
            self._process.wait()


# Runs


def todo(state: Path, only: Sequence[str]) -> Iterator[tuple[Case, int]]:
    """Yield missing sessions, one of each case in turn, so that a short run serves all cases."""
    for number in range(max(case.runs for case in CASES)):
        for case in CASES:
            turn = number >= case.after and (number - case.after) % case.every == 0
            wanted = turn and (number - case.after) // case.every < case.runs
            named = not only or case.name in only
            if wanted and named and not record(state, case, number).exists():
                yield case, number


def record(state: Path, case: Case, number: int) -> Path:
    return state / "runs" / case.machine / case.fault.replace(" ", "-") / f"{number:02}"


def run_duet(state: Path, case: Case, number: int) -> None:
    base, new = build(state, "base"), build(state, "new")
    plant(new, case.fault)
    folder = record(state, case, number)
    staging = folder.with_name(f".{folder.name}")
    command = [new.with_name("batchbench"), "duet", "--base-python", base, "--preset", "ci"]
    began = time.monotonic()
    with Hog(case.machine == "hog"):
        done = subprocess.run(
            [
                *command,
                "--max-time",
                str(BUDGET_S[case.machine]),
                "--output",
                staging,
                "--overwrite",
                "--quiet",
            ],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    spent = time.monotonic() - began
    plant(new, "none")
    if done.returncode not in (0, 1):
        sys.exit(f"{case.name}: exit {done.returncode}: {done.stderr}")
    (staging / "run.json").write_text(
        json.dumps({"seconds": spent, "exit": done.returncode, "said": done.stdout.strip()})
    )
    staging.rename(folder)
    print(f"{case.name} {number}: exit {done.returncode} in {spent:.0f} s: {done.stdout.strip()}")


SESSIONS = {1: "none-1", 4: "slots 15 %-1", 7: "none-2", 10: "none-3"}
"""Baselines that are saved, by the round before which, far apart; 12 processes each."""


def session_file(state: Path, session: str) -> Path:
    return state / "sessions" / f"{session.replace(' ', '-')}.json"


def save_session(state: Path, session: str) -> None:
    """Measure what ``check`` measures, in 12 fresh processes."""
    file = session_file(state, session)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = build(state, "new")
    fault = session.removeprefix("hog-").rpartition("-")[0] or "none"
    plant(new, fault)
    command = [new.with_name("batchbench"), "baseline", "save", "--preset", "ci", "--quiet"]
    with Hog(session.startswith("hog")):
        subprocess.run([*command, "--processes", "12", "--output", file], check=True)
    plant(new, "none")
    print(f"session {session} is saved", flush=True)


# Tables


def table(state: Path) -> str:
    """Return the results as Markdown."""
    rows = [
        "| machine | planted | live runs | failed | passed | cannot tell | median s | longest s "
        "| resampled: failed | passed | cannot tell | median s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in CASES:
        folders = [record(state, case, n) for n in range(CASES[0].runs)]
        done = [folder for folder in folders if folder.exists()]
        if not done:
            continue
        told = [json.loads((folder / "run.json").read_text()) for folder in done]
        gates = [json.loads((folder / "duet.json").read_text()) for folder in done]
        answers = [gate["gate"]["answer"] for gate in gates]
        live = [f"{answers.count(a)}" for a in ("failed", "passed", "cannot tell")]
        seconds = [t["seconds"] for t in told]
        rows.append(
            f"| {case.machine} | {case.fault} | {len(done)} | {' | '.join(live)} "
            f"| {median(seconds):.0f} | {max(seconds):.0f} | {resampled(gates)} |"
        )
        if case == CASES[0]:
            for percent in (3, 5, 10):
                told = resampled(gates, shift=math.log1p(percent / 100))
                rows.append(
                    f"| {case.machine} | the same, {percent} % added to each pair "
                    f"| | | | | | | {told} |"
                )
    return "\n".join(rows) + "\n"


def resampled(gates: Sequence[dict], verdicts: int = 2000, shift: float = 0.0) -> str:
    """Shares of verdicts on pairs drawn from all of a case; N/A where the work itself differs."""
    pairs = [
        pair_of(pair)
        for gate in gates
        for run in ("first", "confirmation")
        if gate[run]
        for pair in gate[run]["pairs"]
    ]
    if shift:
        pairs = [Shifted(pair, shift) for pair in pairs]
    if any(e["kind"] == "work" and e["fails"] for gate in gates for e in gate["gate"]["evidence"]):
        return "by counts | N/A | N/A | N/A"
    if len(pairs) < 20:
        return "too few pairs | N/A | N/A | N/A"
    found = replayed(pairs, verdicts)
    answers = [answer for answer, _ in found]
    shares = [f"{answers.count(a) / verdicts:.2%}" for a in ("failed", "passed", "cannot tell")]
    return f"{' | '.join(shares)} | {median(s for _, s in found):.0f}"


def pair_of(data: dict) -> object:
    """Return a pair from its record."""
    from batchbench.studies.gate.duet import Pair
    from batchbench.studies.gate.worker import Turn

    turns = {
        name: [(Turn(*base), Turn(*new)) for base, new in pairs]
        for name, pairs in data["turns"].items()
    }
    passes = {name: tuple(steps) for name, steps in data["passes"].items()}
    return Pair(**{**data, "turns": turns, "passes": passes})


def table_of_checks(state: Path, verdicts: int = 2000) -> str:
    """Verdicts of ``check`` on processes drawn from sessions that were saved at other times."""
    from batchbench.studies.gate.check import load_baseline

    rows = [
        "| baseline of | checked | verdicts | failed | passed | cannot tell | median processes |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    found = {
        session: load_baseline(file).processes
        for session in SESSIONS.values()
        if (file := session_file(state, session)).exists()
    }
    for base in found:
        for new in found:
            if base == new or "15" in base or "hog" in base:
                continue
            told = [checked(found[base], found[new], seed) for seed in range(verdicts)]
            answers = [answer for answer, _ in told]
            shares = [
                f"{answers.count(a) / verdicts:.2%}" for a in ("failed", "passed", "cannot tell")
            ]
            rows.append(
                f"| {base} | {new} | {verdicts} | {' | '.join(shares)} "
                f"| {median(n for _, n in told):.0f} |"
            )
    return "\n".join(rows) + "\n"


def checked(base: Sequence, new: Sequence, seed: int, most: int = 24) -> tuple[str, int]:
    """One verdict, and how many processes it took."""
    from batchbench.reports.statistics import Verdict
    from batchbench.studies.gate.check import FIRST_LOOK, NEXT_LOOK, decide_ratios, rule_of
    from batchbench.studies.gate.spec import CheckSpec

    chance = random.Random(seed)
    kept = chance.choices(base, k=12)
    rule = rule_of(CheckSpec(baseline=Path("x")), len(kept[0].ratios), other=False)
    drawn = chance.choices(new, k=most)
    for look, count in enumerate(range(FIRST_LOOK, most + 1, NEXT_LOOK), start=1):
        told = decide_ratios(kept, drawn[:count], rule, look).values()
        if all(decision.is_sure for decision in told):
            break
    if any(decision.verdict is Verdict.SLOWER for decision in told):
        return "failed", count
    return ("passed" if all(d.is_sure for d in told) else "cannot tell"), count


class Shifted:
    """A pair whose new side is so much slower (a log ratio) than it was measured."""

    def __init__(self, pair: object, shift: float) -> None:
        self._pair, self._shift = pair, shift

    def __getattr__(self, name: str) -> object:
        return getattr(self._pair, name)

    def value(self, lane: str) -> float:
        return self._pair.value(lane) + self._shift


class Drawn:
    """Pairs drawn from those that were recorded, and the time that they took."""

    def __init__(self, pairs: Sequence) -> None:
        self._pairs, self._chance = pairs, random.Random(1)
        self.seconds = 0.0

    def pair(self, names: Sequence[str], known: object) -> tuple:
        from batchbench.studies.gate.processes import ProcessReport

        pair = self._chance.choice(self._pairs)
        self.seconds += pair.seconds
        model, workload = {"device": "cpu", "dtype": "float32"}, {"closed": True}
        opened = {"model": model, "workload": workload, "environment": {}, "also": {}}
        report = ProcessReport({"version": "1"}, opened, {"work": {}})
        return pair, (report, report)

    def restart(self) -> None:
        """Do nothing: pairs are drawn independently."""


def replayed(pairs: Sequence, verdicts: int) -> list[tuple[str, float]]:
    """Verdicts and seconds of duets whose processes are drawn from those that were recorded."""
    from batchbench.studies.gate.duet import TurnsWatch, run_duet
    from batchbench.studies.gate.spec import DuetSpec

    drawn, spec, watch = Drawn(pairs), DuetSpec(max_time=BUDGET_S["quiet"]), TurnsWatch()
    names = list(pairs[0].passes)
    found = []
    for _ in range(verdicts):
        result = run_duet(drawn, names, spec, watch, clock=lambda: drawn.seconds)
        found.append((answer_of(result), result.seconds))
    return found


class Simulated:
    """A pair of processes of which only the value is known."""

    def __init__(self, value: float) -> None:
        self._value = value
        self.turns, self.passes, self.seconds = {}, {"continuous": (1, 1)}, 7.3

    def value(self, lane: str) -> float:
        return self._value

    def kernel(self) -> float:
        return 0.0

    def busy(self) -> float:
        return 0.0

    def step_ns(self, lane: str) -> tuple[float, float]:
        return 1.0, 1.0


def table_of_simulations(verdicts: int = 1000) -> str:
    """Apply the rule to heavy tails: Student's t with 3 degrees of freedom, 7.3 s a pair."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [
        "| scatter of a pair | slower by | failed | passed | cannot tell | median s |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for scatter in (0.005, 0.01, 0.015, 0.02, 0.03):
        for loss in (0.0, 0.03, 0.05, 0.10):
            noise = rng.standard_t(3, 4000) * scatter / math.sqrt(3)
            found = replayed([Simulated(math.log1p(loss) + x) for x in noise], verdicts)
            answers = [answer for answer, _ in found]
            shares = [
                f"{answers.count(a) / verdicts:.1%}" for a in ("failed", "passed", "cannot tell")
            ]
            spent = f"{median(s for _, s in found):.0f}"
            rows.append(f"| {scatter:.1%} | {loss:.0%} | {' | '.join(shares)} | {spent} |")
    return "\n".join(rows) + "\n"


def answer_of(found) -> str:
    """Return the verdict of the gate on one strategy."""
    from batchbench.reports.statistics import Verdict

    first, second = found.first, found.confirmation
    (decision,) = first.decisions.values()
    if first.contamination or not decision.is_sure:
        return "cannot tell"
    if decision.verdict is not Verdict.SLOWER:
        return "passed"
    if second is None or second.contamination:
        return "cannot tell"
    (again,) = second.decisions.values()
    return "failed" if again.verdict is Verdict.SLOWER else "cannot tell"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=Path("gate-power"))
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--sessions", action="store_true", help="measure check as well")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--simulated", action="store_true", help="the rule on made-up pairs")
    asked = parser.parse_args()
    if asked.simulated:
        print(table_of_simulations())
        return
    state = asked.state.absolute()
    began = time.monotonic()
    if not asked.table:
        missing = {n: s for n, s in SESSIONS.items() if not session_file(state, s).exists()}
        sessions = missing if asked.sessions else {}
        for case, number in todo(state, asked.only):
            if time.monotonic() - began > 60 * asked.minutes:
                print("the time is up; run it again to go on")
                break
            for due in [each for each in sessions if each <= number]:
                save_session(state, sessions.pop(due))
            run_duet(state, case, number)
    print(table(state))
    print(table_of_checks(state))


if __name__ == "__main__":
    main()
