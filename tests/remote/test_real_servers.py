"""Real servers, where they are installed: their schedules, lengths, outputs and probes.

``benchmarks/servers.py`` installs and starts them. The models are small GPT-2 shapes with dummy
weights: these tests say nothing about speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.real_servers import call, needs, running

from batchbench.batching.remote.dialects import body_for, discover, growth_of, read_counts
from batchbench.batching.remote.exchange import Address
from batchbench.batching.remote.wire import post

pytestmark = pytest.mark.server

SLOTS, REQUESTS = 4, 16

WAVES = REQUESTS // SLOTS * 30
"""Passes of four waves whose longest request has 30 tokens."""

NAMES = [pytest.param(name, marks=needs(name)) for name in ("llama.cpp", "vllm", "transformers")]
COUNTING = [name for name in NAMES if name.values != ("transformers",)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with dummy weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    call("checkpoint", folder, "--shape", "toy-gpt2")
    return folder


def model_of(name: str, folder: Path) -> Path:
    """Return the checkpoint in the form that a server reads."""
    if name != "llama.cpp":
        return folder
    file = folder.parent / "toy.gguf"
    if not file.exists():
        python = os.environ.get("BATCHBENCH_GGUF_PYTHON", sys.executable)
        script = Path(__file__).parents[2] / "benchmarks" / "gguf_checkpoint.py"
        done = subprocess.run([python, script, folder, file], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("BATCHBENCH_GGUF_PYTHON names no Python with gguf and safetensors")
    return file


def program(*words: object) -> subprocess.CompletedProcess[str]:
    """Run batchbench in a process of its own, as a user does."""
    command = [sys.executable, "-m", "batchbench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def result_of(url: str, output: Path, *words: object) -> dict[str, Any]:
    """Return the result of a short run on a server."""
    options = ["--target", url, "--batch-size", SLOTS, "--queue-size", REQUESTS, "--quiet"]
    options += ["--long-tokens", 30, "--trials", 2, "--output", output, *words]
    done = program("run", *options)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("name", COUNTING)
def test_waves_and_continuous_take_the_passes_of_their_schedules(
    name: str, folder: Path, tmp_path: Path
) -> None:
    with running(name, model_of(name, folder), SLOTS) as url:
        result = result_of(url, tmp_path / "run", "--verify-model", folder)
    server, plan = result["server"], result["strategies"]
    assert server["passes"]["static"] == [WAVES, WAVES]
    assert all(passes < 0.75 * WAVES for passes in server["passes"]["continuous"])
    assert server["cached_tokens"] == {"static": [0, 0], "continuous": [0, 0]}
    assert plan["static"]["summary"]["completed"] == REQUESTS
    assert result["comparison"]["step_ratio_source"] == "server"
    assert result["verification"]["wrong"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_exact_lengths(name: str, folder: Path, tmp_path: Path) -> None:
    words = ["--tokenizer", folder] if name == "transformers" else []
    with running(name, model_of(name, folder), SLOTS) as url:
        result = result_of(url, tmp_path / "run", *words)
    tokens = result["workload"]["total_output_tokens"]
    for strategy in result["strategies"].values():
        assert strategy["summary"]["total_output_tokens"] == tokens
    assert result["failures"] == []
    assert result["agreement"]["requests"] == REQUESTS


@pytest.mark.parametrize(("slots", "verdict"), [(SLOTS, "continuous"), (1, "serial")])
@pytest.mark.parametrize("name", COUNTING)
def test_the_probe_is_never_wrong(name: str, slots: int, verdict: str, folder: Path) -> None:
    with running(name, model_of(name, folder), slots) as url:
        done = program("probe", url, "--json")
    found = json.loads(done.stdout)
    assert found["verdict"] in (verdict, "cannot tell")
    if found["verdict"] == "continuous" and not found["slots_is_lower_bound"]:
        assert found["slots"] == slots


@pytest.mark.parametrize("name", COUNTING)
def test_a_prompt_cache_stays_unused(name: str, folder: Path) -> None:
    with running(name, model_of(name, folder), SLOTS) as url:
        address = Address.parse(url)
        dialect = discover(address)
        (model,) = dialect.served_models
        prompt = list(range(100, 250))
        before = read_counts(address, dialect)
        for _ in range(2):
            body = body_for(dialect, "/v1/completions", model, prompt, 4)
            assert post(address, "/v1/completions", body).status == 200
        after = read_counts(address, dialect)
    grown = growth_of(before, after)
    assert (grown["cached_tokens"], grown["output_tokens"]) == (0, 8)
    assert grown["prompt_tokens"] == 300
    assert grown["passes"] >= 8
