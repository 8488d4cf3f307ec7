"""Whole commands on a GPU, which is the stand-in: every token verified, nothing left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.cuda_stand_in import StandIn, environment_of_children, impossible
from support.models import LLAMA
from support.program import Call, caller

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.studies.gate import worker
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from support.models import MakeModel

FEW = ("--batch-size", "3", "--queue-size", "5", "--long-tokens", "8", "--short-tokens", "3")
"""A workload of seconds on the stand-in, whose kernels take 0.1 ms and more."""


@pytest.fixture(scope="module")
def llama(
    make_model: MakeModel, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of another family, with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    make_model(LLAMA).module.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return folder


@pytest.fixture
def call(
    cuda_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(monkeypatch, capsys)


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    folder = checkpoint if request.param == "gpt2" else request.getfixturevalue("llama")
    assert isinstance(folder, Path)
    return folder


def result_of(call: Call, folder: Path, *words: object) -> Mapping[str, Any]:
    """Run the program on the GPU, and return its result."""
    words = (*words, *FEW, "--device", "cuda", "--quiet", "--output", folder)
    code, out, err = call(*map(str, words))
    assert code == 0, (out, err)
    (file,) = (folder / name for name in ("result.json", "ladder.json") if (folder / name).exists())
    result: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def check_run(result: Mapping[str, Any]) -> None:
    found = result["verification"]
    assert (found["passed"], found["requests_checked"], found["wrong"]) == (True, 5, 0)
    assert result["model"]["device"] == "cuda:0"
    assert result["model"]["execution"] == "graph"
    assert "eager" not in (result["model"]["execution_note"] or "")
    environment = result["environment"]
    assert environment["gpu"] == "Stand-in for CUDA"
    assert "efficient_attention" in environment["gpu_attention"]
    assert environment["cudnn"] == 92000


def test_run_with_the_scheduler_of_transformers(call: Call, model: Path, tmp_path: Path) -> None:
    names = "static,continuous,generate_batch"
    words = ("run", "--model", model, "--strategy", names, "--trials", 1, "--max-time", 60)
    result = result_of(call, tmp_path / "run", *words)
    check_run(result)
    assert list(result["strategies"]) == names.split(",")


@pytest.mark.parametrize(
    ("family", "option"),
    [("checkpoint", ("--request-rate", "200")), ("llama", ("--stop-at-eos",))],
)
def test_run_with_arrivals_and_with_texts_that_end(
    family: str,
    option: tuple[str, ...],
    call: Call,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(family)
    words = ("run", "--model", folder, "--trials", 1, "--max-time", 60, *option)
    check_run(result_of(call, tmp_path / "run", *words))


def test_a_dry_run_and_a_run_on_a_second_device(
    call: Call, checkpoint: Path, tmp_path: Path
) -> None:
    words = ("run", "--model", str(checkpoint), *FEW, "--device", "cuda:1", "--trials", "1")
    code, out, _ = call(*words, "--dry-run")
    assert code == 0
    assert "of KV cache on cuda:1" in out
    code, _, err = call(*words, "--quiet", "--output", str(tmp_path / "run"))
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["model"]["device"] == "cuda:1"
    assert result["verification"]["passed"]


def test_ladder(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    rungs = "notebook,generate_batch,graph"
    words = ("ladder", "--model", checkpoint, "--rungs", rungs, "--rounds", 1)
    result = result_of(call, tmp_path / "ladder", *words)
    assert [rung["name"] for rung in result["rungs"]] == rungs.split(",")
    assert result["left_out"] == {}
    assert result["model"]["device"] == "cuda:0"


@pytest.mark.usefixtures("cuda_stand_in")
def test_the_worker_of_a_duet_takes_turns(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A duet is two such processes; how they alternate does not depend on the device."""
    nothing = {name: lambda: 0 for name in ("collect", "freeze", "disable")}
    monkeypatch.setattr(worker, "gc", SimpleNamespace(**nothing))  # they are of a whole process
    experiment = Experiment(
        WorkloadSpec(queue_size=5, long_tokens=8, short_tokens=3),
        ModelSpec(model=str(checkpoint), device="cuda"),
        ServingSpec(batch_size=3),
        TrialsSpec(),
    )
    served = worker.Worker()
    asked = {"config": experiment.config(), "lanes": {"static": None, "continuous": None}}
    opened = served.answer({"do": "open", **asked, "also": [], "core": None})
    assert opened["model"]["device"] == "cuda:0"
    for lane in ("static", "continuous", "static"):
        steps = opened["lanes"][lane]["steps"]
        assert steps > 0
        served.answer({"do": "turn", "lane": lane, "steps": steps})
    finished = served.answer({"do": "finish"})
    assert finished["varied"] == {"static": None, "continuous": None}
    assert finished["work"]["static"] == opened["lanes"]["static"]["work"]


def test_child_processes_find_the_stand_in() -> None:
    if why := impossible():
        pytest.skip(why)
    code = "import torch; print(torch.cuda.device_count(), torch.ones(2, device='cuda:1').sum())"
    environment = {**os.environ, **environment_of_children("3,64")}
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "3 tensor(2.) on cuda:1\n"
