"""A trained model, SmolLM2-135M: real text, real ends of texts and real ties.

``make trained`` fetches the model and runs these tests; without it they skip themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.machine import usable_cores
from batchbench.batching.models import ModelSpec, encoder, find_model, find_tokenizer
from batchbench.batching.models.loading import LoadedModel, load_model
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import verify
from batchbench.workloads import Workload, WorkloadSpec, make_workload
from batchbench.workloads.sampling import Sampling

pytestmark = pytest.mark.trained

FILE = os.environ.get("BATCHBENCH_TRAINED_GGUF", "")
PROMPTS = Path(__file__).parents[2] / "docs" / "examples" / "prompts.txt"
POLICIES = ("static", "continuous")
ENGINES = ("slots", "notebook")
SLOTS = 8


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """Compute with every core; other tests do with one."""
    if not FILE:
        pytest.skip("needs the trained model; run make trained")
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request: pytest.FixtureRequest) -> LoadedModel:
    return load(Path(FILE), request.param)


@pytest.fixture(scope="module")
def answered(trained: LoadedModel) -> tuple[Workload, list[list[int]]]:
    """32 prompts of mixed lengths, and the tokens of transformers' generate for each alone."""
    tokenizer = find_tokenizer(Path(FILE))
    assert tokenizer is not None
    prompts = [tokenizer.encode(line) for line in PROMPTS.read_text().splitlines()]
    assert (len(prompts), len({len(ids) for ids in prompts}) > 10) == (32, True)
    workload = Workload.of("mixed", prompts, [1 + i * 5 % 8 for i in range(len(prompts))])
    return workload, [generated(trained, workload, i) for i in range(len(workload))]


def load(place: Path, dtype: str) -> LoadedModel:
    spec = ModelSpec(model=str(place), dtype=dtype, device="cpu")
    return load_model(find_model(spec), spec, 0)


def generated(model: LoadedModel, workload: Workload, request: int) -> list[int]:
    """Return the tokens that transformers' generate gives for a request alone."""
    ids = torch.tensor(workload.prompt(request)[None].astype(np.int64))
    count = int(workload.output_tokens[request])
    module = model.module
    module.generation_config.eos_token_id = None  # texts go on to the length that is asked for
    config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        made = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return made[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def served(
    model: LoadedModel,
    workload: Workload,
    *,
    slots: int = SLOTS,
    engine: str = "slots",
    policies: Sequence[str] = POLICIES,
) -> list[Recording]:
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    prompt = int(workload.prompt_tokens.max())
    made, _ = make_engine(engine, model, slots, longest, prompt=prompt)
    return [Batcher(policy, made, slots).serve(workload, Watch()) for policy in policies]


def tokens_of(recording: Recording, workload: Workload) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(workload))]


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_are_those_of_generate_alone(
    engine: str, trained: LoadedModel, answered: tuple[Workload, list[list[int]]]
) -> None:
    """In float32 all of them; in bfloat16 those that differ do so at a tie."""
    workload, alone = answered
    recordings = served(trained, workload, engine=engine)
    differs = {
        request
        for recording in recordings
        for request, tokens in enumerate(tokens_of(recording, workload))
        if tokens != alone[request]
    }
    if trained.dtype is torch.float32:
        assert differs == set()
        return
    found = verify(workload, recordings, TeacherForced(trained))
    ties = {finding.request: finding for finding in found.findings}
    assert found.wrong == 0, found.findings
    for tie in ties.values():
        assert tie.gap is not None
        assert tie.tolerance is not None
        assert tie.gap <= tie.tolerance
    # generate may also choose the other token of a tie; then its tokens deviate from the reference.
    stray = [alone[request] for request in differs - ties.keys()]
    for request, tokens in zip(differs - ties.keys(), stray, strict=True):
        deviations = TeacherForced(trained).deviations(
            workload.prompt(request), np.array(tokens, np.int32)
        )
        assert deviations
        assert deviations[0].is_tie


def test_sampled_tokens_are_those_of_the_sampler_alone(
    trained: LoadedModel, answered: tuple[Workload, list[list[int]]]
) -> None:
    """The reference applies the same sampler to transformers' logits of each request alone."""
    sampling = Sampling(0.8, top_p=0.95, top_k=50, seed=3)
    workload = replace(answered[0], sampling=sampling)
    recordings = served(trained, workload)
    assert tokens_of(recordings[0], workload) != answered[1]
    found = verify(workload, recordings, TeacherForced(trained))
    assert (found.requests_checked, found.wrong) == (32, 0), found.findings
    if trained.dtype is torch.float32:
        assert found.identical == 32


def test_no_request_is_wrong_at_any_batch_size() -> None:
    model = load(Path(FILE), "float32")
    spec = WorkloadSpec(queue_size=20, prompt_tokens="4:64", output_tokens="1:5", seed=1)
    workload = make_workload(
        spec, batch_size=8, vocab_size=model.source.vocab_size, encode=None, note=None
    )
    recordings = [
        recording
        for slots in (1, 2, 3, 4, 5, 8, 20)
        for recording in served(model, workload, slots=slots, policies=["continuous"])
    ]
    found = verify(workload, recordings, TeacherForced(model))
    assert (found.wrong, found.requests_checked) == (0, 20)
    assert len({tuple(map(tuple, tokens_of(r, workload))) for r in recordings}) == 1


def test_answers_end_where_the_model_ends_them() -> None:
    """In the chat template short answers end by themselves, at different lengths."""
    model = load(Path(FILE), "float32")
    tokenizer = find_tokenizer(Path(FILE))
    assert tokenizer is not None
    encode = encoder(tokenizer, chat=True)
    assert encode is not None
    texts = PROMPTS.read_text().splitlines()
    prompts = [encode(texts[i]) for i in (0, 4, 10, 12, 14, 17)]
    assert tokenizer.decode(prompts[0]).endswith(
        f"<|im_start|>user\n{texts[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    workload = replace(Workload.of("chat", prompts, [24] * len(prompts)), stop_at_eos=True)
    recordings = served(model, workload, slots=3)
    eos = model.source.eos_token_ids
    assert [tokenizer.decode([token]) for token in eos] == ["<|im_end|>"]
    answers = tokens_of(recordings[0], workload)
    assert answers == tokens_of(recordings[1], workload)
    assert "Paris" in tokenizer.decode(answers[0])
    ended = [answer for answer in answers if answer[-1] in eos]
    assert len({len(answer) for answer in ended}) > 1
    assert all(len(answer) == 24 for answer in answers if answer not in ended)
    assert not any(token in eos for answer in answers for token in answer[:-1])
    assert verify(workload, recordings, TeacherForced(model), eos).wrong == 0


def test_the_same_model_as_safetensors_gives_the_same_tokens(tmp_path: Path) -> None:
    model = load(Path(FILE), "float32")
    model.module.save_pretrained(tmp_path)
    other = load(tmp_path, "float32")
    assert other.weights_digest == model.weights_digest
    workload = Workload.of("two", [[504, 2365, 6354], [3, 5, 8, 13, 21]], [5, 5])
    for request in range(2):
        assert generated(model, workload, request) == generated(other, workload, request)
