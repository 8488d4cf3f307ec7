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
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch import attention
from batchbench.batching.engines.torch.cache import SlotLayer
from batchbench.batching.engines.torch.making import make_engine
from batchbench.batching.engines.torch.native import Native, native
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Plan
from batchbench.batching.recording import Recording
from batchbench.batching.strategies import Batcher
from batchbench.batching.verification import Deviation, Verification, verify
from batchbench.batching.watch import Watch
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from conftest import Alone, MakeModel

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

some = settings(max_examples=30, deadline=None, derandomize=True, database=None)


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
    """With a position to spare in each slot, for faults that need it."""
    made, _ = make_engine(engine, model, 3, workload.max_total_tokens + 1)
    return Batcher(policy, made, 3, prefill=prefill, max_batched_tokens=8)


def recording_of(
    workload: Workload, outputs: Sequence[Sequence[int]], strategy: str = "static"
) -> Recording:
    """As if these outputs had been produced."""
    simulated = Batcher(strategy, SimulatedEngine(), 2).serve(workload, Watch())
    produced = np.array([len(tokens) for tokens in outputs], np.int64)
    return replace(
        simulated,
        requests=replace(simulated.requests, output_tokens=produced),
        tokens=np.array([token for tokens in outputs for token in tokens], np.int32),
    )


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
Attend = Callable[..., torch.Tensor]


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """What decodes stands one position further on than it should."""
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
    write = SlotLayer.write

    def shifted(
        layer: SlotLayer,
        slots: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
        states: torch.Tensor,
    ) -> None:
        if (positions == 0).any():
            positions, rows = positions + 1, None
        write(layer, slots, positions, rows, states)

    patch.setattr(SlotLayer, "write", shifted)


def padding_seen(patch: pytest.MonkeyPatch) -> None:
    """The padding on the left of the notebook's batch counts as text."""
    compute = NotebookEngine._compute

    def unmasked(engine: NotebookEngine, ids: Any, mask: Any, positions: Any, past: Any) -> Any:
        return compute(engine, ids, mask * 0 + 1, positions, past)

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


def _kernel_reads_another_slot(attend: Attend) -> Attend:
    """Each row writes to its slot and sees the one before it."""

    def changed(own: Native, qkv: Any, block: Any, *rest: Any) -> torch.Tensor:
        attend(own, qkv, block, *rest)
        return attend(own, qkv, block.roll(1, 1), *rest)

    return changed


def _kernel_reads_too_far(attend: Attend) -> Attend:
    """Each row sees one position beyond its own."""

    def changed(own: Native, qkv: Any, block: Any, slots: Any, positions: Any, n: int) -> Any:
        attend(own, qkv, block, slots, positions, n)
        return attend(own, qkv, block.clone(), slots, positions + 1, n)

    return changed


def _kernel_writes_too_far(attend: Attend) -> Attend:
    """A prompt's first position is still the earlier occupant's."""

    def changed(own: Native, qkv: Any, block: Any, slots: Any, positions: Any, n: int) -> Any:
        later = positions + 1 if (positions == 0).any() else positions
        return attend(own, qkv, block, slots, later, n)

    return changed


@pytest.mark.skipif(native() is None, reason="no kernels of our own on this machine")
@pytest.mark.parametrize(
    "fault", [_kernel_reads_another_slot, _kernel_reads_too_far, _kernel_writes_too_far]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_kernel_is_caught(
    dtype: str,
    fault: Callable[[Attend], Attend],
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(dtype=dtype)
    batcher = batcher_for(model, engine="slots")
    with monkeypatch.context() as patch:
        patch.setattr(Native, "attention", fault(Native.attention))
        recording = batcher.serve(WORKLOAD, Watch())
    assert verify(WORKLOAD, [recording], TeacherForced(model)).wrong > 0


@pytest.mark.parametrize("request_", range(len(WORKLOAD)))
def test_a_request_retired_a_step_early_is_caught(request_: int, tiny: LoadedModel) -> None:
    shorter = WORKLOAD.output_tokens.copy()
    shorter[request_] -= 1
    recording = serve(tiny, replace(WORKLOAD, output_tokens=shorter))
    found = verify(WORKLOAD, [recording], TeacherForced(tiny))
    assert (found.wrong, found.identical) == (1, 7)
    asked = WORKLOAD.output_tokens[request_]
    assert found.findings[0].reason == f"{asked - 1} output tokens where {asked} are due"


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


@pytest.mark.parametrize(
    ("gap", "tolerance"), [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (math.nan, math.nan)]
)
def test_a_gap_that_is_no_number_is_no_tie(gap: float, tolerance: float) -> None:
    assert not Deviation(0, gap, tolerance).is_tie


# The book-keeping, with a reference that says what it is told


class Told:
    """Finds the deviations that it is told of, and remembers what it was asked."""

    name = "told"

    def __init__(self, *deviations: Deviation) -> None:
        self._deviations = deviations
        self.asked: list[tuple[list[int], list[int]]] = []

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32]
    ) -> Sequence[Deviation]:
        self.asked.append((prompt.tolist(), output.tolist()))
        return [d for d in self._deviations if d.index < len(output)]


TIE, FAULT = Deviation(1, 0.25, 0.5), Deviation(2, 0.75, 0.5)


def same_prompts(*lengths: int) -> tuple[Workload, Recording]:
    """Requests of one prompt that all say 10, 11, 12, …, for so many tokens."""
    workload = Workload.of("alike", [[1, 2]] * len(lengths), lengths)
    return workload, recording_of(workload, [range(10, 10 + n) for n in lengths])


def test_requests_of_one_prompt_share_one_reference() -> None:
    workload, recording = same_prompts(3, 6, 1, 6, 2)
    reference = Told()
    assert verify(workload, [recording] * 4, reference).identical == 5
    assert reference.asked == [([1, 2], [10, 11, 12, 13, 14, 15])]


def test_other_prompts_and_other_outputs_have_references_of_their_own() -> None:
    workload = Workload.of("unlike", [[1, 2], [1, 3], [1, 2], [1]], [2, 2, 2, 3])
    said = [[10, 11], [10, 11], [10, 12], [2, 10, 11]]
    reference = Told()
    verify(workload, [recording_of(workload, said)], reference)
    asked = sorted(zip([[1, 2], [1, 3], [1, 2], [1]], said, strict=True))
    assert sorted(reference.asked) == asked


def test_only_what_a_request_said_is_held_against_it() -> None:
    workload, recording = same_prompts(1, 2, 3)
    found = verify(workload, [recording], Told(TIE, FAULT))
    assert (found.identical, found.numerical_ties, found.wrong) == (1, 1, 1)
    verdicts = [(f.request, f.verdict, f.index, f.gap) for f in found.findings]
    assert verdicts == [(1, "numerical tie", 1, 0.25), (2, "wrong", 2, 0.75)]
    assert found.max_logit_gap == 0.75


def test_a_request_counts_once_with_its_worst_verdict() -> None:
    workload = Workload.of("four", [[1], [2], [3], [4]], [3, 3, 3, 3])
    right, tie, wrong = [7, 7, 7], [7, 8, 7], [7, 7, 9]

    class ByOutput(Told):
        def deviations(
            self, prompt: NDArray[np.int32], output: NDArray[np.int32]
        ) -> Sequence[Deviation]:
            return [TIE] * int(output[1] == 8) + [FAULT] * int(output[2] == 9)

    trials = [[right, right, wrong, tie], [right, tie, tie, wrong], [right, right, right, right]]
    recordings = [
        recording_of(workload, said, strategy)
        for said in trials
        for strategy in ("static", "continuous")
    ]
    found = verify(workload, recordings, ByOutput())
    assert found.requests_checked == 4
    assert (found.identical, found.numerical_ties, found.wrong) == (1, 1, 2)
    assert found.reference == "told"
    assert found.passed is False


def test_a_fault_is_told_once_for_all_trials() -> None:
    workload, recording = same_prompts(3)
    found = verify(workload, [recording] * 5, Told(FAULT))
    assert len(found.findings) == 1
    assert "0.75" in found.findings[0].reason
    assert "0.5" in found.findings[0].reason


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ([5, 6, 0], False),  # ends with the end of text
        ([5, 6, 7, 8, 9], False),  # as many as were asked for
        ([5, 6, 7, 8, 0], False),  # both
        ([5, 6], True),  # no reason to end
        ([5, 0, 7], True),  # went on after the end
        ([5, 6, 7, 8, 9, 0], True),  # more than were asked for
    ],
)
def test_a_text_ends_where_it_ends_or_where_it_must(said: list[int], wrong: bool) -> None:
    workload = Workload.of("ends", [[1]], [5], stop_at_eos=True)
    found = verify(workload, [recording_of(workload, [said])], Told(), eos=[0, 299])
    assert (found.wrong == 1) is wrong


def test_an_end_of_text_ends_nothing_unless_asked_to() -> None:
    workload = Workload.of("goes on", [[1]], [4])
    assert verify(workload, [recording_of(workload, [[5, 0, 0, 7]])], Told(), eos=[0]).passed
    assert not verify(workload, [recording_of(workload, [[5, 0]])], Told(), eos=[0]).passed


@some
@given(st.integers(1, 60), st.integers(1, 70))
def test_a_limit_checks_so_many_requests_spread_over_the_queue(count: int, limit: int) -> None:
    workload = Workload.of("alike", [[1]] * count, [3] * count)
    recording = recording_of(workload, [[7, 7, 7]] * count)
    found = verify(workload, [recording], Told(FAULT), limit=limit)
    checked = [f.request for f in found.findings]  # all that are checked are wrong
    assert found.requests_checked == found.wrong == len(checked) == min(limit, count)
    if len(checked) > 1:
        assert (checked[0], checked[-1]) == (0, count - 1)
        gaps = np.diff(checked)
        assert gaps.max() - gaps.min() <= 1


def test_without_a_limit_every_request_is_checked() -> None:
    workload, recording = same_prompts(*[3] * 9)
    assert verify(workload, [recording], Told()).requests_checked == 9


def test_nothing_checked_is_nothing_passed() -> None:
    workload, recording = same_prompts(3, 3)
    reference = Told(FAULT)
    found = verify(workload, [recording], reference, limit=0)
    assert found.passed is None
    assert (found.requests_checked, found.reference, found.max_logit_gap) == (0, None, None)
    assert not reference.asked
