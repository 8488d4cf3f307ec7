"""Studies on a Ray cluster of two nodes and through submitit, with nodes and jobs killed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.executors import Logged, grid_of, swept
from support.schedules import Schedule
from support.servers import Manner, serving

from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import Outcome, conduct
from batchbench.errors import IncompleteError, UsageError
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.capacity.search import (
    CapacityQuery,
    CapacityWatch,
    find_capacity,
    find_capacity_on,
)
from batchbench.studies.executors.jobs import Ended, Failed, Job, Needs, Unlike, clients_on
from batchbench.studies.sweep.run import Store
from batchbench.version import __version__

pytestmark = [
    pytest.mark.cluster,
    # Ray's own files and sockets, closed when Python ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NEEDS = Needs({"batchbench": __version__})


@pytest.fixture(autouse=True)
def support_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of an executor import ``support``."""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each; the second is ``worker``."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.worker = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_a_node_of_ray_that_dies_loses_no_cell_and_repeats_none(
    two_nodes: Any, tmp_path: Path
) -> None:
    from batchbench.studies.executors.ray_cluster import RayCluster

    logged = Logged(tmp_path / "log", tmp_path / "cluster", pause_s=0.2)

    def kill() -> None:
        while len(logged.begun()) < 6:
            time.sleep(0.01)
        two_nodes.remove_node(two_nodes.worker, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    executor = RayCluster("auto", Watch(), NEEDS)
    with closing(executor):
        table = swept(tmp_path / "cluster", grid_of(10), executor, logged)
    killer.join()
    assert table == swept(tmp_path / "alone", grid_of(10))
    assert not logged.repeated()
    assert set(logged.begun()) == set(range(10))
    assert len(logged.begun()) <= 12
    # A machine of another kind is refused before it serves anything.
    with (
        closing(
            RayCluster("auto", Watch(), Needs({**NEEDS.like, "cpu": "another"}, same=True))
        ) as other,
        pytest.raises(UsageError, match=r"no node can be used: its cpu is .*; --any-hardware uses"),
    ):
        swept(tmp_path / "other", grid_of(1), other)


def test_a_job_of_submitit_that_is_killed_loses_no_cell_and_repeats_none(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    from batchbench.studies.executors.slurm import Slurm

    def slurm(**like: str) -> Slurm:
        return Slurm(
            tmp_path / "jobs",
            Watch(),
            Needs({**NEEDS.like, **like}, same=True),
            parallel=2,
            cluster="local",
            grace_s=0.3,
        )

    logged = Logged(tmp_path / "log", tmp_path / "cluster", kills=(1,))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "7_submitted.pkl").touch()  # of a sweep that was killed
    with closing(slurm()) as executor:
        table = swept(tmp_path / "cluster", grid_of(3), executor, logged)
        files = sorted(file.name for file in (tmp_path / "jobs").glob("*_*"))
    assert table == swept(tmp_path / "alone", grid_of(3))
    assert not logged.repeated()
    assert sorted(logged.begun()) == [0, 1, 1, 2]
    assert not [name for name in files if name.endswith(".pkl")]
    assert not (tmp_path / "jobs").exists()
    with closing(slurm(cpu="another")) as executor:
        executor.submit(Job("a", lambda watch, models: Failed("never")))
        ended: list[Ended] = []
        while not ended:
            ended += executor.wait()
    assert isinstance(ended[0].outcome, Unlike)
    assert len(Store(tmp_path / "cluster")) == 3


def ray() -> Any:
    from batchbench.studies.executors.ray_cluster import RayCluster

    return RayCluster("auto", Watch(), NEEDS)


def submitit(folder: Path) -> Any:
    from batchbench.studies.executors.slurm import Slurm

    return Slurm(folder, Watch(), NEEDS, parallel=2, cluster="local", grace_s=0.3)


def asked(url: str, **options: object) -> Experiment:
    own = {"target": url, "clients": 2, "strategy": "continuous", "request_rate": 100.0}
    sizes = {"queue_size": 24, "output_tokens": "4", "trials": 1, "verify": "none"}
    return Experiment.of({**own, **sizes, **options})


def check_clients(outcome: Outcome) -> None:
    """Check that two clients on this machine have served everything."""
    (recording,) = outcome.recordings["continuous"]
    assert recording.requests.due_ns.tolist() == outcome.workload.due_ns.tolist()
    about = recording.header.about["clients"]
    assert [client["requests"] for client in about] == [12, 12]
    assert all(abs(client["offset_ns"]) <= client["within_ns"] for client in about)


class Killing(Watch):
    """Kills something when the second trial begins."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        if trial == 1:
            self._kill()


def test_nodes_of_ray_are_clients_of_one_server_and_search_capacities(
    two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchbench.studies.executors.jobs.PLACES_S", 5.0)
    simulated = Experiment.of({"queue_size": 60, "request_rate": 1.0}, simulated=True)
    query = CapacityQuery(GoalsSpec(slo=("ttft:80",)), 0.9, 1, 0.5)
    with serving(Schedule(slots=32), Manner("vllm")) as server, closing(ray()) as executor:
        found = find_capacity_on(executor, simulated, query, CapacityWatch())
        alone = find_capacity(simulated, query)
        assert [(c.low, c.high) for c in found.capacities] == [
            (c.low, c.high) for c in alone.capacities
        ]
        start = clients_on(executor)
        for _ in range(2):  # the second run finds the places free again
            check_clients(conduct(asked(server.url), Watch(), start=start))
        with pytest.raises(IncompleteError, match="--clients 3: only 2 can run at once; lower it"):
            conduct(asked(server.url, clients=3), Watch(), start=start)

        def kill() -> None:
            two_nodes.remove_node(two_nodes.worker, allow_graceful=False)

        killed = conduct(asked(server.url, trials=4), Killing(kill), start=start)
    assert len(killed.recordings["continuous"]) == 1
    assert killed.stopped is not None
    assert [len(failure["failed"]) for failure in killed.failures] == [12, 12]
    assert killed.failures[0]["failed"][0]["kind"] == "client_lost"


def test_jobs_of_submitit_are_clients_of_one_server_and_search_capacities(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    simulated = Experiment.of({"queue_size": 60, "request_rate": 1.0}, simulated=True)
    query = CapacityQuery(GoalsSpec(slo=("ttft:80",)), 0.9, 1, 0.5)
    with (
        serving(Schedule(slots=32), Manner("vllm")) as server,
        closing(submitit(tmp_path / "jobs")) as executor,
    ):
        found = find_capacity_on(executor, simulated, query, CapacityWatch())
        check_clients(conduct(asked(server.url), Watch(), start=clients_on(executor)))
    assert [c.low for c in found.capacities] == [
        c.low for c in find_capacity(simulated, query).capacities
    ]
    assert not (tmp_path / "jobs").exists()
