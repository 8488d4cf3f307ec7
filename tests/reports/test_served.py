"""Results of runs against a server: their data, their words, and the reasons to doubt them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from support.classic import CLASSIC
from support.mutations import Change, changes, spoil_json
from support.results import PASSED, clean, shown
from support.served import (
    DIFFERENT,
    QUIET,
    SERVER,
    failed_trial,
    served,
    served_result,
    served_trial,
    served_trials,
)

from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.batching.remote.events import ClientLag
from batchbench.errors import UsageError
from batchbench.reports.formats import dashboards, html, markdown
from batchbench.reports.formats.terminal import sentence
from batchbench.reports.result import (
    Result,
    load_result,
    recording_files,
    remake_result,
    to_json,
)
from batchbench.reports.side_by_side import Labelled, SideBySide
from batchbench.workloads import Workload


def recordings_of(client: ClientLag | None, workload: Workload = CLASSIC) -> dict[str, Any]:
    return {
        name: served_trials(name, client=client, workload=workload)
        for name in ("static", "continuous")
    }


def reasons(result: Result) -> list[str]:
    return result.data["validity"]["reasons"]


# Data


def test_a_served_result_has_no_counters_and_no_account() -> None:
    data = served().data
    assert all(of["counters"] is None for of in data["strategies"].values())
    assert data["explain"]["strategies"] == {"static": None, "continuous": None}
    assert data["prediction"] is None
    assert data["verification"]["passed"] is None


def test_our_own_engine_has_no_server() -> None:
    data = clean().data
    assert (data["server"], data["agreement"], data["failures"]) == (None, None, None)
    assert data["comparison"] is not None
    assert data["comparison"]["step_ratio_source"] == "schedule"


def test_a_served_result_is_derived_anew_to_the_byte() -> None:
    result = served_result(
        agreement=DIFFERENT,
        failures=[failed_trial(3)],
    )
    assert to_json(remake_result(result)) == to_json(result)


@pytest.mark.parametrize(
    ("passes", "ratio", "source"),
    [
        ({"static": (400,) * 4, "continuous": (100,) * 4}, 4.0, "server"),
        ({"static": (400,) * 4, "continuous": (100, None, 100, 100)}, 400 / 130, "schedule"),
        ({}, 400 / 130, "schedule"),
    ],
)
def test_the_step_ratio_is_the_servers_or_else_the_schedules(
    passes: Mapping[str, Sequence[int | None]], ratio: float, source: str
) -> None:
    server = replace(SERVER, passes={name: list(p) for name, p in passes.items()})
    comparison = served_result(server=server).data["comparison"]
    assert comparison is not None
    assert comparison["step_ratio"] == pytest.approx(ratio)
    assert comparison["step_ratio_source"] == source


def test_the_schedules_say_nothing_of_a_server_with_fewer_slots() -> None:
    comparison = served_result(server=replace(SERVER, passes={}, slots=4)).data["comparison"]
    assert comparison is not None
    assert comparison["step_ratio"] is comparison["step_ratio_source"] is None
    assert comparison["efficiency"] is None


@pytest.mark.parametrize(("share", "stamps"), [(1.0, "kernel"), (0.5, "user")])
def test_a_result_says_who_stamped_arrivals(share: float, stamps: str) -> None:
    result = served_result(recordings_of(replace(QUIET, kernel_share=share)))
    server = result.data["server"]
    assert server is not None
    assert server["stamps"] == stamps


# Words


def test_the_sentence_says_in_waves_and_whose_count_it_is() -> None:
    assert sentence(served()) == (
        "continuous batching was 3.08× as fast as static batching in waves (95 % CI 3.08–3.08); "
        "by the server's own count of forward passes: 3.08×; both strategies gave the same output "
        "for 32/32 requests; run valid."
    )


def test_the_sentence_says_with_what_outputs_were_compared() -> None:
    checked = sentence(served_result(verification=PASSED))
    assert (
        "; outputs identical to unbatched generation for 32/32 requests; both strategies "
        "gave the same output for 32/32 requests; run valid."
    ) in checked


def test_a_difference_is_told_with_its_place_and_the_noise_of_the_server() -> None:
    assert (
        "the strategies' outputs differ for 1/32 requests (first: request 5 from token 12 on), "
        "and 30/32 are the same in all trials of the baseline"
    ) in sentence(served_result(agreement=DIFFERENT))
    by_text = served_result(agreement={**DIFFERENT, "by": "text", "baseline_repeat": None})
    assert "(first: request 5 from character 12 on); run" in sentence(by_text)


def test_the_title_has_the_server_and_the_table_says_waves() -> None:
    text = shown(served(), 100)
    assert "SmolLM2-135M · llama.cpp b4242 at 127.0.0.1:8080 · 8 at once · 32 requests" in text
    assert "static (waves)" in text
    assert "Where the time went" not in text
    assert "Server: llama.cpp b4242; it reports 8 slots; it counts forward passes" in text


def test_fewer_slots_than_the_batch_size_are_told() -> None:
    text = " ".join(shown(served_result(server=replace(SERVER, slots=4)), 200).split())
    assert "it reports 4 slots, fewer than --batch-size 8" in text


# The audit


def test_a_clean_run_is_valid() -> None:
    assert reasons(served()) == []


def test_cached_tokens_make_a_run_suspect() -> None:
    cached = {"static": (0, 0, 0, 0), "continuous": (0, 48, 0, 0)}
    assert reasons(served_result(server=replace(SERVER, cached_tokens=cached))) == [
        "continuous: the server took 48 prompt tokens from a cache and did not compute them: turn "
        "its prompt cache off"
    ]


def test_a_server_that_is_busy_at_the_start_makes_a_run_suspect() -> None:
    assert reasons(served_result(server=replace(SERVER, running_before=2))) == [
        "the server was serving 2 requests of other clients when a trial began: run again when "
        "nobody else uses the server"
    ]


@pytest.mark.parametrize(
    ("share", "lag_ns", "doubtful"),
    [
        (0.5, 1_200_000, True),  # 12 % of the ITL of 10 ms, without the kernel's stamps
        (0.5, 800_000, False),
        (1.0, 60_000_000, False),  # the kernel stamped all arrivals, however late they were read
    ],
)
def test_a_slow_client_is_doubted_only_without_kernel_stamps(
    share: float, lag_ns: int, doubtful: bool
) -> None:
    client = replace(QUIET, kernel_share=share, loop_p99_ns=lag_ns)
    found = reasons(served_result(recordings_of(client)))
    assert [("of the median ITL" in reason) for reason in found] == [True] * doubtful


@pytest.mark.parametrize(
    ("share", "lag_ns", "doubtful"),
    [
        (0.3, 1_200_000, True),
        (0.01, 1_200_000, True),
        (0.004, 1_200_000, False),
        (0.3, 800_000, False),  # the client was in time, so the server sent it together
    ],
)
def test_output_that_a_late_client_reads_together_is_doubted(
    share: float, lag_ns: int, doubtful: bool
) -> None:
    client = replace(QUIET, merged_share=share, loop_p99_ns=lag_ns)
    found = reasons(served_result(recordings_of(client)))
    assert [("read late, together" in reason) for reason in found] == [True] * doubtful


@pytest.mark.parametrize(("lag_ns", "said"), [(800_000, "buffers"), (12_000_000, "read late,")])
def test_output_in_one_piece_is_the_servers_doing_unless_the_client_read_late(
    lag_ns: int, said: str
) -> None:
    """A step takes 10 ms, and an output of ten tokens or more comes when its last is ready."""
    client = replace(QUIET, merged_share=0.9, loop_p99_ns=lag_ns)
    recordings = {
        name: [
            replace(r, token_ends_ns=np.repeat(r.last_token_ns, r.requests.output_tokens))
            for r in trials
        ]
        for name, trials in recordings_of(client).items()
    }
    (found,) = reasons(served_result(recordings))
    assert said in found
    assert "90%" in found


def test_requests_sent_late_are_doubted_if_they_had_a_time() -> None:
    late = replace(QUIET, late_p99_ns=50_000_000)
    assert reasons(served_result(recordings_of(late))) == []  # they wait for a place
    timed = Workload.of("timed", [[7] * 7] * 8, [10] * 8, due_ns=[i * 10**8 for i in range(8)])
    found = reasons(served_result(recordings_of(late, timed), workload=timed))
    assert [reason for reason in found if reason.startswith("continuous: requests were sent")]
    assert not [reason for reason in found if reason.startswith("static (waves): requests")]


@pytest.mark.parametrize(
    ("paces", "doubtful"),
    [((1.0, 4.0), True), ((3.0, 3.2), False), ((3.03, 3.12), False)],
)
def test_pairs_that_contradict_each_other_are_doubted(
    paces: Sequence[float], doubtful: bool
) -> None:
    """Continuous is 3.08 times as fast if its steps take as long."""
    trials = {
        "static": [served_trial("static", i) for i in range(4)],
        "continuous": [
            served_trial("continuous", i, step_ns=paces[i % 2] * 10_000_000) for i in range(4)
        ],
    }
    found = [reason for reason in reasons(served_result(trials)) if "contradict" in reason]
    assert bool(found) is doubtful


def test_a_trial_that_failed_is_told_with_its_request_and_phase() -> None:
    result = served_result(failures=[failed_trial(7, 8)])
    assert reasons(result) == [
        "2 of 32 requests failed in trial 3 of static (waves) (request 7 before its first token: "
        "it refuses connections): its times are left out"
    ]
    assert "Failed: 2 of 32 requests failed in trial 3" in shown(result, 200)


def test_other_processes_and_other_outputs_are_no_doubt_of_a_server() -> None:
    """The server itself may be the other process, and its outputs are compared elsewhere."""

    def busy(recording: Recording, trial: int) -> Recording:
        about = {**recording.header.about, "foreign_cores": 2.0}
        tokens = None if recording.tokens is None else recording.tokens + trial
        return replace(recording, header=replace(recording.header, about=about), tokens=tokens)

    trials = {
        name: [busy(r, i) for i, r in enumerate(served_trials(name))]
        for name in ("static", "continuous")
    }
    assert reasons(served_result(trials)) == []


@pytest.mark.parametrize(
    "client",
    [
        7,
        {},
        {**asdict(QUIET), "kernel_share": "all"},
        {**asdict(QUIET), "merged_share": 2.0},
        {**asdict(QUIET), "loop_p99_ns": -1},
        {**asdict(QUIET), "late_p99_ns": None},
    ],
)
def test_a_recording_with_impossible_times_of_its_client_is_refused(
    tmp_path: Path, client: Any
) -> None:
    good = served_trial("static")
    file = tmp_path / "recording.npz"
    file.write_bytes(save_recording(good))
    load_recording(file)
    about = {**good.header.about, "client": client}
    bad = replace(good, header=replace(good.header, about=about))
    file.write_bytes(save_recording(bad))
    with pytest.raises(UsageError, match=r"about\.client"):
        load_recording(file)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of a run against a server in which requests failed."""
    folder = tmp_path_factory.mktemp("served")
    result = served_result(agreement=DIFFERENT, failures=[failed_trial(7)])
    for name, content in recording_files(result.recordings).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "result.json").write_text(to_json(result), encoding="utf-8")
    return folder


@given(changes)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_changed_result_of_a_server_is_refused_or_shown(
    saved: Path, spoiled: list[Change]
) -> None:
    file = saved / "result.json"
    good = file.read_bytes()
    file.write_bytes(spoil_json(json.loads(good), spoiled))
    try:
        result = load_result(saved)
    except UsageError:
        return
    finally:
        file.write_bytes(good)
    one = Labelled("one", result)
    assert shown(result, 80)
    assert markdown.render([one], [{}])
    assert html.render([one])
    assert dashboards.render_bencher([one, Labelled("other", served())])
    assert SideBySide([one, Labelled("other", served())]).sentence
    try:
        remake_result(result)
    except UsageError:
        return


def test_one_trial_without_the_kernels_stamps_makes_them_the_clients() -> None:
    trials = recordings_of(QUIET)
    trials["static"][2] = served_trial("static", 2, client=replace(QUIET, kernel_share=0.5))
    server = served_result(trials).data["server"]
    assert server is not None
    assert server["stamps"] == "user"


@pytest.mark.parametrize(
    "change",
    [
        {"passes": {"static": [400], "continuous": [130] * 4}},
        {"cached_tokens": {"other": [0] * 4}},
    ],
)
def test_counts_that_are_not_one_per_trial_are_refused(saved: Path, change: Any) -> None:
    file = saved / "result.json"
    good = file.read_bytes()
    data = json.loads(good)
    data["server"] |= change
    file.write_text(json.dumps(data), encoding="utf-8")
    try:
        with pytest.raises(UsageError, match="counts are not one per trial of each strategy"):
            load_result(saved)
    finally:
        file.write_bytes(good)


def test_a_server_without_a_target_is_refused(saved: Path) -> None:
    file = saved / "result.json"
    good = file.read_bytes()
    data = json.loads(good)
    del data["config"]["target"]
    file.write_text(json.dumps(data), encoding="utf-8")
    try:
        with pytest.raises(UsageError, match="it has a server, and its config has no target"):
            load_result(saved)
    finally:
        file.write_bytes(good)
