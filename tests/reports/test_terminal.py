"""The terminal's sentence and table."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
from rich.console import Console
from support.results import PASSED, clean, measured, paced, result_of, shown, simulated, trials_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.verification import NOT_VERIFIED, Finding
from batchbench.reports.formats.terminal import render, sentence
from batchbench.reports.result import Result
from batchbench.reports.text import number
from batchbench.workloads import Workload

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
WIDTHS = (40, 60, 80, 120)


# The sentence


def test_faster() -> None:
    result = result_of(
        {
            "static": paced("static", 10, 11, 10, 11),
            "continuous": paced("continuous", 10, 10.5, 10.1, 11),
        }
    )
    assert sentence(result) == (
        "continuous batching was 3.03× as fast as static batching (95 % CI 2.94–3.18); counting "
        "steps only: 3.03×; outputs identical for 32/32 requests; run valid."
    )


def test_slower_is_less_than_once_as_fast() -> None:
    result = result_of(
        {
            "static": paced("static", 10, 10.2, 10, 10.2),
            "continuous": paced("continuous", 40, 41, 40, 42),
        }
    )
    assert sentence(result).startswith(
        "continuous batching was 0.76× as fast as static batching (95 % CI 0.73–0.77);"
    )


def test_equally_fast_is_no_difference() -> None:
    same = {"static": paced("static", 10, 10, 10), "mine:Own": paced("static", 10, 10, 10)}
    assert sentence(result_of(same)).startswith(
        "mine:Own and static batching showed no difference (1.00×, 95 % CI 1.00–1.00);"
    )


def test_three_pairs_are_needed_for_an_interval() -> None:
    pairs = {"static": paced("static", 10, 10), "continuous": paced("continuous", 10, 10)}
    text = "static batching (2 pairs of trials: too few for an interval); counting steps only"
    assert text in sentence(result_of(pairs))
    one = {name: trials[:1] for name, trials in pairs.items()}
    assert "static batching (1 pair of trials: too few for an interval)" in sentence(result_of(one))


def test_one_strategy_is_told_without_a_comparison() -> None:
    assert sentence(result_of({"static": paced("static", 10, 10, 10)})) == (
        "static batching served 32 requests in 4 s, 170 output tokens/s; "
        "outputs identical for 32/32 requests; run valid."
    )


def test_large_and_small_numbers_are_spelled_without_exponents() -> None:
    for step_ms in (0.001, 0.05, 10, 30_000):
        assert not re.search(r"\de[+-]", sentence(result_of({"static": paced("static", step_ms)})))


def test_of_three_strategies_the_last_is_compared_and_the_other_is_named() -> None:
    own = [
        replace(t, header=replace(t.header, strategy="mine:Own")) for t in trials_of("continuous")
    ]
    recordings = {
        "static": trials_of("static"),
        "continuous": trials_of("continuous"),
        "mine:Own": own,
    }
    text = sentence(result_of(recordings))
    assert "mine:Own was 3.03× as fast as static batching (95 % CI 3.03–3.03)" in text
    assert "; the others over static: continuous 3.03×;" in text


def test_another_baseline_than_static_is_named() -> None:
    turned = {"continuous": trials_of("continuous"), "static": trials_of("static")}
    assert sentence(result_of(turned)).startswith(
        "static batching was 0.33× as fast as continuous batching (95 % CI 0.33–0.33); counting"
    )


def test_ties_are_counted_with_the_largest_gap() -> None:
    some = replace(PASSED, identical=30, numerical_ties=2, max_logit_gap=0.00123)
    assert (
        "outputs identical for 30/32 requests, 2 numerical ties (logits 0.0012 apart at most)"
        in sentence(result_of(verification=some))
    )
    one = replace(PASSED, identical=31, numerical_ties=1, max_logit_gap=0.1)
    assert "31/32 requests, 1 numerical tie (" in sentence(result_of(verification=one))


def test_wrong_outputs_are_shouted_with_the_first() -> None:
    tie = Finding(1, "static", "numerical tie", 3, 0.1, 0.2, "is close")
    bad = Finding(4, "continuous", "wrong", 9, 5.0, 0.2, "output token 9 is not the model's own")
    found = replace(PASSED, identical=29, numerical_ties=1, wrong=2, findings=(tie, bad))
    text = sentence(result_of(verification=found))
    assert "identical for 29/32 requests, 1 numerical tie" in text
    assert (
        ", 2 WRONG (first: request 4 under continuous, output token 9 is not the model's own);"
        in text
    )
    assert "run suspect (2 requests got wrong tokens)" in text


def test_a_suspect_run_says_why() -> None:
    result = result_of(
        {"static": trials_of("static", foreign=0.9), "continuous": trials_of("continuous")},
        stopped="interrupted after 4 of 8 pairs",
    )
    assert sentence(result).endswith(
        "; run suspect (interrupted after 4 of 8 pairs; "
        "static: other processes kept 0.9 cores busy)."
    )


def test_what_was_not_verified_says_so() -> None:
    assert "; outputs not verified; run valid." in sentence(result_of(verification=NOT_VERIFIED))


def test_a_simulation_says_that_it_is_one() -> None:
    assert sentence(simulated()) == (
        "in simulation, where every step costs the same, continuous batching was 3.08× as fast as "
        "static batching; run valid."
    )


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "N/A"),
        (0, "0"),
        (0.0, "0"),
        (400, "400"),
        (3200, "3,200"),
        (1234.5, "1,234"),
        (12345.6, "12,346"),
        (999.95, "1,000"),
        (12.345, "12.35"),
        (0.0012345, "0.001234"),
        (2.0, "2"),
        (1e7, "10,000,000"),
    ],
)
def test_numbers_have_four_digits_and_commas(value: float | None, text: str) -> None:
    assert number(value) == text


# The table


def cells(result: Result) -> list[list[str]]:
    """Each row of the table on a wide terminal."""
    lines = shown(result, 200).splitlines()
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│")
    ]


def test_the_table_holds_the_results_own_numbers() -> None:
    result = result_of(price=3.6)
    rows = {row[0]: row[1:] for row in cells(result)}
    static = result.data["strategies"]["static"]
    assert rows["Duration"][:2] == ["s", number(static["summary"]["duration"])]
    assert rows["TTFT p99"][:2] == ["ms", number(static["summary"]["p99_ttft_ms"])]
    assert rows["Forward passes"] == ["", "400", "132", "0.33×"]
    assert rows["Slot utilisation"] == ["%", "21.25", "64.39", "3.03×"]
    assert rows["Output throughput"][3].startswith("3.03× (3.03–3.03")
    assert rows["Cost of 1M output tok"][0] == "$"


def test_every_number_has_a_unit() -> None:
    counts = {"Forward passes"}  # what is counted is its unit
    for label, unit, *values in cells(result_of(price=3.6)):
        assert unit or label in counts
        assert values[-1] == "N/A" or "×" in values[-1]


def test_a_row_without_any_value_is_left_out_and_one_without_meaning_is_na() -> None:
    assert "Cost" not in shown(result_of(), 120)
    result = replace(simulated(), data=deepcopy(simulated().data))
    result.data["strategies"]["static"]["summary"]["mean_tpot_ms"] = None
    rows = {row[0]: row[1:] for row in cells(result)}
    assert rows["TPOT mean"][1] == "N/A"


def test_the_title_names_model_device_engine_batch_and_workload() -> None:
    assert "gpt2 · cpu float32 · 8 slots · 32 requests" in shown(result_of(), 120)
    assert "gpt2 · simulated · 8 slots · 32 requests" in shown(simulated(), 120)


def test_the_caption_tells_trials_and_interval() -> None:
    told = "medians of 4 trials, latencies pooled; ÷ is the median of paired trials (95 % CI)"
    assert told in " ".join(shown(clean(), 120).split())
    two = {"static": paced("static", 10, 10), "continuous": paced("continuous", 10, 10)}
    text = shown(result_of(two), 120)
    assert "medians of 2 trials, latencies pooled" in " ".join(text.split())
    assert "95 % CI" not in text
    assert "simulated: a step counts as 1 ms" in shown(simulated(), 120)


def slow(policies: Sequence[str] = ("static", "continuous")) -> Result:
    """Large numbers: three minutes a step."""
    return result_of(
        {policy: paced(policy, 180_000, 181_000, 182_500, 180_700) for policy in policies},
        price=1000.0,
    )


STATICS = ("static", "static-fixed", "static-bucketed", "static-oracle")


def five() -> Result:
    """All our strategies, with goals and a price."""
    names = (*STATICS, "continuous")
    return result_of(
        {name: trials_of(name) for name in names}, price=2.5, slo=("ttft:900", "e2el:2500")
    )


def under_load() -> Result:
    """Requests come in their own time, to a static batching that cannot keep up."""
    workload = Workload.of(
        "timed", [[7] * 7] * 40, [9, 40, 4, 17, 80] * 8, due_ns=[i * 4 * 10**7 for i in range(40)]
    )
    recordings = {
        name: [Batcher(name, SimulatedEngine(), 4).serve(workload, Watch())]
        for name in (*STATICS, "continuous")
    }
    return result_of(recordings, workload=workload, slo=("ttft:20",))


def test_five_strategies_are_told_apart_in_80_columns() -> None:
    text = shown(five(), 80)
    heads = [line for line in text.splitlines() if line.endswith("continuous ")]
    assert len(heads) == 2  # of the table, and of the time budget
    for head in heads:
        assert head.split()[-3:] == ["bucketed", "oracle", "continuous"]
    rows = [line for line in text.splitlines() if line.startswith(" Duration ")]
    assert len(rows[0].split()) == 7
    for name in STATICS[1:]:
        assert re.search(rf"^ {name} +\d", text, re.MULTILINE), name


def test_the_comparison_of_many_has_the_paired_ratios() -> None:
    result = five()
    text = shown(result, 120)
    (line,) = (line for line in text.splitlines() if line.startswith(" continuous"))
    speedup = result.data["comparison"]["speedup"]["median"]
    assert line.split()[1] == f"{1 / speedup:.2f}×"
    assert "÷ static" in text


def test_the_sentence_names_the_best_static_where_several_ran() -> None:
    assert re.search(
        r"continuous batching was 3\.\d\d× as fast as static batching .*, and 0\.\d\d× as fast as "
        "static-oracle, the fastest form of static batching; the others over static: static-fixed "
        "1.00×, ",
        sentence(five()),
    )
    assert "the fastest form" not in sentence(clean())


def test_under_load_the_sentence_tells_how_long_people_wait() -> None:
    result = under_load()
    static, continuous = (
        result.data["strategies"][name]["summary"] for name in ("static", "continuous")
    )
    assert sentence(result).startswith(
        f"at 25 req/s, p99 TTFT was {number(continuous['p99_ttft_ms'])} ms under continuous "
        f"batching, {number(static['p99_ttft_ms'])} ms under static batching, "
    )
    assert (
        f"; {100 * continuous['slo_attainment']:.0f}% against "
        f"{100 * static['slo_attainment']:.0f}% of requests within the SLOs; "
    ) in sentence(under_load())
    assert continuous["slo_attainment"] > static["slo_attainment"] > 0


def test_rows_of_arrivals_are_shown_where_requests_arrive() -> None:
    for label in ("Queue time p99", "Arrival rate", "Arrival lag p99"):
        assert label in shown(under_load(), 120)
        assert label not in shown(clean(), 120)


def test_latency_over_the_unloaded_one_is_shown_by_length_where_lengths_differ() -> None:
    assert "E2E ÷ unloaded, 100 tok" in shown(clean(), 120)
    assert "E2E ÷ unloaded: latency over that of the same request alone" in shown(clean(), 200)
    equal = Workload.of("equal", [[7] * 7] * 9, [5] * 9)
    trials = {p: [measured(p, workload=equal)] for p in ("static", "continuous")}
    assert "unloaded" not in shown(result_of(trials, workload=equal), 120)


def test_a_stall_is_told_with_its_step() -> None:
    text = " ".join(shown(under_load(), 120).split())
    told = (
        r"Longest gap between two tokens, continuous: \d+ ms for \d+ requests?, during step \d+, "
        "which computed a prefill"
    )
    assert re.search(told, text)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [clean, slow, simulated, five, under_load])
def test_nothing_is_wider_than_the_terminal_or_cut_off(
    width: int, make: Callable[[], Result]
) -> None:
    text = shown(make(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [w for w in WIDTHS if w >= 60])
@pytest.mark.parametrize("make", [clean, slow, simulated])
def test_no_number_is_cut_in_two(width: int, make: Callable[[], Result]) -> None:
    result = make()
    assert sorted(NUMBER.findall(shown(result, width))) == sorted(
        NUMBER.findall(shown(result, 200))
    )


def test_no_color_leaves_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bold may stay, as https://no-color.org says."""
    suspect = result_of(stopped="interrupted after 1 of 4 pairs")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = re.compile(r"\x1b\[[\d;]*(?:3|4)[0-9][\d;]*m")

    def drawn() -> str:
        console = Console(file=io.StringIO(), width=80, force_terminal=True)
        console.print(render(suspect))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured.search(drawn())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(drawn())


# Predictions


@pytest.mark.parametrize(
    ("r2", "median_error", "weak"),
    [(0.49, 0.11, True), (0.51, 0.11, False), (0.49, 0.09, False), (None, 0.5, False)],
)
def test_a_fit_that_is_too_weak_predicts_nothing(
    r2: float | None, median_error: float, weak: bool
) -> None:
    result = clean()
    quality = {"steps": 1600, "r2": r2, "median_error": median_error, "total_error": 0.012}
    duration = {"duration": 1.1, "measured_duration": 1.0, "error": 0.1, "extrapolates": []}
    prediction = {
        "fitted_on": "static",
        "strategies": [{"strategy": "continuous", **duration}],
        "held_out": quality,
    }
    text = shown(replace(result, data={**result.data, "prediction": prediction}), 200)
    assert ("too weak to predict with" in text) is weak
    assert ("continuous takes 1.1 s, 10.0% above the measured 1 s." in text) is not weak
