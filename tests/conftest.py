"""Fixtures of several test files: a machine, a tiny checkpoint, and small models.

Nothing here imports torch before a test asks for a model.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir
from support.machine import settle, shuffle
from support.models import SENTENCES, TINY, Alone, MakeModel

if TYPE_CHECKING:
    from support.cuda_stand_in import StandIn

    from batchbench.batching.models.loading import LoadedModel

SLOWEST = (
    "test_duet.py",
    "test_streams.py",
    "test_gpu_commands.py",
    "test_sweep.py",
    "test_platforms.py",
    "test_graphs.py",
    "test_files.py",
    "test_sampling.py",
)
"""Files that begin, so that at the end no process works through one while the other is idle."""

_tidy_up: Callable[[], None] | None = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set the machine that tests see, before any of their files is imported."""
    global _tidy_up
    if config.pluginmanager.has_plugin("terminalreporter"):
        writer = config.get_terminal_writer()
        writer.fullwidth = writer.fullwidth  # pytest's lines stay as wide as the user's terminal
    _tidy_up = settle()
    # Examples do not depend on the day, nor on how busy the machine is.
    calm = settings(
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("anywhere", calm)
    settings.load_profile("anywhere")
    set_hypothesis_home_dir(os.environ["HOME"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files, or let ``TEST_ORDER`` shuffle them."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    shuffle(items)


def pytest_unconfigure() -> None:
    """Delete the home folder of the tests."""
    if _tidy_up is not None:
        _tidy_up()


@pytest.fixture(scope="module", autouse=True)
def light_garbage() -> None:
    """Keep imported objects out of the garbage collection before each trial of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Makes a model up: settings on top of ``TINY``, or a whole configuration of another type."""
    return _make_model


def _make_model(
    config: Mapping[str, Any] = TINY,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    **settings: Any,
) -> LoadedModel:
    from batchbench.batching.models import ModelSpec, Source
    from batchbench.batching.models.loading import load_model

    source = Source("made-up", "dummy", {**config, **settings}, None, "made up for a test")
    return load_model(source, ModelSpec(dtype=dtype, device=device), seed)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``save_pretrained`` leaves it, with a tokenizer. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    _make_model().module.save_pretrained(folder)
    _save_tokenizer(folder / "tokenizer.json")
    return folder


def _save_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(file))


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> LoadedModel:
    """The tiny checkpoint, loaded in float32 on the CPU. Not to be changed."""
    from batchbench.batching.models import ModelSpec, find_model
    from batchbench.batching.models.loading import load_model

    spec = ModelSpec(model=str(checkpoint), dtype="float32", device="cpu")
    return load_model(find_model(spec), spec, 0)


@pytest.fixture(scope="session")
def taught(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real run on the tiny model. Copy it before you change it."""
    from batchbench.cli.main import run_command

    folder = tmp_path_factory.mktemp("taught") / "run"
    with pytest.MonkeyPatch.context() as patch:
        words = ["run", "--model", checkpoint, "--batch-size", 4, "--queue-size", 16]
        words += ["--long-tokens", 30, "--trials", 2, "--quiet", "--output", folder]
        patch.setattr(sys, "argv", ["batchbench", *map(str, words)])
        assert run_command() == 0
    return folder


@pytest.fixture(scope="session")
def alone() -> Alone:
    """Greedy generation of one prompt by the stock model with its own cache, nothing of ours."""
    return _alone


def _alone(model: LoadedModel, prompt: Sequence[int], count: int) -> list[int]:
    import torch
    from transformers import DynamicCache

    from batchbench.batching.engines.torch.attention import cache_argument

    module = model.module
    module.set_attn_implementation("sdpa")
    tokens: list[int] = []
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = DynamicCache()
    name = cache_argument(module)
    with torch.inference_mode():
        while len(tokens) < count:
            logits = module(input_ids=ids, use_cache=True, **{name: cache}).logits
            ids = logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Calls the program with words that it must refuse: exit code 2, and the one line it says."""

    def call(*words: str) -> str:
        from batchbench.cli.main import run_command

        monkeypatch.setattr(sys, "argv", ["batchbench", *words])
        assert run_command() == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        return told.err

    return call


@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial on a GPU serves its workload once, however short it is."""
    from batchbench.batching import trials

    monkeypatch.setattr(trials, "TRIAL_S", 0.0)


@pytest.fixture
def cuda_stand_in(short_trials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Two CUDA devices that are none; skips the test where it cannot be."""
    from support.cuda_stand_in import StandIn, impossible

    if why := impossible():
        pytest.skip(why)
    with StandIn() as gpu:
        yield gpu
        monkeypatch.undo()  # else a function of the stand-in that a test replaced would outlive it
        gc.collect()  # tensors of the stand-in must not outlive it


@pytest.fixture
def triton_stand_in(short_trials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Two CUDA devices that are none, with Triton's kernels in Triton's interpreter."""
    from support.cuda_stand_in import StandIn, impossible

    from batchbench.batching.engines.torch import graphs

    pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")
    if why := impossible():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch, StandIn(triton=True) as gpu:
        patch.setattr(graphs, "WARM_UPS", 1)  # the interpreter takes milliseconds a program
        yield gpu
        monkeypatch.undo()  # else a function of the stand-in that a test replaced would outlive it
        gc.collect()  # tensors of the stand-in must not outlive it


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which batchbench cannot have kernels of its own."""
    from batchbench.batching.engines.torch import forward, linear, sampling

    for module in (sampling, forward, linear):
        monkeypatch.setattr(module, "native", lambda: None)
