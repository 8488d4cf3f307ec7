"""Predictions: the same steps as in truth, from the option to the picture; the break-even map."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from support.laws import workload_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.bench import LocalBench
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.batching.step_cost import StepCost
from batchbench.cli.main import run_command
from batchbench.reports.metrics import counters
from batchbench.reports.prediction import counts_of
from batchbench.reports.result import load_result, make_result
from batchbench.studies.predict.breakeven import Contest
from batchbench.studies.sweep.grid import parse_numbers
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_fit_is_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes a weak fit, whose predictions are not shown."""
    monkeypatch.setattr("batchbench.reports.prediction.WEAK_ERROR", math.inf)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Types a command; exit code, standard output and error."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["batchbench", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        code = run_command()
        return (code, *capsys.readouterr())

    return call


# The same steps


def some_workload(seed: int) -> tuple[Workload, dict[str, Any]]:
    """A closed workload and how it is served, other for each seed."""
    rng = np.random.default_rng(seed)
    rows = [
        (int(rng.integers(1, 20)), int(rng.choice([1, 3, 8, 30], p=[0.1, 0.4, 0.3, 0.2])), 0)
        for _ in range(int(rng.integers(1, 16)))
    ]
    slots = int(rng.integers(1, 6))
    prefill = ("separate", "mixed")[seed % 2]
    order = ("fifo", "longest-first", "shortest-first")[seed % 3]
    how = {"prefill": prefill, "order": order, "slots": slots}
    how["max_batched_tokens"] = slots + int(rng.choice([2, 9, 1000]))
    return workload_of(rows), how


@pytest.mark.parametrize("seed", range(20))
def test_simulated_and_real_runs_take_identical_steps(tiny: LoadedModel, seed: int) -> None:
    from batchbench.batching.engines.torch.slots import SlotsEngine

    workload, how = some_workload(seed)
    engine = SlotsEngine(tiny, how["slots"], workload.max_total_tokens)
    cost = StepCost(1e6, 1e4, 3.3, 50.5, 7.0, host_ns=1e4)
    for policy in ("static", "continuous"):
        real = Batcher(policy, engine, **how).serve(workload, Watch())
        told = Batcher(policy, SimulatedEngine(cost), **how).serve(workload, Watch())
        for column in ("slot", "admitted", "started", "first", "last", "released", "output_tokens"):
            ours, theirs = (getattr(r.requests, column) for r in (told, real))
            assert ours.tolist() == theirs.tolist(), column
        for column in ("request", "start", "stop"):
            ours, theirs = (getattr(r.chunks, column) for r in (told, real))
            assert ours.tolist() == theirs.tolist(), column
        assert counts_of(told).tolist() == counts_of(real).tolist()


# A run predicts


@pytest.fixture
def good_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every fit for good, whatever this machine is busy with."""
    monkeypatch.setattr("batchbench.reports.prediction.is_weak", lambda fit: False)


@pytest.mark.usefixtures("good_fit")
def test_a_run_tells_predicted_beside_measured(taught: Path, say: Say) -> None:
    found = load_result(taught).data["prediction"]
    assert found["fitted_on"] == "static"
    told = {s["strategy"]: s for s in found["strategies"]}
    assert set(told) == {"static", "continuous"}
    for each in told.values():
        assert each["error"] == pytest.approx(each["duration"] / each["measured_duration"] - 1)
    assert found["held_out"]["steps"] == 2 * load_result(taught).recordings["static"][0].num_steps
    code, out, _ = say("report", taught, "--verbose")
    text = " ".join(out.split())
    assert code == 0
    assert re.search(r"Predicted from the steps of static: continuous takes .* measured", text)
    assert "steps (cross-validated): " in text


def test_a_run_times_smaller_batches_and_predicts_with_them(taught: Path) -> None:
    data = load_result(taught).data
    steps = data["small_batches"]
    assert sorted({step[0] for step in steps}) == [0, 1, 2]
    assert data["prediction"]["cost"]["rows_seen"] == [0, 1, 2, 4]
    assert [rows for rows, _ in data["prediction"]["cost"]["bends"]] == [1, 2]
    for told in data["prediction"]["strategies"]:
        assert told["extrapolates"] == []
    assert data["warm_up"]["duration_s"] * 1e9 > sum(step[-1] for step in steps)


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_smaller_batches_leave_no_trace_in_the_trials(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    asked = Experiment.of(
        {"model": str(checkpoint), "device": "cpu", "batch_size": 4, "queue_size": 9,
         "long_tokens": 20, "engine": engine, "trials": 1}
    )  # fmt: skip
    timed = conduct(asked)
    assert timed.small_batches
    monkeypatch.setattr(LocalBench, "time_small_batches", lambda session: [])
    untimed = conduct(asked)
    assert timed.verification.passed
    for name in ("static", "continuous"):
        (ours,), (theirs,) = timed.recordings[name], untimed.recordings[name]
        assert ours.tokens is not None
        assert theirs.tokens is not None
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert counters(ours) == counters(theirs)
        assert ours.header.about["computed_passes"] == ours.num_steps
    assert make_result(untimed).data["small_batches"] == []


@pytest.mark.usefixtures("good_fit")
def test_what_a_prediction_cannot_know_is_said_everywhere(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    """Earlier results have no timed smaller batches."""
    monkeypatch.setattr(LocalBench, "time_small_batches", lambda session: [])
    words = ["run", "--model", checkpoint, "--batch-size", 8, "--queue-size", 16, "--trials", 1]
    code, out, _ = say(*words, "--long-tokens", 30, "--output", tmp_path / "run", "-v")
    assert code == 0
    told = load_result(tmp_path / "run").data["prediction"]["strategies"][-1]["extrapolates"]
    assert told == ["1–3 rows decode together (the fit saw no step of 1–7 rows)"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert say("report", tmp_path / "run", "--format", "markdown")[0] == 0
    markdown = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    for shown in (out, markdown, html.unescape(page)):
        assert told[0] in " ".join(shown.split())


def test_a_simulation_predicts_nothing_of_itself(tmp_path: Path, say: Say) -> None:
    assert say("simulate", "--quiet", "--output", tmp_path / "out")[0] == 0
    data = load_result(tmp_path / "out").data
    assert data["prediction"] is None
    assert data["small_batches"] == []
    assert data["cost"] is None


def test_results_of_an_older_batchbench_without_prediction_are_read(
    taught: Path, tmp_path: Path, say: Say
) -> None:
    import shutil

    shutil.copytree(taught, tmp_path / "old")
    file = tmp_path / "old" / "result.json"
    data = json.loads(file.read_text())
    del data["prediction"], data["cost"]
    file.write_text(json.dumps(data))
    assert say("report", tmp_path / "old")[0] == 0


# simulate --cost


def test_a_simulation_on_costs_is_marked_and_its_times_are_real_ones(
    taught: Path, tmp_path: Path, say: Say
) -> None:
    folder = tmp_path / "out"
    words = ("simulate", "--cost", taught, "--batch-size", 8, "--queue-size", 24)
    code, out, _ = say(*words, "--long-tokens", 30, "--output", folder)
    text = " ".join(out.split())
    assert code == 0
    assert text.startswith(f"In simulation, with the step costs of {taught}, ")
    assert "every step costs the same" not in text
    assert "step costs are fitted" in text
    assert "up to 8 rows decode together (the fit saw up to 4)" in text
    again = load_result(folder)
    assert again.data["simulated"] is True
    assert again.data["cost"]["source"] == str(taught)
    assert again.data["cost"]["extrapolates"]
    assert not again.recordings["static"][0].in_steps
    assert f"--cost {taught}" in again.data["command"]
    picture = (folder / "throughput.svg").read_text()
    assert "output tokens/s" in picture
    assert "tokens/step" not in picture
    # The command that it gives makes the same recordings again.
    command = again.data["command"].split()[1:]
    assert say(*command, "--quiet", "--output", tmp_path / "again")[0] == 0
    other = load_result(tmp_path / "again")
    for name, (one,) in again.recordings.items():
        assert other.recordings[name][0].step_ends_ns.tolist() == one.step_ends_ns.tolist()


def test_the_run_itself_simulated_on_its_costs_takes_its_steps(
    taught: Path, tmp_path: Path, say: Say
) -> None:
    folder = tmp_path / "out"
    words = ("--batch-size", 4, "--queue-size", 16, "--long-tokens", 30)
    assert say("simulate", "--cost", taught, *words, "--quiet", "--output", folder)[0] == 0
    told, real = load_result(folder).data["strategies"], load_result(taught).data["strategies"]
    assert {n: s["counters"] for n, s in told.items()} == {
        n: s["counters"] for n, s in real.items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simulate", "--cost", "{tmp}/none"), "--cost {tmp}/none: no such folder"),
        (("simulate", "--cost", "{run}", "--engine", "notebook"), "add --engine slots"),
        (("predict", "{tmp}/none"), "predict {tmp}/none: no such folder"),
        (("predict", "{run}", "--batch-size", "0:4"), "--batch-size 0:4: must be at least 1"),
        (("predict", "{run}", "--batch-size", "4:1"), "--batch-size 4:1: a step of 1"),
        (("predict", "{run}", "--batch-size", "x"), "--batch-size x: must be a number"),
        (("breakeven", "--spread", "-1"), "--spread -1: must be at least 0"),
        (("breakeven", "--load", "0"), "--load 0: must be all, or from 0.01"),
        (("breakeven", "--load", "x"), "--load x: must be a number"),
        (("breakeven", "--cost", "{run}", "--model", "gpt2"), "drop --model"),
        (("breakeven", "--cost", "{tmp}/none"), "--cost {tmp}/none: no such folder"),
    ],
)
def test_bad_questions_are_one_line_that_names_the_option(
    taught: Path, tmp_path: Path, say: Say, words: tuple[str, ...], said: str
) -> None:
    places = {"run": taught, "tmp": tmp_path}
    output = () if words[0] == "simulate" else ("--output", tmp_path / "out")
    code, _, err = say(*(word.format(**places) for word in words), *output)
    assert code == 2
    assert said.format(**places) in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_simulation_cannot_teach(tmp_path: Path, say: Say) -> None:
    assert say("simulate", "--quiet", "--output", tmp_path / "s")[0] == 0
    code, _, err = say("simulate", "--cost", tmp_path / "s", "--output", tmp_path / "out")
    assert code == 2
    assert "not of a simulation" in err


# predict


def test_predict_tells_each_batch_size_and_what_the_fit_saw(
    taught: Path, tmp_path: Path, say: Say
) -> None:
    folder = tmp_path / "out"
    code, out, _ = say("predict", taught, "--batch-size", "1:8", "--output", folder)
    assert code == 0
    assert out.startswith("predicted: static reaches 95%")
    data = json.loads((folder / "predict.json").read_text())
    frame = pd.read_csv(folder / "predict.csv")
    assert len(data["points"]) == len(frame) == 16
    assert set(frame[frame["measured"]]["batch_size"]) == {4}
    assert not frame[frame["batch_size"] > 4]["seen"].any()
    assert data["requests"] == 64
    one = frame[frame["batch_size"] == 1]["output_throughput"]
    assert one.nunique() == 1  # with one slot there is no difference
    enough = frame[frame["batch_size"] == data["enough"]["continuous"]]
    best = frame[frame["strategy"] == "continuous"]["output_throughput"].max()
    reached = enough[enough["strategy"] == "continuous"]["output_throughput"]
    assert reached.item() >= 0.95 * best
    assert {file.name for file in folder.iterdir()} == {
        *("predict.json", "predict.csv", "slots.png", "slots.svg")
    }
    words = ["predict", taught, "--batch-size", "2", "--json", "--output", folder]
    code, _, told = say(*words)
    assert code == 2
    assert told.endswith("holds a result; give another folder or --overwrite\n")
    code, out, _ = say(*words, "--overwrite")
    assert code == 0
    assert [p["batch_size"] for p in json.loads(out)["points"]] == [2, 2]


def test_a_range_without_a_step_counts_by_one() -> None:
    assert parse_numbers("1:4,9", int, "--batch-size") == [1, 2, 3, 4, 9]


# breakeven


def test_breakeven_maps_who_wins_and_runs_some_cells_for_real(
    taught: Path, tmp_path: Path, say: Say
) -> None:
    folder = tmp_path / "map"
    words = ["breakeven", "--cost", taught, "--batch-size", "2,8", "--spread", "0,1"]
    words += ["--load", "0.8,all", "--mean-tokens", 8, "--prompt-tokens", 4, "--batches", 4]
    words += ["--measure", 1, "--trials", 1, "--output", folder]
    code, out, err = say(*words)
    assert code == 0
    text = " ".join(out.split())
    assert "3 comparisons in 1 measured cell have the predicted winner" in text
    assert re.match("4 of 8 cells go beyond the measured steps", text)
    assert "measuring 1 cell, 1 trial each: about" in err
    (again,) = [line for line in out.splitlines() if line.startswith("Again: ")]
    assert again.startswith("Again: batchbench breakeven --cost")
    data = json.loads((folder / "breakeven.json").read_text())
    frame = pd.read_csv(folder / "breakeven.csv")
    assert len(frame) == len(data["cells"]) == 2 * 2 * 2 * 3
    assert frame["measured_winner"].notna().sum() == 3
    # Equal outputs that are all there at once: no difference but where somebody stalls.
    equal = frame[(frame["spread"] == 0) & (frame["load"] == "all")]
    assert (equal["winner"] == "even").all()
    spread = frame[(frame["spread"] == 1) & (frame["load"] == "all")]
    assert (spread[spread["metric"] == "throughput"]["winner"] == "continuous").all()
    assert (folder / "breakeven.png").exists()
    # What is finished is kept: nothing is served again.
    before = {file: file.stat().st_mtime_ns for file in (folder / "cells").rglob("*")}
    assert say(*words, "--quiet")[0] == 2
    assert say(*words, "--quiet", "--overwrite")[0] == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "cells").rglob("*")} == before
    code, out, _ = say(*words, "--overwrite", "--price-per-hour", 2)
    assert code == 0
    assert "At 2 an hour, a million output tokens cost " in " ".join(out.split())
    assert json.loads((folder / "breakeven.json").read_text())["price_per_hour"] == 2


def test_breakeven_without_a_result_makes_a_run_and_static_can_win(
    checkpoint: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever this machine is busy with: every pass costs the same.
    monkeypatch.setattr("batchbench.reports.prediction.fit_cost", lambda work: StepCost(1e6))
    folder = tmp_path / "map"
    words = ["breakeven", "--model", checkpoint, "--batch-size", "8", "--spread", "0,0.1"]
    words += ["--load", "all", "--mean-tokens", 8, "--prompt-tokens", 4, "--batches", 8]
    words += ["--prefill", "separate", "--quiet", "--output", folder]
    code, out, err = say(*words)
    assert (code, err) == (0, "")
    assert "on throughput continuous wins " in " ".join(out.split())
    assert load_result(folder / "teacher").data["config"]["serving"]["batch_size"] == 8
    assert (folder / "teacher" / "report.html").exists()
    # Lengths that differ a little make each end an admission of its own, which stalls the others.
    frame = pd.read_csv(folder / "breakeven.csv")
    throughput = frame[(frame["metric"] == "throughput") & (frame["spread"] == 0.1)]
    assert (throughput["winner"] == "static").all()


@pytest.mark.parametrize(
    ("static", "continuous", "winner"),
    [
        (1.0, 1.0, "even"),
        (1.0, 1.019, "even"),
        (1.0, 1.03, "continuous"),
        (1.03, 1.0, "static"),
        (0.0, 1.0, "continuous"),
        (1.0, 0.0, "static"),
        (0.0, 0.0, "even"),
    ],
)
def test_who_wins_a_contest(static: float, continuous: float, winner: str) -> None:
    contest = Contest.of(static, continuous)
    assert contest.winner == winner
    assert contest.agrees(contest)
    assert not math.isnan(contest.height)
    against = Contest.of(continuous, static)
    assert contest.agrees(against) is (winner == "even")
    assert replace(contest, ratio=contest.ratio) == contest
