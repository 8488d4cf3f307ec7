"""Limits of the machine: the cache's size, bandwidth, products, floors, clocks, peak memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support import models
from support.models import MakeModel

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch import hardware as measuring
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.forward import TransformersForward, make_forward
from batchbench.batching.engines.torch.hardware import (
    ModelClock,
    measure_bandwidth,
    measure_products,
    products,
    reading_of,
)
from batchbench.batching.engines.torch.linear import Kernels
from batchbench.batching.machine import PeakMemory, last_level_cache_bytes
from batchbench.batching.progress import Watch
from batchbench.batching.step_cost import Bandwidth, Ceiling, Reading, middle
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.models.loading import LoadedModel

pytestmark = pytest.mark.machine

LLAMA = {**models.LLAMA, "tie_word_embeddings": False}


# The last-level cache


def cache(tree: Path, cpu: int, index: int, level: int, size: str, shared: str, kind: str) -> None:
    folder = tree / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, value in (
        ("level", level),
        ("size", size),
        ("shared_cpu_list", shared),
        ("type", kind),
    ):
        (folder / name).write_text(f"{value}\n")


def test_each_last_level_cache_counts_once(tmp_path: Path) -> None:
    """Four processors, two of them to a cache of the third level."""
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu), "Data")
        cache(tmp_path, cpu, 1, 1, "512M", str(cpu), "Instruction")
        cache(tmp_path, cpu, 2, 3, "32768K", "0-1" if cpu < 2 else "2-3", "Unified")
    (tmp_path / "cpufreq").mkdir()
    assert last_level_cache_bytes(tmp_path) == 2 * 32 * 2**20


def test_units_are_read(tmp_path: Path) -> None:
    cache(tmp_path, 0, 0, 2, "2M", "0", "Unified")
    assert last_level_cache_bytes(tmp_path) == 2 * 2**20
    cache(tmp_path, 1, 0, 4, "1G", "0-1", "Unified")
    assert last_level_cache_bytes(tmp_path) == 2**30


def test_a_machine_that_does_not_tell_is_not_guessed_at(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) is None
    assert last_level_cache_bytes(tmp_path / "absent") is None
    cache(tmp_path, 0, 0, 3, "large", "0", "Unified")
    (tmp_path / "cpu1" / "cache" / "index0").mkdir(parents=True)  # switched off: no files
    assert last_level_cache_bytes(tmp_path) is None


# Bandwidth


def test_a_gpu_reads_four_gibibytes_where_half_of_the_free_memory_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads 256 MiB in a tenth of a millisecond, as long as a few launches."""
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 50 * 2**20)
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 70 * 2**30)
    gpu = torch.device("cuda")
    assert measuring.buffer_bytes(gpu) == 2**32
    assert measuring.buffer_bytes(gpu, free=2**30) == 2**29
    assert measuring.buffer_bytes(torch.device("cpu")) == 2**28


@pytest.mark.parametrize(
    ("cache_bytes", "free", "buffer", "beyond"),
    [
        (2**20, 2**30, 2**22, True),
        (2**20, 2**22, 2**21, False),
        (None, 2**30, 2**21, None),
        (0, 2**30, 2**21, True),
    ],
    ids=["four times the cache", "half of what is free", "size unknown", "no cache"],
)
def test_the_buffer_is_larger_than_the_cache_where_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
    cache_bytes: int | None,
    free: int,
    buffer: int,
    beyond: bool | None,
) -> None:
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: cache_bytes)
    monkeypatch.setattr(measuring, "free_bytes", lambda device: free)
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 2**21)
    found = measure_bandwidth(torch.device("cpu"), turns=2)
    assert found.buffer_bytes == buffer
    assert found.beyond_cache is beyond
    assert (found.cache_bytes, found.passes) == (cache_bytes, 2)
    assert found.threads == torch.get_num_threads()


def test_the_fastest_way_of_reading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.4, 0.1, 0.2])
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 2**20)
    monkeypatch.setattr(measuring, "median_s", lambda *asked: next(times))
    found = measure_bandwidth(torch.device("cpu"))
    assert found.method == "matrix × vector"
    assert found.bytes_per_s == pytest.approx(2**20 / 0.1)


# Products, and what a step reads


@pytest.mark.parametrize("config", [{}, LLAMA], ids=["gpt2", "llama"])
def test_all_products_of_a_step_are_made_once(make_model: MakeModel, config: dict) -> None:
    model = make_model(config) if config else make_model()
    seen: list[tuple[int, int]] = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None):  # type: ignore[no-untyped-def]
        def product(x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (5, weight.shape[1])
            seen.append(tuple(weight.shape))
            return torch.nn.functional.linear(x, weight, bias)

        return product

    products(model, 5, make)()
    block = (
        [(192, 64), (64, 64)] if config else [(96, 32), (32, 32), (128, 32), (32, 128)]
    )  # of gpt2: attention in and out, MLP in and out
    if config:
        block = [(128, 64), (64, 64), (192, 64), (64, 96)]
    assert sorted(seen) == sorted([*block * 2, (300, 64 if config else 32)])


def test_a_step_reads_all_but_tables_that_are_looked_up(make_model: MakeModel) -> None:
    gpt2, llama = make_model(), make_model(LLAMA)
    found = reading_of(gpt2)
    positions = 128 * 32 * 4  # tokens' embeddings are tied to the last product
    assert found.step_weight_bytes == found.weight_bytes - positions
    assert found.kv_token_bytes == 2 * 2 * 32 * 4
    assert measure_products(gpt2, 4, turns=1) > 0
    untied = reading_of(llama)
    assert untied.step_weight_bytes == untied.weight_bytes - 300 * 64 * 4


def test_the_floor_is_bytes_over_bandwidth_and_the_ceiling_what_binds() -> None:
    speed = Bandwidth(1e9, "sum", 2**30, 2**20, 7, 2)
    reading = Reading("float32", 500, 400, 10)
    weak = Ceiling(speed, reading, products_s=3e-6, rows=8, kv_tokens=60)
    assert weak.floor_s == pytest.approx(1e-6)
    assert weak.bound == "arithmetic"
    assert weak.tokens_per_s == pytest.approx(8 / 3e-6)
    other = replace(weak, bandwidth=replace(speed, bytes_per_s=3e9))
    assert middle([weak, other]).floor_s == pytest.approx(0.5e-6)
    assert middle([weak, other]).reading == weak.reading
    strong = replace(weak, products_s=5e-7)
    assert strong.bound == "memory"
    assert strong.tokens_per_s == pytest.approx(8e6)


@pytest.mark.parametrize(
    ("products_s", "arithmetic_s", "launching_s", "cause"),
    [
        (9e-7, 2e-6, 3e-6, "memory"),
        (5e-6, 2e-7, 3e-6, "launching"),
        (5e-6, 4e-6, 3e-6, "arithmetic"),
        (5e-6, 2e-7, 8e-7, "memory"),
        (5e-6, None, None, "arithmetic"),
    ],
    ids=["products are fast", "launching", "arithmetic", "slow to read", "a CPU"],
)
def test_the_cause_of_a_limit_is_the_slowest_of_three(
    products_s: float, arithmetic_s: float | None, launching_s: float | None, cause: str
) -> None:
    """The floor is 1 µs; the ceiling is what the products leave."""
    speed = Bandwidth(1e9, "sum", 2**30, 2**20, 7, None)
    reading = Reading("bfloat16", 500, 400, 10)
    found = Ceiling(speed, reading, products_s, 8, 60, arithmetic_s, launching_s)
    assert found.bound == cause
    assert found.tokens_per_s == pytest.approx(8 / max(1e-6, products_s))
    drifted = replace(found, launching_s=launching_s and launching_s * 3)
    assert middle([found, drifted, found]) == found


# Within the model, and outside

WORKLOAD = Workload.of("two", [[1, 2, 3], [4, 5]], [6, 3])


def test_all_kernels_give_the_same_tokens(tiny: LoadedModel) -> None:
    outputs = []
    for most in Kernels:
        forward = make_forward(tiny, most)
        engine, _ = make_engine("slots", tiny, 2, WORKLOAD.max_total_tokens, forward=forward)
        outputs.append(Batcher("continuous", engine, 2).serve(WORKLOAD, Watch()).tokens)
    assert all(np.array_equal(outputs[0], other) for other in outputs)
    assert make_forward(tiny, Kernels.PLAIN).extra_bytes == 0


@pytest.mark.parametrize("make", [make_forward, TransformersForward])
def test_the_clock_runs_while_the_model_does_and_once(
    tiny: LoadedModel, make: Callable[[LoadedModel], Forward]
) -> None:
    """A model that takes long to answer takes that long by the clock; nothing is counted twice."""
    clock, times = ModelClock(), iter(range(0, 10**9, 1000))
    forward = clock.timed(make(tiny))
    engine, _ = make_engine("slots", tiny, 2, WORKLOAD.max_total_tokens, forward=forward)
    batcher = Batcher("continuous", engine, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "batchbench.batching.engines.torch.hardware.time.perf_counter_ns",
            lambda: next(times),
        )
        patch.setattr(engine.clock, "now", lambda: 0)
        with clock.on(tiny.module):
            recording = batcher.serve(WORKLOAD, Watch())
    assert clock.ns == recording.num_steps * 1000  # each pass: one reading before, one after
    with clock.on(tiny.module):
        assert clock.ns == 0
    assert not tiny.module._forward_hooks
    assert not tiny.module._forward_pre_hooks


def test_a_timed_pass_is_the_same_to_its_engine(tiny: LoadedModel) -> None:
    plain = make_forward(tiny)
    timed = ModelClock().timed(plain)
    assert timed.cache_dtype is plain.cache_dtype
    assert timed.extra_bytes == plain.extra_bytes
    with pytest.raises(AttributeError):
        timed.nothing  # type: ignore[attr-defined]  # noqa: B018


# Peak memory


def status(folder: Path, rss: int, peak: int) -> None:
    (folder / "status").write_text(f"Name:\tx\nVmHWM:\t{peak:8} kB\nVmRSS:\t{rss:8} kB\n")


def test_growth_is_from_what_was_there_to_the_height(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").touch()
    status(tmp_path, 1000, 5000)
    with PeakMemory("cpu", tmp_path) as memory:
        status(tmp_path, 1200, 1500)
    assert memory.growth_bytes == 500 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_without_a_mark_that_can_be_reset_nothing_is_told(tmp_path: Path) -> None:
    status(tmp_path, 1000, 5000)
    for device, folder in (("cpu", tmp_path / "absent"), ("mps", tmp_path)):
        with PeakMemory(device, folder) as memory:
            pass
        assert memory.growth_bytes is None


def test_a_gpus_graphs_compute_in_memory_that_torch_calls_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def segment(device: int, pool: tuple[int, int], total: int, used: int) -> dict[str, object]:
        sizes = {"total_size": total, "allocated_size": used}
        return {"device": device, "segment_pool_id": pool, **sizes}

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130)
    segments = [segment(1, (0, 0), 900, 130), segment(1, (0, 7), 64, 4), segment(0, (0, 8), 32, 0)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    with PeakMemory("cuda:1") as memory:
        pass
    assert memory.growth_bytes == 30 + 60


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_kernels_own_mark_sees_what_is_taken_and_given_back() -> None:
    """Use a small process, because the kernel may reclaim memory of a large one meanwhile."""
    script = """
import numpy as np
from batchbench.batching.machine import PeakMemory
with PeakMemory("cpu") as memory:
    taken = np.ones(2**24)
    del taken
print(memory.growth_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    growth = done.stdout.decode().strip()
    assert growth == "None" or int(growth) > 2**26
