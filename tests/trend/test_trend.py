"""Histories: what is found in noise and what is not, what makes a series, and what CI is told."""

from __future__ import annotations

import json
import math
import random as shuffling
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from batchbench import Experiment, conduct
from batchbench.cli.main import app
from batchbench.errors import UsageError
from batchbench.reports.result import make_result
from batchbench.studies.gate.evidence import Answer
from batchbench.studies.trend import history as history_file
from batchbench.studies.trend.changes import (
    SHORTEST,
    fewest_values,
    find_changes,
    judge,
    judge_series,
)
from batchbench.studies.trend.history import (
    METRICS,
    Entry,
    Series,
    TrendSpec,
    Value,
    find_results,
    higher_is_better,
    make_lines,
    read_entry,
)
from batchbench.studies.trend.report import MOST_PANELS, draw_trend, render_markdown, sparkline

START = datetime(2026, 1, 1, tzinfo=UTC)
RATE, LATENCY = "output_throughput", "median_e2el_ms"


def noise(seed: int, length: int, sd: float = 0.01) -> np.ndarray:
    """Logarithms that come in no order."""
    return sd * np.random.default_rng(seed).standard_normal(length)


def with_step(seed: int, length: int, at: int, share: float, sd: float = 0.01) -> np.ndarray:
    """The same with a change of level."""
    logs = noise(seed, length, sd)
    logs[at:] += math.log1p(share)
    return logs


def entry(index: int, log: float | None = None, **facts: Any) -> Entry:
    """A result of a made-up commit; ``log`` is its throughput's logarithm."""
    values = {} if log is None else {(RATE, "continuous"): Value(math.exp(log))}
    usual: dict[str, Any] = {
        "file": Path(f"/results/{index}/result.json"),
        "created": START + timedelta(days=index),
        "commit": f"c0ffee{index:06d}",
        "setup": {"model": "gpt2", "batch size": 8, "simulated": False},
        "machine": {"device": "cpu", "dtype": "float32"},
        "values": values,
    }
    return Entry(**{**usual, **facts})


def history(logs: Sequence[float], **facts: Any) -> list[Entry]:
    """Results in a row."""
    return [entry(i, float(log), **facts) for i, log in enumerate(logs)]


def asked(**given: Any) -> TrendSpec:
    """One metric, so that few results suffice."""
    return TrendSpec(**{"metric": (RATE,), **given})


# Change points


def test_false_alarms_are_as_rare_as_was_asked() -> None:
    """The best of all splits is tested, so that it does not matter that it was chosen."""
    alarms = sum(bool(find_changes(noise(seed, 24).tolist(), 0.05)) for seed in range(400))
    assert alarms <= stats.binom.ppf(0.9999, 400, 0.05)
    assert alarms >= stats.binom.ppf(0.0001, 400, 0.05)  # nor is power given away


def test_nothing_is_found_in_noise_in_99_of_100_histories() -> None:
    alarms = 0
    for seed in range(300):
        trend = judge(make_lines(history(noise(seed, 30)), 200), asked(floor=0.0))
        (told,) = trend.lines[0].series
        assert told.drift is not None
        alarms += bool(told.changes) or told.drift.counts
    assert alarms <= stats.binom.ppf(0.9999, 300, 0.01)


def test_heavy_tails_raise_no_alarms() -> None:
    drawn = np.random.default_rng(1).standard_t(2, (200, 24))
    alarms = sum(bool(find_changes(row.tolist(), 0.05)) for row in drawn)
    assert alarms <= stats.binom.ppf(0.9999, 200, 0.05)


@pytest.mark.parametrize("at", [6, 15, 24])
def test_a_planted_step_is_found_where_it_is(at: int) -> None:
    exact = 0
    for seed in range(20):
        found = find_changes(with_step(seed, 30, at, -0.05).tolist(), 0.005)
        assert min(abs(each.index - at) for each in found) <= 1
        exact += any(each.index == at for each in found)
    assert exact >= 18


def test_beside_a_true_step_no_more_false_ones_are_found_than_was_asked() -> None:
    more = sum(
        len(find_changes(with_step(seed, 30, 15, -0.1).tolist(), 0.05)) > 1 for seed in range(200)
    )
    assert more <= stats.binom.ppf(0.9999, 200, 0.05)


def test_several_steps_are_found_in_order() -> None:
    logs = noise(3, 60)
    logs[20:] += 0.06
    logs[40:] -= 0.1
    assert [each.index for each in find_changes(logs.tolist(), 0.001)] == [20, 40]


def test_an_outlier_is_no_change_and_equal_values_are_none() -> None:
    logs = noise(5, 30)
    logs[12] += 1.0
    assert find_changes(logs.tolist(), 0.01) == []
    assert find_changes([1.0] * 30, 0.01) == []


def test_a_step_without_noise_is_found() -> None:
    (found,) = find_changes([1.0] * 10 + [1.1] * 10, 0.001)
    assert found.index == 10


def test_the_same_series_gives_the_same_answer_and_units_do_not_matter() -> None:
    logs = with_step(7, 40, 25, 0.04)
    once, again = (find_changes(logs.tolist(), 0.001) for _ in range(2))
    assert once == again
    moved = find_changes((5 * logs + 3).tolist(), 0.001)
    assert [each.index for each in moved] == [each.index for each in once]


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001, 0.0001])
def test_from_so_many_values_on_a_test_can_be_significant(alpha: float) -> None:
    n = fewest_values(alpha)
    step = [0.0] * (n // 2) + [1.0] * (n - n // 2)
    ramp = [*np.linspace(0, 0.01, n // 2), *np.linspace(1, 1.01, n - n // 2)]
    assert find_changes(step, alpha)
    assert find_changes(ramp, alpha)
    fewer = ramp[n // 2 - (n - 1) // 2 : n // 2] + ramp[n // 2 : n // 2 + n - 1 - (n - 1) // 2]
    if n > 2 * SHORTEST:
        assert find_changes(fewer, alpha / 16) == []


# What a series tells


@pytest.mark.parametrize(("metric", "is_loss"), [(RATE, True), (LATENCY, False)])
def test_which_way_is_worse_depends_on_the_metric(metric: str, is_loss: bool) -> None:
    logs = with_step(1, 30, 18, -0.06)
    entries = [
        replace(each, values={(metric, "static"): Value(math.exp(log))})
        for each, log in zip(history(logs), logs, strict=True)
    ]
    told = judge_series(Series(metric, "static", entries), 0.005, 0.02)
    (change,) = told.changes
    assert (change.is_loss, change.counts) == (is_loss, True)
    assert change.after is entries[18]
    assert change.before is entries[17]
    assert change.low < -0.06 < change.high or change.share == pytest.approx(-0.06, abs=0.012)
    assert change.low < change.share < change.high
    assert bool(told.loss) is is_loss


def test_a_change_within_the_floor_is_split_off_but_does_not_count() -> None:
    logs = with_step(2, 60, 30, -0.012, sd=0.003)
    trend = judge(make_lines(history(logs), 200), asked(floor=2.0))
    (told,) = trend.lines[0].series
    assert [change.counts for change in told.changes] == [False]
    assert told.newest is None
    assert trend.answer is Answer.PASSED
    assert judge(make_lines(history(logs), 200), asked(floor=1.0)).answer is Answer.FAILED


def test_small_losses_add_up_to_a_drift() -> None:
    """Each of them is within the floor; together they are not."""
    logs = noise(4, 60, sd=0.002)
    for at in (12, 24, 36, 48):
        logs[at:] += math.log1p(-0.01)
    trend = judge(make_lines(history(logs), 200), asked(floor=2.0))
    (told,) = trend.lines[0].series
    assert not any(change.counts for change in told.changes)
    assert told.drift is not None
    assert told.drift.counts
    assert told.drift.is_loss
    assert told.drift.share == pytest.approx(-0.039, abs=0.006)
    assert trend.answer is Answer.FAILED


def test_an_accepted_loss_fails_nothing_and_is_shown() -> None:
    entries = history(with_step(6, 40, 20, -0.06))
    lines = make_lines(entries, 200)
    assert judge(lines, asked()).answer is Answer.FAILED
    for later in (20, 25, 39):
        trend = judge(lines, asked(accept=f"c0ffee{later:06d}"))
        assert trend.answer is Answer.PASSED
        assert "accepted" in trend.sentence
    assert judge(lines, asked(accept="c0ffee000019")).answer is Answer.FAILED


def test_a_loss_that_was_made_good_fails_nothing() -> None:
    logs = noise(8, 60)
    logs[20:40] += math.log1p(-0.08)
    trend = judge(make_lines(history(logs), 200), asked())
    (told,) = trend.lines[0].series
    assert [change.is_loss for change in told.changes] == [True, False]
    assert trend.answer is Answer.PASSED


def test_too_few_results_are_never_a_pass() -> None:
    trend = judge(make_lines(history(noise(0, 9)), 200), asked())
    (told,) = trend.lines[0].series
    assert trend.answer is Answer.UNKNOWN
    assert told.too_few == fewest_values(trend.alpha) > 9
    assert "9 valid results" in trend.sentence


def test_suspect_results_do_not_count() -> None:
    logs = noise(9, 30)
    logs[20:] += 1.0
    entries = [
        replace(each, reasons=("busy machine",)) if i >= 20 else each
        for i, each in enumerate(history(logs))
    ]
    trend = judge(make_lines(entries, 200), asked())
    (told,) = trend.lines[0].series
    assert told.changes == []
    assert told.segments[-1].last == 19
    assert len(sparkline(told)) > 0
    assert trend.answer is Answer.PASSED


def test_the_more_is_looked_at_the_more_each_must_show() -> None:
    entries = history(noise(0, 20))
    many = [
        replace(each, values={(RATE, f"s{i}"): Value(1.0 + i) for i in range(5)})
        for each in entries
    ]
    one, five = (judge(make_lines(each, 200), asked()).alpha for each in (entries, many))
    assert five == pytest.approx(one / 5)


# What makes a series


def test_the_order_in_which_files_are_read_does_not_matter() -> None:
    entries = history(with_step(1, 30, 18, -0.05))
    mixed = shuffling.Random(0).sample(entries, len(entries))
    told = [judge(make_lines(each, 200), asked()).as_data() for each in (entries, mixed)]
    assert told[0] == told[1]


def test_another_environment_is_another_series_and_only_what_varies_is_named() -> None:
    logs = with_step(1, 40, 20, -0.1)
    entries = [
        replace(each, machine={"device": "cpu", "dtype": "float32", "torch": f"2.{11 + (i > 19)}"})
        for i, each in enumerate(history(logs))
    ]
    lines = make_lines(entries, 200)
    assert [line.facts for line in lines] == [{"torch": "2.12"}, {"torch": "2.11"}]
    assert [line.is_current for line in lines] == [True, False]
    trend = judge(lines, asked())
    assert not any(told.changes for judged in trend.lines for told in judged.series)
    assert trend.answer is Answer.PASSED


def test_a_version_that_computes_in_another_way_continues_the_series() -> None:
    """Otherwise a change from CUDA graphs to none would end a series and not be found."""
    environment = {"cpu": "a", "threads": 2, "python": "3.12.1", "packages": {"torch": "2.11"}}
    model = {"device": "cpu", "dtype": "float32", "execution": "graph"}
    data = {"simulated": False, "environment": environment, "model": model}
    machine = history_file._machine(data)
    for own in ({"execution": "eager"}, {"weights_digest": "b"}):
        assert history_file._machine({**data, "model": {**model, **own}}) == machine
    for own in ({"cpu_kernels": "torch's"}, {"python": "3.12.2"}, {"hostname": "b"}):
        assert history_file._machine({**data, "environment": {**environment, **own}}) == machine
    for own in ({"cpu": "b"}, {"threads": 4}, {"packages": {"torch": "2.12"}}, {"gpu": "H200"}):
        assert history_file._machine({**data, "environment": {**environment, **own}}) != machine
    assert history_file._machine({**data, "simulated": True}) == {}


def test_a_loss_in_a_line_that_ended_fails_nothing() -> None:
    old = history(with_step(1, 30, 18, -0.1), setup={"model": "gpt2", "batch size": 4})
    new = [
        replace(e, created=e.created + timedelta(days=99), commit=f"d00d{i:08d}")
        for i, e in enumerate(history(noise(2, 30)))
    ]
    trend = judge(make_lines([*old, *new], 200), asked())
    assert trend.answer is Answer.PASSED
    assert len(trend.lines) == 2
    assert trend.lines[1].series[0].loss


def test_last_keeps_the_newest() -> None:
    (line,) = make_lines(history(noise(0, 30)), 12)
    assert (len(line.entries), line.dropped) == (12, 18)
    assert line.entries[-1].commit == "c0ffee000029"


# Counts


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_changed_count_is_always_told(at: int) -> None:
    """Counts differ by one in two results or a hundred, also in a suspect one."""
    entries = [
        replace(
            entry(i),
            work={("forward_passes", "static"): 400 + (i >= at), ("outputs", "static"): "abc"},
            reasons=("busy",) if i == at else (),
        )
        for i in range(6)
    ]
    trend = judge(make_lines(entries, 200), asked())
    (recount,) = trend.lines[0].count_changes
    assert (recount.counter, recount.old, recount.new) == ("forward_passes", 400, 401)
    assert (recount.before, recount.after) == (entries[at - 1], entries[at])
    assert trend.answer is Answer.FAILED
    accepted = judge(make_lines(entries, 200), asked(accept=f"c0ffee{at:06d}"))
    assert accepted.answer is Answer.UNKNOWN  # there are no times to be told


def test_less_work_and_other_outputs_are_told_and_are_no_loss() -> None:
    entries = [
        replace(e, work={("forward_passes", "static"): n, ("outputs", "static"): digest})
        for e, n, digest in zip(
            history(noise(0, 20)), [400] * 10 + [390] * 10, ["a"] * 15 + ["b"] * 5, strict=True
        )
    ]
    trend = judge(make_lines(entries, 200), asked())
    told = [recount.counter for recount in trend.lines[0].count_changes]
    assert told == ["forward_passes", "outputs"]
    assert trend.answer is Answer.PASSED


# Files


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    """Return the data of a simulation's result.json."""
    return dict(make_result(conduct(Experiment(simulated=True))).data)


Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, simulated: dict[str, Any]) -> Writer:
    """Write the result of a made-up commit, its throughput scaled."""

    def written(index: int, log: float = 0.0, **changes: Any) -> Path:
        data = json.loads(json.dumps(simulated))
        data["created_at"] = (START + timedelta(days=index)).isoformat()
        data["environment"]["git_commit"] = f"c0ffee{index:06d}"
        for strategy in data["strategies"].values():
            for figures in (strategy["summary"], *strategy["trials"]):
                figures[RATE] *= math.exp(log)
        data |= changes
        file = tmp_path / "ci" / "deep" / f"{index:03}" / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(data))
        return file

    return written


def call(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; an error is the exception's line."""
    done = CliRunner().invoke(app, ["trend", *words], env={"COLUMNS": "80"})
    if isinstance(done.exception, UsageError):
        return done.exception.exit_code, done.stdout, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout, done.stderr


def test_results_are_found_at_any_depth_once(write: Writer, tmp_path: Path) -> None:
    files = [write(i) for i in range(3)]
    staging = tmp_path / "ci" / ".writing-x"
    staging.mkdir()
    (staging / "result.json").write_text("{")
    (tmp_path / "empty").mkdir()
    found, without = find_results([tmp_path / "ci", files[0], files[1].parent, tmp_path / "empty"])
    assert found == files
    assert without == [f"{tmp_path / 'empty'}: has no result.json"]


def test_a_result_is_read_without_its_recordings(write: Writer) -> None:
    found = read_entry(write(0), METRICS)
    assert found.commit == "c0ffee000000"
    assert found.label == "c0ffee00"
    assert {metric for metric, _ in found.values} == set(METRICS)
    assert found.work["forward_passes", "continuous"] == 130
    assert found.machine == {}  # of a simulation: no time depends on it
    assert found.values["speedup", "continuous"].value > 1


SPOILED: dict[str, tuple[str, str]] = {
    "torn": ('{"schema_version": 1, "crea', "is not readable JSON"),
    "empty": ("", "is not readable JSON"),
    "no result": ("[1, 2]", "is not a result of batchbench"),
    "other version": ('{"schema_version": 99}', "has schema version 99"),
    "NaN": ('{"schema_version": 1, "x": NaN}', "NaN is not JSON"),
    "half": ('{"schema_version": 1, "created_at": "2026-01-01"}', "'strategies' is missing"),
    "deep": ("[" * 100_000, "is not readable JSON"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_file_is_named_and_the_others_go_on(kind: str, write: Writer) -> None:
    content, reason = SPOILED[kind]
    ci = write(0).parents[2]
    bad = write(1)
    bad.write_text(content)
    code, out, err = call(str(ci), "--json")
    (line,) = err.splitlines()
    assert line.startswith(f"left out: {bad}: ")
    assert reason in line
    assert code == 0
    assert json.loads(out)["spoiled"] == [line.removeprefix("left out: ")]
    code, out, err = call(str(bad))
    assert (code, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["strategies"].clear(),
        lambda data: data["strategies"]["static"].pop("summary"),
        lambda data: data["strategies"]["static"]["summary"].update({RATE: "fast"}),
        lambda data: data["strategies"]["static"]["counters"].update(forward_passes=1.5),
        lambda data: data["validity"].update(status="fine"),
        lambda data: data.update(created_at="yesterday"),
        lambda data: data.update(environment=None),
    ],
)
def test_what_is_not_whole_is_not_believed(
    spoil: Callable[[dict[str, Any]], None], simulated: dict[str, Any], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(simulated))
    spoil(data)
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="is not a complete result"):
        read_entry(tmp_path / "result.json", METRICS)


# The command


def test_the_exit_code_says_what_was_asked(write: Writer, tmp_path: Path) -> None:
    for i, log in enumerate(with_step(1, 30, 18, -0.08)):
        write(i, float(log))
    ci, metric = str(tmp_path / "ci"), ("--metric", RATE)
    assert call(ci, *metric)[0] == 0
    code, out, _ = call(ci, *metric, "--fail-on-loss", "--quiet")
    assert code == 1
    assert out.startswith("LOSS: static.output_throughput -")
    assert call(ci, *metric, "--fail-on-loss", "--accept", "c0ffee000018")[0] == 0
    few = (ci, *metric, "--fail-on-loss", "--last", "5")
    assert call(*few)[0] == 0
    code, out, _ = call(*few, "--strict", "--quiet")
    assert (code, out[:12]) == (3, "CANNOT TELL:")


def test_the_files_are_written_whole_and_older_pictures_go(write: Writer, tmp_path: Path) -> None:
    for i, log in enumerate(with_step(1, 20, 12, -0.08)):
        write(i, float(log))
    out, page = tmp_path / "out", tmp_path / "trend.md"
    out.mkdir()
    (out / "trend-2.png").write_bytes(b"of an older look")
    words = (str(tmp_path / "ci"), "--output", str(out), "--markdown", str(page), "--quiet")
    assert call(*words)[0] == 0
    assert sorted(f.name for f in out.iterdir()) == ["trend.json", "trend.png", "trend.svg"]
    first = (out / "trend.svg").read_bytes()
    data = json.loads((out / "trend.json").read_text(encoding="utf-8"))
    assert data["answer"] == "failed"
    assert len(data["lines"][0]["series"][0]["points"]) == 20
    assert "| static | output\\_throughput |" in page.read_text(encoding="utf-8")
    assert call(*words)[0] == 0
    assert (out / "trend.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("nowhere",), "nowhere: no such folder"),
        ((".",), "no readable result"),
        ((".", "--metric", "completed"), "--metric completed: has no better and worse"),
        ((".", "--floor", "-1"), "--floor -1: must be at least 0 percent"),
        ((".", "--accept", "ab"), "at least 4 letters"),
        ((".", "--json", "--markdown", "-"), "give one of them"),
    ],
)
def test_a_bad_question_is_one_line(
    words: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert reason in err


def test_a_strategy_or_metric_that_no_result_has_is_refused(write: Writer) -> None:
    file = str(write(0))
    assert "there are continuous, static" in call(file, "--strategy", "other")[2]
    assert "no result has a value" in call(file, "--metric", "energy_joules")[2]


# What is shown


def test_every_metric_has_a_direction_or_is_refused() -> None:
    assert all(higher_is_better(m) for m in ("request_goodput", "slo_attainment", "efficiency"))
    assert not any(higher_is_better(m) for m in ("duration", "p99_ttft_ms", "energy_joules"))
    for metric in ("completed", "total_input_tokens", "arrival_rate", "nonsense"):
        with pytest.raises(UsageError, match="no better and worse"):
            higher_is_better(metric)


def test_the_picture_names_the_change_and_hollows_the_suspect() -> None:
    logs = with_step(1, 40, 25, -0.06)
    entries = history(logs)
    entries[10] = replace(entries[10], reasons=("busy",))
    entries[25] = replace(entries[25], commit="badc0de00000")
    (judged,) = judge(make_lines(entries, 200), asked()).lines
    figure = draw_trend(judged)
    assert figure is not None
    (axes,) = figure.axes
    (label,) = [text.get_text() for text in axes.texts]
    assert label.startswith("worse -")
    assert label.endswith("badc0de0")
    groups = {each.get_gid(): len(each.get_offsets()) for each in axes.collections}
    assert groups == {"points-0-valid": 39, "points-0-suspect": 1}


def test_no_picture_without_a_series_and_no_poster() -> None:
    (empty,) = judge(make_lines([entry(0)], 200), asked()).lines
    assert draw_trend(empty) is None
    crowd = [
        replace(e, values={(RATE, f"s{i}"): Value(1.0 + i) for i in range(MOST_PANELS + 3)})
        for e in history(noise(0, 5))
    ]
    (judged,) = judge(make_lines(crowd, 200), asked()).lines
    figure = draw_trend(judged)
    assert figure is not None
    assert len(figure.axes) == MOST_PANELS


def test_markdown_shows_foreign_text_as_it_is() -> None:
    entries = history(noise(0, 5), commit="a|b<c>")
    text = render_markdown(judge(make_lines(entries, 200), asked()))
    assert "a\\|b\\<c\\>" in text
