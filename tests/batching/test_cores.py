"""Cores: hyperthreads count once, and a container's quota counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from batchbench.batching import machine as cores
from batchbench.batching.engines.torch import hardware
from batchbench.batching.machine import usable_cores
from batchbench.batching.models import ModelSpec
from batchbench.batching.models.loading import set_threads

pytestmark = pytest.mark.machine


@pytest.fixture
def eight_threads_of_four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu % 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_hyperthreads_of_a_core_count_once(eight_threads_of_four_cores: Path) -> None:
    assert usable_cores(eight_threads_of_four_cores, Path("none")) == 4


def test_only_those_count_that_the_process_may_use(
    eight_threads_of_four_cores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    assert usable_cores(eight_threads_of_four_cores, Path("none")) == 2


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 4), ("x", 4)],
)
def test_a_containers_quota_is_a_limit(
    eight_threads_of_four_cores: Path, quota: str, expected: int
) -> None:
    (eight_threads_of_four_cores / "cpu.max").write_text(quota + "\n")
    assert usable_cores(eight_threads_of_four_cores, eight_threads_of_four_cores) == expected


def test_the_older_quota_is_read_too(eight_threads_of_four_cores: Path) -> None:
    folder = eight_threads_of_four_cores / "cpu"
    folder.mkdir()
    for quota, expected in ((150_000, 1), (-1, 4)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores(eight_threads_of_four_cores, eight_threads_of_four_cores) == expected


def test_where_nothing_is_told_each_cpu_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert usable_cores(tmp_path, tmp_path) == 3


@pytest.fixture
def threads_put_back() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_put_back")
def test_threads_are_those_asked_for_else_the_users_else_a_core_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loading = "batchbench.batching.models.loading.usable_cores"
    monkeypatch.setattr(loading, lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert set_threads(ModelSpec()) == 1
    assert set_threads(ModelSpec(threads=2)) == 2
    assert set_threads(ModelSpec()) == 1  # not what an earlier experiment asked for
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(ModelSpec()) == 3
    assert cores.usable_cores() >= 1


# Comparing two machines


def test_what_times_depend_on_is_hardware_software_and_execution() -> None:
    groups = (*cores.HARDWARE, *cores.SOFTWARE, *cores.EXECUTION)
    assert sorted(cores.MUST_MATCH_FOR_TIMES) == sorted(groups)


def test_every_fact_that_must_match_is_one_that_a_run_records() -> None:
    environment = cores.environment() | hardware.torch_environment("cpu")
    model = dict.fromkeys(("device", "dtype", "execution", "weights_digest"))
    facts = cores.facts_of(environment, model, engine="slots")
    assert facts.keys() >= {*cores.MUST_MATCH_FOR_TIMES, *cores.MUST_MATCH_FOR_OUTPUTS}


def test_a_difference_names_the_fact_and_both_values() -> None:
    base = {"python": "3.11.2", "cpu": "one", "hostname": "a"}
    new = {"python": "3.11.9", "cpu": "two", "gpu": "H200"}
    assert cores.differences(base, new) == [
        ("cpu", "one", "two"),
        ("hostname", "a", None),
        ("gpu", None, "H200"),
    ]
    assert cores.differences(base, new, ("gpu", "python")) == [("gpu", None, "H200")]
    assert cores.differences({"python": "3.11.2"}, {"python": "3.12.2"})
