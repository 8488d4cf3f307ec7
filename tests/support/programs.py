"""Programs that tests run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLAIN = {
    name: value
    for name, value in os.environ.items()
    if name.startswith(("HF_", "OMP_", "PATH", "HOME", "TMPDIR", "PYTHONPATH"))
}
"""Return an environment without variables that change what the program prints."""

EVERY_COMMAND = """
import sys
from batchbench.cli import gate as gates
from batchbench.cli import main, options, output
from support.gates import FAILED, PASSED, UNKNOWN
from matplotlib.figure import Figure
Figure.savefig = lambda self, out, **_: out.write(b"a picture")
taught, few = sys.argv[1], sys.argv[2:]
output.prepare()

def call(*words):
    sys.argv = ["batchbench", *words]
    code = main.run_command()
    assert code == 0, (words, code)

small = ("--queue-size", "8", "--batch-size", "2")
call("--help")
call("--version")
for name in main.COMMANDS:
    call(name, "--help")
    call(name, "--help-all") if name in ("run", "sweep", "duet") else None
for words in ("baseline save", "baseline show", "workload list", "workload show", "workload save"):
    call(*words.split(), "--help")
call("workload", "list")
call("doctor")
call("help")
call("help", "metrics")
call("simulate", *small, "--output", "one")
call("report", taught)
call("report", "one", "--format", "markdown")
if few:
    sys.stdout.flush()
    raise SystemExit
call("workload", "show", *small)
call("workload", "show", "--preset", "chat", "--queue-size", "8")
call("workload", "save", "w.jsonl", *small)
call("simulate", *small, "--output", "two", "--json")
call("simulate", *small, "--output", "three", "--quiet")
call("simulate", *small, "--dry-run")
call("report", "one", "two")
for format in options.DOCUMENTS:
    if format != "llmd":  # a report for each strategy
        call("report", "one", "--format", format, "--file", "-")
    call("report", "one", "--format", format)
call("sweep", "--queue-size", "4,8", "--simulated", "--output", "swept")
call("capacity", "--slo", "ttft:50", "--simulated", "--queue-size", "100", "--max-trials", "1",
     "--precision", "1", "--output", "carried")
call("predict", taught, "--batch-size", "1,2,4")
call("breakeven", "--cost", taught, "--batch-size", "2", "--spread", "0,1", "--load", "all",
     "--measure", "0", "--mean-tokens", "8", "--output", "mapped")
call("compare", "one", "two")
call("trend", "one", "two")
call("reproduce", "one")
call("watch", "one", "--gif", "film.gif")
for gate in (PASSED, FAILED, UNKNOWN):
    for how in ({}, {"json": True}, {"quiet": True}, {"markdown": gates.STANDARD_OUTPUT}):
        try:
            gates.conclude(gate, gates.GateOutputSpec(github="on", **how))
        except main.typer.Exit:
            pass
sys.stdout.flush()
"""


def program(
    *words: str, cwd: Path, env: Mapping[str, str] | None = None, code: str = ""
) -> subprocess.Popen[bytes]:
    """Start batchbench, or ``code`` with these arguments; its streams are pipes."""
    start: Sequence[str] = ("-c", code) if code else ("-m", "batchbench")
    path = os.pathsep.join([str(Path(__file__).parents[1]), PLAIN.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *start, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env={**PLAIN, "COLUMNS": "100", "PYTHONPATH": path, **(env or {})},
    )
