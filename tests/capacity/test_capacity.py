"""Capacity: verdicts, the search, its report, and a comparison with a fine grid."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law, thorough
from support.program import Call, call

from batchbench.batching.bench import LocalBench
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.verification import Verification
from batchbench.errors import UsageError
from batchbench.json_file import json_text
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.capacity import report
from batchbench.studies.capacity import search as benches
from batchbench.studies.capacity.report import draw_capacity
from batchbench.studies.capacity.search import (
    GROWTH,
    MOST_PROBES,
    CapacityFindings,
    CapacityQuery,
    Search,
    TrialFigures,
    Verdict,
    attained,
    check_enough,
    figures_of,
    find_capacity,
    judge,
    mean_of,
    queue_growth,
)

YES, NO, BORDER = Verdict.SUSTAINED, Verdict.NOT_SUSTAINED, Verdict.BORDERLINE


def trial(met: int, requests: int = 100, growth: float = 0.0) -> TrialFigures:
    """Return made-up figures of a trial."""
    return TrialFigures(requests, met, growth, {"ttft": 1.0})


# Judging


def test_one_trial_is_no_proof_unless_it_is_all_there_may_be() -> None:
    assert judge([trial(100)], 0.9, 8) is None
    assert judge([trial(90)], 0.9, 1) is YES
    assert judge([trial(89)], 0.9, 1) is NO
    assert judge([trial(100, growth=GROWTH + 0.01)], 0.9, 1) is NO


@pytest.mark.parametrize(
    ("trials", "verdict"),
    [
        ([trial(100)] * 2, YES),
        ([trial(30), trial(25)], NO),
        ([trial(97), trial(91)], None),  # above what is asked, and not surely
        ([trial(88), trial(93)] * 4, BORDER),
        ([trial(10, 10)] * 2, None),  # too few requests
        ([trial(100, growth=0.50), trial(100, growth=0.53)], NO),  # the queue grows
        ([trial(100, growth=0.0), trial(100, growth=0.15)], None),
        ([trial(100, growth=-0.01), trial(100, growth=0.0)], YES),
    ],
)
def test_a_verdict_is_what_the_intervals_clear(
    trials: Sequence[TrialFigures], verdict: Verdict | None
) -> None:
    assert judge(trials, 0.9, 8) is verdict


@law
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0.5, 0.99))
def test_judging_is_sure_or_goes_on(met: list[int], asked: float) -> None:
    trials = [trial(m, 50) for m in met]
    share = attained(trials)
    assert 0 <= share.low <= share.value <= share.high <= 1
    verdict = judge(trials, asked, 6)
    if verdict is YES:
        assert share.low >= asked
    if verdict is NO:
        assert share.high < asked
    assert (verdict is None) <= (len(met) < 6)
    assert (verdict is BORDER) <= (len(met) == 6)


def test_trials_that_differ_widen_the_interval_of_the_share() -> None:
    alike, apart = attained([trial(90)] * 4), attained([trial(99), trial(81)] * 2)
    assert alike.value == apart.value
    assert apart.low < alike.low
    assert alike.high < apart.high


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Trials with a luck of their own, as a queue has: 95 %, within 2 points over 2,000 draws."""
    rng, truth, count = np.random.default_rng(0), 0.9, 2000
    covered = 0
    for _ in range(count):
        lucks = rng.beta(truth * 30, (1 - truth) * 30, size=4)
        share = attained([trial(int(rng.binomial(100, luck))) for luck in lucks])
        covered += share.low <= truth <= share.high
    assert covered / count > 0.93
    assert mean_of([1.0]).low == -math.inf


# The queue


def served(seed: int = 0, **given: Any) -> Any:
    """One simulated trial of continuous batching."""
    asked = Experiment.of({"strategy": "continuous", "seed": seed, **given}, simulated=True)
    session = LocalBench(asked, Watch())
    (batcher,) = session.strategies()
    return batcher.serve(session.workload, Watch())


def test_a_queue_grows_by_what_is_not_served() -> None:
    """One slot, 10 steps a request: 100 requests/s are served, with all beyond it left waiting."""
    fixed = {"batch_size": 1, "long_tokens": 10, "short_tokens": 10, "queue_size": 600}
    for rate, growth in ((50, 0.0), (95, 0.0), (125, 0.2), (200, 0.5), (1000, 0.9)):
        found = queue_growth(served(arrivals="constant", request_rate=float(rate), **fixed))
        assert found == pytest.approx(growth, abs=0.01)


def test_few_requests_have_no_thirds() -> None:
    assert queue_growth(served(queue_size=2)) == 0.0


def test_figures_count_who_is_within_all_limits() -> None:
    recording = served(batch_size=1, long_tokens=10, short_tokens=1, long_every=2, queue_size=4)
    # Ends of 10, 11, 21 and 22 ms; two of the requests have but one token and no TPOT.
    assert figures_of(recording, {"e2el": 11.0}, 0.5).met == 2
    assert figures_of(recording, {"e2el": 21.0, "ttft": 10.5}, 0.5).met == 1
    assert figures_of(recording, {"tpot": 0.5}, 0.5).met == 2
    assert figures_of(recording, {"e2el": 1.0}, 0.5).latency_ms == {"e2el": 16.0}


# The search


def searched(search: Search, verdict: Callable[[float], Verdict]) -> list[float]:
    """The rates that a search asked for."""
    rates = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        search.record(rate, verdict(rate))
    return rates


@thorough
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.001, 1))
def test_the_search_closes_in_on_any_capacity(first: float, truth: float, precision: float) -> None:
    capacity = 10**truth
    search = Search(10**first, precision)
    rates = searched(search, lambda rate: YES if rate <= capacity else NO)
    assert search.low <= capacity <= search.high
    assert search.high / search.low <= (1 + precision) * (1 + 1e-9)
    assert len(rates) == len(set(rates)) <= MOST_PROBES


@thorough
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 1), st.floats(0.01, 0.5))
def test_what_trials_cannot_tell_stays_between_the_ends(
    first: float, truth: float, width: float, precision: float
) -> None:
    """Between ``low`` and ``high`` lies the band without a verdict, and little more."""
    begin = 10**truth
    end = begin * (1 + width)

    def verdict(rate: float) -> Verdict:
        return YES if rate <= begin else NO if rate >= end else BORDER

    search = Search(10**first, precision)
    searched(search, verdict)
    assert search.low <= begin
    assert end <= search.high * (1 + 1e-9)
    if search.probes < MOST_PROBES:
        hit = bool(search.borderline)
        slack = (1 + precision) ** (2 if hit else 1) * (1 + 1e-9)
        assert search.high / search.low <= (end / begin if hit else 1) * slack


def test_a_search_ends_where_hardly_any_requests_meet() -> None:
    """Rates that the trials cannot decide, however low, do not let it go on for years."""
    search = Search(1.0, 0.1, lowest=0.025)
    searched(search, lambda rate: NO if rate > 1 else BORDER)
    assert (search.low, min(search.borderline)) == (0, 2**-5)


@pytest.mark.parametrize(("requests", "trials"), [(8, 8), (18, 4), (9, 8)])
def test_fewer_requests_than_can_prove_anything_are_refused(requests: int, trials: int) -> None:
    """Without a miss, 73 requests are the fewest that prove 95 %."""
    query = asked_of(trials, attainment=0.95, ttft=500)
    with pytest.raises(UsageError, match=f"^--queue-size {requests}: {trials} trials of so few "):
        check_enough(requests, query)
    check_enough(math.ceil(73 / trials), query)


def test_a_rate_that_is_never_or_always_sustained_ends_the_search() -> None:
    always, never = Search(1.0, 0.1), Search(1.0, 0.1)
    searched(always, lambda rate: YES)
    searched(never, lambda rate: NO)
    assert always.high == math.inf
    assert never.low == 0


# Against brute force


def asked_of(
    most_trials: int, attainment: float = 0.9, precision: float = 0.1, **limits: float
) -> CapacityQuery:
    """Limits in ms."""
    slo = tuple(f"{name}:{limit:g}" for name, limit in limits.items())
    return CapacityQuery(GoalsSpec(slo=slo), attainment, most_trials, precision)


def brute_force(
    experiment: Experiment, asked: CapacityQuery, strategy: str, rates: Sequence[float]
) -> list[bool]:
    """Return for each rate if it is sustained, from all trials together and without a search."""
    session = LocalBench(experiment, Watch())
    (batcher,) = [b for b in session.strategies() if b.name == strategy]
    verdicts = []
    for rate in rates:
        trials = []
        for k in range(asked.most_trials):
            spec = experiment.workload
            spec = replace(spec, request_rate=float(rate), seed=spec.seed + k)
            recording = batcher.serve(session.make(spec), Watch())
            trials.append(figures_of(recording, asked.goals.limits_ms, asked.attainment))
        share = sum(t.met for t in trials) / sum(t.requests for t in trials)
        growth = np.mean([t.growth for t in trials])
        verdicts.append(bool(share >= asked.attainment and growth <= GROWTH))
    return verdicts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits", [{"ttft": 60.0}, {"e2el": 150.0, "tpot": 1.5}, {"e2el": 10_000.0}]
)
def test_without_noise_the_capacity_is_the_one_of_a_fine_grid(
    limits: dict[str, float], seed: int
) -> None:
    """One trial is exact in simulation. On a grid of rates 1 % apart the lowest that is not
    sustained and the highest that is (they may be in any order where noise of the arrivals makes
    them so) must not both lie on one side of what was found."""
    experiment = Experiment.of(
        {"queue_size": 120, "batch_size": 4, "request_rate": 1.0, "seed": seed}, simulated=True
    )
    asked = asked_of(1, **limits)
    found = find_capacity(experiment, replace(asked, precision=0.02))
    for capacity in found.capacities:
        assert capacity.high / capacity.low <= 1.02 * (1 + 1e-9)
        low, high = capacity.low, capacity.high
        rates = [low, high, *np.geomspace(low / 1.1, high * 1.1, 24).tolist()]
        verdicts = dict(
            zip(rates, brute_force(experiment, asked, capacity.strategy, rates), strict=True)
        )
        assert verdicts[low]
        assert not verdicts[high]
        lowest_bad = min(rate for rate, good in verdicts.items() if not good)
        highest_good = max(rate for rate, good in verdicts.items() if good)
        assert lowest_bad <= high
        assert highest_good >= low


def test_with_noise_the_interval_holds_the_capacity_of_all_trials_together() -> None:
    experiment = Experiment.of(
        {"queue_size": 150, "batch_size": 4, "request_rate": 1.0}, simulated=True
    )
    asked = asked_of(6, ttft=60.0)
    found = find_capacity(experiment, asked)
    for capacity in found.capacities:
        low, high = capacity.low, capacity.high
        rates = np.geomspace(low / 1.3, high * 1.3, 24).tolist()
        verdicts = brute_force(experiment, asked, capacity.strategy, rates)
        crossing = next(rate for rate, good in zip(rates, verdicts, strict=True) if not good)
        assert low <= crossing <= high * 1.03


def test_continuous_carries_more_and_trials_are_the_same_for_both() -> None:
    experiment = Experiment.of({"queue_size": 150, "request_rate": 1.0}, simulated=True)
    found = find_capacity(experiment, asked_of(4, ttft=80.0))
    static, continuous = found.capacities
    assert continuous.low > static.high
    assert found.ratio is not None
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.ratio.value == continuous.low / static.low
    assert found.unloaded_ms["tpot"] == 1.0
    assert static.probes[0].rate == continuous.probes[0].rate == 1e3 / found.unloaded_ms["e2el"]


# The report


@pytest.fixture(scope="module")
def findings() -> CapacityFindings:
    """A search with both strategies."""
    experiment = Experiment.of({"queue_size": 60, "request_rate": 1.0}, simulated=True)
    return find_capacity(experiment, asked_of(3, precision=0.2, ttft=80.0))


def test_the_sentence_says_how_much_more(findings: CapacityFindings) -> None:
    text = report.sentence(report.data_of(findings, ""))
    assert text.startswith("in simulation, with TTFT ≤ 80 ms for 90 % of the requests, continuous")
    assert "× (" in text
    assert "the load of static batching" in text


def test_a_borderline_rate_says_why(findings: CapacityFindings) -> None:
    for trials, why in (
        ([trial(88), trial(93)] * 4, "90 % in\ninterval"),
        ([trial(100, growth=g) for g in (0.0, 0.2)] * 2, "queue\nmay grow"),
    ):
        probe = benches.Probe("static", 8.0, trials, BORDER)
        data = report._probe(probe)
        assert str(report._cells(data, {}, 0.9)[-1]) == f"borderline\n{why}"
        assert data["verdict"] == "border"


def test_one_strategy_or_one_that_carries_nothing_has_no_ratio(findings: CapacityFindings) -> None:
    static, continuous = findings.capacities
    alone = replace(findings, capacities=[continuous])
    assert alone.ratio is None
    assert "continuous batching sustains" in report.sentence(report.data_of(alone, ""))
    nothing = replace(findings, capacities=[replace(static, low=0.0), continuous])
    assert "static batching sustains less than" in report.sentence(report.data_of(nothing, ""))
    data = report.data_of(nothing, "")
    assert data["comparison"] is None
    draw_capacity(data)


def test_wrong_outputs_are_told(findings: CapacityFindings) -> None:
    wrong = Verification(60, 58, 0, 2, "made up", None, ())
    failed = replace(findings, verification=wrong, reasons=["2 requests got wrong"])
    text = report.sentence(report.data_of(failed, ""))
    assert "outputs identical for 58/60 requests, 2 WRONG; suspect (2 requests got wrong)." in text


def test_the_picture_shows_every_probe_and_both_capacities(findings: CapacityFindings) -> None:
    data = report.data_of(findings, "")
    figure = draw_capacity(data)
    for i, capacity in enumerate(findings.capacities):
        for what in ("attainment", "ttft"):
            (line,) = figure.findobj(lambda a, i=i, w=what: a.get_gid() == f"{w}-{i}")
            assert list(line.get_xdata()) == sorted(probe.rate for probe in capacity.probes)
    written = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert len(written & {report._rate(c.low) for c in findings.capacities}) == 2


def test_json_holds_no_infinity(findings: CapacityFindings) -> None:
    data = json.loads(json_text(report.data_of(findings, "x")))
    assert data["strategies"]["static"]["rate"] == findings.capacities[0].low
    probe = data["strategies"]["continuous"]["probes"][0]
    assert {"rate", "verdict", "attainment", "queue_growth", "latency_ms", "trials"} == set(probe)
    once = judge([trial(100)], 0.9, 1)
    assert once is YES


# A model


def test_a_model_is_probed_verified_and_audited(checkpoint: Path) -> None:
    experiment = Experiment.of(
        {
            "model": str(checkpoint),
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "batch_size": 2,
            "queue_size": 24,
            "prompt_tokens": "2:6",
            "output_tokens": "2:4",
            "request_rate": 1.0,
        }
    )
    found = find_capacity(experiment, asked_of(1, 0.5, 1.0, e2el=10_000.0))
    assert [capacity.strategy for capacity in found.capacities] == ["static", "continuous"]
    assert all(0 < c.low < c.high for c in found.capacities)
    assert found.verification.requests_checked == 24
    assert found.verification.wrong == 0


# The program

program = call  # the fixture


QUICK = ("--queue-size", "60", "--max-trials", "1", "--precision", "0.5", "--slo-attainment", "0.9")


def test_it_says_what_it_found_and_the_same_again(program: Call, tmp_path: Path) -> None:
    words = ("capacity", "--simulated", "--slo", "ttft:80", "--slo", "tpot:2", *QUICK)
    code, out, err = program(*words, "--output", "c")
    assert code == 0
    assert all(len(line) <= 80 for line in out.split("Again:")[0].splitlines())
    assert "for 90 % of the requests" in " ".join(out.split())
    assert err.splitlines()[0] == "serving requests one at a time …"
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [
        "capacity.json",
        "capacity.png",
        "capacity.svg",
    ]
    (again,) = [line for line in out.splitlines() if line.startswith("Again: ")]
    again_words = (*shlex.split(again)[2:], "--output", "c")
    assert program(*again_words)[0] == 2  # the folder holds a result
    quiet = program(*again_words, "--overwrite", "--quiet")[1]
    assert quiet.strip() == " ".join(out.split("\n\n")[0].split())
    code, out, _ = program(*words, "--output", "d", "--json")
    assert out == (tmp_path / "d" / "capacity.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--slo: give one or more latency limits, such as --slo ttft:500"),
        (("--slo", "ttft:0.5"), "--slo ttft:0.5: no rate is low enough, since requests take 1 ms "
         "even without load (p90 of ttft, one at a time); raise the limit above that, or lower "),
        (("--slo", "e2el:50"), "--slo e2el:50: no rate is low enough, since requests take "
         "100 ms even without load (p90 of e2el"),
        (("--slo", "ttft:9", "--batch-size", "64"), "--queue-size 60: continuous sustains even a "
         "rate at which all requests arrive at once"),
        (("--slo", "ttft:9", "--arrivals", "ramp:from=1,to=2"), "--arrivals ramp:from=1,to=2: has "
         "no rate to search for; use poisson, gamma or constant"),
        (("--slo", "ttft:9", "--max-trials", "0"), "--max-trials 0: must be at least 1"),
        (("--slo", "ttft:9", "--batch-size", "1,2"), "--batch-size 1,2: must be a whole number"),
    ],
)  # fmt: skip
def test_a_question_without_an_answer_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], said: str, program: Call, tmp_path: Path
) -> None:
    code, out, err = program("capacity", "--simulated", *QUICK, *words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"batchbench: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arrivals", ["constant", "poisson", "gamma"])
def test_arrivals_that_have_a_rate_are_searched(arrivals: str, program: Call) -> None:
    words = ("--simulated", "--slo", "ttft:80", "--arrivals", arrivals, *QUICK)
    assert program("capacity", *words, "--quiet")[0] == 0


def test_ctrl_c_keeps_nothing(
    program: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benches.ProbeRunner, "probe", interrupted)
    code, _, err = program("capacity", "--simulated", "--slo", "ttft:80", *QUICK)
    assert (code, err.splitlines()[-1]) == (130, "batchbench: interrupted; nothing was kept")
    assert list(tmp_path.iterdir()) == []


def test_wrong_outputs_end_with_1(program: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verification(60, 59, 0, 1, "made up", None, ())
    monkeypatch.setattr(LocalBench, "verify", lambda self, recordings: wrong)
    code, out, _ = program("capacity", "--simulated", "--slo", "ttft:80", *QUICK, "--quiet")
    assert code == 1
    assert "1 WRONG; suspect (1 request got wrong tokens)" in out
