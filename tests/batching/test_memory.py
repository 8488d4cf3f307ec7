"""Memory: weights, the slot cache and little more, measured from outside while batches change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, sys
from pathlib import Path
import numpy as np
from batchbench.batching.engines.torch.attention import SlotCache
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.models import ModelSpec, Source
from batchbench.batching.models.loading import load_model
from batchbench.batching.batcher import Batcher
from batchbench.batching.progress import Watch
from batchbench.workloads import Workload

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

shape = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 1024, "n_embd": 256,
         "n_layer": 2, "n_head": 4}
source = Source("made-up", "dummy", shape, None, "made up for a test")
model = load_model(source, ModelSpec(dtype="float32", device="cpu"), 0)
rng = np.random.default_rng(0)
prompts = [rng.integers(1, 300, n).tolist() for n in rng.integers(1, 30, 120)]
workload = Workload.of("changing", prompts, rng.integers(1, 12, 120).tolist())

def serve(max_len):
    engine, memory = make_engine("slots", model, 64, max_len)
    for policy in ("static", "continuous"):
        Batcher(policy, engine, 64, prefill="mixed").serve(workload, Watch())
    return memory["kv_cache_bytes"]

# Kernels are made for each number of rows when it is first met: they are not the cache's.
serve(42)
gc.collect()
if "copying" in sys.argv:
    erase, changes = SlotCache.erase, []
    def copying(cache, slot, start, stop):
        erase(cache, slot, start, stop)
        changes.append(slot)
        if len(changes) % 25 == 0:
            for layer in cache.blocks:
                layer.block = layer.block.clone()
    SlotCache.erase = copying
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
cache = serve(1024)
print((resident("VmHWM") - before) / cache)
"""


def peak(*words: str) -> float:
    """Most memory taken beside the model, as a multiple of the cache (256 MiB)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, encoding="utf-8", check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_change_of_the_batch_copies_the_cache() -> None:
    assert 0.9 < peak() < 1.15


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_cache_that_is_copied_is_noticed() -> None:
    assert peak("copying") > 1.3
