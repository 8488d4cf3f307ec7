"""The predicted memory: its parts, the limits of the machine, and the largest batch that fits."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from transformers import GPT2Config

from batchbench.batching.dry_run import Estimate, estimate
from batchbench.batching.engines.torch.architecture import describe
from batchbench.batching.engines.torch.build import Served, largest_batch
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import free_host_bytes
from batchbench.batching.progress import Watch

MIB = 2**20

CONFIG = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)


def foretell(checkpoint: Path, **settings: Any) -> Estimate:
    """The estimate of a run on the tiny checkpoint."""
    asked = {"model": str(checkpoint), "device": "cpu", "dtype": "float32", "verify": "none"}
    return estimate(Experiment.of({**asked, **settings}), Watch())


def served(**changes: Any) -> Served:
    fields = {
        "config": CONFIG,
        "dtype": torch.float32,
        "cached": torch.float32,
        "engine": "slots",
        "prompt": 7,
        "longest": 107,
        "mixes": True,
        "budget": None,
        "lean": describe(CONFIG),
    }
    return Served(**{**fields, **changes})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the memory of the machine that is free."""
    sizing = importlib.import_module("batchbench.batching.engines.torch.build")

    def set_free(size: int) -> None:
        monkeypatch.setattr(sizing, "free_bytes", lambda device: size)

    return set_free


@given(st.integers(0, 1000), st.integers(1, 1000))
@law
def test_the_largest_batch_is_the_last_that_fits(last: int, most: int) -> None:
    found = largest_batch(lambda slots: slots <= last, most)
    assert found == min(last, most - 1)


@given(
    st.integers(1, 500),
    st.integers(1, 900),
    st.integers(1, 900),
    st.booleans(),
    st.none() | st.integers(1, 4096),
    st.booleans(),
    st.sampled_from(["slots", "notebook"]),
)
@law
def test_more_slots_and_longer_requests_never_take_less(
    slots: int, prompt: int, output: int, mixes: bool, budget: int | None, lean: bool, engine: str
) -> None:
    described = describe(CONFIG) if lean else None
    how = {"mixes": mixes, "budget": budget, "lean": described, "engine": engine}
    one = served(prompt=prompt, longest=prompt + output, **how)
    longer = served(prompt=prompt + 1, longest=prompt + output + 1, **how)
    assert one.bytes(slots) >= one.cache_bytes(slots) > 0
    assert one.bytes(slots + 1) > one.bytes(slots)
    assert longer.bytes(slots) > one.bytes(slots)


def test_the_cache_is_counted_to_the_byte() -> None:
    layers, heads, size = 2, 4, 8
    assert served().cache_bytes(3) == 3 * 107 * 2 * layers * heads * size * 4
    assert served(cached=torch.bfloat16).cache_bytes(3) == served().cache_bytes(3) // 2


def test_a_run_that_fits_is_not_warned_of(checkpoint: Path, free: Any) -> None:
    free(2**40)
    found = foretell(checkpoint)
    assert found.sizes is not None
    assert found.sizes.fitting is None
    assert found.sizes.peak_bytes > psutil.Process().memory_info().rss / 2
    assert not any(line.startswith("warning") for line in found.lines())


def test_the_batch_that_a_warning_names_fits_and_no_larger_one(checkpoint: Path, free: Any) -> None:
    free(500 * MIB)
    found = foretell(checkpoint, batch_size=10**5, queue_size=8)
    assert found.sizes is not None
    largest = found.sizes.fitting
    assert 0 < largest < 10**5
    (said,) = [line for line in found.lines() if line.startswith("warning")]
    assert "--batch-size 100000 does not fit" in said
    assert said.endswith(f"the largest --batch-size that fits is {largest}")
    # The process grows a little from one estimate to the next, as the room does.
    for tenths, fits in ((9, True), (11, False)):
        sizes = foretell(checkpoint, batch_size=largest * tenths // 10, queue_size=8).sizes
        assert sizes is not None
        assert (sizes.fitting is None) is fits


def test_where_nothing_fits_a_smaller_model_is_named(checkpoint: Path, free: Any) -> None:
    free(MIB)
    found = foretell(checkpoint, batch_size=4)
    assert found.sizes is not None
    assert found.sizes.fitting == 0
    assert any("not even one slot fits: choose a smaller model" in line for line in found.lines())


def test_each_part_of_a_run_is_counted(checkpoint: Path, free: Any) -> None:
    free(2**40)

    def peak(**settings: Any) -> int:
        asked = {"batch_size": 2000, "queue_size": 2000, "prompt_tokens": "20", **settings}
        sizes = foretell(checkpoint, **asked).sizes
        assert sizes is not None
        return sizes.peak_bytes

    slots = peak()
    cache = 2000 * 120 * 2 * 2 * 4 * 8 * 4
    assert peak(engine="notebook") > slots + 0.9 * cache  # its old cache and the new one
    assert peak(strategy="continuous,generate_batch") > slots + 0.9 * cache
    assert peak(long_tokens=50) < slots - 0.3 * cache


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "1000\n", "memory.current": "300\n"}, 700),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "file 9\ninactive_file 5"},
         105),
        ({"memory.max": "1000", "memory.current": "1200"}, 0),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400",
          "memory/memory.stat": "total_inactive_file 100"}, 700),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"},
         None),
    ],
)  # fmt: skip
def test_the_limit_of_a_container_counts(
    files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = 10**9
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": there}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == (there if free is None else free)
