"""Runs against a server: failures, agreement of outputs, the server's facts, and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.models import Alone
from support.schedules import Core, Job, Schedule
from support.servers import Manner, serving
from support.wired import experiment, wired

from batchbench.batching.bench import check_pair_time
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import Tokenizer
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Header, Recording
from batchbench.batching.remote import bench as remote
from batchbench.batching.remote.bench import RemoteBench, served_model, with_ids
from batchbench.batching.remote.dialects import DIALECTS, Dialect
from batchbench.batching.remote.exchange import Failure, FailureKind
from batchbench.batching.remote.outcome import (
    Agreement,
    Comparison,
    Difference,
    Output,
    TrialFailed,
    failure_words,
)
from batchbench.batching.session import StopReason, conduct
from batchbench.errors import UsageError
from batchbench.reports.formats.terminal import sentence
from batchbench.reports.result import make_result
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

SMALL = {"queue_size": 12, "batch_size": 4, "long_tokens": 20, "short_tokens": 5}

WARM_UPS = 2
"""Servings of the warm-up: on the integer clock the second is as fast as the first."""


class Notes(Watch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


# Failures


def test_a_failed_round_is_left_out_and_no_other_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    network.breaks = {WARM_UPS + 3: [2, 7]}  # the second trial of the second round: static
    outcome = conduct(experiment(trials=4, **SMALL), Watch())
    assert {name: len(done) for name, done in outcome.recordings.items()} == {
        "static": 3,
        "continuous": 3,
    }
    assert [r.header.trial for r in outcome.recordings["static"]] == [0, 1, 2]
    (failed,) = outcome.failures
    assert (failed["strategy"], failed["trial"], failed["requests"]) == ("static", 1, 12)
    assert [(f["request"], f["kind"], f["phase"]) for f in failed["failed"]] == [
        (2, "reset", "after 5 tokens"),
        (7, "reset", "after 5 tokens"),
    ]
    assert failure_words(failed) == (
        "2 of 12 requests failed in trial 2 of static (request 2 after 5 tokens: it broke)"
    )
    assert outcome.stopped is not None
    assert outcome.stopped.reason is StopReason.FAILED
    assert str(outcome.stopped) == "requests failed, so only 3 of 4 pairs were finished"
    assert outcome.server is not None
    assert [len(passes) for passes in outcome.server.passes.values()] == [3, 3]


def test_two_failed_rounds_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    network.breaks = {WARM_UPS + 2: [0], WARM_UPS + 3: [0]}
    outcome = conduct(experiment(trials=9, **SMALL), Watch())
    assert [len(done) for done in outcome.recordings.values()] == [1, 1]
    assert [failed["trial"] for failed in outcome.failures] == [1, 2]
    assert len(network.trials) == WARM_UPS + 4


def test_failed_rounds_with_finished_ones_in_between_do_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = wired(monkeypatch)
    network.breaks = {WARM_UPS: [0], WARM_UPS + 3: [0]}
    outcome = conduct(experiment(trials=4, **SMALL), Watch())
    assert [failed["trial"] for failed in outcome.failures] == [0, 2]
    assert [len(done) for done in outcome.recordings.values()] == [2, 2]


@pytest.mark.parametrize("trial", [WARM_UPS, WARM_UPS + 1])
def test_without_one_finished_round_there_is_no_result(
    monkeypatch: pytest.MonkeyPatch, trial: int
) -> None:
    network = wired(monkeypatch)
    network.breaks = {trial: [3], trial + 1: [3], trial + 2: [3]}
    with pytest.raises(TrialFailed, match="1 of 12 requests failed in trial") as raised:
        conduct(experiment(trials=4, **SMALL), Watch())
    assert raised.value.exit_code == 1


STATUS = Failure(FailureKind.STATUS, "the server answers 400: too long", 400)


@pytest.mark.parametrize(("trial", "place"), [(0, ""), (WARM_UPS, "request 3: ")])
def test_requests_that_the_server_refuses_are_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, trial: int, place: str
) -> None:
    network = wired(monkeypatch)
    network.breaks, network.failure = {trial: [3]}, STATUS
    with pytest.raises(UsageError, match=f"^--target: {place}the server answers 400: too long$"):
        conduct(experiment(**SMALL), Watch())
    assert len(network.trials) == trial + 1


def test_a_server_that_ends_in_a_trial_is_no_wrong_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is down when the next round begins; the error is that of the round in which it ended."""
    refused = Failure(FailureKind.REFUSED, "nobody answers")
    network = wired(monkeypatch)
    network.breaks = {WARM_UPS: [3], WARM_UPS + 1: [0]}
    network.failures = {WARM_UPS + 1: refused}
    with pytest.raises(TrialFailed, match=r"request 3 .*it broke"):
        conduct(experiment(**SMALL), Watch())
    network = wired(monkeypatch)
    network.breaks, network.failure = {WARM_UPS + 1: [0]}, refused  # between two trials
    with pytest.raises(TrialFailed, match=r"request 0 .*nobody answers"):
        conduct(experiment(**SMALL), Watch())


def test_a_failure_in_the_warm_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    network.breaks = {1: [0, 1, 2]}
    with pytest.raises(TrialFailed, match=r"3 of 4 requests failed in the warm-up \(request 0"):
        conduct(experiment(**SMALL), Watch())


def test_fewer_tokens_than_asked_for_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose context is full cuts the output, and says nothing."""
    wired(monkeypatch, Schedule(context=22), Manner("openai"))
    with pytest.raises(TrialFailed, match="the server produced 15 of 20 output tokens"):
        conduct(experiment(**SMALL), Watch())


def test_a_trial_sends_no_more_after_a_request_that_nobody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the others would take as long."""
    with serving() as server:
        url = server.url
        bench = RemoteBench(Experiment.of({"target": url}, SMALL), Watch())
    for limited in (bench, bench.within(60.0)):
        with pytest.raises(TrialFailed) as raised:
            limited.strategy("continuous").serve(bench.workload, Watch())
        assert 1 <= len(raised.value.failed["failed"]) <= 4
        assert raised.value.is_usage


def test_a_request_that_the_server_says_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch, Schedule(context=26))
    with pytest.raises(UsageError, match=r"request 0: 7 prompt \+ 20 output tokens exceed the 26"):
        conduct(experiment(**SMALL), Watch())
    assert network.trials == []


# Agreement


def test_outputs_that_do_not_depend_on_the_batch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, manner=Manner("vllm"))
    outcome = conduct(experiment(**SMALL), Watch())
    assert outcome.agreement == agreement_of(12, 12, 0, 12)


@pytest.mark.parametrize(("dialect", "by"), [("vllm", "token ids"), ("openai", "text")])
def test_outputs_that_depend_on_the_batch_differ(
    monkeypatch: pytest.MonkeyPatch, dialect: str, by: str
) -> None:
    """The fake's tokens from the fourth on depend on the number of running requests."""
    wired(monkeypatch, Schedule(drift=3), Manner(dialect))  # type: ignore[arg-type]
    outcome = conduct(experiment(**SMALL), Watch())
    agreement = outcome.agreement
    assert agreement is not None
    assert (agreement["by"], agreement["requests"], agreement["baseline_repeat"]) == (by, 12, 12)
    assert agreement["same"] + agreement["differ"] == 12
    assert 0 < agreement["differ"] < 12
    first = agreement["first"][0]
    assert (first["baseline"], first["strategy"], first["trial"]) == ("static", "continuous", 0)
    assert first["expected"] != first["found"]
    if by == "token ids":
        assert first["position"] >= 3
    else:
        assert first["position"] >= len(" t1") * 3


def agreement_of(
    requests: int, same: int, differ: int, repeat: int | None, *first: Difference
) -> Agreement:
    return {
        "by": "token ids",
        "requests": requests,
        "same": same,
        "differ": differ,
        "baseline_repeat": repeat,
        "first": list(first),
    }


def difference(request: int, trial: int, position: int, expected: str, found: str) -> Difference:
    return {
        "request": request,
        "baseline": "a",
        "baseline_trial": trial,
        "strategy": "b",
        "trial": trial,
        "position": position,
        "expected": expected,
        "found": found,
    }


def outputs(*ids: str) -> list[Output]:
    return [Output(tuple(map(int, one.split(","))), "") for one in ids]


def test_differences_are_counted_by_request_and_the_baseline_shows_its_own_noise() -> None:
    comparison = Comparison(["a", "b"])
    assert comparison.agreement() is None
    comparison.add({"a": outputs("1,2", "3", "4"), "b": outputs("1,2", "3", "5")})
    one = difference(2, 0, 0, "4", "5")
    assert comparison.agreement() == agreement_of(3, 2, 1, None, one)
    comparison.add({"a": outputs("1,7", "3", "4"), "b": outputs("1,2", "3", "5")})
    later = [difference(0, 1, 1, "7", "2"), difference(2, 1, 0, "4", "5")]
    assert comparison.agreement() == agreement_of(3, 1, 2, 2, one, *later)


def test_texts_differ_where_one_goes_on_and_the_other_ends() -> None:
    comparison = Comparison(["a", "b"])
    comparison.add({"a": [Output(None, "one two\n")], "b": [Output((1,), "one")]})
    agreement = comparison.agreement()
    assert agreement is not None
    assert agreement["by"] == "text"
    assert agreement["first"] == [difference(0, 0, 3, " two\\n", "the end")]


def test_a_single_strategy_has_nothing_to_agree_with(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch)
    assert conduct(experiment(strategy="continuous", **SMALL), Watch()).agreement is None


# The server


def test_the_servers_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, Schedule(slots=6), Manner("llama.cpp", cached_tokens=2))
    outcome = conduct(experiment(**SMALL), Watch())
    server = outcome.server
    assert server is not None
    assert (server.name, server.slots, server.running_before) == ("llama.cpp", 6, 0)
    assert server.prompt_cache_off
    assert server.cached_tokens == {"static": [24, 24], "continuous": [24, 24]}
    assert outcome.model["name"] == "fake-model"
    assert outcome.recordings["static"][0].header.about["client"]["kernel_share"] == 1.0


def test_a_server_without_counters_tells_no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, manner=Manner("openai"))
    outcome = conduct(experiment(**SMALL), Watch())
    assert outcome.server is not None
    assert outcome.server.passes == {"static": [None, None], "continuous": [None, None]}
    assert outcome.server.slots is outcome.server.running_before is None


def test_the_served_model_is_found_or_must_be_named() -> None:
    def has(*names: str) -> Dialect:
        return Dialect("openai", served_models=names)

    assert served_model("auto", has("one")) == "one"
    assert served_model("two", has("one", "two")) == "two"
    assert served_model("auto", has()) is None
    assert served_model("mine", has()) == "mine"
    with pytest.raises(UsageError, match="--model: the server has several; name one of one, two"):
        served_model("auto", has("one", "two"))
    with pytest.raises(UsageError, match="--model nine: the server has no such model; it has one"):
        served_model("nine", has("one"))


def test_a_server_that_cannot_go_on_after_an_end_token_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wired(monkeypatch)
    monkeypatch.setattr(remote, "discover", lambda address: DIALECTS["tgi"])
    notes = Notes()
    with pytest.raises(UsageError, match="takes texts, not token ids"):
        conduct(experiment(**SMALL), notes)
    assert "--stop-at-eos takes outputs as they come" in notes.lines[0]


# Limits


def test_a_pair_that_takes_too_long_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    with pytest.raises(UsageError, match=r"--max-time 1: one pair of trials takes about [1-9]"):
        conduct(experiment(max_time=1.0), Watch())
    with pytest.raises(UsageError, match=r"one pair of trials takes about 0\.2[0-9] s here"):
        check_pair_time(0.1, 0.204)
    assert len(network.trials) == WARM_UPS


def test_a_trial_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteBench, "check_time", lambda self, warm_up: None)
    with serving(Schedule(step_ns=5_000_000)) as server:
        asked = Experiment.of({"target": server.url}, {"max_time": 0.3, **SMALL, "long_tokens": 90})
        with pytest.raises(UsageError, match=r"--max-time 0\.3: the first pair of trials took"):
            conduct(asked, Watch())


# Prompts and outputs as text


@pytest.mark.parametrize(
    ("dialect", "endpoint", "as_ids"),
    [
        ("vllm", "/v1/completions", True),
        ("vllm", "/v1/chat/completions", False),
        ("openai", "/v1/completions", True),
    ],
)
def test_prompts_are_ids_where_the_server_takes_them_and_else_text(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, dialect: str, endpoint: str, as_ids: bool
) -> None:
    network = wired(monkeypatch, manner=Manner(dialect))  # type: ignore[arg-type]
    asked = experiment(tokenizer=str(checkpoint), endpoint=endpoint, **SMALL)
    outcome = conduct(asked, Watch())
    text = "The quick brown fox jumped over the"
    assert outcome.texts is not None
    prompt, output = outcome.texts[0]
    assert prompt == text
    assert output.startswith(" t")
    body = network.bodies[-1]
    if as_ids:
        assert body["prompt"] == outcome.workload.prompt(11).tolist()
        assert max(body["prompt"]) < 300  # the vocabulary of the folder
    else:
        assert body["messages"] == [{"role": "user", "content": text}]
    assert body["model"] == "fake-model"


def test_a_chat_without_a_tokenizer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch)
    with pytest.raises(UsageError, match="--tokenizer"):
        conduct(experiment(endpoint="/v1/chat/completions", **SMALL), Watch())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{}/nothing", "--tokenizer .*nothing: no such file or folder"),
        ("{}", "holds no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, says: str
) -> None:
    wired(monkeypatch)
    with pytest.raises(UsageError, match=says):
        conduct(experiment(tokenizer=name.format(tmp_path), **SMALL), Watch())


def test_ids_come_from_text_only_if_they_give_it_back() -> None:
    """The tokenizer cuts at spaces, so that a double one is lost."""
    words = Tokenizer(
        lambda text: [int(word) for word in text.split()],
        lambda ids: " ".join(map(str, ids)),
        dict,
    )
    workload = Workload.of("three", [[1]] * 3, [2, 2, 3])
    recording = Recording.of_tokens(
        Header("a", 0, 1, False, {}), workload, None, [[1, 2], [1, 2], [1, 2, 3]], [0, 0, 0]
    )
    texts = [Output(None, "7 8"), Output(None, "7  8"), Output(None, "7 8")]
    found, unknown = with_ids(recording, texts, words)
    assert unknown == {1, 2}  # another text, and another number of tokens
    assert found.tokens_of(0).tolist() == [7, 8]
    assert with_ids(recording, texts, None) == (recording, {0, 1, 2})


# Against the model


class Speaker:
    """Gives a fake server the model's own tokens, of which some may be changed."""

    def __init__(self, model: LoadedModel, alone: Alone) -> None:
        self._model, self._alone = model, alone
        self._known: dict[tuple[int, ...], list[int]] = {}
        self.wrong_at: int | None = None

    def token(self, core: Core, job: Job, running: int) -> int:
        prompt = tuple(job.prompt)
        if prompt not in self._known:
            self._known[prompt] = self._alone(self._model, prompt, 40)
        place = len(job.tokens)
        token = self._known[prompt][place]
        return (token + 1) % 300 if place == self.wrong_at else token


@pytest.fixture
def speaker(
    tiny: LoadedModel, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Speaker]:
    def make() -> Speaker:
        made = Speaker(tiny, alone)
        monkeypatch.setattr(
            Core, "_token", lambda core, job, running: made.token(core, job, running)
        )
        return made

    return make


VERIFIED = {"queue_size": 6, "batch_size": 3, "long_tokens": 12, "short_tokens": 4}


@pytest.mark.parametrize("wrong_at", [None, 2])
def test_outputs_are_checked_against_the_model(
    monkeypatch: pytest.MonkeyPatch,
    speaker: Callable[[], Speaker],
    checkpoint: Path,
    wrong_at: int | None,
) -> None:
    wired(monkeypatch, manner=Manner("vllm"))
    speaker().wrong_at = wrong_at
    asked = experiment(verify_model=checkpoint, prompt_tokens="uniform:min=3,max=9", **VERIFIED)
    found = conduct(asked, Watch()).verification
    assert found.requests_checked == 6
    assert found.passed is (wrong_at is None)
    assert found.wrong == (0 if wrong_at is None else 6)


def test_texts_are_checked_where_they_give_back_the_ids(
    monkeypatch: pytest.MonkeyPatch, speaker: Callable[[], Speaker], checkpoint: Path
) -> None:
    wired(monkeypatch, manner=Manner("openai"))
    speaker()
    notes = Notes()
    found = conduct(experiment(verify_model=checkpoint, **VERIFIED), notes)
    # The fake's texts are " t1 t2": not those of the tokenizer.
    assert found.verification.requests_checked == 0
    assert found.verification.passed is None
    assert "6 of 6 requests cannot be checked" in notes.lines[-1]


# Sampling


def test_sampled_requests_have_the_same_seeds_in_each_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = wired(monkeypatch)
    outcome = conduct(experiment(temperature=0.7, top_p=0.9, **SMALL), Watch())
    trials = [network.bodies[-12 * (i + 1) : len(network.bodies) - 12 * i] for i in range(4)]
    seeds = {tuple(sorted(body["seed"] for body in trial)) for trial in trials}
    assert [len(set(of_trial)) for of_trial in seeds] == [12]
    assert {(body["temperature"], body["top_p"]) for body in network.bodies} == {(0.7, 0.9)}
    data = make_result(outcome).data
    assert data["workload"].get("sampling") == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "seed": 0,
    }
    differing = agreement_of(12, 7, 5, 12)
    said = sentence(make_result(replace(outcome, agreement=differing)))
    assert "differ for 5/12 requests" in said
    assert "because the server uses its own random numbers" in said


CANNOT = [
    ("openai", {"top_k": 20}, "--top-k 20: requests to this openai server have no such field"),
    ("llama.cpp", {"verify_model": Path()}, "--verify-model: sampled outputs cannot be checked"),
    ("transformers", {"stop_at_eos": True}, "--temperature 0.7: this transformers .*--stop-at-eos"),
]


@pytest.mark.parametrize(("dialect", "options", "message"), CANNOT)
def test_what_a_server_cannot_sample_is_refused(
    dialect: str,
    options: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
) -> None:
    wired(monkeypatch)
    monkeypatch.setattr(remote, "discover", lambda _: DIALECTS[dialect])
    given = {"temperature": 0.7, "tokenizer": str(checkpoint), **options}
    if "verify_model" in given:
        given["verify_model"] = checkpoint
    with pytest.raises(UsageError, match=message):
        conduct(experiment(**given, **SMALL), Watch())
