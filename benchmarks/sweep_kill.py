"""Kill a sweep again and again, and see that nothing is lost, repeated or torn.

    python benchmarks/sweep_kill.py [--kills 20] [--seed 0] [--folder DIR]

A sweep of 24 simulated cells runs once undisturbed. Then the same sweep is started over and over in
another folder, each time killed with SIGKILL at a random moment (while it starts, serves a cell,
writes one, or draws), and at last left to finish. The sweeps write down each cell that they begin.
Exit code 1 where a law is broken:

- the table at the end is the undisturbed one, byte for byte, and sweep.json but for its times;
- no cell was begun again after it had been finished;
- no file was ever torn: at each kill every cell that has its name is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from batchbench.reports.result import load_result

GRID = "sweep --simulated --batch-size 1,2,4,8,16,32 --long-every 2,4,8,16 --queue-size 2000"

SWEEPER = """
import os, sys, time
from batchbench.cli.main import main
from batchbench.studies.executors.jobs import Executor

log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
cells = os.path.join(sys.argv[-1], "cells")
submit = Executor.submit

def logged(self, job):
    held = os.path.isdir(os.path.join(cells, job.key))
    os.write(log, f"{job.key} {held} {time.monotonic()}\\n".encode())
    submit(self, job)

Executor.submit = logged
main()
"""


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """The sweep in a process of its own; the cells that it begins go to ``log``."""
    words = [*GRID.split(), "--quiet", "--output", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", SWEEPER, str(log), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def finish(folder: Path, log: Path) -> None:
    """The sweep, undisturbed."""
    process = start(folder, log)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the sweep ended with {process.returncode}: {errors.decode()}")


def begun(log: Path) -> list[tuple[str, bool, float]]:
    """Return for each started cell its digest, its start, and True if it was there already."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(digest, held == "True", float(at)) for digest, held, at in map(str.split, lines)]


def finished(folder: Path, read: set[str]) -> set[str]:
    """Cells that have their names; those not ``read`` before are, so that a torn one is found."""
    cells = [place for place in (folder / "cells").glob("*") if not place.name.startswith(".")]
    for place in cells:
        if place.name not in read:
            load_result(place)
    if (folder / "sweep.json").exists():
        json.loads((folder / "sweep.json").read_text())
    return {place.name for place in cells}


def lasting(folder: Path) -> dict[str, object]:
    """``sweep.json`` without what says when and where it was written."""
    told = json.loads((folder / "sweep.json").read_text())
    return {name: told[name] for name in told if name not in ("created_at", "command")}


@dataclass(frozen=True)
class Times:
    """Times of the undisturbed sweep, in seconds."""

    starting_s: float  # up to the first cell
    serving_s: float  # from the first cell to the last
    telling_s: float  # table and pictures


def kill_somewhere(
    process: subprocess.Popen[bytes], log: Path, wait_s: float, *, serving: bool, cells: int
) -> None:
    """Kill it after ``wait_s``: from its start, or from when it begins a cell, or has no more."""
    lines = len(begun(log))
    try:
        while serving and process.poll() is None and cells:
            if len(begun(log)) >= lines + cells:
                break
            time.sleep(0.005)
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stderr is not None
    process.stderr.close()


def main() -> int:
    """Kill, compare, report."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=20)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--folder", type=Path, default=None)
    options = asked.parse_args()
    place = options.folder or Path(tempfile.mkdtemp(prefix="sweep-kill-"))
    alone, killed, log = place / "alone", place / "killed", place / "begun.log"
    chance = random.Random(options.seed)

    began = time.monotonic()
    finish(alone, place / "alone.log")
    undisturbed = begun(place / "alone.log")
    first, last, end = undisturbed[0][2], undisturbed[-1][2], time.monotonic()
    times = Times(first - began, last - first, end - last)
    cells = len(undisturbed)
    print(f"undisturbed: {cells} cells in {end - began:.1f} s")

    faults: list[str] = []
    before: set[str] = set()
    for kill in range(1, options.kills + 1):
        lines = len(begun(log))
        telling = kill > 0.8 * options.kills  # the last fifth: while it draws
        starting = not telling and chance.random() < 0.2
        most_s = times.telling_s if telling else times.serving_s * 3 / options.kills
        kill_somewhere(
            start(killed, log),
            log,
            chance.uniform(0, times.starting_s if starting else most_s),
            serving=not starting,
            cells=cells - len(before) if telling else 1,
        )
        new, after = begun(log)[lines:], finished(killed, before)
        faults += [f"kill {kill}: {d} was begun again" for d, held, _ in new if held or d in before]
        faults += [f"kill {kill}: {d} is gone" for d in before - after]
        print(f"kill {kill:>2}: {len(new):>2} cells begun, {len(after):>2} of {cells} finished")
        before = after
    lines = len(begun(log))
    finish(killed, log)
    faults += [f"at the end {d} was begun again" for d, _, _ in begun(log)[lines:] if d in before]
    finished(killed, set())
    if (alone / "sweep.csv").read_bytes() != (killed / "sweep.csv").read_bytes():
        faults.append("the tables differ")
    if lasting(alone) != lasting(killed):
        faults.append("sweep.json differs")
    if left := [file.name for file in killed.rglob(".writing-*")]:
        faults.append(f"left behind: {left}")
    tries = len(begun(log))
    print(f"left to finish: {cells} cells were begun {tries} times, {tries - cells} were cut off")
    print("\n".join(faults) or "same table, no cell repeated, no file torn")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
