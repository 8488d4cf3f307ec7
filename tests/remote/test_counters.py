"""Counters of servers: Prometheus' text format, and what grew during a trial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers import ADDRESS, Answers, answers_of

from batchbench.batching.remote.dialects import (
    DIALECTS,
    MOST_EXACT,
    counts_in,
    growth_of,
    read_counts,
    samples,
)

LLAMA, VLLM = DIALECTS["llama.cpp"].metrics, DIALECTS["vllm"].metrics


@pytest.mark.parametrize("name", ["llama.cpp", "vllm"])
def test_a_real_server_has_every_counter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_of(name).install(monkeypatch)
    found = read_counts(ADDRESS, DIALECTS[name])
    assert found.keys() == set(DIALECTS[name].metrics.values())


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("answer", [None, (0, ""), (200, ""), (200, "<html>"), (501, "{}")])
def test_a_server_without_metrics_has_no_counters(
    name: str, answer: tuple[int, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers({} if answer is None else {"/metrics": answer}).install(monkeypatch)
    assert read_counts(ADDRESS, DIALECTS[name]) == {}


def test_samples_are_read_with_labels_of_any_text() -> None:
    text = r"""# HELP vllm:a The number of {things}.
# TYPE vllm:a counter
vllm:a 3
vllm:b{model="a } b",path="C:\\x \" y"} 4.5 1395066363000
vllm:c{} 1e+06
vllm:d NaN
vllm:e{le="+Inf"} +Inf
vllm:f
vllm:g x
not a metric 7
"""
    assert list(samples(text)) == [("vllm:a", 3), ("vllm:b", 4.5), ("vllm:c", 1e6)]


def test_a_counter_is_the_sum_over_its_labels_and_no_other_name_counts() -> None:
    text = """vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 900
vllm:iteration_tokens_total_count{engine="0"} 20
vllm:iteration_tokens_total_count{engine="1"} 22
vllm:iteration_tokens_total_sum{engine="0"} 900
vllm:num_requests_running_more{engine="0"} 5
"""
    assert counts_in(text, VLLM) == {"passes": 42}


def test_counts_that_are_written_with_six_digits_are_left_out_where_they_are_not_exact() -> None:
    assert counts_in("llamacpp:n_decode_total 999999\n", LLAMA) == {"passes": 999999}
    assert counts_in("llamacpp:n_decode_total 1e+06\n", LLAMA) == {}
    text = "llamacpp:n_decode_total 1.23457e+06\nllamacpp:requests_processing 2\n"
    assert counts_in(text, LLAMA) == {"running": 2}
    large = f"vllm:prompt_tokens_total {MOST_EXACT}.0\n"
    assert counts_in(large, VLLM) == {"prompt_tokens": MOST_EXACT}


GROWING = ("passes", "prompt_tokens", "output_tokens", "cached_tokens")
READINGS = st.dictionaries(st.sampled_from(GROWING), st.integers(0, 10**9))


@given(READINGS, READINGS)
def test_what_grew_is_never_negative(before: dict[str, int], after: dict[str, int]) -> None:
    grown = growth_of(before, after)
    for name in GROWING:
        first, last, growth = (c.get(name) for c in (before, after, grown))
        assert (growth is None) == (first is None or last is None or last < first)
        assert growth is None or first is None or first + growth == last


def test_counts_beyond_all_reason_are_left_out() -> None:
    names = {"a": "passes"}
    assert counts_in("a 1e308\na 1e308\na -1e308\na NaN\na Inf\n", names) == {}
    assert counts_in("a 1e308\na 7\n", names) == {"passes": 7}
