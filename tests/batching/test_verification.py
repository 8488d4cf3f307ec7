"""Verification: what is right passes, and whatever is broken on purpose is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.outputs import recording_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.torch import attention, forward
from batchbench.batching.engines.torch.attention import SlotLayer
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.forward import LeanForward
from batchbench.batching.engines.torch.kernels import Native, native
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import Verification, verify
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import Alone, MakeModel

PROMPTS = np.random.default_rng(1).integers(1, 300, (8, 12)).tolist()

WORKLOAD = Workload.of(
    "eight requests",
    [prompt[:length] for prompt, length in zip(PROMPTS, (5, 2, 12, 7, 3, 9, 4, 6), strict=True)],
    [4, 12, 3, 7, 9, 6, 5, 8],
)

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

SERVED = [
    ("slots", "separate", "static"),
    ("slots", "separate", "continuous"),
    ("slots", "mixed", "continuous"),
    ("notebook", "separate", "static"),
    ("notebook", "separate", "continuous"),
]


def serve(
    model: LoadedModel,
    workload: Workload = WORKLOAD,
    *,
    engine: str = "slots",
    prefill: str = "separate",
    policy: str = "continuous",
) -> Recording:
    return batcher_for(model, workload, engine, prefill, policy).serve(workload, Watch())


def batcher_for(
    model: LoadedModel,
    workload: Workload = WORKLOAD,
    engine: str = "slots",
    prefill: str = "separate",
    policy: str = "continuous",
) -> Batcher:
    """Make an engine with a spare position in each slot, for faults that need it."""
    made, _ = make_engine(engine, model, 3, workload.max_total_tokens + 1)
    return Batcher(policy, made, 3, prefill=prefill, max_batched_tokens=8)


def outputs(recording: Recording) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(WORKLOAD))]


# Right outputs


@pytest.mark.parametrize(("engine", "prefill", "policy"), SERVED)
def test_right_outputs_are_identical(
    engine: str, prefill: str, policy: str, tiny: LoadedModel
) -> None:
    recording = serve(tiny, engine=engine, prefill=prefill, policy=policy)
    found = verify(WORKLOAD, [recording], TeacherForced(tiny))
    assert found == Verification(8, 8, 0, 0, TeacherForced.name, 0.0)
    assert found.passed is True


def test_what_the_model_says_alone_deviates_nowhere(tiny: LoadedModel, alone: Alone) -> None:
    reference = TeacherForced(tiny)
    for prompt in PROMPTS:
        said = np.array(alone(tiny, prompt, 30), np.int32)
        assert not reference.deviations(np.array(prompt, np.int32), said)


def test_any_other_token_is_a_deviation_where_it_stands(tiny: LoadedModel, alone: Alone) -> None:
    reference, prompt = TeacherForced(tiny), np.array(PROMPTS[0], np.int32)
    right = np.array(alone(tiny, PROMPTS[0], 30), np.int32)
    rng = np.random.default_rng(2)
    for index, step in enumerate(rng.integers(1, 300, 30)):
        said = right.copy()
        said[index] = (said[index] + step) % 300
        first = reference.deviations(prompt, said)[0]
        assert first.index == index
        assert not first.is_tie


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_fault(dtype: str, make_model: MakeModel) -> None:
    model = make_model(dtype=dtype)
    recordings = [serve(model, engine=e, prefill=f, policy=p) for e, f, p in SERVED]
    found = verify(WORKLOAD, recordings, TeacherForced(model))
    assert found.wrong == 0, found.findings


def test_an_engine_works_on_after_verification(make_model: MakeModel) -> None:
    model = make_model(LLAMA)
    engine, _ = make_engine("slots", model, 3, WORKLOAD.max_total_tokens)
    batcher = Batcher("continuous", engine, 3)
    before = batcher.serve(WORKLOAD, Watch())
    assert verify(WORKLOAD, [before], TeacherForced(model)).passed
    assert outputs(batcher.serve(WORKLOAD, Watch())) == outputs(before)


# Faults, each made on purpose

Fault = Callable[[pytest.MonkeyPatch], None]


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Decode one position further on than right."""
    from batchbench.batching.engines.torch.base import TorchEngine

    run = TorchEngine.run

    def shifted(engine: TorchEngine, plan: Plan) -> int:
        return run(engine, replace(plan, positions=plan.positions + 1))

    patch.setattr(TorchEngine, "run", shifted)


def _in_decode(change: Callable[[Any, attention.Layout], tuple[Any, attention.Layout]]) -> Fault:
    """Changes what the decoding rows of the slots engine attend to."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        decode = attention._decode

        def changed(q: torch.Tensor, block: Any, layout: Any, options: Any) -> torch.Tensor:
            return decode(q, *change(block, layout), options)

        patch.setattr(attention, "_decode", changed)

    return fault


def _neighbour(block: Any, layout: attention.Layout) -> tuple[Any, attention.Layout]:
    """Each row sees the slot beside its own too."""
    keys, values = (
        torch.cat([cached[:, :, : layout.length], cached[:, :, : layout.length].roll(1, 0)], 2)
        for cached in (block.keys, block.values)
    )
    mask = layout.mask(block.keys.dtype)
    twice = replace(layout, length=2 * layout.length)
    twice._mask = torch.cat([mask, mask], -1)
    return SimpleNamespace(keys=keys, values=values), twice


def _beyond_own_length(block: Any, layout: attention.Layout) -> tuple[Any, attention.Layout]:
    """Each row sees as much as the longest: whatever an earlier occupant of its slot left."""
    blind = replace(layout)
    blind._mask = torch.zeros_like(layout.mask(block.keys.dtype))
    return block, blind


def _another_slot(block: Any, layout: attention.Layout) -> tuple[Any, attention.Layout]:
    moved = SimpleNamespace(keys=block.keys.roll(1, 0), values=block.values.roll(1, 0))
    return moved, layout


def slot_not_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A prompt is written one position too far: the first is still the earlier occupant's."""
    attend = attention.attend

    def shifted(
        block: SlotLayer, q: Any, kv: Any, layout: attention.Layout, *rest: Any, **options: Any
    ) -> torch.Tensor:
        before = block.block.clone()
        seen = attend(block, q, kv, layout, *rest, **options)
        slots, positions = layout.slots, layout.positions
        if (positions == 0).any():
            block.block.copy_(before)
            block.keys[slots, :, positions + 1], block.values[slots, :, positions + 1] = kv.unbind(
                1
            )
        return seen

    patch.setattr(attention, "attend", shifted)
    patch.setattr(forward, "attend", shifted)


def padding_seen(patch: pytest.MonkeyPatch) -> None:
    """The padding on the left of the notebook's batch counts as text."""
    compute = NotebookEngine._compute

    def unmasked(
        engine: NotebookEngine, ids: Any, mask: Any, positions: Any, past: Any, slots: Any
    ) -> Any:
        return compute(engine, ids, torch.ones_like(mask), positions, past, slots)

    patch.setattr(NotebookEngine, "_compute", unmasked)


def rows_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """After requests have left the notebook's batch, the others hold one another's past."""
    filtered = NotebookEngine._filter

    def mixed_up(engine: NotebookEngine, keep: list[bool]) -> None:
        filtered(engine, keep)
        engine._past = [(k.roll(1, 0), v.roll(1, 0)) for k, v in engine._past]

    patch.setattr(NotebookEngine, "_filter", mixed_up)


FAULTS: Sequence[tuple[str, Fault]] = (
    ("slots", positions_off_by_one),
    ("slots", _in_decode(_neighbour)),
    ("slots", _in_decode(_beyond_own_length)),
    ("slots", _in_decode(_another_slot)),
    ("slots", slot_not_forgotten),
    ("notebook", positions_off_by_one),
    ("notebook", padding_seen),
    ("notebook", rows_mixed_up),
)


@pytest.mark.parametrize(
    ("engine", "fault"),
    FAULTS,
    ids=[
        *("slots: positions off by one", "slots: the neighbour is seen"),
        *("slots: beyond its own length", "slots: another slot", "slots: not forgotten"),
        *("notebook: positions off by one", "notebook: padding seen", "notebook: rows mixed up"),
    ],
)
@pytest.mark.parametrize("config", [None, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_engine_is_caught(
    dtype: str,
    config: Mapping[str, Any] | None,
    engine: str,
    fault: Fault,
    make_model: MakeModel,
    torch_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(dtype=dtype) if config is None else make_model(config, dtype=dtype)
    batcher = batcher_for(model, engine=engine)
    with monkeypatch.context() as patch:
        fault(patch)
        recording = batcher.serve(WORKLOAD, Watch())
    found = verify(WORKLOAD, [recording], TeacherForced(model))
    assert found.wrong > 0
    assert found.passed is False
    assert all(f.strategy == "continuous" and f.reason for f in found.findings)


# Decoding rows attend in Native.attention, layer by layer, or in Native.decode, in all layers. A
# broken kernel writes to the cache what the right one writes, but reads another block or further.

Blocks = list[torch.Tensor]


def _another_slots_block(blocks: Blocks, positions: torch.Tensor) -> tuple[Blocks, torch.Tensor]:
    """Each row sees the slot before its own."""
    return [block.roll(1, 1) for block in blocks], positions


def _one_position_more(blocks: Blocks, positions: torch.Tensor) -> tuple[Blocks, torch.Tensor]:
    """Each row sees one position beyond its own."""
    return [block.clone() for block in blocks], positions + 1


def _kernels_read(
    change: Callable[[Blocks, torch.Tensor], tuple[Blocks, torch.Tensor]],
) -> Fault:
    attend, decode = Native.attention, Native.decode

    def attention(
        own: Native, qkv: Any, block: Any, slots: Any, positions: Any, *rest: Any
    ) -> torch.Tensor:
        attend(own, qkv.clone(), block, slots, positions, *rest)
        [seen], at = change([block], positions)
        return attend(own, qkv, seen, slots, at, *rest)

    def decoding(
        own: Native,
        table: Any,
        of: Any,
        x: Any,
        blocks: Blocks,
        slots: Any,
        positions: Any,
        angles: Any,
    ) -> None:
        decode(own, table, of, x.clone(), blocks, slots, positions, angles)
        seen, at = change(blocks, positions)
        decode(own, table, of, x, seen, slots, at, angles)

    def fault(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Native, "attention", attention)
        patch.setattr(Native, "decode", decoding)

    return fault


def _kernel_writes_too_far(patch: pytest.MonkeyPatch) -> None:
    """A prompt's first position is still the earlier occupant's."""
    attend = Native.attention

    def attention(
        own: Native, qkv: Any, block: Any, slots: Any, positions: Any, *rest: Any
    ) -> torch.Tensor:
        later = positions + 1 if (positions == 0).any() else positions
        return attend(own, qkv, block, slots, later, *rest)

    patch.setattr(Native, "attention", attention)


def _kernels_that_decode(patch: pytest.MonkeyPatch) -> set[str]:
    """Return the names of kernels that attend for decoding rows, which come as they are called."""
    attend, decode, called = Native.attention, Native.decode, set()

    def attention(
        own: Native, qkv: Any, block: Any, slots: Any, positions: Any, rows: int, *rest: Any
    ) -> torch.Tensor:
        called.update(["attention"] if rows else [])
        return attend(own, qkv, block, slots, positions, rows, *rest)

    def decoding(own: Native, *given: Any) -> None:
        called.add("decode")
        decode(own, *given)

    patch.setattr(Native, "attention", attention)
    patch.setattr(Native, "decode", decoding)
    return called


@pytest.mark.skipif(native() is None, reason="no kernels of our own on this machine")
@pytest.mark.parametrize(
    "fault",
    [
        _kernels_read(_another_slots_block),
        _kernels_read(_one_position_more),
        _kernel_writes_too_far,
    ],
    ids=["reads another slot", "reads too far", "writes too far"],
)
@pytest.mark.parametrize("kernel", ["decode", "attention"])
@pytest.mark.parametrize("config", [None, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_kernel_is_caught(
    dtype: str,
    config: Mapping[str, Any] | None,
    kernel: str,
    fault: Fault,
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(dtype=dtype) if config is None else make_model(config, dtype=dtype)
    if kernel == "attention":  # as where weights are not packed
        monkeypatch.setattr(LeanForward, "_make_table", lambda forward: None)
    batcher = batcher_for(model, engine="slots")
    with monkeypatch.context() as patch:
        fault(patch)
        called = _kernels_that_decode(patch)
        recording = batcher.serve(WORKLOAD, Watch())
    made = native()
    packed = made is not None and made.multiplies(torch.empty(2, 2, dtype=model.dtype))
    assert called == {kernel if packed else "attention"}
    assert verify(WORKLOAD, [recording], TeacherForced(model)).wrong > 0
    assert verify(WORKLOAD, [batcher.serve(WORKLOAD, Watch())], TeacherForced(model)).passed


@pytest.mark.parametrize("request_", range(len(WORKLOAD)))
def test_a_request_retired_a_step_early_is_caught(request_: int, tiny: LoadedModel) -> None:
    shorter = WORKLOAD.output_tokens.copy()
    shorter[request_] -= 1
    recording = serve(tiny, replace(WORKLOAD, output_tokens=shorter))
    found = verify(WORKLOAD, [recording], TeacherForced(tiny))
    assert (found.wrong, found.identical) == (1, 7)
    asked = WORKLOAD.output_tokens[request_]
    assert found.findings[0].reason == f"{asked - 1} output tokens instead of {asked}"


def test_a_token_too_many_is_caught(tiny: LoadedModel) -> None:
    longer = WORKLOAD.output_tokens.copy()
    longer[4] += 1
    recording = serve(tiny, replace(WORKLOAD, output_tokens=longer))
    found = verify(WORKLOAD, [recording], TeacherForced(tiny))
    assert [(f.request, f.verdict) for f in found.findings] == [(4, "wrong")]


def test_a_swapped_token_is_caught_where_it_stands(tiny: LoadedModel) -> None:
    recording = serve(tiny)
    assert recording.tokens is not None
    tokens = recording.tokens.copy()
    tokens[recording.token_offsets[3] + 2] ^= 1
    found = verify(WORKLOAD, [replace(recording, tokens=tokens)], TeacherForced(tiny))
    assert [(f.request, f.verdict, f.index) for f in found.findings] == [(3, "wrong", 2)]
    assert found.max_logit_gap == found.findings[0].gap > 0


def test_outputs_of_two_requests_exchanged_are_caught(tiny: LoadedModel) -> None:
    workload = replace(WORKLOAD, output_tokens=np.full(len(WORKLOAD), 4, np.int64))
    exchanged = outputs(serve(tiny, workload))
    exchanged[2], exchanged[5] = exchanged[5], exchanged[2]
    found = verify(workload, [recording_of(workload, exchanged)], TeacherForced(tiny))
    assert [f.request for f in found.findings] == [2, 5]


def test_weights_that_changed_are_caught(make_model: MakeModel) -> None:
    recording = serve(make_model(seed=0))
    assert not verify(WORKLOAD, [recording], TeacherForced(make_model(seed=1))).passed


# Numerical ties


def twins(model: LoadedModel, said: Sequence[int], difference: float) -> tuple[LoadedModel, int]:
    """Gives the last token that was said a twin, whose logit is that share lower."""
    rows = model.module.transformer.wte.weight
    twin = next(token for token in range(1, 300) if token not in said)
    rows[twin] = rows[said[-1]] * (1 - difference)
    return model, twin


def verdict_on_twin(model: LoadedModel, alone: Alone, difference: float) -> Verification:
    said = alone(model, PROMPTS[0], 8)
    model, twin = twins(model, said, difference)
    workload = Workload.of("one", [PROMPTS[0]], [8])
    recordings = [recording_of(workload, [said]), recording_of(workload, [[*said[:-1], twin]])]
    return verify(workload, recordings, TeacherForced(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_tokens_of_one_logit_are_a_tie(dtype: str, make_model: MakeModel, alone: Alone) -> None:
    found = verdict_on_twin(make_model(dtype=dtype), alone, 0.0)
    assert (found.numerical_ties, found.wrong, found.passed) == (1, 0, True)
    [tie] = found.findings
    assert (tie.verdict, tie.index) == ("numerical tie", 7)
    assert tie.gap == found.max_logit_gap == pytest.approx(0, abs=1e-6)
    assert tie.gap <= tie.tolerance


def test_a_margin_that_the_precision_can_tell_is_no_tie(
    make_model: MakeModel, alone: Alone
) -> None:
    found = verdict_on_twin(make_model(), alone, 0.01)
    assert (found.numerical_ties, found.wrong, found.passed) == (0, 1, False)
    [fault] = found.findings
    assert (fault.verdict, fault.index) == ("wrong", 7)
    assert fault.gap > 100 * fault.tolerance > 0


def test_the_margin_is_what_the_logits_differ_by(make_model: MakeModel, alone: Alone) -> None:
    model = make_model()
    found = verdict_on_twin(model, alone, 0.01)
    ids = torch.tensor([[*PROMPTS[0], *alone(model, PROMPTS[0], 7)]])
    with torch.inference_mode():
        best = model.module.double()(ids).logits[0, -1].max()
    assert found.findings[0].gap == pytest.approx(float(best) * 0.01, rel=1e-4)


def test_a_lower_precision_leaves_more_open(make_model: MakeModel, alone: Alone) -> None:
    """1/256 is the distance of neighbours in bfloat16, and 2^15 of them in float32."""
    exact = verdict_on_twin(make_model(), alone, 1 / 256)
    rounded = verdict_on_twin(make_model(dtype="bfloat16"), alone, 1 / 256)
    assert (exact.wrong, rounded.wrong, rounded.numerical_ties) == (1, 0, 1)


def test_the_tolerance_is_small_beside_the_logits(make_model: MakeModel, alone: Alone) -> None:
    """Else everything would be a tie, and nothing wrong."""
    for dtype, share in (("float32", 1e-5), ("bfloat16", 0.2)):
        model = make_model(dtype=dtype)
        said = np.array(alone(model, PROMPTS[0], 8), np.int32)
        said[-1] ^= 1
        [*_, last] = TeacherForced(model).deviations(np.array(PROMPTS[0], np.int32), said)
        with torch.inference_mode():
            logits = model.module(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
        assert 0 < last.tolerance < share * float(logits.std())


# Numbers that are none


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_a_model_that_overflows_is_wrong(engine: str, number: float, make_model: MakeModel) -> None:
    model = make_model()
    model.module.transformer.wpe.weight[8:] = number
    found = verify(WORKLOAD, [serve(model, engine=engine)], TeacherForced(model))
    reach = (WORKLOAD.prompt_tokens + WORKLOAD.output_tokens - 1).tolist()  # positions computed
    overflowed = [request for request, positions in enumerate(reach) if positions > 8]
    wrong = [f.request for f in found.findings if f.verdict == "wrong"]
    assert set(overflowed) <= set(wrong)
    assert found.numerical_ties == 0
    assert found.max_logit_gap is not None
    assert math.isfinite(found.max_logit_gap)


def test_one_logit_that_is_no_number_is_wrong(make_model: MakeModel) -> None:
    model = make_model()
    model.module.transformer.wte.weight[299] = math.nan
    found = verify(WORKLOAD, [serve(model)], TeacherForced(model))
    assert (found.wrong, found.identical, found.numerical_ties) == (8, 0, 0)
    assert all((f.gap, f.tolerance) == (None, None) for f in found.findings)


def test_what_the_numbers_never_touched_is_identical(make_model: MakeModel, alone: Alone) -> None:
    model = make_model()
    model.module.transformer.wpe.weight[20:] = math.nan
    workload = Workload.of("short", [PROMPTS[0]], [8])
    said = recording_of(workload, [alone(model, PROMPTS[0], 8)])
    assert verify(workload, [said], TeacherForced(model)).identical == 1


@pytest.mark.parametrize(("flip", "verdicts"), [(0, (1, 1)), (1, (0, 2))], ids=["right", "wrong"])
def test_a_verdict_does_not_depend_on_a_longer_request_that_overflows(
    flip: int, verdicts: tuple[int, int], make_model: MakeModel, alone: Alone
) -> None:
    """The two have one prompt and could share one reference call, but for the overflow."""
    model = make_model()
    said = alone(model, PROMPTS[0], 12)
    said[2] ^= flip
    model.module.transformer.wpe.weight[len(PROMPTS[0]) + 8 :] = math.nan
    workload = Workload.of("two", [PROMPTS[0], PROMPTS[0]], [12, 6])
    found = verify(workload, [recording_of(workload, [said, said[:6]])], TeacherForced(model))
    assert (found.identical, found.wrong) == verdicts
