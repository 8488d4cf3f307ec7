"""Experiments: conducted from the question to the verified answer."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from batchbench.batching import bench as benches
from batchbench.batching import session as conducting
from batchbench.batching.batcher import Batcher
from batchbench.batching.bench import LocalBench, check_context
from batchbench.batching.engines.torch import hardware as bandwidth
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec, Source
from batchbench.batching.progress import Limited, Progress, Watch
from batchbench.batching.remote.spec import TargetSpec
from batchbench.batching.session import StopReason, conduct
from batchbench.batching.step_cost import Bandwidth
from batchbench.batching.trials import WarmUp, beginning
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.reports.formats.terminal import step_lines
from batchbench.reports.result import make_result
from batchbench.reports.result_file import SCHEMA_FILE
from batchbench.settings import as_json, option_name
from batchbench.workloads import Workload
from batchbench.workloads.spec import WorkloadSpec

Ask = Callable[..., Experiment]

WARM_UP = LocalBench.warm_up

BOTH = ("static", "continuous")


@pytest.fixture(autouse=True, scope="module")
def cheap_garbage() -> Iterator[None]:
    """Each trial collects garbage, and looks through all of torch for it: not here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a tiny model vary by more than 5 % for ever."""
    monkeypatch.setattr(LocalBench, "warm_up", lambda session: WARM_UP(session, most=2))


class Listener(Watch):
    """Writes down what it hears, and interrupts when it hears a certain thing."""

    def __init__(self, interrupt_at: tuple[object, ...] | None = None) -> None:
        self.heard: list[tuple[object, ...]] = []
        self._interrupt_at = interrupt_at

    def _hear(self, *what: object) -> None:
        self.heard.append(what)
        if what == self._interrupt_at:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self._hear("note", line)

    def phase(self, name: str) -> None:
        self._hear("phase", name)

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self._hear("begins", strategy, trial)

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        self._hear("ends", strategy, trial)

    def all_of(self, kind: str) -> list[list[object]]:
        return [rest for first, *rest in self.heard if first == kind]


@pytest.fixture
def ask(checkpoint: Path) -> Ask:
    """A small experiment on the tiny checkpoint, with any settings changed."""

    def experiment(**changed: Any) -> Experiment:
        asked: dict[str, Any] = {
            "batch_size": 3,
            "queue_size": 7,
            "long_tokens": 9,
            "short_tokens": 3,
            "model": str(checkpoint),
            "device": "cpu",
            "trials": 2,
            **changed,
        }

        def spec(kind: Any) -> Any:
            return kind(**{f.name: asked.pop(f.name) for f in fields(kind) if f.name in asked})

        specs = [spec(kind) for kind in (WorkloadSpec, ModelSpec, ServingSpec, TrialsSpec)]
        simulated = asked.pop("simulated", False)
        assert not asked, f"no such settings: {asked}"
        return Experiment(*specs, simulated=simulated)

    return experiment


# From the question to the answer


@pytest.mark.parametrize(
    "serving",
    [
        {},
        {"prefill": "mixed", "max_batched_tokens": 5},
        {"engine": "notebook"},
        {"order": "longest-first", "strategy": "continuous,static"},
    ],
    ids=["slots", "mixed", "notebook", "longest first"],
)
def test_an_experiment_yields_verified_recordings(ask: Ask, serving: dict[str, Any]) -> None:
    experiment = ask(prompt_tokens="1:20", **serving)
    outcome = conduct(experiment)
    assert tuple(outcome.recordings) == experiment.serving.strategies
    for name, recordings in outcome.recordings.items():
        assert [r.header.trial for r in recordings] == [0, 1]
        for r in recordings:
            assert (r.header.strategy, r.header.slots, r.header.simulated) == (name, 3, False)
            assert r.header.workload["digest"] == outcome.workload.digest
            assert r.requests.output_tokens.tolist() == outcome.workload.output_tokens.tolist()
    assert outcome.verification.passed
    assert outcome.verification.requests_checked == 7
    assert outcome.stopped is None
    assert outcome.warm_up.rounds >= 2


def test_the_model_is_told_as_it_was_resolved(ask: Ask, checkpoint: Path) -> None:
    model = conduct(ask(trials=1)).model
    assert (model["name"], model["load_format"]) == ("tiny", "pretrained")
    assert (model["device"], model["dtype"]) == ("cpu", "float32")
    assert model["parameters"] * 4 == model["weight_bytes"]
    longest = len(conduct(ask(simulated=True)).workload.prompt(0)) + 9
    assert model["kv_cache_bytes"] == 3 * longest * 2 * 32 * 2 * 4  # slots … layers, k and v
    assert str(checkpoint) in model["note"]


def test_outputs_are_readable_where_there_is_a_tokenizer(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("A request.\nThe quick brown fox\n", encoding="utf-8")
    outcome = conduct(ask(prompts=file, trials=1))
    assert outcome.texts is not None
    assert [prompt for prompt, _ in outcome.texts[:3]] == [
        "A request.",
        "The quick brown fox",
        "A request.",
    ]
    assert all(output for _, output in outcome.texts)


def test_made_up_models_say_nothing_readable(ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    outcome = conduct(ask(model=str(folder), load_format="dummy", trials=1))
    assert outcome.texts is None
    assert outcome.verification.passed
    assert outcome.model["load_format"] == "dummy"


def test_the_seed_is_that_of_dummy_weights_and_of_prompts(ask: Ask) -> None:
    zero, one, again = (
        conduct(ask(load_format="dummy", prompt_tokens="4", trials=1, seed=s)) for s in (0, 1, 0)
    )
    said = [outcome.recordings["static"][0].tokens for outcome in (zero, one, again)]
    assert np.array_equal(said[0], said[2])
    assert not np.array_equal(said[0], said[1])
    assert zero.workload.digest == again.workload.digest != one.workload.digest


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
def test_a_simulation_takes_the_same_steps(ask: Ask, prefill: str) -> None:
    settings = {"prefill": prefill, "max_batched_tokens": 6, "prompt_tokens": "1:20", "trials": 1}
    real, simulated = conduct(ask(**settings)), conduct(ask(simulated=True, **settings))
    assert simulated.workload.digest == real.workload.digest
    assert not simulated.verification.requests_checked
    for name in BOTH:
        [one], [other] = real.recordings[name], simulated.recordings[name]
        assert one.num_steps == other.num_steps
        for column in ("slot", "admitted", "started", "first", "last", "released"):
            assert np.array_equal(getattr(one.requests, column), getattr(other.requests, column))


def test_texts_may_end_by_themselves(ask: Ask) -> None:
    outcome = conduct(ask(stop_at_eos=True, trials=1))
    assert outcome.verification.passed


@pytest.mark.parametrize(("verify", "checked"), [("all", 7), ("2", 2), ("1e2", 7), ("none", 0)])
def test_as_many_outputs_are_verified_as_asked(ask: Ask, verify: str, checked: int) -> None:
    found = conduct(ask(verify=verify, trials=1)).verification
    assert found.requests_checked == checked
    assert found.passed is (True if checked else None)


@pytest.mark.parametrize("verify", ["", "some", "0.5", "-1", "ALL", "1e"])
def test_other_numbers_to_verify_are_a_usage_error(verify: str) -> None:
    with pytest.raises(UsageError, match="--verify"):
        TrialsSpec(verify=verify)


def test_a_library_call_is_silent(ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    conduct(ask())
    assert capfd.readouterr() == ("", "")


def test_a_watch_hears_of_every_phase(ask: Ask) -> None:
    watch = Listener()
    conduct(ask(), watch)
    assert watch.all_of("phase") == [["loading"], ["warming up"], ["verifying"]]
    assert len(watch.all_of("note")) == 1


def test_progress_ends_with_all_done(ask: Ask) -> None:
    class Last(Watch):
        def progressed(self, progress: Progress) -> None:
            self.progress = progress

    watch = Last()
    outcome = conduct(ask(trials=1), watch)
    recording = outcome.recordings["continuous"][0]
    assert (watch.progress.done, watch.progress.requests) == (7, 7)
    assert watch.progress.steps == recording.num_steps
    assert watch.progress.tokens == outcome.workload.output_tokens.sum()


# Rounds


def test_rounds_alternate_their_order(ask: Ask) -> None:
    watch = Listener()
    conduct(ask(trials=3, verify="none"), watch)
    a, b = BOTH
    order = [(name, trial) for name, trial in watch.all_of("begins")]
    assert order == [(a, 0), (b, 0), (b, 1), (a, 1), (a, 2), (b, 2)]
    assert watch.all_of("ends") == watch.all_of("begins")


def test_the_order_of_rounds_does_not_show_in_the_recordings(ask: Ask) -> None:
    outcome = conduct(ask(trials=2, verify="none"))
    for name, recordings in outcome.recordings.items():
        assert [(r.header.strategy, r.header.trial) for r in recordings] == [(name, 0), (name, 1)]


@pytest.mark.parametrize("at", [("begins", "continuous", 1), ("ends", "static", 1)])
def test_an_interrupt_keeps_the_rounds_that_are_finished(ask: Ask, at: tuple[object, ...]) -> None:
    outcome = conduct(ask(trials=3), Listener(interrupt_at=at))
    assert {name: len(rs) for name, rs in outcome.recordings.items()} == dict.fromkeys(BOTH, 1)
    assert outcome.stopped is not None
    assert outcome.stopped.reason is StopReason.INTERRUPTED
    assert str(outcome.stopped) == "interrupted after 1 of 3 pairs"
    assert outcome.verification.passed is None


def test_an_interrupt_of_the_verification_keeps_all_rounds(ask: Ask) -> None:
    outcome = conduct(ask(), Listener(interrupt_at=("phase", "verifying")))
    assert {name: len(rs) for name, rs in outcome.recordings.items()} == dict.fromkeys(BOTH, 2)
    assert outcome.stopped is not None
    assert outcome.stopped.reason is StopReason.INTERRUPTED
    assert outcome.verification.passed is None


@pytest.mark.parametrize(
    "at", [("begins", "static", 0), ("ends", "continuous", 0), ("phase", "warming up")]
)
def test_an_interrupt_before_a_round_is_finished_goes_through(
    ask: Ask, at: tuple[object, ...]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        conduct(ask(), Listener(interrupt_at=at))


@pytest.mark.parametrize("at", [None, ("ends", "static", 0)])
def test_garbage_is_collected_again_afterwards(ask: Ask, at: tuple[object, ...] | None) -> None:
    class Breaks(Watch):
        def progressed(self, progress: Progress) -> None:
            assert not gc.isenabled()
            if at is not None:
                raise KeyboardInterrupt

    assert gc.isenabled()
    if at is None:
        conduct(ask(trials=1), Breaks())
    else:
        with pytest.raises(KeyboardInterrupt):
            conduct(ask(trials=1), Breaks())
    assert gc.isenabled()


# Limits


def test_no_round_is_begun_that_would_end_too_late(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Listener()
    now = SimpleNamespace(monotonic=lambda: 10.0 * len(watch.all_of("ends")) / len(BOTH))
    monkeypatch.setattr(conducting, "time", now)  # ten seconds a round
    outcome = conduct(ask(trials=5, max_time=25.0), watch)
    assert {name: len(rs) for name, rs in outcome.recordings.items()} == dict.fromkeys(BOTH, 2)
    assert outcome.stopped is not None
    assert outcome.stopped.reason is StopReason.OUT_OF_TIME
    assert str(outcome.stopped) == "--max-time 25 s ended it after 2 pairs"
    assert outcome.verification.passed


def test_time_enough_stops_nothing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Listener()
    now = SimpleNamespace(monotonic=lambda: 10.0 * len(watch.all_of("ends")) / len(BOTH))
    monkeypatch.setattr(conducting, "time", now)
    outcome = conduct(ask(trials=3, max_time=30.0, verify="none"), watch)
    assert [len(rs) for rs in outcome.recordings.values()] == [3, 3]
    assert outcome.stopped is None


class Slowing(Listener):
    """A clock that stands still but for ``trials`` trials and, after them, in one endless trial."""

    def __init__(self, trials: int) -> None:
        super().__init__()
        self.trials, self.now = trials, 0.0

    def monotonic(self) -> float:
        return self.now

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        super().trial_ends(strategy, trial, duration_ns)
        self.now += 5.0

    def progressed(self, progress: Progress) -> None:
        super().progressed(progress)
        if len(self.all_of("ends")) >= self.trials:
            self.now += 8.0


@pytest.mark.parametrize("trials", [2, 3, 5])
def test_a_trial_that_takes_far_too_long_is_given_up(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    """The finished rounds are kept, and the engine can serve again."""
    watch = Slowing(trials)
    for module in (conducting, benches):
        monkeypatch.setattr(module, "time", watch)
    outcome = conduct(ask(trials=50, max_time=60.0), watch)
    finished = trials // len(BOTH)
    assert [len(rs) for rs in outcome.recordings.values()] == [finished] * len(BOTH)
    assert str(outcome.stopped) == f"--max-time 60 s ended it after {finished} pairs"
    assert watch.now <= 66 + 8
    assert outcome.verification.passed
    assert gc.isenabled()


def test_where_not_one_round_is_finished_in_time_nothing_is_kept(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Slowing(1)
    for module in (conducting, benches):
        monkeypatch.setattr(module, "time", watch)
    with pytest.raises(UsageError, match="--max-time 60: the first pair of trials took longer"):
        conduct(ask(trials=5, max_time=60.0), watch)


def test_no_wait_is_begun_that_would_end_too_late() -> None:
    told = Progress("continuous", 0, 1, 1)
    told.idle(0, 10**11)
    limited = Limited(Watch(), 50.0, lambda: 0.0, real=True)
    limited.progressed(told)
    with pytest.raises(OutOfTimeError):
        limited.idles(told)
    Limited(Watch(), 50.0, lambda: 0.0, real=False).idles(told)  # on a virtual clock nobody waits


def test_a_time_in_which_no_round_ends_is_a_usage_error(ask: Ask) -> None:
    with pytest.raises(UsageError, match=r"--max-time 0\.001: .*raise it, or lower --queue-size"):
        conduct(ask(long_tokens=100, max_time=0.001))


def test_a_request_beyond_the_context_is_a_usage_error(ask: Ask) -> None:
    with pytest.raises(UsageError, match=r"request 0: .*200 output.*the 128 .*--long-tokens"):
        conduct(ask(long_tokens=200))
    with pytest.raises(UsageError, match="the 128 that tiny takes"):
        conduct(ask(prompt_tokens="126", simulated=True))


def test_a_request_may_be_as_long_as_the_context() -> None:
    source = Source("x", "dummy", {"n_positions": 10}, None, "")
    check_context(Workload.of("fits", [[1] * 4, [1]], [6, 9]), source.context, source.name)
    with pytest.raises(UsageError, match="request 1: 2 prompt"):
        check_context(
            Workload.of("does not", [[1] * 4, [1, 1]], [6, 9]), source.context, source.name
        )
    check_context(Workload.of("any", [[1]], [10**6]), None, source.name)


def test_a_batch_too_large_for_the_memory_names_the_largest_that_fits(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = "batchbench.batching.engines.torch.build.free_bytes"
    monkeypatch.setattr(making, lambda device: 2**20)
    with pytest.raises(UsageError, match=r"--batch-size 1000: .*largest that fits is \d+$") as no:
        conduct(ask(batch_size=1000))
    fits = int(str(no.value).rsplit(" ", 1)[1])
    assert conduct(ask(batch_size=fits, trials=1)).verification.passed


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"strategy": ""}, "--strategy"),
        ({"strategy": "static,static"}, "--strategy"),
        ({"strategy": "dynamic"}, "--strategy"),
        ({"batch_size": 0}, "--batch-size"),
        ({"trials": 0}, "--trials"),
        ({"max_time": float("nan")}, "--max-time"),
        ({"engine": "vllm"}, "--engine"),
        ({"order": "lifo"}, "--order"),
        ({"prefill": "mixed", "engine": "notebook"}, "--prefill"),
        ({"prefill": "mixed", "max_batched_tokens": 3}, "--max-batched-tokens"),
        ({"simulated": True, "stop_at_eos": True}, "--stop-at-eos"),
        ({"model": "/no/such/folder"}, "--model"),
        ({"device": "cuda:99"}, "--device"),
    ],
)
def test_what_cannot_be_done_names_the_option(
    ask: Ask, changed: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError, match=option):
        conduct(ask(**changed))


# Its pieces


@pytest.mark.parametrize(
    ("step_ns", "rounds", "settled"),
    [([100, 80, 79, 1], 3, True), ([100, 104], 2, True), ([100, 90] * 5, 10, False)],
)
def test_warm_up_ends_when_steps_change_no_more(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    step_ns: list[int],
    rounds: int,
    settled: bool,
) -> None:
    costs = iter(step_ns)

    def serve(batcher: object, workload: Workload, watch: Watch) -> SimpleNamespace:
        starts = np.arange(4) * 1000
        return SimpleNamespace(step_starts_ns=starts, step_ends_ns=starts + next(costs))

    monkeypatch.setattr(Batcher, "serve", serve)
    before, last = step_ns[rounds - 2 : rounds]
    change = pytest.approx(last / before - 1)
    found = WARM_UP(LocalBench(ask(), Watch()))
    assert found.duration_s is not None
    assert replace(found, duration_s=None) == WarmUp(rounds, settled, change, last)


def test_the_beginning_of_a_workload_is_closed_and_short() -> None:
    workload = Workload.of(
        "w", [[1], [2, 3], [4, 5, 6]], [20, 5, 9], due_ns=[0, 5, 9], stop_at_eos=True
    )
    piece = beginning(workload, 2, output_tokens=12)
    assert [(r.prompt_tokens, r.output_tokens) for r in piece] == [(1, 12), (2, 5)]
    assert [piece.prompt(i).tolist() for i in range(2)] == [[1], [2, 3]]
    assert piece.closed
    assert len(beginning(workload, 99, output_tokens=1)) == 3


def test_a_config_is_plain_json(ask: Ask, tmp_path: Path) -> None:
    import json

    file = tmp_path / "prompts.txt"
    file.write_text("one\n")
    config = ask(prompts=file).config()
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert list(config) == ["preset", "workload", "model", "serving", "trials"]
    assert config["workload"]["prompts"] == str(file)


def parsed(command: str) -> Experiment:
    """The experiment that a command line asks for, going by the fields of the specs alone."""
    program, verb, *words = shlex.split(command)
    assert program == "batchbench"
    simulated = verb == "simulate"
    asked = Experiment(trials=TrialsSpec(trials=1)) if simulated else Experiment()
    specs = {"workload": WorkloadSpec, "model": ModelSpec}
    specs |= {"serving": ServingSpec, "trials": TrialsSpec}
    changed: dict[str, dict[str, Any]] = {part: {} for part in specs}
    options = {
        option_name(name): (part, name, hint)
        for part, kind in specs.items()
        for name, hint in get_type_hints(kind).items()
    }
    rest = iter(words)
    for word in rest:
        part, name, hint = options[word]
        kinds = [k for k in getattr(hint, "__args__", (hint,)) if k is not type(None)]
        changed[part][name] = True if hint is bool else kinds[0](next(rest))
    parts = {part: replace(getattr(asked, part), **new) for part, new in changed.items()}
    return Experiment(**parts, simulated=simulated)


def test_the_command_of_the_defaults_is_short() -> None:
    assert Experiment().command() == "batchbench run --batch-size 8"
    simulated = Experiment(WorkloadSpec(queue_size=32), trials=TrialsSpec(trials=1), simulated=True)
    assert simulated.command() == "batchbench simulate --batch-size 8 --queue-size 32"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"simulated": True},
        {"simulated": True, "trials": 1},
        {"simulated": True, "trials": 4},
        {"trials": 4, "verify": "none", "max_time": 2.5},
        {"model": "a folder/with 'quotes' $HOME", "revision": "v1", "threads": 3},
        {"load_format": "dummy", "dtype": "bfloat16", "device": "cuda:1"},
        {"prompt_tokens": "4:64", "seed": 2**63 - 1, "long_every": 1, "stop_at_eos": True},
        {"strategy": "continuous, static", "engine": "notebook", "order": "shortest-first"},
        {"prefill": "mixed", "max_batched_tokens": 99, "batch_size": 8, "queue_size": 32},
    ],
)
def test_a_command_asks_for_the_same_experiment_again(ask: Ask, changed: dict[str, Any]) -> None:
    experiment = ask(**changed)
    assert parsed(experiment.command()) == experiment


def test_a_command_names_files_as_a_shell_reads_them(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_text("one\n")
    experiment = ask(prompts=file)
    assert parsed(experiment.command()) == experiment


# What memory allows


@pytest.mark.parametrize("cache", [1, 2**40])
def test_memory_is_measured_before_each_round_where_no_cache_holds_the_weights(
    cache: int, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([1e9, 2e9])
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: cache)
    monkeypatch.setattr(
        bandwidth,
        "measure_bandwidth",
        lambda device: Bandwidth(next(speeds), "sum", 2**30, cache, 7, 1),
    )
    result = make_result(conduct(ask(prompt_tokens="1:20")))
    for name, strategy in result.data["strategies"].items():
        shares = [trial["floor_share"] for trial in strategy["trials"]]
        if cache > 1:
            assert shares == [None, None]
            assert strategy["decode_step"] is None
            continue
        told = [r.header.about["memory"]["bytes_per_s"] for r in result.recordings[name]]
        assert told == [1e9, 2e9]
        assert all(share > 0 for share in shares)
        assert strategy["decode_step"]["floor_share"] == pytest.approx(np.median(shares))
        assert strategy["summary"]["floor_share"] == pytest.approx(np.median(shares))
    floors = [line for line in step_lines(result) if line.startswith("Decode step")]
    assert len(floors) == (2 if cache == 1 else 0)
    assert Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).is_valid(result.data)


def test_a_buffer_that_found_no_room_tells_no_floor(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Bandwidth(1e9, "sum", 2**10, 2**20, 7, 1)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(bandwidth, "measure_bandwidth", lambda device: small)
    (told,) = conduct(ask(strategy="continuous", trials=1)).recordings["continuous"]
    assert "memory" not in told.header.about


FIRST_KEYS = {
    "workload": (
        "arrivals burstiness long_every long_tokens max_concurrency on_bad_row "
        "output_tokens overlong prompt_tokens prompts queue_size request_rate seed "
        "shared_prefix_tokens short_tokens speed stop_at_eos trace trace_block_size "
        "trace_format trace_time_unit"
    ),
    "model": ("device dtype load_format model revision threads"),
    "serving": ("batch_size engine execution max_batched_tokens max_wait order prefill strategy"),
    "trials": ("max_time trials verify"),
}
"""Settings of an experiment in version 0.1: an earlier version refuses others."""


def test_an_experiment_of_old_options_can_be_read_by_an_earlier_version() -> None:
    """``duet --base-ref main`` sends the experiment to main's worker."""
    experiment = Experiment()
    for part, names in FIRST_KEYS.items():
        assert sorted(as_json(getattr(experiment, part))) == names.split()
    assert "clients" not in as_json(TargetSpec(target="http://127.0.0.1:9"))
