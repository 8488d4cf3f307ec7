"""Predicted and measured peak memory: `--dry-run` and real runs, each in a fresh process.

    .venv/bin/python benchmarks/dry_run_memory.py [--only notebook] [--output FILE.json]

The measured peak is the most resident memory of a whole `batchbench run`, as Linux counts it for an
ended child. Dummy weights, few tokens: what is compared is memory, not time.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

CASES = (
    "--model gpt2 --batch-size 2 --queue-size 4",
    "--model gpt2 --batch-size 2 --queue-size 4 --dtype bfloat16",
    "--model gpt2 --batch-size 2 --queue-size 4 --dtype bfloat16 --verify all",
    "--model gpt2 --batch-size 8 --queue-size 8 --prompt-tokens cycle:every=8,long=900,short=8",
    "--model gpt2 --batch-size 32 --queue-size 32 --prompt-tokens cycle:every=32,long=900,short=8",
    "--model gpt2 --batch-size 4 --queue-size 4 --prompt-tokens 200 --engine notebook",
    "--model gpt2 --batch-size 8 --queue-size 8 --prompt-tokens 300 --engine notebook",
    "--model gpt2 --batch-size 4 --queue-size 4 --prompt-tokens 100 --engine notebook"
    " --dtype bfloat16",
    "--model gpt2 --batch-size 4 --queue-size 4 --prompt-tokens 100"
    " --strategy continuous,generate_batch",
    "--model gpt2-medium --batch-size 4 --queue-size 4 --prompt-tokens 30",
    "--model gpt2-medium --batch-size 4 --queue-size 4 --prompt-tokens 100 --engine notebook",
    "--model gpt2-medium --batch-size 8 --queue-size 8 --dtype bfloat16"
    " --prompt-tokens cycle:every=8,long=900,short=8",
)

COMMON = "--load-format dummy --trials 1 --long-tokens 6 --short-tokens 4 --threads 1 --quiet"

FORETELL = """
import sys
from batchbench.batching.dry_run import estimate
from batchbench.batching.progress import Watch
from batchbench.cli import run
run._dry_run = lambda experiment, output: print(estimate(experiment, Watch()).peak_bytes)
from batchbench.cli.main import main
main()
"""


def words_of(case: str) -> list[str]:
    """The command line of a case; nothing is verified unless it says so."""
    words = ["run", *shlex.split(case), *COMMON.split()]
    return words if "--verify" in case else [*words, "--verify", "none"]


def foretold(case: str) -> int:
    """Bytes, as `--dry-run` tells."""
    command = [sys.executable, "-c", FORETELL, *words_of(case), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measured(case: str) -> int:
    """Bytes that a run takes at its height."""
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", str(Path(folder, "out"))]
        command = [sys.executable, "-m", "batchbench", *words_of(case), *output]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)}: ended with {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases that contain this text")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    asked = parser.parse_args()
    rows = []
    table = Table(title="peak memory of a run, MiB")
    for head in ("case", "foretold", "measured", "error"):
        table.add_column(head, justify="left" if head == "case" else "right")
    for case in (c for c in CASES if asked.only in c):
        told, real = foretold(case), measured(case)
        rows.append({"case": case, "foretold_bytes": told, "measured_bytes": real})
        cells = (f"{told / 2**20:,.0f}", f"{real / 2**20:,.0f}", f"{told / real - 1:+.1%}")
        print(case, *cells, flush=True)
        table.add_row(case, *cells)
        if asked.output is not None:
            asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
