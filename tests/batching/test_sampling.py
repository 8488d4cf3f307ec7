"""Sampled tokens: the distribution, the streams, and the same tokens in every batch."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from support.models import LLAMA, TINY
from support.sampling import drawn, drawn_alone, kept, noise_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch import sampling as module
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.kernels import native
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.sampling import (
    Chooser,
    best_token,
    choose,
    keys_at,
    noise,
    perturbed,
    smallest_kept,
)
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import Verification, verify
from batchbench.workloads import Workload
from batchbench.workloads.sampling import Sampling, Stream

if TYPE_CHECKING:
    from support.cuda_stand_in import StandIn
    from support.models import MakeModel

some = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

PLAIN = Sampling(1.0)
CUTS = [PLAIN, Sampling(0.7, 0.9), Sampling(1.3, 1.0, 5), Sampling(0.8, 0.8, 20, 7)]


def keys(count: int, sampling: Sampling = PLAIN, request: int = 0) -> torch.Tensor:
    """The keys of the first positions of a request."""
    words = torch.from_numpy(Stream(sampling, request).words)[None]
    return keys_at(words, torch.arange(count))


# The noise


def test_the_noise_never_changes() -> None:
    """Tokens that a seed gave once are those that it gives on every machine and in later versions."""
    assert Stream(Sampling(1.0, seed=3), 5).words.tolist() == [0, 0]
    assert keys(2, Sampling(1.0, seed=3), 5).tolist() == []
    assert noise(keys(1, Sampling(1.0, seed=3), 5), 4)[0].tolist() == []


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.integers(0, 10**6))
@some
def test_the_noise_is_as_defined(seed: int, request: int, position: int) -> None:
    stream = Stream(Sampling(1.0, seed=seed), request)
    at = keys_at(torch.from_numpy(stream.words)[None], torch.tensor([position]))
    expected = noise_of(stream, position, 50)
    assert np.abs(noise(at, 50, torch.float64)[0].numpy() - expected).max() < 1e-12
    assert np.abs(noise(at, 50)[0].numpy() - expected).max() < 2e-6


def uniforms(at: torch.Tensor, vocabulary: int = 4096) -> np.ndarray:
    """Uniform numbers of the noise, which is Gumbel's distribution."""
    return stats.gumbel_r.cdf(noise(at, vocabulary, torch.float64).numpy())


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: uniforms(keys(1), 10**6)[0],
        lambda: uniforms(keys(10**6), 1)[:, 0],
        lambda: np.array(
            [uniforms(keys(1, PLAIN, request), 1)[0, 0] for request in range(20_000)]
        ),
        lambda: np.array(
            [uniforms(keys(1, Sampling(1.0, seed=seed)), 1)[0, 0] for seed in range(20_000)]
        ),
    ],
    ids=["tokens", "positions", "requests", "seeds"],
)
def test_the_noise_is_uniform_and_successive_numbers_are_independent(
    numbers: Callable[[], np.ndarray],
) -> None:
    """Each number alone, each with the next, and the low bits that make small differences."""
    found = numbers()
    assert stats.kstest(found, "uniform").pvalue > 0.001
    for lag in (1, 2, 16, 256):
        pairs, _, _ = np.histogram2d(found[:-lag], found[lag:], 16, [[0, 1], [0, 1]])
        assert stats.chisquare(pairs.flatten()).pvalue > 0.001, lag
    low = np.floor(found * 2**20) % 64
    assert stats.chisquare(np.bincount(low.astype(int), minlength=64)).pvalue > 0.001


def test_streams_are_independent() -> None:
    """No correlation between neighbouring requests, positions and seeds, token by token."""
    rows = [
        noise(keys(8, Sampling(1.0, seed=seed), request), 20_000)
        for seed, request in itertools.product(range(4), range(8))
    ]
    correlation = np.corrcoef(torch.cat(rows).numpy())
    between = correlation[np.triu_indices(len(correlation), 1)]
    assert np.abs(between).max() < 5 / np.sqrt(20_000)
    assert abs(between.std() * np.sqrt(20_000) - 1) < 0.02


def test_a_bit_of_any_input_changes_half_of_the_noise() -> None:
    """Flip a bit of token, position or key: each bit of the hash changes half of the time."""
    generator = torch.Generator().manual_seed(0)

    def bits(words: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        at = keys_at(words, positions)
        return module._hash(tokens.int() ^ at[:, 0], module._LONG, at[:, 1])

    count = 2000
    words = torch.randint(-(2**31), 2**31, (count, 2), generator=generator).int()
    positions, tokens = torch.randint(0, 2**17, (2, count), generator=generator).int()
    before = bits(words, positions, tokens)
    for bit in range(17):
        changes = [
            bits(words, positions, tokens ^ (1 << bit)),
            bits(words, positions ^ (1 << bit), tokens),
            *(bits(words ^ torch.tensor(flip), positions, tokens) for flip in _flips(bit)),
        ]
        for after in changes:
            flipped = ((before ^ after)[:, None] >> torch.arange(1, 32)) & 1
            share = flipped.float().mean(0)
            assert (share - 0.5).abs().max() < 0.07, bit


def _flips(bit: int) -> list[list[int]]:
    return [[1 << bit, 0], [0, 1 << bit]]


# The distribution


def expected_share(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    share = np.exp((logits - logits.max()) / sampling.temperature) * kept(logits, sampling)
    return share / share.sum()


@pytest.mark.parametrize("sampling", CUTS, ids=str)
@pytest.mark.parametrize("kernels", ["own", "torch"])
def test_tokens_are_drawn_from_the_softmax_of_what_is_kept(
    sampling: Sampling, kernels: str, request: pytest.FixtureRequest
) -> None:
    if kernels == "torch":
        request.getfixturevalue("torch_kernels")
    draws = 40_000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens = choose(logits.repeat(draws, 1), sampling, keys(draws, sampling))
    counts = np.bincount(tokens.numpy(), minlength=40)
    share = expected_share(logits.double().numpy(), sampling)
    assert (counts[share == 0] == 0).all()
    assert (share == 0).any() == (sampling != PLAIN)
    real = share > 0
    expected = share[real] * draws
    # Rare tokens together, as the test needs at least 5 of each.
    rare = expected < 5
    found = [*counts[real][~rare], counts[real][rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    assert stats.chisquare(*zip(*[p for p in zip(found, wanted) if p[1]])).pvalue > 0.001


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    """The noise of the best of 50,000 equal tokens is far out in the distribution's tail."""
    tokens = choose(torch.zeros(4000, 50_257), PLAIN, keys(4000))
    counts = np.bincount(tokens.numpy() * 50 // 50_257, minlength=50)
    assert stats.chisquare(counts).pvalue > 0.001
    assert len(set(tokens.tolist())) > 3800


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 15, 16, 17, 100, 1500]),
    st.sampled_from(CUTS),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@some
def test_each_token_is_the_one_that_the_definition_draws(
    seed: int, vocabulary: int, sampling: Sampling, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(3, vocabulary, generator=generator) * 4 - 90).to(dtype)
    how = replace(sampling, seed=seed)
    at = keys(3, how)
    exact = logits.double().numpy()
    expected = [drawn(row, Stream(how, 0), i) for i, row in enumerate(exact)]
    assert choose(logits, how, at).tolist() == expected
    assert best_token(perturbed(logits, how, at)).tolist() == expected
    least = smallest_kept(logits.float(), how)
    if least is not None:
        shown = [(row >= edge).tolist() for row, edge in zip(logits.float(), least, strict=True)]
        assert shown == [kept(row, how).tolist() for row in exact]


def test_cuts_keep_equal_tokens_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for sampling in (Sampling(1.0, 1.0, 2), Sampling(1.0, 0.7)):
        tokens = choose(logits.repeat(500, 1), sampling, keys(500))
        assert set(tokens.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_logits_that_are_no_numbers_give_some_token(value: float) -> None:
    logits = torch.zeros(2, 40)
    logits[0, 7], logits[1] = value, value
    for sampling in CUTS:
        assert all(0 <= token < 40 for token in choose(logits, sampling, keys(2)).tolist())


@given(st.integers(0, 2**32 - 1))
@some
def test_one_token_kept_and_temperatures_near_0_are_greedy(seed: int) -> None:
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(seed)) * 5
    greedy = best_token(logits).tolist()
    for sampling in (Sampling(3.0, 1.0, 1), Sampling(3.0, 1e-6), Sampling(1e-30), Sampling(1e-5)):
        assert choose(logits, sampling, keys(4)).tolist() == greedy
        assert best_token(perturbed(logits, sampling, keys(4))).tolist() == greedy


# The same tokens in every batch

PROMPTS = np.random.default_rng(1).integers(1, 300, (8, 12)).tolist()
LENGTHS, OUTPUTS = (5, 2, 12, 7, 3, 9, 4, 6), (4, 12, 3, 7, 9, 6, 5, 8)
WORKLOAD = Workload.of(
    "eight requests",
    [prompt[:length] for prompt, length in zip(PROMPTS, LENGTHS, strict=True)],
    OUTPUTS,
    sampling=CUTS[1],
)


def outputs(recording: Recording, workload: Workload = WORKLOAD) -> list[list[int]]:
    return [recording.tokens_of(i).tolist() for i in range(len(workload))]


def serve(
    model: LoadedModel,
    workload: Workload = WORKLOAD,
    *,
    engine: str = "slots",
    slots: int = 3,
    policy: str = "continuous",
    execution: str = "auto",
    **options: Any,
) -> Recording:
    made, _ = make_engine(engine, model, slots, workload.max_total_tokens + 1, execution)
    return Batcher(policy, made, slots, **options).serve(workload, Watch())


def alone(model: LoadedModel, workload: Workload = WORKLOAD) -> list[list[int]]:
    return [
        drawn_alone(model, workload.prompt(i).tolist(), int(count), workload.stream(i))
        for i, count in enumerate(workload.output_tokens)
    ]


@pytest.mark.parametrize("sampling", CUTS, ids=str)
@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_tokens_equal_those_of_the_request_alone(
    config: Mapping[str, Any], sampling: Sampling, make_model: MakeModel
) -> None:
    """By the definition of the sampler, over the logits of transformers for that request."""
    model = make_model(config)
    workload = replace(WORKLOAD, sampling=sampling)
    expected = alone(model, workload)
    assert expected != alone(model, replace(workload, sampling=None))
    for engine, policy, options in (
        ("slots", "static", {}),
        ("slots", "continuous", {"prefill": "mixed", "max_batched_tokens": 5}),
        ("notebook", "continuous", {}),
    ):
        recording = serve(model, workload, engine=engine, policy=policy, **options)
        assert outputs(recording) == expected
        found = verify(workload, [recording], TeacherForced(model))
        assert found.identical == len(workload), found.findings


@given(
    slots=st.integers(1, 8),
    engine=st.sampled_from(["slots", "notebook"]),
    policy=st.sampled_from(["static", "static-bucketed", "continuous"]),
    order=st.sampled_from(["fifo", "shortest-first"]),
    budget=st.integers(9, 30),
    mixed=st.booleans(),
    repeat=st.sampled_from([None, 1]),
)
@some
def test_tokens_do_not_depend_on_the_batch(
    tiny: LoadedModel,
    slots: int,
    engine: str,
    policy: str,
    order: str,
    budget: int,
    mixed: bool,
    repeat: int | None,
) -> None:
    prefill = "mixed" if mixed and engine == "slots" else "separate"
    how = {"order": order, "prefill": prefill, "max_batched_tokens": budget, "max_repeat": repeat}
    recording = serve(tiny, engine=engine, slots=slots, policy=policy, **how)
    assert outputs(recording) == outputs(serve(tiny))
