"""Sampled tokens: the distribution, the streams, and the same tokens in every batch."""

from __future__ import annotations

import itertools
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
from batchbench.batching.engines.generate_batch import GenerateBatch
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.engines.torch import sampling as module
from batchbench.batching.engines.torch.build import make_engine
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
from batchbench.batching.experiment import Experiment
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Workload
from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling

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
    """A seed gives the same tokens on every machine and in later versions."""
    stream = Stream(Sampling(1.0, seed=3), 5)
    assert stream.words.tolist() == [1699602211, 425792675]
    at = keys(2, stream.sampling, stream.request)
    assert at.tolist() == [[1906253101, -2097430163], [-112801624, -1895763441]]
    found = noise(at, 4, torch.float64)[0].tolist()
    expected = [2.260839167554182, -0.5702252105359205, 1.1222702244399407, -0.9528705800559627]
    assert found == pytest.approx(expected, abs=1e-12)


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


def of_streams(streams: list[Stream]) -> np.ndarray:
    """The first number of each stream."""
    words = torch.from_numpy(np.array([stream.words for stream in streams]))
    return uniforms(keys_at(words, torch.zeros(len(streams))), 1)[:, 0]


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: uniforms(keys(1), 10**6)[0],
        lambda: uniforms(keys(10**6), 1)[:, 0],
        lambda: of_streams([Stream(PLAIN, request) for request in range(8000)]),
        lambda: of_streams([Stream(Sampling(1.0, seed=seed), 0) for seed in range(8000)]),
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
    rare = expected < 5  # the test needs at least 5 of each, so these are counted together
    found, wanted = counts[real][~rare], expected[~rare]
    if rare.any():
        found = np.append(found, counts[real][rare].sum())
        wanted = np.append(wanted, expected[rare].sum())
    assert stats.chisquare(found, wanted).pvalue > 0.001


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
    longest, sampling = workload.max_total_tokens + 1, workload.sampling
    made, _ = make_engine(engine, model, slots, longest, execution, sampling=sampling)
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


def test_seeds_and_requests_have_tokens_of_their_own(tiny: LoadedModel) -> None:
    same = Workload.of("one prompt", [PROMPTS[0]] * 6, [10] * 6, sampling=PLAIN)
    first = outputs(serve(tiny, same), same)
    assert len({tuple(tokens) for tokens in first}) == 6
    other = replace(same, sampling=replace(PLAIN, seed=1))
    second = outputs(serve(tiny, other), other)
    assert all(one != two for one, two in zip(first, second, strict=True))
    assert first == outputs(serve(tiny, same), same)


def test_an_engine_serves_workloads_of_other_samplings_in_turn(tiny: LoadedModel) -> None:
    engine, _ = make_engine("slots", tiny, 3, WORKLOAD.max_total_tokens)
    batcher = Batcher("continuous", engine, 3)
    for sampling in (CUTS[1], None, CUTS[2], CUTS[1]):
        workload = replace(WORKLOAD, sampling=sampling)
        assert outputs(batcher.serve(workload, Watch())) == outputs(serve(tiny, workload))


def test_texts_end_at_their_end_token(tiny: LoadedModel) -> None:
    """The tokens are those of a run to the full length, up to the first end token."""
    whole = outputs(serve(tiny, replace(WORKLOAD, sampling=Sampling(3.0))))
    ending = replace(WORKLOAD, sampling=Sampling(3.0), stop_at_eos=True)
    common = {token for tokens in whole for token in tokens[:-1]}
    model = replace(tiny, source=replace(tiny.source, config={**tiny.source.config}))
    eos = min(common)
    engine, _ = make_engine("slots", model, 3, ending.max_total_tokens)
    engine._eos = {eos}
    recording = Batcher("continuous", engine, 3).serve(ending, Watch())
    cut = [t[: t.index(eos) + 1] if eos in t else t for t in whole]
    assert outputs(recording) == cut != whole
    found = verify(ending, [recording], TeacherForced(tiny), [eos])
    assert found.identical == len(ending)


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
def test_graphs_draw_the_same_tokens(
    prefill: str, cuda_stand_in: StandIn, make_model: MakeModel
) -> None:
    model, host = make_model(device="cuda"), make_model()
    recording = serve(model, execution="graph", prefill=prefill, max_batched_tokens=8)
    assert outputs(recording) == outputs(serve(host))
    assert verify(WORKLOAD, [recording], TeacherForced(model)).identical == len(WORKLOAD)


@pytest.mark.parametrize("sampling", [PLAIN, CUTS[3]], ids=str)
def test_tritons_kernels_draw_the_same_tokens(
    sampling: Sampling, triton_stand_in: StandIn, make_model: MakeModel
) -> None:
    few = Workload.of("few", [p[:4] for p in PROMPTS[:3]], [1, 3, 2], sampling=sampling)
    model, host = make_model(device="cuda"), make_model()
    recording = serve(model, few, slots=2, prefill="mixed", max_batched_tokens=8)
    assert outputs(recording, few) == outputs(serve(host, few), few)


def test_the_compiler_takes_the_sampler_whole() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2)) * 3
    traced = torch.compile(choose, fullgraph=True, dynamic=False, backend="eager")
    assert traced(logits, CUTS[3], keys(3)).tolist() == choose(logits, CUTS[3], keys(3)).tolist()


def test_transformers_batching_and_simulation(tiny: LoadedModel) -> None:
    """The former has no stream of each request; the latter has the same steps for all tokens."""
    with pytest.raises(UsageError, match=r"--strategy generate_batch: .* give --temperature 0"):
        Experiment.of({"strategy": "static,generate_batch", "temperature": 0.7})
    with pytest.raises(UsageError, match="--strategy generate_batch: "):
        GenerateBatch(tiny, 2, 30).serve(WORKLOAD, Watch())
    steps = [
        serve_on(SimulatedEngine(), replace(WORKLOAD, sampling=sampling)).num_steps
        for sampling in (None, PLAIN)
    ]
    assert steps[0] == steps[1]


def serve_on(engine: SimulatedEngine, workload: Workload) -> Recording:
    return Batcher("continuous", engine, 3).serve(workload, Watch())


# Verification


@pytest.mark.parametrize("sampling", CUTS, ids=str)
@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_half_precision_gives_ties_and_no_wrong_tokens(
    engine: str, sampling: Sampling, make_model: MakeModel
) -> None:
    model = make_model(dtype="bfloat16")
    workload = replace(WORKLOAD, sampling=sampling)
    found = verify(workload, [serve(model, workload, engine=engine)], TeacherForced(model))
    assert found.wrong == 0, found.findings
    assert found.identical > 0


def test_rounding_is_a_tie_and_more_is_wrong(tiny: LoadedModel) -> None:
    """Errors of the logits as large as those of float32 change few tokens, and none is wrong."""
    reference = TeacherForced(tiny)
    verdicts: dict[float, list[bool]] = {}
    for error, sampling in itertools.product((1e-7, 0.3), CUTS):
        workload = replace(WORKLOAD, sampling=sampling)

        def blurred(
            logits: torch.Tensor, *how: Any, size: float = error, **named: Any
        ) -> torch.Tensor:
            return choose(logits + size * torch.randn_like(logits), *how, **named)

        engine, _ = make_engine("slots", tiny, 3, workload.max_total_tokens)
        engine._chooser.choose = blurred
        found = Batcher("continuous", engine, 3).serve(workload, Watch())
        verdicts.setdefault(error, []).append(bool(verify(workload, [found], reference).passed))
    assert all(verdicts[1e-7])
    assert not any(verdicts[0.3])


class _Faulty(Chooser):
    """A chooser with a fault, put into the place of an engine's own."""

    def __init__(self, own: Chooser) -> None:
        vars(self).update(vars(own))
        self.calls = 0


class _NoiseOfSlot(_Faulty):
    def seat(self, chunks: Any) -> None:
        for chunk in chunks:
            super().seat([chunk._replace(request=chunk.request._replace(index=chunk.slot))])


class _NoiseOfNextRequest(_Faulty):
    def seat(self, chunks: Any) -> None:
        for chunk in chunks:
            index = chunk.request.index + 1
            super().seat([chunk._replace(request=chunk.request._replace(index=index))])


class _NoiseOfEarlierRequest(_Faulty):
    def seat(self, chunks: Any) -> None:
        """Keep the first request's stream in the slot of the next one."""
        super().seat([chunk for chunk in chunks if not self._seated[chunk.slot].any()])


class _NoiseOfStep(_Faulty):
    def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(logits, slots, torch.full_like(positions, self.calls))


class _NoiseOfRow(_Faulty):
    def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
        return super().__call__(logits, slots, positions + torch.arange(len(positions)))


class _NoiseOfBatchSize(_Faulty):
    def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
        return super().__call__(logits, slots, positions + len(positions) - 1)


class _NextPosition(_Faulty):
    def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
        return super().__call__(logits, slots, positions + 1)


class _Greedy(_Faulty):
    def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
        return self.choose(logits)


def _changed(**fields: Any) -> Callable[[Chooser], Chooser]:
    class Changed(_Faulty):
        def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
            assert self.sampling is not None
            own, self.sampling = self.sampling, replace(self.sampling, **fields)
            try:
                return super().__call__(logits, slots, positions)
            finally:
                self.sampling = own

    return Changed


def _off_by_one(change: int) -> Callable[[Chooser], Chooser]:
    """Keep one token more than top-k and top-p say, or one less."""

    class Shifted(_Faulty):
        def __call__(self, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
            assert self.sampling is not None
            kept = (logits >= smallest_kept(logits, self.sampling)).sum(-1)
            edge = logits.sort(-1, descending=True).values.gather(
                1, (kept + change - 1).clamp(min=0)[:, None]
            )
            sums = perturbed(
                logits,
                Sampling(self.sampling.temperature),
                keys_at(self.streams[slots], positions),
            )
            return best_token(sums.masked_fill(logits < edge, -torch.inf))

    return Shifted


FAULTS = {
    "noise of the slot": _NoiseOfSlot,
    "noise of the next request": _NoiseOfNextRequest,
    "noise of the slot's first request": _NoiseOfEarlierRequest,
    "noise of the step": _NoiseOfStep,
    "noise of the row": _NoiseOfRow,
    "noise of the batch size": _NoiseOfBatchSize,
    "noise of the next position": _NextPosition,
    "no noise": _Greedy,
    "temperature ignored": _changed(temperature=1.0),
    "temperature slightly off": _changed(temperature=0.51),
    "top-k ignored": _changed(top_k=0),
    "top-p ignored": _changed(top_p=1.0),
    "one token more": _off_by_one(1),
    "one token less": _off_by_one(-1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_sampler_is_caught(fault: str, tiny: LoadedModel) -> None:
    cut = Sampling(0.5, 0.6, 4 if "top-p" not in fault else 0)
    workload = replace(WORKLOAD, sampling=cut, output_tokens=WORKLOAD.output_tokens * 4)
    engine, _ = make_engine("slots", tiny, 3, workload.max_total_tokens)
    batcher = Batcher("continuous", engine, 3)
    right = batcher.serve(workload, Watch())
    engine._chooser = FAULTS[fault](engine._chooser)
    broken = batcher.serve(workload, Watch())
    found = verify(workload, [broken], TeacherForced(tiny))
    assert found.wrong > 0
    assert "the random stream draw" in found.findings[0].reason
    assert verify(workload, [right], TeacherForced(tiny)).identical == len(workload)
