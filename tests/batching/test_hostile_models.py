"""Hostile checkpoints: none of their code runs, and nothing outside their folder is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[Path], object]


@pytest.fixture
def spoiled(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def settings(**changes: Any) -> Change:
    """Return a change of settings in config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def text(name: str, content: str) -> Change:
    """Return a change of a file to this content."""
    return lambda folder: (folder / name).write_text(content)


def index(*names: Any) -> Change:
    """Return a change that makes an index of weights in several files."""

    def change(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        places = {f"transformer.h.{i}.ln_1.weight": name for i, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


DEEP = "[" * 100_000 + "]" * 100_000

SPOILED: Mapping[str, tuple[Change, str]] = {
    "index above": (index("../outside.safetensors"), "nothing outside it is read"),
    "index absolute": (index("/etc/passwd"), "nothing outside it is read"),
    "index of no text": (index(5), "has no weight_map"),
    "index of a missing file": (index("other.safetensors"), "lacks other.safetensors"),
    "n_embd of a billion": (settings(n_embd=10**9), "--model"),
    "n_embd of 10^18": (settings(n_embd=10**18), "n_embd = 1000000000000000000; it must be"),
    "n_embd below 0": (settings(n_embd=-32), "n_embd = -32; it must be a number above 0"),
    "n_embd of 0": (settings(n_embd=0), "n_embd = 0; it must be a number above 0"),
    "n_embd of a text": (settings(n_embd="x"), 'n_embd = "x"; it must be a number above 0'),
    "a million layers": (settings(n_layer=10**6), "n_layer = 1000000; it must be 0 to 10000"),
    "no layer": (settings(n_layer=0), "n_layer = 0; it must be a number above 0"),
    "no head": (settings(n_head=0), "n_head = 0; it must be a number above 0"),
    "vocabulary of true": (settings(vocab_size=True), "vocab_size = true"),
    "end of text is a text": (settings(eos_token_id="x"), 'eos_token_id = "x"'),
    "model type is a list": (settings(model_type=["gpt2"]), "model_type ="),
    "unknown model type": (settings(model_type="surprise"), "config.json is not usable"),
    "config nested deep": (text("config.json", DEEP), "nested more than 64 deep"),
    "tokenizer torn": (text("tokenizer.json", "{"), "tokenizer"),
    "tokenizer nested deep": (text("tokenizer.json", DEEP), "tokenizer"),
    "generation config nested deep": (text("generation_config.json", DEEP), "cannot be loaded"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_refused(
    name: str, spoiled: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    change, said = SPOILED[name]
    change(spoiled)
    words = ["--batch-size", "2", "--queue-size", "2", "--quiet", "--output", str(tmp_path / "out")]
    assert said in refused("run", "--model", str(spoiled), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2", "surprise"])
def test_code_of_a_checkpoint_is_never_run(
    kind: str, spoiled: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """A known type uses its own class; other models are refused."""
    from batchbench.batching.models import ModelSpec, find_model
    from batchbench.batching.models.loading import load_model

    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (spoiled / "own.py").write_text(code)
    maps = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    settings(model_type=kind, auto_map=maps)(spoiled)
    if kind == "gpt2":
        spec = ModelSpec(model=str(spoiled), dtype="float32", device="cpu")
        assert type(load_model(find_model(spec), spec, 0).module).__name__ == "GPT2LMHeadModel"
    else:
        words = [
            "--batch-size",
            "2",
            "--queue-size",
            "2",
            "--quiet",
            "--output",
            str(tmp_path / "out"),
        ]
        assert "auto_map), which is never run" in refused("run", "--model", str(spoiled), *words)
    assert not (tmp_path / "ran").exists()
