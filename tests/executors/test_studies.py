"""Capacity searches, break-even maps and ladders whose independent parts run elsewhere."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.executors import FACTS, Adversary, Threads
from support.program import Call
from support.program import call as call
from support.schedules import MS, Schedule
from support.servers import Manner, serving

from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.errors import IncompleteError, UsageError
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.capacity import report
from batchbench.studies.capacity.search import (
    CapacityQuery,
    CapacityWatch,
    find_capacity,
    find_capacity_on,
)
from batchbench.studies.executors.jobs import (
    Done,
    Failed,
    Job,
    Lost,
    clients_on,
    kinds_of,
    run_parts,
)
from batchbench.studies.executors.spec import ExecutorSpec
from batchbench.studies.sweep.grid import Grid
from batchbench.studies.sweep.report import (
    CellResult,
    SweepResult,
    notes,
    render,
    sentence,
    to_json,
)

SIMULATED = Experiment.of({"queue_size": 60, "batch_size": 4, "request_rate": 1.0}, simulated=True)

QUERY = CapacityQuery(GoalsSpec(slo=("ttft:60",)), 0.9, 1, 0.2)

Use = Callable[[str, Adversary], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Let a command have an executor of ours, whatever it asks for."""

    def place(command: str, executor: Adversary) -> None:
        monkeypatch.setattr(f"batchbench.cli.{command}.make_executor", lambda *_: executor)

    return place


@pytest.mark.parametrize("seed", range(3))
def test_searches_elsewhere_find_what_one_process_finds(seed: int) -> None:
    adversary = Adversary(seed, 2)
    found = find_capacity_on(adversary, SIMULATED, QUERY, CapacityWatch())
    alone = report.data_of(find_capacity(SIMULATED, QUERY), "")
    data = report.data_of(found, "")
    same = ("strategies", "comparison", "config", "workload", "alone_ms", "verification")
    assert {name: data[name] for name in same} == {name: alone[name] for name in same}
    assert data["nodes"] == {"static": "somewhere", "continuous": "somewhere"}
    assert (alone["nodes"], alone["machines"], data["machines"]) == (None, [], [])
    assert set(adversary.begun.values()) == {1}


def test_strategies_of_unlike_machines_are_a_suspect_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpus = iter(("X", "Y"))
    monkeypatch.setattr(
        "batchbench.studies.capacity.search.kinds_of",
        lambda environments: [f"{next(cpus)} (a)" for _ in environments],
    )
    experiment = Experiment.of({"queue_size": 60, "batch_size": 4, "request_rate": 1.0})
    alone = find_capacity(SIMULATED, QUERY)
    monkeypatch.setattr("batchbench.studies.capacity.search.find_capacity", lambda *_: alone)
    found = find_capacity_on(Adversary(0, 2), experiment, QUERY, CapacityWatch())
    assert report.data_of(found, "")["validity"] == {
        "status": "suspect",
        "reasons": [
            "strategies were searched on 2 kinds of machines (X (a); Y (a)): drop --any-hardware"
        ],
    }


def test_a_part_that_fails_or_is_lost_says_why() -> None:
    def failing(watch: Watch, models: object) -> Failed:
        return Failed("it does not fit")

    with pytest.raises(UsageError, match="it does not fit"):
        run_parts([Job("a", failing)], Adversary(0, 1), Watch())

    class Cursed(Adversary):
        def _outcome(self, job: Job) -> Any:
            return Lost("its node died")

    job = Job("static", lambda watch, models: Done({}))
    with pytest.raises(IncompleteError) as found:
        run_parts([job], Cursed(0, 1), Watch())
    assert str(found.value) == (
        "static was lost 3 times with its machine (its node died); the same command starts from "
        "the beginning"
    )


def test_capacity_says_where_each_strategy_ran(call: Call, use: Use) -> None:
    use("studies", Adversary(1, 2))
    words = ("capacity", "--simulated", "--slo", "ttft:80", "-n", "60", "--max-trials", "1")
    words = (*words, "--precision", "0.5", "--slo-attainment", "0.9", "--executor", "ray")
    code, out, err = call(*words, "--output", "c")
    assert code == 0
    assert "static ran on somewhere; continuous ran on somewhere" in out
    assert "Again: batchbench capacity --simulated" in out
    assert "--executor ray" in out
    assert err.count(" on somewhere\n") == 2
    assert json.loads(Path("c/capacity.json").read_text())["nodes"]["static"] == "somewhere"


TINY = ("--batch-size", "2", "--spread", "1", "--load", "all", "--mean-tokens", "4")


def test_a_map_measures_its_first_run_and_its_cells_elsewhere(
    checkpoint: Path, call: Call, use: Use
) -> None:
    adversary = Adversary(2, 2)
    use("predict", adversary)
    words = ("breakeven", "--model", str(checkpoint), *TINY, "--batches", "2", "--measure", "1")
    words = (*words, "--trials", "1", "--output", "m", "--executor", "ray")
    code, out, err = call(*words)
    assert code == 0
    assert "in 1 measured cell have the predicted winner" in " ".join(out.split())
    assert "the first run ran " in err
    assert adversary.begun["the first run"] == 1
    assert len(adversary.begun) == 2
    data = json.loads(Path("m/breakeven.json").read_text())
    assert len(data["machines"]) == 1
    # The same command again measures nothing.
    assert call(*words, "--overwrite")[0] == 0
    assert sum(adversary.begun.values()) == 2


def test_a_ladder_is_one_job_whose_rungs_take_turns_on_one_machine(
    checkpoint: Path, call: Call, use: Use
) -> None:
    adversary = Adversary(3, 4)
    use("studies", adversary)
    words = ("ladder", "-b", "3", "-n", "5", "--long-tokens", "6", "--rounds", "1")
    words = (*words, "--device", "cpu", "--model", str(checkpoint), "--rungs", "notebook,lean")
    code, out, _ = call(*words, "--executor", "slurm", "--output", "l")
    assert code == 0
    assert adversary.begun == {"the ladder": 1}
    data = json.loads(Path("l/ladder.json").read_text())
    assert [rung["name"] for rung in data["rungs"]] == ["notebook", "lean"]
    assert "Again: batchbench ladder" in out
    assert sorted(file.name for file in Path("l").iterdir()) == [
        *("ladder.json", "ladder.png", "ladder.svg", "recordings"),
    ]


def test_a_sweep_on_unlike_machines_is_marked_as_suspect() -> None:
    def swept(*environments: dict[str, Any]) -> SweepResult:
        grid = Grid({"seed": tuple(range(len(environments)))})
        rest = {"verification": {"wrong": 0}, "validity": {"status": "valid", "reasons": []}}
        data = [{**rest, "environment": facts, "model": {"name": "m"}} for facts in environments]
        cells = [CellResult(cell, own) for cell, own in zip(grid.cells, data, strict=True)]
        return SweepResult(grid, GoalsSpec(), cells, [], 0)

    other = {**FACTS, "hostname": "b"}
    alike, unlike = swept(FACTS, other), swept(FACTS, other, {**other, "gpu": "H100"})
    assert kinds_of([FACTS, other]) == ["X none, torch 2.9 (a, b)"]
    assert sentence(alike, None) == "."
    assert notes(alike, None, {}) == []
    assert sentence(unlike, None) == "cells ran on 2 kinds of machines."
    machines = ["X none, torch 2.9 (a, b)", "X H100, torch 2.9 (b)"]
    assert notes(unlike, None, {}) == [
        f"suspect: cells ran on 2 kinds of machines ({'; '.join(machines)}), so compare strategies "
        "within a cell, not across cells"
    ]
    assert json.loads(to_json(unlike, "", {}))["machines"] == machines
    styles = [str(render(s, None, {}).renderables[0].style) for s in (alike, unlike)]  # type: ignore[attr-defined]
    assert styles == ["bold", "bold yellow"]


# Several clients of one server

CLIENTS = ("--clients", "2", "--strategy", "continuous", "--executor", "ray")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """Clients are threads of this process."""
    executor = Threads(2)
    monkeypatch.setattr("batchbench.studies.executors.spec.make_executor", lambda *_: executor)
    monkeypatch.setattr("batchbench.batching.remote.clients._own_hosts", lambda: ("127.0.0.1",))
    return executor


@pytest.fixture
def url() -> Iterator[str]:
    with serving(Schedule(slots=32, step_ns=2 * MS), Manner("vllm")) as server:
        yield server.url


def test_clients_of_an_executor_share_the_requests_of_a_run(
    call: Call, threads: Threads, url: str
) -> None:
    words = ("run", "--target", url, "--request-rate", "100", "-n", "24", "--output-tokens", "4")
    code, out, err = call(*words, *CLIENTS, "--trials", "2", "-o", "r")
    assert code == 0
    assert err.startswith("waiting for clients (0 of 2 are here) …\nwaiting for clients (1 of 2")
    assert " 2 clients (2 on " in " ".join(out.split())
    clients = json.loads(Path("r/result.json").read_text())["server"]["clients"]
    assert [client["requests"] for client in clients["each"]] == [12, 12]
    assert not threads.running


def test_a_sweep_over_rates_loads_one_server_with_all_clients(
    call: Call, threads: Threads, url: str
) -> None:
    words = ("sweep", "--target", url, "--request-rate", "50,100", "-n", "12", "--trials", "1")
    code, _, _ = call(*words, "--output-tokens", "4", *CLIENTS, "-o", "s")
    assert code == 0
    cells = json.loads(Path("s/sweep.json").read_text())["cells"]
    assert [len(cell["server"]["clients"]["each"]) for cell in cells] == [2, 2]


def test_a_capacity_is_that_of_one_server_under_all_clients(
    call: Call, threads: Threads, url: str
) -> None:
    words = ("capacity", "--target", url, "--slo", "e2el:200", "-n", "40", "--max-trials", "1")
    words = (*words, "--precision", "1", "--slo-attainment", "0.5", "--output-tokens", "20")
    code, out, _ = call(*words, *CLIENTS, "-o", "c")
    assert code == 0
    data = json.loads(Path("c/capacity.json").read_text())
    assert len(data["clients"]) == 2
    assert data["nodes"] is None
    assert "2 clients share the requests (" in out


def test_a_client_without_a_place_or_that_ends_is_an_error(
    threads: Threads, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchbench.studies.executors.jobs.PLACES_S", 0.0)
    options = {"target": url, "clients": 3, "strategy": "continuous", "request_rate": 100.0}
    experiment = Experiment.of({**options, "queue_size": 12, "verify": "none"})
    with pytest.raises(IncompleteError, match="--clients 3: only 2 can run at once; lower it"):
        conduct(experiment, Watch(), start=clients_on(threads))
    assert not threads.running
    with (
        clients_on(Threads(1))(lambda: None, 1) as look,
        pytest.raises(IncompleteError, match=r"--clients: client 1 on .*: it ended"),
    ):
        list(iter(look, 1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--executor", "ray"), "--executor ray: a run has no independent parts; give"),
        (
            ("run", "--target", "http://a:1", "--target=http://b:1"),
            "--target: there are several; give one, or compare them with batchbench sweep",
        ),
    ],
)
def test_a_run_has_one_server_and_no_parts(call: Call, words: tuple[str, ...], said: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert said in err


def commands_of_the_page() -> list[str]:
    """Return the commands in docs/clusters.md, continued lines joined."""
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text("utf-8")
    lines = page.replace("\\\n", " ").splitlines()
    return [line.split("$ ")[1] for line in lines if "$ batchbench " in line]


@pytest.mark.parametrize("command", commands_of_the_page())
def test_commands_of_the_page_get_as_far_as_their_executor(
    command: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(spec: ExecutorSpec, experiments: Sequence[Experiment], *_: object) -> None:
        assert experiments
        raise UsageError(f"reached {spec.executor}")

    for place in (
        "cli.studies",
        "cli.predict",
        "studies.executors.spec",
    ):
        monkeypatch.setattr(f"batchbench.{place}.make_executor", reached)
    monkeypatch.setattr("batchbench.studies.sweep.run.ask_servers", lambda grid: {})
    words = shlex.split(command.replace("/shared/", "shared-"))[1:]
    executor = dict(itertools.pairwise(words)).get("--executor")
    if executor is None:  # clients on this machine, of a server that is not there
        words[words.index("http://server:8000")] = "http://127.0.0.1:9"
    code, _, err = call(*words)
    assert code == 2
    said = f"reached {executor}" if executor else "http://127.0.0.1:9 refuses connections"
    assert err.splitlines()[-1].startswith(f"batchbench: {said}")
