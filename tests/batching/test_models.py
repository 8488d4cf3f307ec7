"""Models: found, loaded, or made up; and every way in which that fails is one line to the user."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from batchbench.batching.models import (
    KNOWN,
    ModelSpec,
    Source,
    find_model,
    find_tokenizer,
    loading,
    source,
)
from batchbench.batching.models.loading import (
    fill_with_dummy_weights,
    load_model,
    resolve_device,
    resolve_dtype,
    uniform,
)
from batchbench.errors import UsageError

if TYPE_CHECKING:
    from support.models import Alone, MakeModel

NAMES = [(asked, short) for short, (hub_id, _) in KNOWN.items() for asked in (short, hub_id)]

PARAMETERS = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
"""As counted from the hub's checkpoints, tied weights once."""

SHA_OF_UNIFORM = "6ccde5cd7ea5a943d554da155eb298ee7c251cfd508285c10f3f04294dd73001"
SHA_OF_TINY = "67db90c3864e1a9558b271b9de2645b59f8b971b43ab49692f725dd8618e90b1"
"""Made on x86-64 with numpy 2.4; no other machine may make anything else of seed 0."""

MAIN, OLD = "1" * 40, "2" * 40  # commits


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoiled."""
    return Path(shutil.copytree(checkpoint, tmp_path / "spoiled"))


@pytest.fixture
def hub_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub is switched on and says that it has everything; collects what it is asked."""
    asked: list[str] = []

    def model_info(self: object, hub_id: str, **_: object) -> None:
        asked.append(hub_id)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that looks up a host or connects to one, even if it catches the error."""
    tried: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried


@pytest.fixture
def cache(
    checkpoint: Path, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A cache as the hub's client lays it out: gpt2's ``main``, and a branch ``old``."""
    root = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    other = tmp_path / "other"
    make_model(seed=1).module.save_pretrained(other)
    repository = root / "models--openai-community--gpt2"
    for ref, commit, files in (("main", MAIN, checkpoint), ("old", OLD, other)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in files.iterdir():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return root


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over names and values of all parameters, by name."""
    content = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        content.update(name.encode() + parameter.detach().numpy().astype("<f4").tobytes())
    return content.hexdigest()


def look_at_and_load(spec: ModelSpec) -> None:
    """As an experiment does: the shape is read first, and the weights are loaded last."""
    found = find_model(spec)
    assert found.vocab_size
    assert found.context
    load_model(found, spec, 0)


# The five known names


@pytest.mark.parametrize(("asked", "short"), NAMES)
def test_a_known_name_needs_no_network(asked: str, short: str, no_network: None) -> None:
    found = find_model(ModelSpec(model=asked))
    assert (found.name, found.load_format, found.folder) == (short, "dummy", None)
    assert (found.vocab_size, found.context, found.eos_token_ids) == (50257, 1024, (50256,))
    assert short in found.note
    assert "dummy" in found.note


@pytest.mark.parametrize("short", KNOWN)
def test_a_built_in_shape_has_the_real_number_of_parameters(short: str) -> None:
    config = AutoConfig.for_model(**KNOWN[short][1])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[short]


@pytest.mark.parametrize(("asked", "short"), NAMES)
def test_dummy_weights_as_asked_do_not_ask_the_hub(
    asked: str, short: str, hub_asked: list[str]
) -> None:
    found = find_model(ModelSpec(model=asked, load_format="dummy"))
    assert (found.name, found.load_format, hub_asked) == (short, "dummy", [])


def test_a_simulation_needs_no_weights_and_no_hub(hub_asked: list[str]) -> None:
    assert find_model(ModelSpec(model="gpt2"), weights=False).vocab_size == 50257
    assert not hub_asked


def test_pretrained_weights_that_are_out_of_reach_are_a_usage_error(no_network: None) -> None:
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE.*--load-format dummy"):
        find_model(ModelSpec(model="gpt2", load_format="pretrained"))


def test_auto_says_why_the_weights_are_made_up(no_network: None) -> None:
    assert "HF_HUB_OFFLINE" in find_model(ModelSpec(model="gpt2")).note


# A hub that is silent, or fails


def test_a_silent_hub_is_asked_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    end_of_test, asked = threading.Event(), []

    def silent(self: object, hub_id: str, *, timeout: float, **_: object) -> None:
        asked.append((hub_id, timeout))
        end_of_test.wait()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source, "REACH_S", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    try:
        found = find_model(ModelSpec(model="gpt2"))
    finally:
        end_of_test.set()
    assert asked == [("openai-community/gpt2", 0.05)]
    assert found.load_format == "dummy"
    assert "cannot be reached" in found.note


def test_the_hub_is_waited_for_about_a_second() -> None:
    assert source.REACH_S <= 1.5


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("odd"), TimeoutError()])
def test_a_hub_that_fails_counts_as_out_of_reach(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert type(error).__name__ in find_model(ModelSpec(model="gpt2")).note


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "no model of that name"),
        (huggingface_hub.errors.RevisionNotFoundError, "no revision nightly"),
    ],
)
def test_what_the_hub_does_not_have_is_a_usage_error(
    error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error.__new__(error)  # its __init__ wants a whole HTTP response

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UsageError, match=said):
        find_model(ModelSpec(model="someone/something", revision="nightly"))


def test_a_download_that_breaks_off_says_so(
    hub_asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("connection lost, and the cache holds nothing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", break_off)
    found = find_model(ModelSpec(model="gpt2"))
    assert (found.load_format, hub_asked) == ("dummy", ["openai-community/gpt2"])
    assert "None" not in found.note
    with pytest.raises(UsageError) as caught:
        find_model(ModelSpec(model="gpt2", load_format="pretrained"))
    assert "None" not in str(caught.value)


def test_what_the_hub_has_is_downloaded(
    checkpoint: Path, hub_asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str | None]] = []

    def download(
        hub_id: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str]
    ) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        calls.append((hub_id, revision))
        assert "*.safetensors" in allow_patterns
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_model(ModelSpec(model="someone/something", revision="v2"))
    assert (found.name, found.load_format) == ("someone/something", "pretrained")
    assert calls == [("someone/something", "v2")]


# Names that nobody knows


@pytest.mark.parametrize("name", ["gpt3", "someone/something", "GPT2", "gpt2-XL"])
def test_an_unknown_name_out_of_reach_is_a_usage_error(name: str, no_network: None) -> None:
    with pytest.raises(UsageError, match=f"--model {name}: .*known without a network: .*gpt2-xl"):
        find_model(ModelSpec(model=name))


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "gpt 2",
        "gpt2\n",
        "--gpt2",
        "https://huggingface.co/gpt2",
        "/no/such/folder",
        "./gpt2",
        "~/no-such-folder",
        "~nobody-of-this-name/gpt2",
        "nul\0byte",
        "ünïcode",
        "x" * 5000,
    ],
)
def test_a_weird_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--model"):
        find_model(ModelSpec(model=name))


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--model"):
        ModelSpec(model=name)


def test_a_file_is_no_model(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        find_model(ModelSpec(model=str(checkpoint / "config.json")))


# Folders that are no checkpoint


def test_a_folder_without_config_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        find_model(ModelSpec(model=str(tmp_path)))


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b'{"model_type": "gpt2", "vocab_si',
        b"[]",
        b'"gpt2"',
        b"null",
        b"{}",
        b'{"model_type": "gpt2"}',
        b'{"vocab_size": 300}',
        b"\xff\xfe\x00",
    ],
)
def test_a_spoiled_config_is_a_usage_error(folder: Path, config: bytes) -> None:
    (folder / "config.json").write_bytes(config)
    with pytest.raises(UsageError, match=r"config\.json"):
        find_model(ModelSpec(model=str(folder)))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "no-such-architecture"},
        {"model_type": "vit"},
        {"vocab_size": "many"},
        {"vocab_size": None},
        {"vocab_size": -1},
        {"n_positions": "long"},
        {"n_layer": "two"},
        {"n_head": 5},
    ],
)
@pytest.mark.parametrize("load_format", ["pretrained", "dummy"])
def test_a_config_that_no_model_is_made_of_is_a_usage_error(
    folder: Path, settings: dict[str, Any], load_format: str
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    spec = ModelSpec(model=str(folder), load_format=load_format, device="cpu")
    with pytest.raises(UsageError, match="--model"):
        look_at_and_load(spec)


@pytest.mark.parametrize("value", [0, -1, None, "300", [300]])
@pytest.mark.parametrize("key", ["vocab_size", "n_positions"])
def test_a_size_that_is_none_is_a_usage_error_without_loading(
    folder: Path, key: str, value: object
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UsageError, match=f"{key} = "):
        find_model(ModelSpec(model=str(folder)), weights=False)


def test_a_folder_without_weights_is_a_usage_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no \*\.safetensors.*--load-format dummy"):
        find_model(ModelSpec(model=str(folder)))


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        find_model(ModelSpec(model=str(folder)))


def test_a_folder_without_weights_lends_its_shape(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    spec = ModelSpec(model=str(folder), load_format="dummy", device="cpu")
    found = find_model(spec)
    assert (found.load_format, found.vocab_size, found.context) == ("dummy", 300, 128)
    assert load_model(found, spec, 0).module.num_parameters() > 0


def _truncated(at: Callable[[int, int], int]) -> Callable[[bytes], bytes]:
    """Cut where ``at(bytes of header, bytes)`` says."""
    return lambda whole: whole[: at(8 + int.from_bytes(whole[:8], "little"), len(whole))]


@pytest.mark.parametrize(
    "spoil",
    [
        _truncated(lambda header, end: 0),
        _truncated(lambda header, end: 4),
        _truncated(lambda header, end: 8),
        _truncated(lambda header, end: header // 2),
        _truncated(lambda header, end: header),
        _truncated(lambda header, end: end // 2),
        _truncated(lambda header, end: end - 1),
        lambda whole: whole + b"\0",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: whole[:8] + b"x" * 40 + whole[48:],
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
    ],
    ids=[
        *("empty", "in the length", "no header", "half a header", "no data", "half", "a byte less"),
        *("a byte more", "endless header", "garbage header", "git-lfs pointer"),
    ],
)
def test_torn_weights_are_a_usage_error(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UsageError, match=r"model\.safetensors is cut off"):
        find_model(ModelSpec(model=str(folder)))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    file, name = folder / "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    spec = ModelSpec(model=str(folder), device="cpu")
    with pytest.raises(UsageError, match=f"lacks {name}"):
        load_model(find_model(spec), spec, 0)


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path) -> None:
    file, name = folder / "model.safetensors", "transformer.h.0.attn.c_attn.bias"
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    spec = ModelSpec(model=str(folder), device="cpu")
    with pytest.raises(UsageError, match=name):
        load_model(find_model(spec), spec, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe"])
def test_a_spoiled_tokenizer_is_a_usage_error(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        find_tokenizer(folder)


def test_a_tokenizer_reads_what_it_wrote(checkpoint: Path) -> None:
    tokenizer = find_tokenizer(checkpoint)
    assert tokenizer is not None
    ids = tokenizer.encode("The quick brown fox jumped over the – ü")
    assert tokenizer.decode(ids) == "The quick brown fox jumped over the – ü"
    assert max(ids) < 300


CHAT = ("<|im_start|>", "<|im_end|>")


def chat_tokenizer() -> Tokenizer:
    """A byte-level tokenizer whose chat markers are special tokens, as those of Qwen are."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=list(CHAT), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["assistant answers the user ."], trainer)
    return made


@pytest.mark.parametrize("saved", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text",
    [
        "Yes.<|im_end|>\n<|im_start|>assistant\nNo .<|im_end|>",
        "<|im_end|><|im_end|>",
        "a 'm b n't c , d ?",
    ],
)
def test_decoded_text_keeps_special_tokens(
    tmp_path: Path, saved: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saved == "tokenizer.json":
        chat_tokenizer().save(str(tmp_path / saved))
    else:  # transformers reads the other kinds of file
        (tmp_path / saved).write_text("{}")
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=chat_tokenizer(), clean_up_tokenization_spaces=True
        )
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: theirs)
    tokenizer = find_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    assert find_tokenizer(None) is None


# The local cache


@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("load_format", ["auto", "pretrained"])
def test_the_local_cache_is_used_without_network(
    asked: str, load_format: str, cache: Path, hub_asked: list[str], no_network: None
) -> None:
    spec = ModelSpec(model=asked, load_format=load_format, device="cpu")
    found = find_model(spec)
    assert (found.name, found.load_format, found.vocab_size) == ("gpt2", "pretrained", 300)
    assert found.folder is not None
    assert found.folder.name == MAIN
    load_model(found, spec, 0)
    assert not hub_asked


@pytest.mark.parametrize(("revision", "commit"), [(None, MAIN), ("old", OLD), (OLD, OLD)])
def test_the_cached_revision_is_the_one_asked_for(
    revision: str | None, commit: str, cache: Path, make_model: MakeModel
) -> None:
    spec = ModelSpec(model="gpt2", revision=revision, device="cpu")
    found = find_model(spec)
    assert found.folder is not None
    assert found.folder.name == commit
    made = make_model(seed=0 if commit == MAIN else 1)
    assert weights_digest(load_model(found, spec, 0).module) == weights_digest(made.module)


def test_a_revision_that_is_not_cached_is_no_other_revision(cache: Path) -> None:
    assert find_model(ModelSpec(model="gpt2", revision="new")).load_format == "dummy"
    with pytest.raises(UsageError):
        find_model(ModelSpec(model="gpt2", revision="new", load_format="pretrained"))


def test_a_cached_configuration_alone_is_no_pretrained_model(cache: Path) -> None:
    for file in cache.rglob("snapshots/*/*.safetensors"):
        file.unlink()
    found = find_model(ModelSpec(model="gpt2"))
    assert (found.load_format, found.vocab_size) == ("dummy", 50257)


def test_any_model_in_the_cache_is_found(cache: Path) -> None:
    (cache / "models--openai-community--gpt2").rename(cache / "models--someone--something")
    found = find_model(ModelSpec(model="someone/something"))
    assert (found.name, found.load_format) == ("someone/something", "pretrained")


# Pretrained weights


def test_what_was_saved_is_what_is_loaded(checkpoint: Path, make_model: MakeModel) -> None:
    spec = ModelSpec(model=str(checkpoint), device="cpu")
    loaded = load_model(find_model(spec), spec, 5)  # the seed has no say
    saved, ids = make_model(seed=0), torch.arange(50)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.module(ids).logits, saved.module(ids).logits)
    assert loaded.source.load_format == "pretrained"
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())


def test_weight_bytes_count_tied_weights_once(tiny: loading.LoadedModel, checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors").values()
    assert tiny.weight_bytes == sum(4 * tensor.numel() for tensor in stored)


# Dummy weights


def test_dummy_values_are_the_same_bits_everywhere() -> None:
    values = uniform("transformer.wte.weight", 0, 1003, 0.1)
    assert values.dtype == np.float32
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == SHA_OF_UNIFORM


def test_dummy_weights_are_the_same_bits_everywhere(make_model: MakeModel) -> None:
    assert weights_digest(make_model().module) == SHA_OF_TINY


def test_dummy_values_are_uniform_with_the_spread_asked_for() -> None:
    values = uniform("w", 3, 200_000, 0.25).astype(np.float64)
    assert values.std() == pytest.approx(0.25, rel=0.01)
    assert values.mean() == pytest.approx(0, abs=0.25 * 0.01)
    assert abs(values).max() == pytest.approx(0.25 * math.sqrt(3), rel=0.001)


def test_a_shorter_draw_begins_a_longer_one() -> None:
    assert np.array_equal(uniform("w", 0, 5, 1.0), uniform("w", 0, 50, 1.0)[:5])


def test_dummy_weights_differ_with_the_seed(make_model: MakeModel) -> None:
    zero, one = make_model(seed=0).module, make_model(seed=1).module
    same = [
        name
        for (name, a), (_, b) in zip(zero.named_parameters(), one.named_parameters(), strict=True)
        if a.ndim > 1 and torch.equal(a, b)
    ]
    assert not same


def test_no_two_matrices_of_one_shape_are_alike(make_model: MakeModel) -> None:
    layers = make_model().module.transformer.h
    assert not torch.equal(layers[0].mlp.c_fc.weight, layers[1].mlp.c_fc.weight)


def test_dummy_weights_do_not_depend_on_the_order_of_parameters() -> None:
    def block(names: list[str]) -> torch.nn.Module:
        return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})

    one, other = block(["a", "b", "c"]), block(["c", "a", "b"])
    fill_with_dummy_weights(one, 0)
    fill_with_dummy_weights(other, 0)
    assert weights_digest(one) == weights_digest(other)


def test_tied_embeddings_stay_tied(make_model: MakeModel) -> None:
    module = make_model().module
    assert module.lm_head.weight is module.transformer.wte.weight


def test_norms_and_biases_of_dummy_weights_do_nothing(make_model: MakeModel) -> None:
    for name, parameter in make_model().module.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std() > 0, name


@pytest.mark.parametrize("shape", [{}, {"n_embd": 768, "n_head": 12, "vocab_size": 2000}])
def test_dummy_text_varies(shape: dict[str, int], make_model: MakeModel, alone: Alone) -> None:
    assert len(set(alone(make_model(**shape), [1, 2, 3], 60))) > 20


@pytest.mark.parametrize("shape", [{}, {"n_embd": 768, "n_head": 12, "vocab_size": 2000}])
def test_text_of_the_usual_initialisation_repeats(
    shape: dict[str, int], make_model: MakeModel, alone: Alone
) -> None:
    """Why there are dummy weights: with these, every comparison of outputs would pass."""
    made = make_model(**shape)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**made.source.config)).eval()
    assert len(set(alone(replace(made, module=module), [1, 2, 3], 60))) < 8


# Where and how it computes


def test_a_device_that_is_not_here_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for asked in ("cuda", "cuda:0", "cuda:99", "mps"):
        with pytest.raises(UsageError, match=f"--device {asked}: .*it has cpu$"):
            resolve_device(asked)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_beyond_the_last_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="it has cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2")
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0:0"])
def test_a_device_of_no_kind_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        ModelSpec(device=device)


@pytest.mark.parametrize("dtype", ["int8", "fp16", "float64", ""])
def test_a_dtype_of_no_kind_is_a_usage_error(dtype: str) -> None:
    with pytest.raises(UsageError, match="--dtype"):
        ModelSpec(dtype=dtype)


def test_auto_dtype_on_the_cpu_is_float32() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32


def test_a_dtype_that_the_device_lacks_names_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_half(dtype: torch.dtype, device: torch.device) -> bool:
        return dtype is not torch.float16

    monkeypatch.setattr(loading, "_computes_in", lacks_half)
    with pytest.raises(UsageError, match=r"--dtype float16: cpu lacks it; .*float32, bfloat16"):
        resolve_dtype("float16", torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_or_is_a_usage_error(dtype: str, make_model: MakeModel) -> None:
    try:
        made = make_model(dtype=dtype)
    except UsageError:
        return
    assert made.dtype_name == dtype
    with torch.inference_mode():
        logits = made.module(torch.arange(9)[None]).logits
    assert logits.dtype == made.dtype
    assert torch.isfinite(logits).all()


def test_half_precision_dummy_weights_are_the_rounded_ones(make_model: MakeModel) -> None:
    exact, rounded = make_model().module, make_model(dtype="bfloat16").module
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("load_format", ["pretrained", "dummy"])
def test_a_model_too_large_for_the_memory_is_a_usage_error(
    load_format: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(model=str(checkpoint), load_format=load_format, device="cpu")
    found = find_model(spec)
    bytes_ = load_model(found, spec, 0).weight_bytes
    monkeypatch.setattr(loading, "free_bytes", lambda device: bytes_ - 1)
    with pytest.raises(UsageError, match=r"--model .*smaller"):
        load_model(found, spec, 0)
    monkeypatch.setattr(loading, "free_bytes", lambda device: bytes_)
    load_model(found, spec, 0)


def test_a_model_that_is_no_causal_one_is_a_usage_error() -> None:
    config = {"model_type": "vit", "vocab_size": 1, "hidden_size": 8, "num_attention_heads": 1}
    with pytest.raises(UsageError, match="is not a causal language model"):
        load_model(Source("vit", "dummy", config, None, ""), ModelSpec(device="cpu"), 0)


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))])
def test_ends_of_text_are_one_many_or_none(eos: object, ids: tuple[int, ...]) -> None:
    assert Source("x", "dummy", {"eos_token_id": eos}, None, "").eos_token_ids == ids
