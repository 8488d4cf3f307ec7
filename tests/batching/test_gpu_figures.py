"""Figures of the GPU path that need no GPU: what is timed how, and what was met before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda_stand_in import StandIn
from support.models import LLAMA, TINY, MakeModel

from batchbench.batching import trials
from batchbench.batching.bench import LocalBench
from batchbench.batching.dry_run import estimate
from batchbench.batching.engines.torch import build, hardware
from batchbench.batching.engines.torch.hardware import (
    GRAPH_RUNS,
    measure_arithmetic,
    measure_bandwidth,
    measure_launching,
    measure_products,
)
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.reports.metrics import counters
from batchbench.reports.result import make_result
from batchbench.workloads.spec import WorkloadSpec


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in computes on the CPU, and takes its memory."""
    monkeypatch.setattr(hardware, "_LEAST_GPU_BYTES", 2**20)
    monkeypatch.setattr(hardware, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(hardware, "_LARGE", 32)


def experiment(checkpoint: Path, **serving: Any) -> Experiment:
    return Experiment(
        WorkloadSpec(queue_size=7, long_tokens=30, short_tokens=5, prompt_tokens="1:20"),
        ModelSpec(model=str(checkpoint), device="cuda", dtype="float32"),
        ServingSpec(batch_size=3, **serving),
        TrialsSpec(trials=2),
    )


# Products, launching, arithmetic


@pytest.mark.parametrize("measure", [measure_products, measure_launching])
def test_products_are_timed_as_a_captured_graph(
    make_model: MakeModel, cuda_stand_in: StandIn, measure: Any
) -> None:
    """Launched one by one, they would take as long as their launches take the host."""
    model = make_model(device="cuda:0", dtype="float32")
    before = len(cuda_stand_in.graphs)
    assert measure(model, 4, turns=3) > 0
    (graph,) = cuda_stand_in.graphs[before:]
    per_run = 4 * 2 + 1  # four products in each of two layers, and the head
    assert graph.launches.total() >= GRAPH_RUNS * per_run
    assert graph.launches.total() % GRAPH_RUNS == 0
    assert graph.replays == 1 + hardware._WARM_UPS + 3


def test_the_rate_of_arithmetic_is_that_of_a_large_product(
    make_model: MakeModel, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(device="cuda:0", dtype="float32")
    monkeypatch.setattr(hardware, "device_median_s", lambda *given, **named: 2.0)
    weights = 2 * (96 * 32 + 32 * 32 + 2 * 128 * 32) + 300 * 32
    assert measure_arithmetic(model, 4) == pytest.approx(2.0 * 4 * weights / 32**3)


def test_a_cpu_has_two_causes_only(tiny: Any) -> None:
    assert measure_launching(tiny, 4) is None
    assert measure_arithmetic(tiny, 4) is None


def test_a_large_buffer_is_read_on_the_device(
    cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_LEAST_GPU_BYTES", 2**22)
    found = measure_bandwidth(torch.device("cuda:0"), turns=2)
    assert found.buffer_bytes == 2**22
    assert cuda_stand_in.peak(0) >= 2**22


# Warm-up and servings


def test_every_shape_that_is_timed_was_met_before(
    checkpoint: Path, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU loads a kernel when it first meets its shape, which takes as long as many steps."""
    monkeypatch.setattr(trials, "TRIAL_S", 0.001)
    shapes: Counter[tuple[int, ...]] = Counter()
    forward = SlotsEngine._forward_pass

    def noted(engine: Any, ids: torch.Tensor, layout: Any, keep: torch.Tensor | None) -> Any:
        kept = -1 if keep is None else len(keep)
        fresh = tuple(len(prompts.valid) for prompts in layout.fresh)
        shapes[len(ids), kept, layout.decoding, layout.length, *fresh] += 1
        return forward(engine, ids, layout, keep)

    monkeypatch.setattr(SlotsEngine, "_forward_pass", noted)
    bench = LocalBench(experiment(checkpoint), Watch())
    bench.warm_up(most=2)
    met = set(shapes)
    list(bench.rounds())
    assert met
    assert set(shapes) == met


def test_a_short_trial_is_served_several_times_and_stays_the_workload(
    checkpoint: Path, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(checkpoint)
    monkeypatch.setattr(trials, "TRIAL_S", 0.0)
    once = conduct(asked)
    monkeypatch.setattr(trials, "TRIAL_S", 1e3)
    monkeypatch.setattr(trials, "servings_for", lambda duration_s, trial_s: 3)
    often = conduct(asked)
    for name, recordings in often.recordings.items():
        for recording, single in zip(recordings, once.recordings[name], strict=True):
            assert recording.header.about["servings"] == 3
            assert counters(recording) == counters(single)
            assert recording.header.about["computed_passes"] == single.num_steps
            assert recording.tokens is not None
            assert single.tokens is not None
            assert recording.tokens.tolist() == single.tokens.tolist()
    assert often.verification == once.verification
    assert often.verification.requests_checked == 7
    result = make_result(often).data
    assert [data["servings"] for data in result["strategies"].values()] == [3, 3]
    assert result["workload"] == make_result(once).data["workload"]
    assert result["environment"]["gpu_clock_mhz"] is None


def test_another_workload_on_the_same_bench_is_served_once(
    checkpoint: Path, cuda_stand_in: StandIn
) -> None:
    bench = LocalBench(experiment(checkpoint), Watch())
    bench._servings = {"static": 3, "continuous": 3}
    other = bench.on(bench.make(WorkloadSpec(queue_size=2, long_tokens=3, short_tokens=2)))
    recording = other.observe(other.strategy("static"), 0)
    assert "servings" not in recording.header.about
    assert bench.observe(bench.strategy("static"), 0).header.about["servings"] == 3


def test_a_longer_time_of_a_pair_counts_all_its_servings(
    checkpoint: Path, cuda_stand_in: StandIn
) -> None:
    asked = replace(experiment(checkpoint), trials=TrialsSpec(trials=2, max_time=1.0))
    bench = LocalBench(asked, Watch())
    bench.check_time(trials.WarmUp(2, True, 0.0, 1_000_000))
    bench._servings = {"static": 99}
    with pytest.raises(Exception, match="--max-time 1: one pair of trials takes about"):
        bench.check_time(trials.WarmUp(2, True, 0.0, 1_000_000))


# The estimate


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_an_estimate_on_a_gpu_counts_launches(
    checkpoint: Path, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Products of 124M parameters take 0.1 ms of a GPU, and their launches several times that."""
    kinds: list[bool] = []

    def kernel_s(device: torch.device, *, replayed: bool) -> float:
        kinds.append(replayed)
        return 1e-3

    monkeypatch.setattr(build, "_time_kernel", kernel_s)
    monkeypatch.setattr(build, "_time_product", lambda *given: (0.0, False))
    monkeypatch.setattr(build, "supports_triton", lambda device: False)
    found = estimate(experiment(checkpoint, engine=engine), Watch())
    of_layer, beside = build.LEAN if engine == "slots" else build.WITH_TRANSFORMERS
    assert found.sizes is not None
    assert found.sizes.launches == 2 * of_layer + beside
    assert kinds == [engine == "slots"]
    assert found.seconds is not None
    lengths = [count * found.sizes.launches * 1e-3 for count in found.steps.values()]
    expected = sum(length * trials.servings_for(length, 1.0) for length in lengths) * 2
    assert found.seconds == pytest.approx(expected, rel=1e-3)
    (line,) = [line for line in found.lines() if line.startswith("time")]
    assert f"launching {found.sizes.launches} kernels" in line


def test_the_time_of_a_kernel_is_that_of_many_in_a_row(cuda_stand_in: StandIn) -> None:
    device = torch.device("cuda:0")
    for replayed in (True, False):
        before = len(cuda_stand_in.graphs)
        assert 0 < build._time_kernel(device, replayed=replayed) < 0.01
        graphs = cuda_stand_in.graphs[before:]
        assert [graph.launches.total() for graph in graphs] == [100] * replayed


@pytest.mark.parametrize(
    ("config", "depth", "counted"),
    [(TINY, "n_layer", build.LEAN), (LLAMA, "num_hidden_layers", build.LLAMA_LEAN)],
    ids=["gpt2", "llama"],
)
def test_launches_that_an_estimate_counts_are_those_of_captured_passes(
    config: Any,
    depth: str,
    counted: tuple[int, int],
    make_model: MakeModel,
    cuda_stand_in: StandIn,
) -> None:
    """With Triton's kernels, test_triton_engine.py counts them."""
    counts = []
    for layers in (2, 3):
        model = make_model({**config, depth: layers}, device="cuda:0", dtype="bfloat16")
        build.make_engine("slots", model, 2, 64)
        counts.append(cuda_stand_in.graphs[0].launches.total())  # the full batch
        cuda_stand_in.graphs.clear()
    of_layer, beside = counted
    assert counts == [2 * of_layer + beside, 3 * of_layer + beside]


@pytest.mark.parametrize(
    ("triton", "counted"), [(False, build.LLAMA_LEAN), (True, build.LLAMA_WITH_TRITON)]
)
def test_an_estimate_counts_the_launches_of_the_kernels_that_are_used(
    triton: bool,
    counted: tuple[int, int],
    make_model: MakeModel,
    tmp_path: Path,
    cuda_stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model(LLAMA).module.save_pretrained(tmp_path)
    monkeypatch.setattr(build, "_time_kernel", lambda device, *, replayed: 1e-6)
    monkeypatch.setattr(build, "supports_triton", lambda device: triton)
    of_layer, beside = counted
    sizes = estimate(experiment(tmp_path), Watch()).sizes
    assert sizes is not None
    assert sizes.launches == 2 * of_layer + beside


def test_the_buffer_that_measures_memory_refuses_no_batch(
    checkpoint: Path, cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes at most half of what the cache leaves."""
    monkeypatch.setattr(hardware, "_LEAST_GPU_BYTES", 2**42)
    monkeypatch.setattr(hardware, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(build, "_time_kernel", lambda device, *, replayed: 1e-6)
    sizes = estimate(experiment(checkpoint), Watch()).sizes
    assert sizes is not None
    assert sizes.room_bytes / 3 < sizes.peak_bytes <= sizes.room_bytes
