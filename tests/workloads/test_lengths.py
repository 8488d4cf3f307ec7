"""Lengths and arrival times: each is of the distribution that it is named after, to the tails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from support.laws import law

from batchbench.errors import UsageError
from batchbench.workloads import WorkloadSpec, make_workload
from batchbench.workloads.arrivals import ArrivalProcess
from batchbench.workloads.generate import Outline, make_outline
from batchbench.workloads.lengths import LONGEST, Cycle, Drawn, Empirical, Lengths, parse_lengths
from batchbench.workloads.request import stream

DRAWS = 100_000

FIT, MISFIT = 0.01, 1e-4
"""A p-value that a right sample passes (seeds are fixed), and one that a wrong one falls below."""


def drawn(text: str) -> Drawn:
    """A distribution of a family."""
    found = parse_lengths(text, "--output-tokens")
    assert isinstance(found, Drawn)
    return found


CONTINUOUS = {
    "uniform:min=1,max=30": stats.uniform(0.5, 30),
    "4:64": stats.uniform(3.5, 61),
    "normal:mean=128,std=32": stats.norm(128, 32),
    "normal:mean=10,std=20,max=40": stats.norm(10, 20),
    "lognormal:mean=128,sigma=0.8,max=512": stats.lognorm(0.8, scale=128 * np.exp(-0.32)),
    "lognormal:median=13,sigma=1": stats.lognorm(1, scale=13),
    "exponential:mean=128,max=1000": stats.expon(scale=128),
    "exponential:mean=2,min=3": stats.expon(scale=2),
}
"""The distributions before rounding and clipping, written a second time."""


@pytest.mark.parametrize("text", CONTINUOUS)
def test_before_rounding_values_are_of_the_distribution(text: str) -> None:
    values = drawn(text).values(stream(3, "output lengths"), DRAWS)
    assert stats.kstest(values, CONTINUOUS[text].cdf).pvalue > FIT
    wrong = 1.03 * values  # three percent off is seen
    assert stats.kstest(wrong, CONTINUOUS[text].cdf).pvalue < MISFIT


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("lognormal:mean=128,sigma=0.8", 128),
        ("exponential:mean=40", 40),
        ("normal:mean=50,std=5", 50),
    ],
)
def test_a_mean_is_that_of_the_distribution_before_rounding_and_clipping(
    text: str, mean: float
) -> None:
    values = drawn(text).values(stream(1, "output lengths"), DRAWS)
    assert abs(values.mean() - mean) < 4 * values.std() / DRAWS**0.5
    clipped = drawn(f"{text},max={mean}").draw(stream(1, "output lengths"), DRAWS)
    assert clipped.mean() < mean - 1


def frequencies(lengths: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """The chi-square test's p-value; ``shares`` are of 1, 2, 3 …; rare ones are put together."""
    counts = np.bincount(lengths, minlength=len(shares) + 1)[1 : len(shares) + 1]
    counts, expected = counts.astype(float), shares * len(lengths)
    assert expected.sum() == pytest.approx(len(lengths), rel=1e-9)
    assert counts.sum() == len(lengths)
    bins: list[tuple[float, float]] = []
    observed, due = 0.0, 0.0
    for count, number in zip(counts, expected, strict=True):
        observed, due = observed + count, due + number
        if due >= 10:
            bins.append((observed, due))
            observed, due = 0.0, 0.0
    (last_observed, last_due) = bins.pop()
    bins.append((last_observed + observed, last_due + due))
    return float(stats.chisquare(*zip(*bins, strict=True)).pvalue)


def rounded(frozen: object, low: int, high: int) -> NDArray[np.float64]:
    """Shares of 1 … ``high`` after rounding and clipping, going by what these words mean."""
    cdf = frozen.cdf  # type: ignore[attr-defined]
    n = np.arange(1, high + 1)
    shares = cdf(n + 0.5) - cdf(n - 0.5)
    shares[low - 1] = cdf(low + 0.5)
    shares[: low - 1] = 0
    shares[high - 1] = 1 - cdf(high - 0.5)
    return np.asarray(shares, np.float64)


def zipf(alpha: float, high: int) -> NDArray[np.float64]:
    """Shares of scipy's zipf, what is beyond counted as ``high``."""
    shares = stats.zipf(alpha).pmf(np.arange(1, high + 1))
    shares[-1] = stats.zipf(alpha).sf(high - 1)
    return np.asarray(shares, np.float64)


WHOLE = {
    "uniform:min=1,max=30": np.full(30, 1 / 30),
    "uniform:min=5,max=6": np.array([0, 0, 0, 0, 0.5, 0.5]),
    "normal:mean=10,std=20,max=40": rounded(stats.norm(10, 20), 1, 40),
    "normal:mean=128,std=32,min=100,max=200": rounded(stats.norm(128, 32), 100, 200),
    "lognormal:mean=128,sigma=0.8,max=512": rounded(
        stats.lognorm(0.8, scale=128 * np.exp(-0.32)), 1, 512
    ),
    "exponential:mean=128,max=1000": rounded(stats.expon(scale=128), 1, 1000),
    "exponential:mean=2,min=3,max=90": rounded(stats.expon(scale=2), 3, 90),
    "zipf:alpha=1.8,max=50": zipf(1.8, 50),
    "zipf:alpha=1.1,max=1000": zipf(1.1, 1000),
}


@pytest.mark.parametrize("text", WHOLE)
def test_after_rounding_lengths_have_the_frequencies_of_the_distribution(text: str) -> None:
    lengths = drawn(text).draw(stream(5, "output lengths"), DRAWS)
    assert frequencies(lengths, WHOLE[text]) > FIT
    halved = np.where(np.arange(DRAWS) % 5 == 0, (lengths + 1) // 2, lengths)
    assert frequencies(halved, WHOLE[text]) < MISFIT


def test_draws_beyond_a_bound_are_clipped_and_not_drawn_again() -> None:
    """The same numbers with and without bounds, but for those beyond."""
    free = drawn("lognormal:mean=100,sigma=1").draw(stream(2, "output lengths"), DRAWS)
    bound = drawn("lognormal:mean=100,sigma=1,min=20,max=200")
    lengths = bound.draw(stream(2, "output lengths"), DRAWS)
    assert lengths.tolist() == np.clip(free, 20, 200).tolist()
    assert {20, 200} <= set(lengths.tolist())
    assert np.mean(lengths == 200) == pytest.approx(np.mean(free >= 200), abs=1e-12)


def test_an_empirical_distribution_has_the_frequencies_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("3\n1\n3\n\n8\n3\n1\n")
    lengths = parse_lengths(f"empirical:{file}", "--output-tokens")
    sample = lengths.draw(stream(4, "output lengths"), DRAWS)
    shares = np.array([2, 0, 3, 0, 0, 0, 0, 1]) / 6
    assert set(sample.tolist()) == {1, 3, 8}
    assert frequencies(sample, shares) > FIT


def test_a_cycle_has_a_long_one_at_every_position_divisible() -> None:
    lengths = parse_lengths("cycle:every=3,long=9,short=2", "--prompt-tokens")
    assert lengths == Cycle(3, 9, 2)
    assert lengths.draw(stream(0, "ids"), 7).tolist() == [9, 2, 2, 9, 2, 2, 9]


# The grammar

texts = st.one_of(
    st.builds("{}".format, st.integers(1, 10**9)),
    st.builds(lambda a, b: f"{a}:{a + b}", st.integers(1, 999), st.integers(0, 999)),
    st.builds("exponential:mean={}".format, st.integers(1, 999) | st.floats(0.01, 999)),
    st.builds(
        lambda m, s, a, b: f"lognormal:sigma={s},min={a},mean={m},max={a + b}",
        st.floats(0.01, 999),
        st.floats(0.01, 9),
        st.integers(1, 99),
        st.integers(0, 99),
    ),
    st.builds("normal:mean={},std={},max=7".format, st.integers(1, 99), st.floats(0.01, 99)),
    st.builds("zipf:alpha={},max={}".format, st.floats(1.01, 9), st.integers(1, 99)),
    st.builds("cycle:every={},long=9,short=4".format, st.integers(1, 99)),
)


@given(texts, st.integers(0, 2**63 - 1), st.integers(1, 50))
@law
def test_draws_stay_within_their_bounds_and_more_begin_with_the_same(
    text: str, seed: int, size: int
) -> None:
    lengths: Lengths = parse_lengths(text, "--output-tokens")
    sample = lengths.draw(stream(seed, "output lengths"), size)
    assert sample.dtype == np.int64
    assert 1 <= sample.min() <= sample.max() <= (lengths.longest or LONGEST)
    more = lengths.draw(stream(seed, "output lengths"), size + 9)
    assert more[:size].tolist() == sample.tolist()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nope:mean=3", "must be a number (7), a range (4:64), uniform:min=1,max=30"),
        ("lognormal", "lognormal:mean=128,sigma=0.8"),
        ("lognormal:mean=3", "lognormal:mean=128,sigma=0.8"),
        ("lognormal:mean=3,median=3,sigma=1", "lognormal:mean=128"),
        ("lognormal:mean=3,mean=3,sigma=1", "lognormal:mean=128"),
        ("exponential:mean=128,top=9", "exponential:mean=128"),
        ("exponential:mean=-1", "must be"),
        ("exponential:mean=nan", "must be"),
        ("exponential:mean=0", "mean must be above 0"),
        ("exponential:mean=1e12", "mean must be above 0 and at most 1000000000"),
        ("exponential:mean=9,max=4.5", "max must be a whole number"),
        ("exponential:mean=9,max=0", "max must be at least 1"),
        ("exponential:mean=9,min=9,max=4", "the smaller bound comes first (4:9)"),
        ("normal:mean=9,std=0", "std must be above 0"),
        ("zipf:alpha=1.8", "zipf:alpha=1.8,max=50"),
        ("zipf:alpha=1,max=50", "alpha must be above 1"),
        ("zipf:alpha=2,max=2000000", "max of zipf must be at most 1000000"),
        ("cycle:every=8,long=100", "cycle:every=8,long=100,short=10"),
        ("cycle:every=0,long=100,short=10", "every must be at least 1"),
        ("empirical:", "empirical:FILE"),
        ("empirical:nowhere.txt", "no such file"),
    ],
)
@pytest.mark.parametrize("option", ["--prompt-tokens", "--output-tokens"])
def test_what_is_not_of_the_grammar_is_answered_with_it(option: str, text: str, told: str) -> None:
    field = option[2:].replace("-", "_")
    with pytest.raises(UsageError) as refused:
        WorkloadSpec(**{field: text})
    assert str(refused.value).startswith(f"{option} {text[:20]}")
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "contains no lengths"),
        (b"\n\n", "contains no lengths"),
        (b"3\n0\n", "line 2: '0' must be at least 1"),
        (b"3\n4\n-1\n", "line 3: '-1' must be at least 1"),
        (b"3\nfour\n", "line 2: 'four' must be a whole number"),
        (b"3.5\n", "line 1: '3.5' must be a whole number"),
        (b"3\n\xff\n", "line 2: "),
    ],
)
def test_a_file_of_lengths_is_refused_by_its_line(
    content: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "lengths.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        Empirical(file, "--prompt-tokens").lengths()
    assert str(refused.value).startswith(f"--prompt-tokens empirical:{file}: ")
    assert told in str(refused.value)


# Arrival times


def due_s(process: ArrivalProcess, count: int, seed: int = 0) -> NDArray[np.float64]:
    """Return the times of arrivals, in s."""
    return process.due_ns(stream(seed, "arrivals"), count) / 1e9


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_are_gamma_distributed_and_of_the_rate(burstiness: float) -> None:
    kind = "poisson" if burstiness == 1.0 else "gamma"
    gaps = np.diff(due_s(ArrivalProcess(kind, 5.0, None, burstiness), DRAWS + 1, seed=1))
    expected = stats.gamma(burstiness, scale=1 / (5.0 * burstiness))
    # Gaps are whole nanoseconds; half of one is put back before the smallest are compared.
    gaps = gaps + stream(0, "ids").uniform(0, 1e-9, DRAWS)
    assert stats.kstest(gaps, expected.cdf).pvalue > FIT
    assert stats.kstest(gaps * 1.06, expected.cdf).pvalue < MISFIT
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_a_poisson_process_has_poisson_counts() -> None:
    times = due_s(ArrivalProcess("poisson", 10.0), DRAWS, seed=2)
    counts = np.bincount(times.astype(np.int64))[:-1]
    shares = stats.poisson(10.0).pmf(np.arange(0, 40))
    assert frequencies(counts + 1, np.append(shares, 1 - shares.sum())) > FIT


@pytest.mark.parametrize(("begin", "end"), [(1.0, 16.0), (16.0, 1.0), (2.0, 2.001), (1e-3, 1e3)])
def test_on_a_ramp_times_are_spread_as_a_line_says(begin: float, end: float) -> None:
    """Given their number, times of a Poisson process are a sample of its rate over time."""
    times = due_s(ArrivalProcess("ramp", begin, end), DRAWS, seed=3)
    assert (np.diff(times) >= 0).all()
    last = 2 * (DRAWS - 1) / (begin + end)
    assert times[-1] == pytest.approx(last)

    def integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
        return begin * t + (end - begin) * t**2 / (2 * last)

    whole = integral(times[-1:])[0]
    assert stats.kstest(times[1:-1], lambda t: integral(t) / whole).pvalue > FIT
    if not 0.9 < begin / end < 1.1:
        assert stats.kstest(times[1:-1], stats.uniform(0, times[-1]).cdf).pvalue < MISFIT


def test_a_constant_rate_is_constant_and_at_once_is_at_once() -> None:
    times = due_s(ArrivalProcess("constant", 4.0), 9)
    assert times.tolist() == [i / 4 for i in range(9)]
    assert not due_s(ArrivalProcess("at-once"), 9).any()


@given(
    st.sampled_from(["poisson", "gamma", "constant", "ramp"]),
    st.floats(1e-3, 1e4),
    st.floats(1e-3, 1e4),
    st.sampled_from([0.01, 0.25, 1000.0]),
    st.integers(1, 300),
    st.integers(0, 2**63 - 1),
)
@law
def test_times_ascend_from_zero_at_the_rate_asked_and_seeds_reproduce(
    kind: str, begin: float, end: float, burstiness: float, count: int, seed: int
) -> None:
    """A run has the requested rate even with few requests and bursty arrivals."""
    process = ArrivalProcess(
        kind, begin, end if kind == "ramp" else None, burstiness if kind == "gamma" else 1.0
    )
    due = process.due_ns(stream(seed, "arrivals"), count)
    assert due[0] == 0
    assert (np.diff(due) >= 0).all()
    assert due.tolist() == process.due_ns(stream(seed, "arrivals"), count).tolist()
    mean_rate = (begin + end) / 2 if kind == "ramp" else begin
    assert due[-1] == pytest.approx((count - 1) / mean_rate * 1e9, rel=1e-9, abs=1)
    if kind != "ramp" and count > 1:  # more requests begin with the same gaps, but for a factor
        more = process.due_ns(stream(seed, "arrivals"), count + 5)[:count]
        if more[-1]:
            assert np.allclose(more / more[-1], due / due[-1], rtol=0, atol=2 / more[-1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"burstiness": 0.5}, "--burstiness 0.5: needs random arrivals; give --request-rate"),
        ({"arrivals": "constant"}, "--arrivals constant: needs a rate; give --request-rate"),
        ({"arrivals": "poisson"}, "--arrivals poisson: needs a rate"),
        ({"arrivals": "gamma"}, "--arrivals gamma: needs a rate"),
        ({"arrivals": "trace"}, "--arrivals trace: there is no trace; give --trace FILE"),
        (
            {"arrivals": "at-once", "request_rate": 2.0},
            "--arrivals at-once: takes no separate rate",
        ),
        (
            {"arrivals": "ramp:from=1,to=2", "request_rate": 2.0},
            "--arrivals ramp:from=1,to=2: takes no separate rate; drop --request-rate",
        ),
        (
            {"arrivals": "poisson", "request_rate": 2.0, "burstiness": 2.0},
            "--burstiness 2: needs random arrivals; give --request-rate and --arrivals gamma",
        ),
        (
            {"arrivals": "constant", "request_rate": 2.0, "burstiness": 2.0},
            "--burstiness 2: needs random arrivals",
        ),
        ({"arrivals": "sometimes"}, "--arrivals sometimes: must be at-once, poisson, gamma"),
        ({"arrivals": "poisson:rate=3"}, "--arrivals poisson:rate=3: must be at-once"),
        ({"arrivals": "ramp"}, "--arrivals ramp: must be"),
        ({"arrivals": "ramp:from=1"}, "--arrivals ramp:from=1: must be"),
        ({"arrivals": "ramp:from=0,to=3"}, "both rates must be above 0"),
        ({"request_rate": 0.0}, "--request-rate 0.0: must be at least"),
        ({"request_rate": float("inf")}, "--request-rate inf: must be a finite number"),
        ({"burstiness": 0.0, "request_rate": 1.0}, "--burstiness 0.0: must be at least 0.01"),
        ({"max_concurrency": 0}, "--max-concurrency 0: must be at least 1"),
        ({"speed": 2.0}, "--speed 2.0: needs a trace; give --trace FILE"),
        ({"trace_format": "azure"}, "--trace-format azure: needs a trace"),
        ({"on_bad_row": "skip"}, "--on-bad-row skip: needs a trace"),
        ({"output_tokens": "7", "long_tokens": 100}, "exclude each other: give one of them"),
        ({"output_tokens": "7", "long_every": 8}, "--output-tokens and --long-every exclude"),
        ({"output_tokens": "7", "short_tokens": 10}, "--output-tokens and --short-tokens"),
        ({"shared_prefix_tokens": 3}, "--shared-prefix-tokens 3: needs random prompts"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError) as refused:
        WorkloadSpec(**settings)  # type: ignore[arg-type]
    assert told in str(refused.value)


# Streams


def outline(spec: WorkloadSpec, **more: object) -> Outline:
    """Lengths and times of a spec."""
    return make_outline(spec, batch_size=8, encode=None, **more)  # type: ignore[arg-type]


SPEC = WorkloadSpec(
    queue_size=50,
    prompt_tokens="4:64",
    output_tokens="exponential:mean=20,max=99",
    request_rate=3.0,
    seed=7,
)


@pytest.mark.parametrize(
    ("changed", "column"),
    [
        ({"prompt_tokens": "1:9"}, "prompt_tokens"),
        ({"output_tokens": "9:99"}, "output_tokens"),
        ({"request_rate": 4.0}, "due_ns"),
        ({"burstiness": 0.5}, "due_ns"),
    ],
)
def test_changing_one_of_lengths_and_times_leaves_the_others(
    changed: dict[str, object], column: str
) -> None:
    before, after = outline(SPEC), outline(replace(SPEC, **changed))  # type: ignore[arg-type]
    for name in ("prompt_tokens", "output_tokens", "due_ns"):
        same = getattr(before, name).tolist() == getattr(after, name).tolist()
        assert same is (name != column)
    if column != "prompt_tokens":
        ids = [o.workload(1000).prompt_ids.tolist() for o in (before, after)]
        assert ids[0] == ids[1]


def test_a_shared_prefix_begins_all_prompts_and_changes_nothing_else() -> None:
    plain = make_workload(SPEC, batch_size=8, vocab_size=1000, encode=None)
    shared = make_workload(
        replace(SPEC, shared_prefix_tokens=10), batch_size=8, vocab_size=1000, encode=None
    )
    assert shared.prompt_offsets.tolist() == plain.prompt_offsets.tolist()
    beginning = max((shared.prompt(i)[:10].tolist() for i in range(50)), key=len)
    for i in range(50):
        prompt = shared.prompt(i).tolist()
        assert prompt[:10] == beginning[: len(prompt)]
        assert prompt[10:] == plain.prompt(i).tolist()[10:]
    assert len({tuple(plain.prompt(i)[:4].tolist()) for i in range(50)}) > 40


# The model's context


@given(st.integers(2, 200), st.sampled_from(["clip", "scale", "skip"]), st.integers(0, 99))
@law
def test_no_request_exceeds_the_context_once_it_is_said_what_to_do(
    context: int, overlong: str, seed: int
) -> None:
    spec = replace(SPEC, overlong=overlong, seed=seed, prompt_tokens="exponential:mean=40")
    total = outline(spec).prompt_tokens + outline(spec).output_tokens
    if overlong == "skip" and (total > context).all():
        with pytest.raises(UsageError, match=r"^--overlong skip: every request exceeds"):
            outline(spec, context=context)
        return
    found = outline(spec, context=context)
    assert (found.prompt_tokens + found.output_tokens).max() <= context
    assert min(found.prompt_tokens.min(), found.output_tokens.min()) >= 1
    assert len(found.workload(100).prompt_ids) == found.prompt_tokens.sum()


def test_clip_cuts_outputs_first_skip_leaves_the_rest_and_each_says_so() -> None:
    told: list[str] = []
    spec = WorkloadSpec(queue_size=16, prompt_tokens="10", long_tokens=95, short_tokens=5)
    clipped = outline(replace(spec, overlong="clip"), context=50, note=told.append)
    assert clipped.prompt_tokens.tolist() == [10] * 16
    assert clipped.output_tokens.tolist() == [40, *[5] * 7] * 2
    skipped = outline(replace(spec, overlong="skip"), context=50, note=told.append)
    assert skipped.output_tokens.tolist() == [5] * 14
    scaled = outline(replace(spec, overlong="scale"), context=50, note=told.append)
    assert (scaled.prompt_tokens[0], scaled.output_tokens[0]) == (10 * 50 // 105, 95 * 50 // 105)
    assert len(told) == 3
    assert told[0] == "requests clipped to the 50 tokens of the context: 2"
    assert "skipped" in told[1]
    assert told[2].startswith(
        "all lengths are multiplied by 0.476: the longest possible request has 1"
    )


def test_lengths_are_scaled_by_their_bounds_and_so_by_the_same_factor_for_every_seed() -> None:
    spec = replace(SPEC, prompt_tokens="exponential:mean=9,max=500", overlong="scale")
    for seed in range(5):
        plain, scaled = (outline(replace(spec, seed=seed), context=c) for c in (None, 300))
        factor = 300 / (500 + 99)
        floor = np.maximum(1, np.floor(plain.prompt_tokens * factor + 1e-9))
        assert scaled.prompt_tokens.tolist() == floor.tolist()
