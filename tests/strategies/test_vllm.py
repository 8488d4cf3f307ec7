"""vLLM's engine as two strategies, on a stand-in that schedules as vLLM does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.models import Alone

from batchbench.batching.experiment import Experiment
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.progress import Watch
from batchbench.batching.session import Outcome, conduct
from batchbench.batching.strategies import vllm as plug_in
from batchbench.errors import UsageError

STRATEGIES = "vllm-static,vllm"


@dataclass
class Engine:
    """A first come, first served engine that gives each running request a token in each step."""

    options: Any
    choose: Any
    waiting: list[Any] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most: int = 0
    fails_at: int | None = None
    steps: int = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        ids = tuple(prompt["prompt_token_ids"])
        self.waiting.append(SimpleNamespace(name=name, ids=ids, params=params, done=0))

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        self.waiting, self.running = [], []

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("CUDA out of memory\nand more")
        while self.waiting and len(self.running) < self.options["max_num_seqs"]:
            self.running.append(self.waiting.pop(0))
        self.most = max(self.most, len(self.running))
        outputs = []
        for request in list(self.running):
            token = self.choose(request.ids, request.done)
            request.done += 1
            ended = not request.params["ignore_eos"] and token in request.params["stop_token_ids"]
            finished = ended or request.done == request.params["max_tokens"]
            output = SimpleNamespace(token_ids=[token])
            outputs.append(
                SimpleNamespace(request_id=request.name, outputs=[output], finished=finished)
            )
            if finished:
                self.running.remove(request)
        return outputs


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tiny: LoadedModel, alone: Alone) -> list[Engine]:
    """The engines that were made; they produce the model's own tokens."""
    made: list[Engine] = []
    known: dict[tuple[int, ...], list[int]] = {}

    def choose(ids: tuple[int, ...], place: int) -> int:
        if ids not in known:
            known[ids] = alone(tiny, ids, 24)
        return known[ids][place]

    def make(options: Any) -> Engine:
        assert (Path(options["model"]) / "model.safetensors").exists()
        made.append(Engine(options, choose))
        return made[-1]

    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    module = SimpleNamespace(
        __version__="9.9",
        EngineArgs=dict,
        SamplingParams=dict,
        LLMEngine=SimpleNamespace(from_engine_args=make),
        sampling_params=kinds,
    )
    monkeypatch.setitem(sys.modules, "vllm", module)  # type: ignore[arg-type]
    monkeypatch.setattr(plug_in, "_ENGINES", {})
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0")
    for name, value in plug_in._SETTINGS.items():
        monkeypatch.setenv(name, value)
    return made


def run(checkpoint: Path, **options: object) -> Outcome:
    small = {"queue_size": 16, "batch_size": 4, "long_tokens": 20, "short_tokens": 3, "trials": 2}
    given = {"model": str(checkpoint), "strategy": STRATEGIES, "device": "cpu"}
    return conduct(Experiment.of(small, given, options), Watch())


def steps_of(outcome: Outcome, name: str) -> set[int]:
    return {recording.header.about["engine_steps"] for recording in outcome.recordings[name]}


def test_waves_and_continuous_take_the_steps_of_our_two_policies(
    engines: list[Engine], checkpoint: Path
) -> None:
    outcome = run(checkpoint)
    (engine,) = engines
    assert engine.options["max_num_seqs"] == 4
    assert engine.most == 4
    assert not engine.options["enable_prefix_caching"]
    assert engine.options["kv_cache_memory_bytes"] > 0
    assert steps_of(outcome, "vllm-static") == {4 * 20}
    # Slots are refilled at once: 16 requests, two of them long, on 4 slots.
    least = -(-int(outcome.workload.output_tokens.sum()) // 4)
    assert all(least <= steps <= least + 20 for steps in steps_of(outcome, "vllm"))
    assert outcome.verification.passed
    assert outcome.verification.requests_checked == 16
    assert outcome.recordings["vllm"][0].header.about["engine"] == "vllm 9.9"


def test_sampled_requests_get_their_settings_and_are_not_verified(
    engines: list[Engine], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[dict[str, Any]]] = {}
    add = Engine.add_request

    def noted(engine: Engine, name: str, prompt: Any, params: Any) -> None:
        asked.setdefault(name, []).append(params)
        add(engine, name, prompt, params)

    monkeypatch.setattr(Engine, "add_request", noted)
    sampled = {"temperature": 0.7, "top_p": 0.9, "strategy": "continuous,vllm"}
    outcome = run(checkpoint, **sampled)
    settings = [params for calls in asked.values() for params in calls]
    assert {(p["temperature"], p["top_p"], p["top_k"]) for p in settings} == {(0.7, 0.9, -1)}
    seeds = [{params["seed"] for params in calls} for calls in asked.values()]
    assert [len(of_request) for of_request in seeds] == [1] * 16
    assert len(set().union(*seeds)) == 16
    checked = outcome.verification
    assert (checked.identical, checked.wrong) == (16, 0)
    assert str(checked.reference).endswith(
        "; not vllm, whose engine draws tokens from random numbers of its own"
    )
    assert run(checkpoint, **sampled | {"strategy": "vllm"}).verification.requests_checked == 0


def test_an_engine_is_shared_as_long_as_the_weights_are_the_same(
    engines: list[Engine], checkpoint: Path
) -> None:
    for seed in (0, 1, 1):
        run(checkpoint, load_format="dummy", seed=seed, verify="none", trials=1)
    assert len(engines) == 2


def test_timed_arrivals_are_not_begun_before_they_are_due(
    engines: list[Engine], checkpoint: Path
) -> None:
    outcome = run(checkpoint, request_rate=200.0, trials=1)
    for (recording,) in outcome.recordings.values():
        assert (recording.admitted_ns >= recording.requests.due_ns).all()
        assert (recording.first_token_ns >= recording.admitted_ns).all()


def test_a_closed_loop_is_due_when_another_request_ends(
    engines: list[Engine], checkpoint: Path
) -> None:
    outcome = run(checkpoint, max_concurrency=2, trials=1)
    for (recording,) in outcome.recordings.values():
        due = recording.requests.due_ns
        assert (due[:2] == 0).all()
        assert np.isin(due[2:], recording.last_token_ns).all()


def test_texts_may_end_early(engines: list[Engine], checkpoint: Path) -> None:
    outcome = run(checkpoint, stop_at_eos=True, trials=1)
    assert outcome.verification.passed


def test_an_interrupted_trial_leaves_no_request_in_the_engine(
    engines: list[Engine], checkpoint: Path
) -> None:
    class Impatient(Watch):
        def progressed(self, progress: Any) -> None:
            if progress.strategy == "vllm" and progress.done >= 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conduct(
            Experiment.of(
                {"model": str(checkpoint), "strategy": STRATEGIES, "queue_size": 16, "trials": 1},
                {"long_tokens": 20, "device": "cpu"},
            ),
            Impatient(),
        )
    assert engines[0].aborted
    assert not engines[0].running


def test_without_vllm_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name, value in plug_in._SETTINGS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"--strategy vllm-static: vLLM cannot be imported .*"):
        run(checkpoint)
