"""The command probe on servers of known schedule: its answer, its files and its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.faults import SHORT_S
from support.program import Program
from support.program import here as here
from support.program import program as program
from support.schedules import FIVE, MS, Schedule
from support.servers import Manner
from support.streams import SSE_HEAD, DialectName, chunked, event
from support.wired import URL, wired

from batchbench.batching.progress import Watch
from batchbench.batching.remote.exchange import Failure, FailureKind
from batchbench.batching.remote.spec import TargetSpec
from batchbench.studies.probe import ask, report
from batchbench.studies.probe.judge import Kind
from batchbench.studies.probe.observations import Role, Stream
from batchbench.studies.probe.report import MOST_STREAMS, Panel, draw_streams, panels_of

KEYS = {"target", "server", "verdict", "slots", "slots_is_lower_bound", "evidence"}


def findings_on(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> ask.Findings:
    wired(monkeypatch, schedule)
    return ask.probe(TargetSpec(target=URL), "auto", 60.0, Watch())


@pytest.mark.parametrize(
    ("name", "verdict", "slots", "bound"),
    [
        ("continuous", "continuous", 8, False),
        ("static", "static", 8, False),
        ("serial", "serial", 1, False),
        ("buffered", "continuous", 8, None),
        ("replicas", "continuous", 8, True),
    ],
)
def test_the_five_kinds_of_server(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    verdict: str,
    slots: int,
    bound: bool | None,
) -> None:
    wired(monkeypatch, FIVE[name])
    said = program("probe", URL, "--json", "--strict")
    assert said.code == 0, said.err
    data = json.loads(said.out)
    assert data.keys() >= KEYS
    assert (data["verdict"], data["slots"]) == (verdict, slots)
    assert bound is None or data["slots_is_lower_bound"] is bound
    assert data["target"] == URL
    assert data["server"]["name"] == "llama.cpp"


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_the_chat_endpoint_and_other_dialects(
    monkeypatch: pytest.MonkeyPatch, dialect: DialectName
) -> None:
    wired(monkeypatch, Schedule(slots=4), Manner(dialect))
    spec = TargetSpec(target=URL, endpoint="/v1/chat/completions")
    verdict = ask.probe(spec, "auto", 60.0, Watch()).verdict
    assert (verdict.kind, verdict.slots) == (Kind.CONTINUOUS, 4)


def test_a_server_that_takes_turns_is_no_verdict_and_exit_code_3_if_strict(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, Schedule("sliced"))
    assert program("probe", URL, "--quiet").code == 0
    said = program("probe", URL, "--quiet", "--strict")
    assert said.code == 3
    assert said.out.startswith(f"{URL}: cannot tell: ")
    assert said.out.count("\n") == 1


def test_the_report_fits_80_columns_and_says_what_each_test_saw(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    said = program("probe", URL)
    assert said.code == 0
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line != line.rstrip()] == []
    for word in ("One alone", "Joining", "Shared steps", "Slots", "Server says", "Time"):
        assert any(line.startswith(word) for line in lines), word
    assert "12 of 12 short requests" in " ".join(said.out.split())


def test_the_output_folder_has_the_json_and_the_picture(
    program: Program, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    wired(monkeypatch)
    assert program("probe", URL, "--output", "out", "--quiet").code == 0
    assert {file.name for file in (here / "out").iterdir()} == {
        *("probe.json", "probe.png", "probe.svg"),
    }
    data = json.loads((here / "out" / "probe.json").read_text(encoding="utf-8"))
    assert data.keys() >= KEYS
    assert (here / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")
    said = program("probe", URL, "--output", "out", "--quiet")
    assert said.code == 2
    assert "--overwrite" in said.error


def test_the_key_is_sent_and_never_shown(
    program: Program, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    network = wired(monkeypatch)
    seen: list[Any] = []
    answer = network.exchange

    def exchange(address: Any, *rest: Any, **more: Any) -> Any:
        seen.append(address.headers)
        return answer(address, *rest, **more)

    monkeypatch.setattr(ask.wire, "exchange", exchange)
    said = program("probe", URL, "--api-key", "s3cret", "--output", "out")
    assert all(headers["Authorization"] == "Bearer s3cret" for headers in seen)
    written = [file.read_bytes() for file in (here / "out").iterdir()]
    assert not any(b"s3cret" in text for text in [said.out.encode(), said.err.encode(), *written])


def test_extra_fields_and_the_length_are_in_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    bodies: list[dict[str, Any]] = []
    body_for = ask.body_for

    def keeping(*given: Any, **more: Any) -> bytes:
        body = body_for(*given, **more)
        bodies.append(json.loads(body))
        return body

    monkeypatch.setattr(ask, "body_for", keeping)
    spec = TargetSpec(target=URL, extra_body='{"top_k": 1}')
    found = ask.probe(spec, "auto", 60.0, Watch())
    assert network.trials
    assert all(body["top_k"] == 1 and body["ignore_eos"] is True for body in bodies)
    prompts = [json.dumps(body["prompt"]) for body in bodies]
    assert len(set(prompts)) == len(prompts)  # no prompt is in a cache
    streams = [s for round in found.observations.rounds for s in round.streams]
    assert [body["max_tokens"] for body in bodies] == [stream.asked for stream in streams]
    assert all(len(stream.times_ns) == stream.asked for stream in streams)


# Failures


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("127.0.0.1:8000",), "type URL http://127.0.0.1:8000"),
        (("http://127.0.0.1:8000?x=1",), "leave out everything from ?"),
        ((URL, "--extra-body", "{"), "--extra-body"),
        ((URL, "--max-time", "0"), "--max-time 0"),
        ((URL, "--endpoint", "/v1"), "--endpoint"),
        ((URL, "--model", "other"), "--model other: the server has no such model; it has"),
        ((), "URL"),
    ],
)
def test_a_bad_question_is_one_line(
    program: Program, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    wired(monkeypatch)
    said = program("probe", *words)
    assert said.code == 2
    assert line in said.error


def test_a_server_that_is_not_there_is_one_line(program: Program) -> None:
    said = program("probe", "http://127.0.0.1:9", "--timeout", str(SHORT_S))
    assert said.code == 2
    assert "127.0.0.1:9" in said.error


def test_a_first_request_that_fails_ends_the_probe(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch)
    network.breaks = {0: [0]}
    said = program("probe", URL)
    assert said.code == 2
    assert said.error.endswith("it broke")


def test_a_request_that_fails_later_is_told_and_exit_code_1(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch)
    network.breaks = {5: [0]}
    said = program("probe", URL)
    assert said.code == 1
    assert "1 request; the first: it broke" in said.out


def hide_tokens(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let a server show no text of requests of so few tokens, which its usage counts."""
    answer = ask.wire.exchange
    asked: list[int] = []
    body_for = ask.body_for

    def keeping(*given: Any, **more: Any) -> bytes:
        asked.append(given[4])
        return body_for(*given, **more)

    def exchange(*given: Any, **more: Any) -> Any:
        asked.clear()
        done = answer(*given, **more)
        for i, (tokens, one) in enumerate(zip(asked, done, strict=True)):
            if tokens <= most:
                end = {"choices": [{"text": "", "finish_reason": "length"}]}
                end |= {"usage": {"completion_tokens": tokens}}
                data = SSE_HEAD + b"".join(chunked(d) for d in (event(end), event("[DONE]"), b""))
                done[i] = replace(one, reads=[one.reads[-1]._replace(data=data)])
        return done

    monkeypatch.setattr(ask, "body_for", keeping)
    monkeypatch.setattr(ask.wire, "exchange", exchange)


def test_a_request_that_shows_no_token_does_not_end_the_probe(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server holds back half a character: it counts a token and sends no text."""
    wired(monkeypatch)
    hide_tokens(monkeypatch, most=1)
    said = program("probe", URL, "--json")
    data = json.loads(said.out)
    assert said.code == 0
    assert (data["verdict"], data["slots"], data["slots_is_lower_bound"]) == (
        *("continuous", 8, False),
    )
    assert "showed no token" in data["evidence"]["tests"]["Left out"]
    assert any(s["failure"] == "no token shown" for r in data["evidence"]["rounds"] for s in r)


@pytest.mark.parametrize("most", [6, 8, 10**6])
def test_too_many_requests_without_a_token_are_why_it_cannot_tell(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    wired(monkeypatch)
    hide_tokens(monkeypatch, most)
    verdict = ask.probe(TargetSpec(target=URL), "auto", 60.0, Watch()).verdict
    assert verdict.kind is Kind.UNKNOWN
    assert "requests showed no token, though the server counts some" in verdict.reason
    assert " time " not in verdict.reason


def test_a_reason_names_a_failure_or_the_time_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    for trial in range(1, 20):
        network.trials, network.breaks = [], {trial: [0]}
        verdict = ask.probe(TargetSpec(target=URL), "auto", 60.0, Watch()).verdict
        if verdict.kind is Kind.UNKNOWN:
            assert verdict.reason.endswith("; the probe ended when a request failed (it broke)")
            assert " time " not in verdict.reason
    assert network.trials
    slow = findings_on(monkeypatch, Schedule(step_ns=5000 * MS)).verdict
    assert slow.kind is Kind.UNKNOWN
    assert slow.reason.endswith("; its time was over, so try --max-time 180")
    turns = findings_on(monkeypatch, Schedule("sliced")).verdict
    assert " time " not in turns.reason


def test_a_refusal_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on requests is what HTTP 429 and 503 tell, and bounds the slots."""
    network = wired(monkeypatch)
    network.failure = Failure(FailureKind.STATUS, "no room", 429)
    network.breaks = {number: range(10, 16) for number in range(20) if number > 12}
    answer = network.exchange

    def exchange(*given: Any, **more: Any) -> Any:
        breaks = network.breaks.pop(len(network.trials), None)
        done = answer(*given, **more)
        for index in breaks or ():
            if index < len(done):
                done[index] = replace(done[index], reads=[], failure=network.failure)
        return done

    monkeypatch.setattr(ask.wire, "exchange", exchange)
    found = ask.probe(TargetSpec(target=URL), "auto", 60.0, Watch())
    assert not found.failures
    assert found.verdict.kind is Kind.CONTINUOUS
    assert found.verdict.slots_is_lower_bound
    assert "and the server refused" in report.tests_of(found)["Slots"]


def test_the_time_is_over_before_the_first_answer(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch)
    network.breaks, network.failure = {0: [0]}, Failure(FailureKind.STOPPED, "stopped")
    said = program("probe", URL, "--max-time", "7")
    assert said.code == 2
    assert "--max-time 7: is over before the first answer; give more time" in said.error


# Pictures


def steady(role: Role, sent_ms: int, first_ms: int, tokens: int) -> Stream:
    times = tuple((first_ms + 20 * i) * MS for i in range(tokens))
    return Stream(role, tokens, sent_ms * MS, times)


def test_tokens_of_one_step_stand_in_one_column() -> None:
    streams = [steady(Role.LONG, 0, 30, 12), steady(Role.SHORT, 60, 110, 5)]
    long, short, axis = report.rows_of(Panel("title", streams), 80)
    columns = [i for i, cell in enumerate(long) if cell == report.TOKEN]
    assert len(columns) == 12
    assert [i for i, cell in enumerate(short) if cell == report.TOKEN] == columns[4:9]
    assert (axis.split()[0], axis.split()[-1]) == ("0", "s")


@pytest.mark.parametrize("width", [20, 80, 200])
def test_rows_fit_the_width_and_tokens_keep_apart(width: int) -> None:
    streams = [steady(Role.LONG, 0, 30, 400), steady(Role.SHORT, 60, 110, 5)]
    rows = report.rows_of(Panel("title", streams), width)
    assert max(map(len, rows)) <= width
    assert report.TOKEN * 2 not in rows[0]


def test_a_long_row_of_waiting_requests_shows_the_end_of_the_long_one() -> None:
    streams = [steady(Role.LONG, 0, 30, 400), steady(Role.SHORT, 60, 8050, 6)]
    long, short, _ = report.rows_of(Panel("title", streams), 80)
    assert short.count(report.TOKEN) == 6
    assert long.rindex(report.TOKEN) < short.index(report.TOKEN)


def test_a_refused_request_has_a_row() -> None:
    refused = Stream(Role.BURST, 8, 0, (), refused=True)
    rows = report.rows_of(Panel("title", [steady(Role.BURST, 0, 30, 8), refused]), 80)
    assert "refused" in rows[1]


def test_the_row_of_a_late_request_without_a_token_fits_the_width() -> None:
    late = Stream(Role.SHORT, 6, 550 * MS, hidden=6)
    rows = report.rows_of(Panel("title", [steady(Role.LONG, 0, 30, 36), late]), 80)
    assert rows[1].endswith("no token shown")
    assert len(rows[1]) <= 80


def test_pictures_of_nothing_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert panels_of([]) == []
    assert draw_streams([], "cannot tell", "title").axes == []
    found = findings_on(monkeypatch, Schedule(slots=100))
    panels = panels_of(found.observations.rounds)
    assert [len(panel.streams) <= MOST_STREAMS for panel in panels] == [True, True]
    figure = draw_streams(panels, "headline", "title")
    for axes, panel in zip(figure.axes, panels, strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == panel.names
    assert figure.axes[0].get_yticklabels()[0].get_text() == "long"
