"""Executors: any order of ends and losses gives the same table; options; kinds of machines."""

from __future__ import annotations

import builtins
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.executors import FACTS, Adversary, grid_of, swept
from support.laws import law
from support.program import Call, caller

from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.errors import IncompleteError, UsageError
from batchbench.studies.executors.jobs import Ended, Executor, Failed, Job, Worker, run_jobs, unlike
from batchbench.studies.executors.spec import ExecutorSpec, make_executor
from batchbench.studies.sweep.run import Store


@pytest.fixture(scope="module")
def alone() -> bytes:
    """The table of four cells, served by this process."""
    with tempfile.TemporaryDirectory() as folder:
        return swept(Path(folder), grid_of(4, 3))


@settings(law, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_any_order_of_ends_and_losses_gives_the_table_of_one_process(
    alone: bytes, seed: int, slots: int
) -> None:
    adversary = Adversary(seed, slots)
    with tempfile.TemporaryDirectory() as folder:
        assert swept(Path(folder), grid_of(4, 3), adversary) == alone
        assert len(Store(Path(folder))) == 4
    assert set(adversary.begun.values()) == {1}
    assert len(adversary.begun) == 4


def test_a_cell_that_is_lost_three_times_is_missing_and_the_others_are_kept(tmp_path: Path) -> None:
    cursed = grid_of(4).cells[2].digest

    class Cursing(Adversary):
        def _outcome(self, job: Job) -> Any:
            return super()._outcome(job) if job.key == cursed else job.work(Watch(), ModelCache())

    adversary = Cursing(0, 2, losses=99)
    adversary._chance.random = lambda: 0.0  # type: ignore[method-assign]
    with pytest.raises(IncompleteError) as found:
        swept(tmp_path, grid_of(4), adversary)
    assert found.value.exit_code == 1
    assert str(found.value) == (
        "1 cell missing, since each was lost 3 times with its machine: seed 2 (it was unlucky); "
        "the same command continues from the cells that are kept"
    )
    assert adversary.lost[cursed] == 3
    assert len(Store(tmp_path)) == 3
    assert Store(tmp_path).failure(grid_of(4).cells[2]) is None
    assert swept(tmp_path, grid_of(4)).count(b"\n") == 9  # the same command continues


def test_a_bug_in_a_job_elsewhere_is_raised_here_and_its_reason_is_kept() -> None:
    def breaks(watch: Watch, models: ModelCache) -> Any:
        raise ZeroDivisionError("made up")

    class Elsewhere(Executor):
        def wait(self) -> Sequence[Ended]:
            job, self._job = self._job, None
            return [] if job is None else [Worker("/no/such/folder", timed=False).run(job)]

    with pytest.raises(RuntimeError, match="made up"):
        list(run_jobs([Job("a", breaks)], Elsewhere()))
    failing = Job("b", lambda watch, models: Failed("too large"))
    (ended,) = run_jobs([failing], Elsewhere())
    assert ended.outcome == Failed("too large")
    assert ended.node


def test_machines_are_of_one_kind_whatever_their_names() -> None:
    assert unlike(FACTS, {**FACTS, "hostname": "b"}) == ""
    assert unlike(FACTS, {**FACTS, "gpu": "H100"}) == "its gpu is H100, not none"
    assert unlike(FACTS, {**FACTS, "gpu": None}) == ""
    assert unlike({"batchbench": "1.0"}, {"batchbench": "0.9"}) == "its batchbench is 0.9, not 1.0"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"slurm_time": 3}, "--slurm-time: is an option of --executor slurm, not of local"),
        (
            {"executor": "slurm", "ray_address": "auto"},
            "--ray-address: is an option of --executor ray, not of slurm",
        ),
        ({"any_hardware": True}, "--any-hardware: is an option of --executor ray or slurm"),
        ({"executor": "ray", "ray_address": "localhost"}, "must be auto or ray://HOST:10001"),
        ({"executor": "dask"}, "--executor dask: must be one of local, ray, slurm"),
        (
            {"executor": "ray", "same_hardware": True, "any_hardware": True},
            "--same-hardware and --any-hardware exclude each other",
        ),
    ],
)
def test_an_option_of_another_executor_is_an_error_by_name(given: Any, said: str) -> None:
    with pytest.raises(UsageError) as found:
        ExecutorSpec(**given)
    assert said in str(found.value)


@pytest.mark.parametrize(("executor", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_answers_with_the_command_to_type(
    executor: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, place = builtins.__import__, {"ray": "ray_cluster", "slurm": "slurm"}[executor]

    def without(name: str, *rest: Any) -> Any:
        if name == f"batchbench.studies.executors.{place}":
            raise ModuleNotFoundError(f"No module named {module}", name=module)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    experiments = [c.experiment for c in grid_of(1).cells if c.experiment is not None]
    with pytest.raises(UsageError) as found:
        make_executor(ExecutorSpec(executor=executor), experiments, tmp_path, Watch())
    assert str(found.value) == (
        f"--executor {executor}: needs {module}; type pip install 'batchbench-llm[{executor}]'"
    )


@settings(law, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_two_clients_do_not_load_one_server_at_the_same_time(seed: int, slots: int) -> None:
    servers = ["a", "b", None]
    jobs = [Job(str(i), lambda watch, models: Failed("over"), servers[i % 3]) for i in range(12)]

    class Watching(Adversary):
        def wait(self) -> Sequence[Ended]:
            busy = [job.server for job in self._jobs if job.server]
            assert len(set(busy)) == len(busy)
            # Nothing waits that could run: other servers, and jobs without one.
            self.most = max(self.most, len(self._jobs))
            return super().wait()

        most = 0

    executor = Watching(seed, slots)
    assert len(list(run_jobs(jobs, executor))) == 12
    assert set(executor.begun.values()) == {1}
    assert executor.most == min(slots, 6)


def test_progress_says_where_cells_ran_and_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("batchbench.cli.studies.make_executor", lambda *_: Adversary(4, 3))
    call: Call = caller(monkeypatch, capsys)
    words = ("sweep", "--simulated", "--queue-size", "5", "--seed", "0:5", "--price-per-hour", "9")
    code, _, err = call(*words, "--output", "s")
    lines = [line for line in err.splitlines() if "done" in line]
    assert code == 0
    assert len(lines) == 6
    assert all(" on somewhere, " in line and " so far" in line for line in lines)
    assert "6/6 done" in lines[-1]
    assert any("running " in line for line in lines)
