"""Engines on Triton's kernels, on the stand-in for CUDA and on a GPU where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.models import LLAMA, TINY

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.progress import Watch
from batchbench.batching.verification import verify
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.cuda_stand_in import StandIn
    from support.models import MakeModel

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

LENGTHS, OUTPUT_TOKENS = (5, 1, 20, 7), (4, 12, 1, 7)

WORKLOAD = Workload.of(
    "four requests",
    [np.random.default_rng(i).integers(1, 300, n).tolist() for i, n in enumerate(LENGTHS)],
    OUTPUT_TOKENS,
)


def engine_for(model: Any, *, slots: int = 3, prompt: int = 20, **options: Any) -> SlotsEngine:
    longest = WORKLOAD.max_total_tokens
    engine, _ = make_engine("slots", model, slots, longest, prompt=prompt, **options)
    assert isinstance(engine, SlotsEngine)
    return engine


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_outputs_are_verified(
    config: Any, prefill: str, triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    model = make_model(config, device="cuda")
    engine = engine_for(model, budget=8, mixes=prefill == "mixed")
    assert engine._pass.triton
    batcher = Batcher("continuous", engine, 3, prefill=prefill, max_batched_tokens=8)
    recording = batcher.serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(model))
    assert found.identical == len(WORKLOAD), found.findings
    assert engine._mixed is not None
    assert engine._mixed.calls == np.count_nonzero(recording.spans.chunks)
    assert engine._passes == 0  # nothing but graphs ran
