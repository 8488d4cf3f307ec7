"""The time budget: it adds up, each cause lands in its own part, and it is shown whole."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.laws import STEP_NS, Config, configs, law, serve, thorough, workload_of, workloads
from support.results import CLASSIC, measured, reasons, result_of, trials_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import ChunkLog, Recording, RequestLog, SpanLog, WaitLog
from batchbench.reports import metrics
from batchbench.reports.figures import draw
from batchbench.reports.formats.terminal import causes, render, time_budget_table
from batchbench.reports.result import Result
from batchbench.reports.time_budget import (
    PARTS,
    TimeBudget,
    explain,
    time_budget,
    typical_budget,
    wall_ns,
    waterfall,
)
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from support.models import MakeModel

DECODE = ("useful_decode_s", "finished_s", "empty_s")
PREFILL = ("prefill_useful_s", "prefill_padding_s", "stalled_s")


def seconds(ns: float) -> Any:
    """Seconds, up to the rounding of a sum of floats."""
    return pytest.approx(ns / 1e9, rel=1e-9, abs=1e-15)


def uneven(recording: Recording, seed: int) -> Recording:
    """The same trial with steps of random lengths, and host work before some of them."""
    rng, s = np.random.default_rng(seed), recording.spans
    cost = rng.integers(1, 1000, recording.num_steps)
    gaps = np.zeros(recording.num_steps, np.int64)
    gaps[recording.first_steps] = rng.integers(0, 50, len(s.steps))
    ends = np.cumsum(cost + gaps)
    header = replace(recording.header, about={"wall_ns": int(ends[-1]) + 7})
    none = np.zeros(0, np.int64)
    return replace(
        recording,
        header=header,
        spans=replace(s, start_ns=(ends - cost)[recording.first_steps]),
        waits=WaitLog(none, none, none, none, none),
        ends_ns=ends,
        step_ns=None,
    )


# It adds up


@thorough
@given(workloads(), configs(waits=(0, 25)))
def test_in_simulation_the_parts_are_the_duration(workload: Workload, config: Config) -> None:
    recording = serve(workload, config)
    found = time_budget(recording)
    assert math.fsum(asdict(found).values()) == seconds(recording.duration_ns)
    assert min(asdict(found).values()) >= 0
    assert (found.host_s, found.residual_s, found.prefill_padding_s) == (0, 0, 0)
    waits = recording.waits
    assert found.waiting_s == seconds((waits.end_ns - waits.start_ns).sum())


@law
@given(workloads(), configs(), st.integers(0, 99))
def test_of_measured_times_the_parts_are_the_wall_time(
    workload: Workload, config: Config, seed: int
) -> None:
    recording = uneven(serve(workload, config), seed)
    found = time_budget(recording)
    assert math.fsum(asdict(found).values()) == seconds(wall_ns(recording))
    assert min(asdict(found).values()) >= 0
    assert found.residual_s == seconds(7)
    between = recording.step_starts_ns - np.concatenate([[0], recording.step_ends_ns[:-1]])
    assert found.host_s == seconds(between.sum())


@law
@given(workloads(), configs())
def test_where_every_step_costs_the_same_shares_are_slot_steps(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    found, counted = time_budget(recording), metrics.counters(recording)
    of_a_slot = STEP_NS / config.slots
    later_tokens = counted["useful_slot_steps"] - len(workload)  # the first is the prompt's
    assert found.useful_decode_s == seconds(later_tokens * of_a_slot)
    assert found.finished_s == seconds(counted["finished_slot_steps"] * of_a_slot)


@law
@given(workloads(), configs(prefills=("separate",)), st.integers(0, 99))
def test_it_is_what_one_finds_slot_by_slot(workload: Workload, config: Config, seed: int) -> None:
    """The same figures from the records of requests alone, a step and a slot at a time."""
    recording = uneven(serve(workload, config), seed)
    expected = dict.fromkeys(PARTS, 0.0)
    log, (first, *_) = recording.requests, recording.requests.first
    assert first >= 0
    steps = zip(recording.step_starts_ns, recording.step_ends_ns, strict=True)
    for step, (start, end) in enumerate(steps):
        reading = (log.admitted <= step) & (step <= log.first)
        running = (log.first < step) & (step <= log.last)
        held = (log.last < step) & (step < log.released)
        if reading.any():
            share = (end - start) / (reading | running).sum()
            expected["prefill_useful_s"] += share * reading.sum()
            expected["stalled_s"] += share * running.sum()
            continue
        share = (end - start) / config.slots
        expected["useful_decode_s"] += share * running.sum()
        expected["finished_s"] += share * held.sum()
        expected["empty_s"] += share * (config.slots - running.sum() - held.sum())
    found = asdict(time_budget(recording))
    for part in (*DECODE, *PREFILL):
        assert found[part] == seconds(expected[part]), part


@law
@given(workloads(), configs(), st.integers(0, 99))
def test_waterfalls_add_up_and_of_equals_are_flat(
    workload: Workload, config: Config, seed: int
) -> None:
    other = uneven(serve(workload, config), seed)
    recordings = {"one": [serve(workload, config)], "same": [serve(workload, config)]}
    found = explain({**recordings, "other": [other]}, None)
    flat, fall = found["waterfall"]
    assert {step["saved_s"] for step in flat["steps"]} == {0.0}
    assert flat["saved_s"] == 0.0
    assert [step["part"] for step in fall["steps"]] == list(PARTS)
    walls = {name: of["wall_s"] for name, of in found["strategies"].items()}
    assert fall["saved_s"] == walls["one"] - walls["other"]
    assert math.fsum(s["saved_s"] for s in fall["steps"]) == pytest.approx(
        fall["saved_s"], abs=1e-15
    )
    assert fall["saved_s"] == seconds(recordings["one"][0].duration_ns - wall_ns(other))


# What is laid upon whom


def trial(
    *passes: tuple[int, int, int, int],
    requests: Sequence[tuple[int, int, int, int]],
    prompts: Sequence[tuple[int, int]],
    waits: Sequence[tuple[int, int, int]] = (),
    **about: Any,
) -> Recording:
    """A trial of two slots, written by hand.

    Args:
        passes: (start, end, slots that decode, pieces of prompts), of a step each.
        requests: (admitted, first, last, released), in steps.
        prompts: (request, tokens), in the order in which they are computed.
        waits: (start, until, end).
    """
    start, end, decoding, chunks = np.array(passes).T
    admitted, first, last, released = np.array(requests).T
    zeros, ones = np.zeros(len(requests), np.int64), np.ones(len(passes), np.int64)
    of, tokens = np.array(prompts, np.int64).reshape(-1, 2).T
    begun, until, over = np.array(waits, np.int64).reshape(-1, 3).T
    base = serve(workload_of([(1, 1, 0)]), Config("static", 2))
    sizes = np.array([dict(prompts)[i] for i in range(len(requests))])
    return replace(
        base,
        header=replace(base.header, simulated=False, about=about),
        requests=RequestLog(
            zeros, sizes, last - first + 1, zeros, admitted, admitted, first, last, released
        ),
        spans=SpanLog(ones, start, decoding, 0 * ones, chunks),
        chunks=ChunkLog(of, 0 * of, tokens),
        waits=WaitLog(0 * begun, begun, until, over, 0 * begun),
        ends_ns=end,
        step_ns=None,
    )


def test_a_mixed_pass_charges_prompts_with_what_it_takes_longer() -> None:
    """A step of one slot takes 10; with a prompt beside it takes 16: 6 are the prompt's."""
    mixed = trial(
        (0, 20, 0, 1),
        (20, 30, 1, 0),
        (30, 46, 1, 1),
        (46, 60, 2, 0),
        requests=[(0, 0, 3, 4), (2, 2, 3, 4)],
        prompts=[(0, 5), (1, 5)],
    )
    found = time_budget(mixed)
    assert found.useful_decode_s == seconds(10 / 2 + 10 / 2 + 14)
    assert found.empty_s == seconds(10 / 2)
    assert found.prefill_useful_s == seconds(20 + 10 / 2 + 6 / 2)
    assert found.stalled_s == seconds(6 / 2)


def test_what_decoding_takes_beside_a_prompt_is_the_median_of_steps_and_not_of_spans() -> None:
    """Steps of one slot take 10, 10, 10, 10, 50 and 60; the first four are one span."""
    passes = [(0, 20, 0, 1), *[(20 + 10 * i, 30 + 10 * i, 1, 0) for i in range(4)]]
    passes += [(60, 110, 1, 0), (110, 170, 1, 0), (170, 186, 1, 1)]
    each = trial(*passes, requests=[(0, 0, 7, 8), (7, 7, 7, 8)], prompts=[(0, 5), (1, 5)])
    keep = np.array([0, 1, 5, 6, 7])
    columns = {name: column[keep] for name, column in vars(each.spans).items()}
    columns["steps"] = np.array([1, 4, 1, 1, 1])
    joined = replace(each, spans=SpanLog(**columns))
    assert time_budget(each) == time_budget(joined)
    # The pass with a prompt took 16, of which decoding alone takes 10.
    assert time_budget(joined).stalled_s == seconds(6 / 2)


def test_a_mixed_pass_is_laid_upon_decode_where_nothing_tells_what_that_costs_alone() -> None:
    mixed = trial(
        (0, 20, 0, 1),
        (20, 46, 1, 1),
        requests=[(0, 0, 1, 2), (1, 1, 1, 2)],
        prompts=[(0, 5), (1, 5)],
    )
    found = time_budget(mixed)
    assert (found.stalled_s, found.useful_decode_s) == (0, seconds(26 / 2))
    assert found.prefill_useful_s == seconds(20 + 26 / 2)


def test_a_mixed_pass_that_is_quicker_than_others_charges_prompts_with_nothing() -> None:
    quick = trial(
        (0, 20, 0, 1),
        (20, 30, 1, 0),
        (30, 36, 1, 1),
        requests=[(0, 0, 2, 3), (2, 2, 2, 3)],
        prompts=[(0, 5), (1, 5)],
    )
    assert time_budget(quick).stalled_s == 0


@pytest.mark.parametrize(("pads", "padding"), [(True, 40 * 6 / 20), (False, 0)])
def test_padding_is_what_the_engine_computes_beyond_the_prompts(pads: bool, padding: float) -> None:
    """Prompts of 4 and 10 tokens are a rectangle of 20, of which 6 are nobody's."""
    prefill = trial(
        (0, 40, 0, 2),
        requests=[(0, 0, 0, 1), (0, 0, 0, 1)],
        prompts=[(0, 4), (1, 10)],
        pads_prompts=pads,
    )
    found = time_budget(prefill)
    assert found.prefill_padding_s == seconds(padding)
    assert found.prefill_useful_s == seconds(40 - padding)


def test_waiting_is_up_to_what_was_waited_for_and_never_while_a_step_is_under_way() -> None:
    """Steps from 10 to 30 and 90 to 100. A host that ran ahead waits from 15 on, until 70; it
    sleeps on to 80. The first wait begins at 2, for 8."""
    found = time_budget(
        trial(
            (10, 30, 0, 1),
            (90, 100, 0, 1),
            requests=[(0, 0, 0, 1), (1, 1, 1, 2)],
            prompts=[(0, 4), (1, 10)],
            waits=[(2, 8, 9), (15, 70, 80)],
            wall_ns=103,
        )
    )
    assert found.waiting_s == seconds(6 + 40)
    assert found.host_s == seconds(4 + 20)
    assert found.residual_s == seconds(3)
    assert found.wall_s == seconds(103)


def test_clocks_that_disagree_show_in_the_residual() -> None:
    """The second step begins 5 before the first ends; the host's clock tells 2 less."""
    found = time_budget(
        trial(
            (0, 30, 0, 1),
            (25, 40, 1, 0),
            requests=[(0, 0, 1, 2)],
            prompts=[(0, 4)],
            wall_ns=38,
        )
    )
    assert found.residual_s == seconds(-7)
    assert found.wall_s == seconds(38)


def test_of_several_trials_it_is_the_one_of_median_duration() -> None:
    paces = (10e6, 13e6, 11e6)
    ranked = [time_budget(measured("static", step_ns=pace)) for pace in sorted(paces)]
    odd, even = ([measured("static", step_ns=p) for p in paces[:n]] for n in (3, 2))
    assert typical_budget(odd) == ranked[1]
    middle = typical_budget(even)
    assert middle is not None
    assert middle.wall_s == seconds(1e9 * (ranked[0].wall_s + ranked[2].wall_s) / 2)
    assert middle.wall_s == pytest.approx(metrics.summary(even)["duration"])


def without_steps(recording: Recording) -> Recording:
    """Return the recording of a strategy that schedules by itself, except for its times."""
    none, r = np.zeros(0, np.int64), recording.requests
    return replace(
        recording,
        spans=SpanLog(none, none, none, none, none),
        ends_ns=None,
        token_ends_ns=np.repeat(recording.ends_of(r.last), r.output_tokens),
    )


def test_a_strategy_that_shows_no_steps_has_no_time_budget() -> None:
    theirs = [without_steps(r) for r in trials_of("continuous")]
    found = explain({"static": trials_of("static"), "theirs": theirs}, 1.5)
    assert found["strategies"]["theirs"] is None
    assert found["strategies"]["static"]["warm_up_s"] == 1.5
    assert found["waterfall"] == []
    turned = explain({"theirs": theirs, "static": trials_of("static")}, 1.5)
    assert turned["waterfall"] == []


def test_what_is_not_accounted_for_makes_a_run_suspect() -> None:
    def ending_late(recording: Recording, by: float) -> Recording:
        about = {**recording.header.about, "wall_ns": round(recording.duration_ns * (1 + by))}
        return replace(recording, header=replace(recording.header, about=about))

    assert reasons([ending_late(r, 0.009) for r in trials_of("static")]) == []
    (reason,) = reasons([ending_late(r, 0.03) for r in trials_of("static")])
    assert reason == "static: 2.9% of the time is not accounted for"


# Planted delays


class ManualClock:
    """A clock that a busy machine cannot disturb: it advances when it is read, and on request."""

    def __init__(self) -> None:
        self._now_ns = 0

    def read(self) -> int:
        self._now_ns += 1_000
        return self._now_ns

    def sleep(self, seconds: float) -> None:
        self._now_ns += max(0, round(seconds * 1e9))


@dataclass
class Plant:
    """Lets time pass where it is planted, and counts how much."""

    clock: ManualClock
    delay_s: float = 0.0
    spent_s: float = 0.0

    def __call__(self) -> None:
        self.clock.sleep(self.delay_s)
        self.spent_s += self.delay_s


class Slow(Watch):
    """A display that takes its time."""

    def __init__(self, host: Plant, requests: int) -> None:
        self._host, self._requests = host, requests

    def progressed(self, progress: Progress) -> None:
        """After the last request is done the trial is over."""
        if progress.done < self._requests:
            self._host()


Serve = Callable[[dict[str, float]], tuple[TimeBudget, dict[str, Plant]]]

FULL = Workload.of("full batch", [[5, 6, 7], [9], [3, 4], [8, 8]] * 2, [8] * 8)
"""Two full batches of equal outputs under static batching: no slot is ever idle."""

MIXED = Workload.of("of all lengths", [[5, 6, 7, 8] * 4] * 10, [3, 9, 5, 12, 2, 8, 4, 10, 6, 7])


@pytest.fixture
def planted(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str, Workload], Serve]:
    """Serve on a tiny model with delays in the host's loop, in prefill, and in decode."""
    clock = ManualClock()
    monkeypatch.setattr(time, "perf_counter_ns", clock.read)
    monkeypatch.setattr(time, "sleep", clock.sleep)

    def of(engine_name: str, policy: str, prefill: str, workload: Workload) -> Serve:
        from batchbench.batching.engines.notebook import NotebookEngine
        from batchbench.batching.engines.torch.slots import SlotsEngine

        model, slots = make_model(), 4
        engine: Any = (
            SlotsEngine(model, slots, workload.max_total_tokens)
            if engine_name == "slots"
            else NotebookEngine(model, slots)
        )
        plants = {where: Plant(clock) for where in ("host", "prefill", "decode")}
        advance = engine._advance

        def delayed(plan: Plan, step: int) -> None:
            plants["prefill" if plan.chunks else "decode"]()
            advance(plan, step)

        engine._advance = delayed
        batcher = Batcher(policy, engine, slots, prefill=prefill)

        def run(delays: dict[str, float]) -> tuple[TimeBudget, dict[str, Plant]]:
            for where, plant in plants.items():
                plant.delay_s, plant.spent_s = delays.get(where, 0.0), 0.0
            recording = batcher.serve(workload, Slow(plants["host"], len(workload)))
            found = time_budget(recording)
            assert math.fsum(asdict(found).values()) == seconds(wall_ns(recording))
            return found, plants

        run({})  # warm
        return run

    return of


def grown(run: Serve, where: str, delay_s: float) -> dict[str, float]:
    """Return the growth of each part with a planted delay, as a share of the delay."""
    plain, _ = run({})
    found, plants = run({where: delay_s})
    assert plants[where].spent_s > 0.1
    return {
        part: (getattr(found, part) - getattr(plain, part)) / plants[where].spent_s
        for part in PARTS
    }


def lands(growth: dict[str, float], own: Sequence[str]) -> bool:
    """Return True if a delay appears in its own parts and hardly in the others."""
    outside = sum(abs(growth[part]) for part in PARTS if part not in own)
    return 0.99 <= sum(growth[part] for part in own) <= 1.01 and outside < 0.01


DELAYS = {"host": 0.03, "prefill": 0.12, "decode": 0.03}
"""Seconds at each place: tens to hundreds of times what a step of the tiny model takes."""


@pytest.mark.parametrize(
    ("where", "part"),
    [("host", "host_s"), ("prefill", "prefill_useful_s"), ("decode", "useful_decode_s")],
)
def test_in_full_batches_a_delay_lands_in_one_part(
    planted: Callable[..., Serve], where: str, part: str
) -> None:
    run = planted("slots", "static", "separate", FULL)
    assert lands(grown(run, where, DELAYS[where]), [part])


@pytest.mark.parametrize(
    ("where", "parts"), [("host", ("host_s",)), ("prefill", PREFILL), ("decode", DECODE)]
)
@pytest.mark.parametrize(
    ("engine", "policy", "prefill"),
    [
        ("slots", "static", "mixed"),
        ("slots", "continuous", "mixed"),
        ("slots", "continuous", "separate"),
        ("notebook", "continuous", "separate"),
    ],
)
def test_a_delay_lands_where_it_was_planted(
    planted: Callable[..., Serve],
    engine: str,
    policy: str,
    prefill: str,
    where: str,
    parts: Sequence[str],
) -> None:
    run = planted(engine, policy, prefill, MIXED)
    assert lands(grown(run, where, DELAYS[where]), parts)


@pytest.mark.parametrize("engine", ["slots", "notebook"])
def test_a_real_trial_is_accounted_for(planted: Callable[..., Serve], engine: str) -> None:
    """Test arrivals that the loop waits for; the residual is at most 1 %."""
    due = [0, 0, *(400_000_000 + 1_000 * i for i in range(8))]
    timed = replace(MIXED, due_ns=np.array(due))
    run = planted(engine, "continuous", "separate", timed)
    found, _ = run({})
    assert abs(found.residual_s) <= max(0.01 * found.wall_s, 0.001)
    assert 0.39 < found.waiting_s <= due[-1] / 1e9
    assert found.stalled_s > 0
    assert found.prefill_padding_s == 0  # equal prompts: nothing to pad


def test_only_the_engine_that_pads_is_charged_with_padding(planted: Callable[..., Serve]) -> None:
    slots, notebook = (
        planted(engine, "static", "separate", FULL)({})[0] for engine in ("slots", "notebook")
    )
    assert slots.prefill_padding_s == 0
    assert notebook.prefill_padding_s > 0


# How it is shown


def shown(part: Any, width: int = 80) -> str:
    """Return the text on a terminal of this width without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True)
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def two() -> Result:
    return result_of({"static": trials_of("static"), "continuous": trials_of("continuous")})


def test_the_causes_in_words() -> None:
    assert causes(two()) == [
        "continuous saved 2.69 s against static: 3.16 s saved by freeing slots when requests "
        "finish, 0.45 s lost to empty slots, 0.02 s lost elsewhere."
    ]
    turned = result_of({"continuous": trials_of("continuous"), "static": trials_of("static")})
    assert causes(turned) == [
        "static lost 2.69 s against continuous: 3.16 s lost to slots held by finished requests, "
        "0.45 s saved by filling empty slots, 0.02 s saved elsewhere."
    ]


def test_equal_strategies_have_no_causes() -> None:
    same = {"static": trials_of("static"), "mine:Own": trials_of("static")}
    assert causes(result_of(same)) == []
    assert "0.00 s" not in shown(render(result_of(same)))


def test_of_several_candidates_each_has_its_causes() -> None:
    three = {
        "static": trials_of("static"),
        "mine:Own": trials_of("continuous"),
        "continuous": trials_of("continuous"),
    }
    lines = causes(result_of(three))
    assert [re.findall(r"^([\w:]+) saved", line) for line in lines] == [
        ["mine:Own"],
        ["continuous"],
    ]


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_adds_up_as_printed(width: int) -> None:
    """Each column of seconds is the sum of its rows, but for the rounding of each."""
    rows = [
        re.findall(r"[-+]?\d+\.\d+", line)
        for line in shown(time_budget_table(two()), width).splitlines()
    ]
    numbers = np.array([row for row in rows if len(row) == 5], float)
    *parts, wall = numbers
    for column in range(5):
        assert sum(part[column] for part in parts) == pytest.approx(
            wall[column], abs=0.06 * len(parts)
        )
    assert "Residual" in shown(time_budget_table(two()), width)


def test_the_table_says_who_shows_no_steps() -> None:
    result = two()
    explained = explain(
        {"static": trials_of("static"), "theirs": [without_steps(measured("continuous"))]}, 1.25
    )
    shy = Result({**result.data, "explain": explained}, result.recordings)
    text = shown(time_budget_table(shy))
    assert "theirs logs no steps" in text
    assert "N/A" in text
    assert "warm-up of 1.25 s" in text
    assert causes(shy) == []


def bars(figure: Any, gid: str) -> list[tuple[float, float]]:
    """Left end and width of the bars of an id."""
    found = figure.findobj(lambda artist: artist.get_gid() == gid)
    return [(bar.get_x(), bar.get_width()) for bar in found]


def test_the_picture_shows_the_account() -> None:
    recordings = {"static": trials_of("static"), "continuous": trials_of("continuous")}
    figure = draw(recordings, "title")["account"]
    for i, trials in enumerate(recordings.values()):
        found = typical_budget(trials)
        assert found is not None
        drawn = {part: bars(figure, f"{part}-{i}") for part in PARTS}
        for part, ((_, width),) in drawn.items():
            assert width == pytest.approx(getattr(found, part))
        ends = sorted(left + width for ((left, width),) in drawn.values())
        assert ends[-1] == pytest.approx(found.wall_s)


def test_the_picture_of_the_waterfall_leads_from_one_end_to_the_other() -> None:
    recordings = {"static": trials_of("static"), "continuous": trials_of("continuous")}
    figure = draw(recordings, "title")["account"]
    before, after = (typical_budget(trials) for trials in recordings.values())
    assert before is not None
    assert after is not None
    at, row = before.wall_s, 1
    while found := bars(figure, f"effect-1-{row}"):
        ((left, width),) = found
        assert left + width == pytest.approx(at)  # a bar begins where the one before it ended
        at, row = left, row + 1
    assert row > 2
    assert at == pytest.approx(after.wall_s)
    assert waterfall(before, after)[0] == pytest.approx(before.wall_s - at)


def test_the_picture_says_who_shows_no_steps() -> None:
    from matplotlib.text import Text

    from batchbench.reports.figures.card import house_style, name_strategies
    from batchbench.reports.figures.time_budget import draw_time_budget

    shy = {
        "theirs": [without_steps(measured("continuous"))],
        "static": [measured("static", workload=CLASSIC)],
    }
    with house_style():
        figure = draw_time_budget(name_strategies(shy), "title")
    written = [text.get_text() for text in figure.findobj(Text)]
    assert "logs no steps: no time budget" in written
    assert not bars(figure, "effect-1-1")
