"""An independent recomputation of every number of a result, from its files alone."""

from __future__ import annotations

import ast
import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from batchbench.cli.main import run_command

PROGRAM = Path(__file__).parents[1] / "support" / "recount.py"

# Nothing of the package can be imported, wherever it is installed.
BLOCKED = f"""
import runpy, sys
sys.modules["batchbench"] = None
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""


def say(*words: object) -> None:
    """Run a command, which must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchbench", *map(str, words), "--quiet"])
        assert run_command() == 0


@functools.cache
def recount(folder: Path, *slos: str) -> dict[str, Any]:
    """Return the numbers that the recount finds in a result."""
    words = [sys.executable, "-I", "-c", BLOCKED, str(folder), *slos]
    done = subprocess.run(words, capture_output=True, text=True, check=True, encoding="utf-8")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield places where two JSON values differ by more than the rounding of sums."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{place}.{key}")
            else:
                yield f"{place}.{key} is missing on one side"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}[{i}]")
    elif isinstance(one, float) and isinstance(other, int | float):
        if not math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{place}: {one} and {other}"
    elif one != other:
        yield f"{place}: {one} and {other}"


def compare(folder: Path) -> list[str]:
    """Return the places where a result and the recount of its recordings differ."""
    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found = recount(folder)
    for account in data["explain"]["strategies"].values():
        if account is not None:
            del account["warm_up_s"]  # it is not in any recording
    parts = ("strategies", "comparisons", "comparison", "explain")
    return [d for part in parts for d in differences(data[part], found[part], part)]


@pytest.fixture(scope="module")
def taught(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: three pairs, prompts in pieces, and a strategy that shows no steps."""
    folder = tmp_path_factory.mktemp("recount") / "run"
    say(
        *("run", "--model", checkpoint, "--batch-size", 3, "--queue-size", 13, "--trials", 3),
        *("--prompt-tokens", "uniform:min=2,max=40", "--output-tokens", "uniform:min=1,max=30"),
        *("--max-batched-tokens", 16, "--strategy", "static,generate_batch,continuous"),
        *("--slo", "ttft:30", "--slo", "tpot:2", "--price-per-hour", 3, "--output", folder),
    )
    return folder


def test_the_recount_imports_nothing_of_the_package() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
    assert names <= sys.stdlib_module_names | {"numpy"}


def test_a_real_run(taught: Path) -> None:
    assert compare(taught) == []
    found = recount(taught)["strategies"]
    assert found["generate_batch"]["counters"] is None
    assert found["static"]["counters"]["stalled_slot_steps"] > 0
    assert found["static"]["counters"]["mixed_passes"] > 0


def test_a_real_run_whose_requests_come_over_time(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    say(
        *("run", "--model", checkpoint, "--engine", "notebook", "--batch-size", 2, "--trials", 1),
        *("--queue-size", 8, "--request-rate", 150, "--output-tokens", "uniform:min=1,max=9"),
        *("--prompt-tokens", "uniform:min=2,max=20", "--output", folder),
    )
    assert compare(folder) == []
    found = recount(folder)["strategies"]["static"]
    assert found["summary"]["mean_arrival_lag_ms"] is not None


@pytest.mark.parametrize("prefill", ["mixed", "separate"])
def test_a_simulation_with_fitted_costs(taught: Path, tmp_path: Path, prefill: str) -> None:
    folder = tmp_path / "out"
    budget = ("--max-batched-tokens", 20) if prefill == "mixed" else ()
    say(
        *("simulate", "--cost", taught, "--batch-size", 4, "--queue-size", 24, "--request-rate"),
        *(
            300,
            "--prompt-tokens",
            "uniform:min=2,max=60",
            "--output-tokens",
            "zipf:alpha=1.3,max=60",
        ),
        *(
            "--strategy",
            "static,static-oracle,continuous",
            "--slo",
            "e2el:400",
            "--prefill",
            prefill,
        ),
        *(*budget, "--output", folder),
    )
    assert compare(folder) == []
    cost = json.loads((folder / "result.json").read_text(encoding="utf-8"))["cost"]
    assert cost["step_ns"] > 0


def test_a_cell_of_a_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    say(
        *("sweep", "--simulated", "--batch-size", "2,3", "--queue-size", 9, "--request-rate", 90),
        *("--prompt-tokens", "uniform:min=2,max=40", "--max-batched-tokens", 16),
        *("--slo", "ttft:40", "--output", folder),
    )
    table = pd.read_csv(folder / "sweep.csv")
    for cell, rows in table.groupby("cell"):
        place = folder / "cells" / str(cell)
        assert compare(place) == []
        for name, strategy in recount(place, "ttft:40")["strategies"].items():
            (row,) = rows[rows["strategy"] == name].to_dict("records")
            for key, value in (strategy["trials"][0] | strategy["counters"]).items():
                if value is None:
                    assert pd.isna(row[key]), key
                else:
                    assert row[key] == pytest.approx(value, rel=1e-9), key


def test_the_rows_of_requests(taught: Path) -> None:
    table = pd.read_csv(taught / "requests.csv")
    for name, trials in recount(taught)["requests"].items():
        for trial, latencies in enumerate(trials):
            rows = table[(table["strategy"] == name) & (table["trial"] == trial)]
            for latency in ("queue", "ttft", "tpot", "e2el"):
                shown = rows[f"{latency}_ms"].dropna().tolist()
                assert shown == pytest.approx(latencies[latency], rel=1e-9), latency


def test_a_number_that_is_wrong_is_found(taught: Path, tmp_path: Path) -> None:
    text = (taught / "result.json").read_text(encoding="utf-8")
    data = json.loads(text)
    data["strategies"]["continuous"]["summary"]["p99_itl_ms"] *= 1.001
    data["strategies"]["static"]["counters"]["empty_slot_steps"] += 1
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "recordings").symlink_to(taught / "recordings")
    (copy / "result.json").write_text(json.dumps(data), encoding="utf-8")
    places = {difference.partition(":")[0] for difference in compare(copy)}
    assert places == {
        "strategies.continuous.summary.p99_itl_ms",
        "strategies.static.counters.empty_slot_steps",
    }
