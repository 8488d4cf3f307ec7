"""Energy: counters as machines have them, made up; a figure only where all of it was counted."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.results import result_of, shown, trials_of

from batchbench.batching import bench as conducting
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.machine import (
    Counter,
    EnergyMeter,
    counters_for,
    gpu_clock_mhz,
    gpu_driver,
    nvml_gpu,
    rapl_packages,
)
from batchbench.batching.models import ModelSpec
from batchbench.batching.recording import Recording
from batchbench.batching.session import conduct
from batchbench.reports import metrics
from batchbench.workloads.spec import WorkloadSpec

RANGE_UJ = 262_143_328_850

Domain = Callable[..., Path]


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    """Adds a domain to the tree, as the kernel shows it."""

    def add(folder: str, name: str, energy_uj: int = 0, range_uj: int = RANGE_UJ) -> Path:
        made = tmp_path / folder
        made.mkdir()
        for file, value in (
            ("name", name),
            ("energy_uj", energy_uj),
            ("max_energy_range_uj", range_uj),
        ):
            (made / file).write_text(f"{value}\n")
        return made / "energy_uj"

    return add


def test_packages_are_counted_and_nothing_twice(domain: Domain, tmp_path: Path) -> None:
    domain("intel-rapl:0", "package-0")
    domain("intel-rapl:1", "package-1")
    domain("intel-rapl:2", "psys")
    domain("intel-rapl:0:0", "core")
    domain("intel-rapl:0:1", "dram")
    domain("intel-rapl-mmio:0", "package-0")
    (tmp_path / "dtpm").mkdir()
    names = [package.name for package in rapl_packages(tmp_path)]
    assert names == ["rapl package-0", "rapl package-1"]


def test_joules_are_the_sum_over_packages(domain: Domain, tmp_path: Path) -> None:
    one = domain("intel-rapl:0", "package-0", 1_000_000)
    two = domain("intel-rapl:1", "package-1", 70_000_000)
    with EnergyMeter(counters_for("cpu", tree=tmp_path)) as meter:
        one.write_text("3500000\n")
        two.write_text("70250000\n")
    assert meter.about() == {
        "energy_joules": pytest.approx(2.75),
        "energy_counters": ["rapl package-0", "rapl package-1"],
    }


def test_a_counter_that_wraps_is_followed(domain: Domain, tmp_path: Path) -> None:
    file = domain("intel-rapl:0", "package-0", RANGE_UJ - 4_000_000)
    with EnergyMeter(counters_for("cpu", tree=tmp_path)) as meter:
        file.write_text("6000000\n")
    assert meter.about()["energy_joules"] == pytest.approx(10)


def test_several_wraps_are_seen_since_it_is_read_in_between(domain: Domain, tmp_path: Path) -> None:
    """A small range makes the reading frequent: twice as often as it could wrap at 1 kW."""
    file = domain("intel-rapl:0", "package-0", 0, range_uj=20_000_000)
    with EnergyMeter(counters_for("cpu", tree=tmp_path)) as meter:
        for value in (15, 10, 5):  # 15 J, then 15 J, then 15 J: wrapped twice
            whole = tmp_path / "whole"  # or the meter could read an empty file
            whole.write_text(f"{value}000000\n")
            whole.replace(file)
            patience = time.monotonic() + 10
            while meter._last != [value] and time.monotonic() < patience:
                time.sleep(0.001)
    assert meter.about()["energy_joules"] == pytest.approx(45)


def test_a_machine_without_counters_has_no_figure(tmp_path: Path) -> None:
    nothing = {"energy_joules": None, "energy_counters": None}
    for tree in (tmp_path, tmp_path / "absent"):
        with EnergyMeter(counters_for("cpu", tree=tree)) as meter:
            pass
        assert meter.about() == nothing


@pytest.mark.parametrize("content", ["", "not a number"])
def test_one_package_that_cannot_be_read_takes_the_figure_away(
    domain: Domain, tmp_path: Path, content: str
) -> None:
    domain("intel-rapl:0", "package-0")
    domain("intel-rapl:1", "package-1").write_text(content)
    assert counters_for("cpu", tree=tmp_path) == []


def test_without_permission_there_is_none(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = domain("intel-rapl:0", "package-0")
    read = Path.read_text

    def refused(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == file:  # root may read anything, so the mode of the file would prove nothing
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    assert counters_for("cpu", tree=tmp_path) == []


def test_a_counter_that_vanishes_leaves_no_half_figure(domain: Domain, tmp_path: Path) -> None:
    kept = domain("intel-rapl:0", "package-0")
    lost = domain("intel-rapl:1", "package-1")
    with EnergyMeter(counters_for("cpu", tree=tmp_path)) as meter:
        kept.write_text("9000000\n")
        lost.unlink()
    assert meter.about() == {"energy_joules": None, "energy_counters": None}


def test_a_counter_that_did_not_move_tells_nothing(domain: Domain, tmp_path: Path) -> None:
    domain("intel-rapl:0", "package-0", 5)
    with EnergyMeter(counters_for("cpu", tree=tmp_path)) as meter:
        pass
    assert meter.about()["energy_joules"] is None


# GPUs


class Nvml(ModuleType):
    """As much of pynvml as is used, for one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: float | None, broken: bool = False) -> None:
        super().__init__("pynvml")
        self.millijoules, self.broken = millijoules, broken

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-abc":
            raise self.NVMLError("not found")
        return uuid

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.95"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert handle == "GPU-abc"
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:  # noqa: N802
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


def test_a_gpu_is_found_by_its_id_and_counts_millijoules(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml(5_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    host = domain("intel-rapl:0", "package-0")
    for tree, also, names in (
        (tmp_path / "absent", 0.0, ["nvml GPU-abc"]),
        (tmp_path, 2.0, ["nvml GPU-abc", "rapl package-0"]),
    ):
        nvml.millijoules = 5_000
        with EnergyMeter(counters_for("cuda:0", "abc", tree), iter([0.0, 2.0]).__next__) as meter:
            nvml.millijoules = 12_500
            host.write_text("2000000\n")
        assert meter.about() == {"energy_joules": 7.5 + also, "energy_counters": names}
        host.write_text("0\n")


@pytest.mark.parametrize("took_s", [1.9, 2.0])
def test_a_gpu_says_nothing_about_less_than_two_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, took_s: float
) -> None:
    nvml = Nvml(5_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    counters = counters_for("cuda:0", "abc", tmp_path)
    with EnergyMeter(counters, iter([7.0, 7.0 + took_s]).__next__) as meter:
        nvml.millijoules = 12_500
    assert meter.about()["energy_joules"] == (7.5 if took_s >= 2 else None)


def test_driver_and_clocks_are_those_of_the_gpu_with_the_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVML counts all GPUs of the machine, torch only those that it is shown."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(5_000))
    assert gpu_driver("abc") == "580.95"
    assert gpu_clock_mhz("abc") == {"sm": 1980, "memory": 2619}
    assert (gpu_driver("other"), gpu_clock_mhz("other")) == (None, None)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(5_000, broken=True))
    assert (gpu_driver("abc"), gpu_clock_mhz("abc")) == (None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (gpu_driver("abc"), gpu_clock_mhz("abc")) == (None, None)


@pytest.mark.parametrize(
    "nvml", [Nvml(None), Nvml(5, broken=True), None], ids=["no counter", "no driver", "no package"]
)
def test_a_gpu_that_does_not_tell_is_not_replaced_by_its_host(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None
) -> None:
    domain("intel-rapl:0", "package-0")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvml_gpu("abc") is None
    assert counters_for("cuda:0", "abc", tmp_path) == []


@pytest.mark.parametrize("change", ["lost", "restarted"])
def test_a_driver_that_goes_away_leaves_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    nvml = Nvml(5_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with EnergyMeter(counters_for("cuda:0", "abc", tmp_path)) as meter:
        nvml.millijoules = None if change == "lost" else 10
    assert meter.about()["energy_joules"] is None


def test_other_devices_have_no_counter(domain: Domain, tmp_path: Path) -> None:
    domain("intel-rapl:0", "package-0")
    assert counters_for("mps", None, tmp_path) == []


# In results


def with_energy(trials: list[Recording], *joules: float | None) -> list[Recording]:
    return [
        replace(t, header=replace(t.header, about={**t.header.about, "energy_joules": j}))
        for t, j in zip(trials, joules, strict=True)
    ]


def test_a_result_has_joules_and_joules_a_useful_token() -> None:
    static = with_energy(trials_of("static"), 10, 30, 20, 22)
    summary = metrics.summary(static)
    assert summary["energy_joules"] == 21
    assert summary["joules_per_output_token"] == 21 / 680
    assert metrics.summary([static[1]])["joules_per_output_token"] == 30 / 680
    result = result_of(
        {"static": static, "continuous": with_energy(trials_of("continuous"), 7, 7, 7, 7)}
    )
    text = shown(result, 120)
    assert "Energy per output token" in text
    assert "0.33×" in text


def test_one_trial_that_was_not_counted_and_there_is_none() -> None:
    static = with_energy(trials_of("static"), 10, None, 20, 22)
    assert metrics.summary(static)["energy_joules"] is None
    result = result_of({"static": static, "continuous": trials_of("continuous")})
    assert "Energy" not in shown(result, 120)


def test_each_trial_of_a_run_is_counted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter("made up", itertools.count(step=0.5).__next__)
    monkeypatch.setattr(conducting, "counters_for", lambda *device: [counter])
    outcome = conduct(
        Experiment(
            WorkloadSpec(queue_size=2, long_tokens=2, short_tokens=2),
            ModelSpec(model=str(checkpoint), device="cpu"),
            ServingSpec(batch_size=2),
            TrialsSpec(trials=2, verify="none"),
        )
    )
    for trials in outcome.recordings.values():
        for recording in trials:
            assert recording.header.about["energy_joules"] == 0.5
            assert recording.header.about["energy_counters"] == ["made up"]
