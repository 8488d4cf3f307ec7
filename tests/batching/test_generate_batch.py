"""transformers' own continuous batching as a strategy: served, timed, verified, and left behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.models import Alone
from support.results import SETTLED

from batchbench.batching.bench import LocalBench
from batchbench.batching.dry_run import estimate
from batchbench.batching.engines.generate_batch import GenerateBatch
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Header, Recording
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.batching.session import Outcome, conduct
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.reports import metrics
from batchbench.reports.figures import draw
from batchbench.reports.formats.html import Labelled, render
from batchbench.reports.formats.terminal import sentence
from batchbench.reports.formats.trace_events import trace_events, write_trace
from batchbench.reports.latency import e2el_ms, gaps_ms, queue_ms, tpot_ms, ttft_ms
from batchbench.reports.output import requests_frame, steps_frame
from batchbench.reports.result import make_result, remake_result, to_json
from batchbench.reports.result_file import SCHEMA_FILE, fault_of
from batchbench.reports.validity import audit
from batchbench.workloads import Workload
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

PROMPTS = [np.random.default_rng(i).integers(1, 300, 3 + 5 * i).tolist() for i in range(5)]
LENGTHS = (9, 1, 14, 4, 2)
WORKLOAD = Workload.of("five", PROMPTS, LENGTHS)


class Listener(Watch):
    """Keeps how many requests were done at each report."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def progressed(self, progress: Progress) -> None:
        self.done.append(progress.done)


def no_thread_of_theirs() -> bool:
    """Return True if no thread of transformers' generation loop is left."""
    return not any("_run_generation_loop" in thread.name for thread in threading.enumerate())


def served(model: LoadedModel, workload: Workload = WORKLOAD, slots: int = 3) -> Recording:
    return GenerateBatch(model, slots, workload.max_total_tokens).serve(workload, Watch())


def test_each_request_gets_its_own_length_and_the_models_own_tokens(
    tiny: LoadedModel, alone: Alone
) -> None:
    recording = served(tiny)
    assert recording.requests.output_tokens.tolist() == list(LENGTHS)
    for i, (prompt, count) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        assert recording.tokens_of(i).tolist() == alone(tiny, prompt, count)
    found = verify(WORKLOAD, [recording], TeacherForced(tiny))
    assert (found.requests_checked, found.wrong) == (5, 0)


def test_a_token_that_ends_a_text_ends_none_unless_that_is_asked(
    tiny: LoadedModel, alone: Alone
) -> None:
    prompt = PROMPTS[2]
    said = alone(tiny, prompt, 14)
    ends = replace(
        tiny, source=replace(tiny.source, config={"vocab_size": 300, "eos_token_id": said[3]})
    )
    workload = Workload.of("one", [prompt], [14])
    assert served(ends, workload).tokens_of(0).tolist() == said
    early = replace(workload, stop_at_eos=True)
    assert served(ends, early).tokens_of(0).tolist() == said[: said.index(said[3]) + 1]


def test_it_tells_when_each_token_was_there_and_shows_no_steps(tiny: LoadedModel) -> None:
    recording = served(tiny)
    assert not recording.has_steps
    assert recording.num_steps == 0
    assert recording.token_ends_ns is not None
    for i in range(len(WORKLOAD)):
        own = recording.token_ends_ns[recording.token_offsets[i] : recording.token_offsets[i + 1]]
        assert own[0] > 0
        assert (np.diff(own) > 0).all()
        assert recording.first_token_ns[i] == own[0]
        assert recording.last_token_ns[i] == own[-1]
    assert recording.duration_ns == recording.token_ends_ns.max()
    assert (recording.admitted_ns < recording.first_token_ns).all()
    assert (queue_ms(recording) >= 0).all()
    assert recording.header.about["engine"].startswith("transformers ")


def test_no_more_requests_run_together_than_there_are_slots(tiny: LoadedModel) -> None:
    """A request in the only slot begins when the one before it is done."""
    recording = served(tiny, slots=1)
    order = np.argsort(recording.first_token_ns)
    assert order.tolist() == [0, 1, 2, 3, 4]  # as they came
    assert (recording.first_token_ns[order][1:] > recording.last_token_ns[order][:-1]).all()


def test_a_queue_that_is_sorted_is_served_so(tiny: LoadedModel) -> None:
    strategy = GenerateBatch(tiny, 1, WORKLOAD.max_total_tokens, order="longest-first")
    assert np.argsort(strategy.serve(WORKLOAD, Watch()).first_token_ns).tolist() == [2, 0, 3, 4, 1]


def test_requests_come_when_they_are_due(tiny: LoadedModel) -> None:
    due = [0, 0, 30_000_000, 60_000_000, 400_000_000]
    recording = served(tiny, replace(WORKLOAD, due_ns=np.array(due)))
    assert (recording.admitted_ns >= due).all()
    assert (recording.first_token_ns > due).all()
    assert (ttft_ms(recording) > 0).all()


def test_in_a_closed_loop_the_next_comes_when_one_is_done(tiny: LoadedModel) -> None:
    recording = served(tiny, replace(WORKLOAD, max_concurrency=1))
    due, last = recording.requests.due_ns, recording.last_token_ns
    assert due[0] == 0
    assert due[1:].tolist() == last[:-1].tolist()


def test_the_model_and_the_process_are_left_as_they_were(tiny: LoadedModel) -> None:
    tiny.module.set_attn_implementation("eager")
    try:
        strategy, watch = GenerateBatch(tiny, 3, WORKLOAD.max_total_tokens), Listener()
        strategy.serve(WORKLOAD, watch)
        assert tiny.module.config._attn_implementation == "eager"
        assert watch.done == [1, 2, 3, 4, 5]
        kept = strategy._manager
        again = strategy.serve(WORKLOAD, Watch(), trial=1)
        assert strategy._manager is kept
        assert again.header.trial == 1
    finally:
        tiny.module.set_attn_implementation("sdpa")
    assert no_thread_of_theirs()


def test_a_manager_of_another_size_is_not_taken_for_ones_own(tiny: LoadedModel) -> None:
    wide, narrow = (GenerateBatch(tiny, n, WORKLOAD.max_total_tokens) for n in (3, 1))
    for strategy, slots in ((wide, 3), (narrow, 1), (wide, 3)):
        strategy.serve(WORKLOAD, Watch())
        assert strategy._manager.continuous_batching_config.max_requests_per_batch == slots


def test_what_fails_in_its_thread_is_told_in_a_line(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of pages" + 400 * "\n  frame at 0x7f0012345678")

    monkeypatch.setattr(tiny.module, "forward", broken)
    with pytest.raises(UsageError, match="continuous batching failed: ") as caught:
        served(tiny)
    assert str(caught.value).isprintable()
    assert "failed: out of pages frame at" in str(caught.value)
    assert len(str(caught.value)) < 300
    monkeypatch.undo()
    assert no_thread_of_theirs()
    assert served(tiny).num_steps == 0  # and the next one is served


def test_ctrl_c_leaves_no_thread_behind(tiny: LoadedModel) -> None:
    class Impatient(Watch):
        def progressed(self, progress: Progress) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GenerateBatch(tiny, 3, WORKLOAD.max_total_tokens).serve(WORKLOAD, Impatient())
    assert no_thread_of_theirs()
    assert tiny.module.config._attn_implementation == "sdpa"


# Beside our own, in one run


def experiment(checkpoint: Path, strategy: str, **settings: Any) -> Experiment:
    return Experiment(
        WorkloadSpec(queue_size=6, long_tokens=12, short_tokens=3),
        ModelSpec(model=str(checkpoint), device="cpu"),
        ServingSpec(batch_size=3, strategy=strategy),
        TrialsSpec(trials=3),
        **settings,
    )


@pytest.fixture(scope="module")
def outcome(checkpoint: Path) -> Outcome:
    return conduct(experiment(checkpoint, "static,continuous,generate_batch"))


def test_it_stands_beside_ours_in_a_result(outcome: Outcome, tmp_path: Path) -> None:
    result = make_result(outcome)
    data = json.loads(to_json(result))
    assert fault_of(data, json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))) is None
    theirs = data["strategies"]["generate_batch"]
    assert theirs["counters"] is None
    assert theirs["stalls"] == []
    assert data["explain"]["strategies"]["generate_batch"] is None
    assert [w["candidate"] for w in data["explain"]["waterfall"]] == ["continuous"]
    assert theirs["summary"]["mean_queue_ms"] >= 0
    assert theirs["output_digest"] == data["strategies"]["static"]["output_digest"]
    assert theirs["summary"]["median_ttft_ms"] > 0
    assert theirs["summary"]["completed"] == 6
    assert data["verification"]["wrong"] == 0
    assert data["comparison"]["step_ratio"] is None
    assert data["comparison"]["efficiency"] is None
    assert data["comparisons"][0]["step_ratio"] > 1
    assert "counting steps" not in sentence(result)
    again = remake_result(result).data
    assert again["strategies"] == result.data["strategies"]
    rows = requests_frame(result)
    assert rows[rows.strategy == "generate_batch"]["slot"].isna().all()
    assert rows[rows.strategy == "static"]["slot"].notna().all()
    assert set(steps_frame(result)["strategy"]) == {"static", "continuous"}


def test_pictures_of_slots_leave_it_out_and_say_so(outcome: Outcome) -> None:
    figures = draw(outcome.recordings, "here")
    assert list(figures) == ["throughput", "latency", "occupancy", "timeline", "account"]
    for name, figure in figures.items():
        text = " ".join(t.get_text() for t in figure.texts)
        assert ("no steps known of generate_batch" in text) == (name in ("occupancy", "timeline"))
    alone = {"generate_batch": outcome.recordings["generate_batch"]}
    assert list(draw(alone, "here")) == ["throughput", "latency"]


def test_pages_and_traces_leave_it_out_and_say_so(outcome: Outcome, tmp_path: Path) -> None:
    for names in (("static", "continuous", "generate_batch"), ("generate_batch",)):
        kept = {name: outcome.recordings[name] for name in names}
        serving = replace(outcome.experiment.serving, strategy=",".join(names))
        asked = replace(outcome.experiment, serving=serving)
        result = make_result(replace(outcome, experiment=asked, recordings=kept))
        page = render([Labelled("", result)])
        assert ("A row is a slot" in page) == (len(names) > 1)
        assert "generate_batch logs no steps, so its slots are not known." in page
        processes = {e["args"]["name"] for e in trace_events(result) if e["name"] == "process_name"}
        assert processes == set(names) - {"generate_batch"}
        write_trace(tmp_path / "trace.json", result)
        told = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["otherData"]
        assert "generate_batch, which logs no steps" in told["left_out"]


def test_what_needs_its_steps_beforehand_is_refused_or_says_so(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"--strategy generate_batch: .*; remove it"):
        conduct(experiment(checkpoint, "generate_batch", simulated=True))
    asked = experiment(checkpoint, "static,generate_batch")
    assert (
        "generate_batch schedules by itself, so its steps are not counted"
        in estimate(asked, Watch()).lines()[0]
    )


def test_a_session_makes_it_once(checkpoint: Path) -> None:
    session = LocalBench(experiment(checkpoint, "generate_batch,continuous"), Watch())
    assert session.strategies()[0] is session.strategies()[0]


# A recording without steps


def tokens_only(times: Sequence[Sequence[int]]) -> Recording:
    workload = Workload.of("given", [[1, 2]] * len(times), [len(t) for t in times])
    header = Header("other", 0, 2, False, {"name": "given"}, {"foreign_cores": 0.0})
    return Recording.of_tokens(
        header, workload, [[7] * len(t) for t in times], times, [1] * len(times)
    )


def test_latencies_are_those_of_the_tokens() -> None:
    recording = tokens_only([[2_000_000, 5_000_000, 6_000_000], [4_000_000]])
    assert ttft_ms(recording).tolist() == [2, 4]
    assert e2el_ms(recording).tolist() == [6, 4]
    assert tpot_ms(recording)[0] == 2
    assert np.isnan(tpot_ms(recording)[1])
    assert gaps_ms(recording).values.tolist() == [1, 3]  # the gap between requests is none
    assert metrics.summary([recording])["completed"] == 2


def test_files_keep_it(tmp_path: Path) -> None:
    recording, file = tokens_only([[2, 5], [4]]), tmp_path / "r.npz"
    file.write_bytes(save_recording(recording))
    loaded = load_recording(file)
    assert loaded.token_ends_ns is not None
    assert loaded.token_ends_ns.tolist() == [2, 5, 4]
    assert loaded.admitted_ns.tolist() == [1, 1]
    assert not loaded.has_steps
    assert loaded.header == recording.header


def test_a_request_without_tokens_or_a_token_without_time_is_no_recording() -> None:
    header = Header("other", 0, 2, False, {})
    two = Workload.of("w", [[1], [1]], [1, 1])
    with pytest.raises(ValueError, match="at least one token"):
        Recording.of_tokens(header, two, [[7], []], [[1], []], [0, 0])
    with pytest.raises(ValueError, match="a time for each"):
        Recording.of_tokens(header, Workload.of("w", [[1]], [2]), [[7, 7]], [[1]], [0])


def test_the_audit_holds_its_laws(tiny: LoadedModel) -> None:
    good = served(tiny)
    good = replace(good, header=replace(good.header, about={"foreign_cores": 0.0}))
    found = verify(WORKLOAD, [good], TeacherForced(tiny))
    assert audit(WORKLOAD, {"theirs": [good]}, found, SETTLED, None) == []
    assert good.token_ends_ns is not None
    swapped = good.token_ends_ns.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    (reason,) = audit(
        WORKLOAD, {"theirs": [replace(good, token_ends_ns=swapped)]}, found, SETTLED, None
    )
    assert "not every request was served exactly once" in reason
    short = replace(WORKLOAD, output_tokens=WORKLOAD.output_tokens + 1)
    assert any("conserved" in r for r in audit(short, {"theirs": [good]}, found, SETTLED, None))
