"""Find a model: its configuration, files and tokenizer, or a known shape for dummy weights.

This module does not import torch, so that a wrong name is reported at once. A checkpoint may come
from anyone: none of its code is run, nothing outside its folder is read, and sizes that no model
has are refused before memory is taken for them.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.models.gguf_file import GgufFile, alone, read_gguf
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.settings import setting

DEVICES = "auto, cuda, cuda:N, mps or cpu"

_model = partial(setting, panel="Model")


@dataclass(frozen=True)
class ModelSpec:
    """The model, its number format and its device."""

    model: str = _model(
        "openai-community/gpt2",
        "Model id on the hub, a local folder or a GGUF file; gpt2, distilgpt2, gpt2-medium, "
        "gpt2-large and gpt2-xl need no network (see --load-format); toy-gpt2 is small, with "
        "random weights.",
        metavar="MODEL",
    )
    load_format: str = _model(
        "auto",
        "Weights to load: pretrained; dummy (right shapes, seeded random values); or auto: from "
        "the local cache, else the hub, else dummy for the five GPT-2 names of --model.",
        choices=("auto", "pretrained", "dummy"),
    )
    revision: str | None = _model(
        None, "Branch, tag or commit of the model on the hub.", metavar="REV"
    )
    dtype: str = _model(
        "auto",
        "Number format of weights and KV cache. auto: bfloat16 (or float16) on CUDA, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _model("auto", f"Device to run on: {DEVICES}.", metavar="DEVICE")
    threads: int | None = _model(
        None, "Number of CPU threads.", min=1, max=4096, default_text="one per core"
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.model.strip():
            raise UsageError("--model: must be a hub id, a folder or a GGUF file, such as gpt2")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise UsageError(f"--device {shown(self.device)}: must be {DEVICES}")


REACH_S = 1.0
"""Seconds to wait for the hub. (The hub client's own retries take 23 s on a host without
network.)"""

_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def _shape(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    return {**_GPT2, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}


KNOWN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "distilgpt2": ("distilbert/distilgpt2", _shape(768, 6, 12)),
    "gpt2": ("openai-community/gpt2", _shape(768, 12, 12)),
    "gpt2-medium": ("openai-community/gpt2-medium", _shape(1024, 24, 16)),
    "gpt2-large": ("openai-community/gpt2-large", _shape(1280, 36, 20)),
    "gpt2-xl": ("openai-community/gpt2-xl", _shape(1600, 48, 25)),
}
"""Short name: hub id, and the shape as in the hub's config.json."""

MADE_UP: Mapping[str, Mapping[str, Any]] = {"toy-gpt2": _shape(256, 4, 4)}
"""Small shapes like GPT-2's without trained weights, for a quick run on any machine."""


@dataclass(frozen=True)
class Source:
    """The place that a model comes from."""

    name: str  # the short name, the hub id, or the folder's name
    load_format: str  # pretrained or dummy, no longer auto
    config: Mapping[str, Any]  # as in config.json
    folder: Path | None  # checkpoint files; None for a built-in shape and a GGUF file
    note: str  # one line on the decision
    gguf: GgufFile | None = None

    @property
    def place(self) -> Path | None:
        """The GGUF file or the folder that has the tokenizer."""
        return self.gguf.path if self.gguf else self.folder

    @property
    def facts(self) -> dict[str, Any]:
        """The name, origin and formats of the weights, for a result."""
        read = self.gguf if self.load_format == "pretrained" else None
        about = {"name": self.name, "load_format": self.load_format, "note": self.note}
        return {**about, "quantization": read and read.quantization}

    @property
    def context(self) -> int | None:
        context: int | None = self.config.get("n_positions")
        return context or self.config.get("max_position_embeddings")

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.config.get("eos_token_id")
        tokens = eos if isinstance(eos, list) else [eos]
        return tuple(token for token in tokens if token is not None)


def find_model(spec: ModelSpec, *, weights: bool = True) -> Source:
    """Decide where the model comes from; without ``weights`` only its configuration is needed."""
    try:
        return _find(spec, weights and spec.load_format != "dummy")
    except UsageError as error:
        raise UsageError(f"--model {spec.model}: {error}") from error


def _find(spec: ModelSpec, trained: bool) -> Source:
    try:
        place = Path(spec.model).expanduser()
        is_folder, is_there, is_file = place.is_dir(), place.exists(), place.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user's home, a NUL
        raise UsageError("is neither a folder nor a hub id") from error
    if is_folder:
        return _from_folder(place, place.resolve().name, trained)
    if is_file:
        return _from_gguf(place, trained)
    looks_local = spec.model.startswith((".", "/", "~")) or set(spec.model) & set(":\\")
    if is_there or looks_local or place.suffix == ".gguf":
        what = "is no file or folder" if is_there else "no such file or folder"
        raise UsageError(f"{what}; give a checkpoint's folder, a GGUF file or a hub id")
    if spec.model not in MADE_UP:
        return _from_hub(spec, trained)
    if spec.load_format == "pretrained":
        raise UsageError("has no trained weights; use --load-format dummy")
    line = f"{spec.model}: a small shape like GPT-2's, dummy weights (seeded random values)"
    return Source(spec.model, "dummy", MADE_UP[spec.model], None, line)


def _from_folder(folder: Path, name: str, trained: bool) -> Source:
    from safetensors import SafetensorError, safe_open

    config = _config_of(folder)
    if not trained:
        return Source(name, "dummy", config, folder, f"{name}: dummy weights, shape of {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError("holds no *.safetensors file; add --load-format dummy for random weights")
    _check_index(folder)
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            why = f"is cut off or not a safetensors file ({error}); fetch it again"
            raise UsageError(f"{file.name} {why}") from error
    return Source(name, "pretrained", config, folder, f"{name}: pretrained weights from {folder}")


def _from_gguf(file: Path, trained: bool) -> Source:
    found = read_gguf(file)
    config = found.config()
    if fault := fault_of(config):
        raise UsageError(f"its header says {fault}")
    if not trained:
        note = f"{file.stem}: dummy weights, shape of {file}"
        return Source(file.stem, "dummy", config, None, note, found)
    formats = f"{found.quantization} dequantised" if found.quantization else found.formats[0]
    note = f"{file.stem}: pretrained weights from {file}, {formats}"
    if found.ignored:
        note += f"; transformers ignores {found.ignored}, so texts differ from the model's own"
    return Source(file.stem, "pretrained", config, None, note, found)


def _from_hub(spec: ModelSpec, trained: bool) -> Source:
    short = next((s for s, (hub_id, _) in KNOWN.items() if spec.model in (s, hub_id)), None)
    hub_id, shape = KNOWN[short] if short else (spec.model, {})
    if short and not trained:
        return Source(short, "dummy", shape, None, f"{short}: dummy weights, as requested")
    cached = _snapshot(hub_id, spec.revision, trained, local=True)
    if cached is None:
        missing = _ask_hub(hub_id, spec.revision)
        if missing is None:
            cached = _snapshot(hub_id, spec.revision, trained, local=False)
            missing = "the download from the hub was interrupted"
    if cached is not None:
        return _from_folder(cached, short or spec.model, trained)
    if short and spec.load_format == "auto":
        line = f"{short}: {missing}, so dummy weights (right shapes, seeded random values)"
        return Source(short, "dummy", shape, None, line)
    known = [*KNOWN, *MADE_UP]
    near = difflib.get_close_matches(spec.model.lower(), known, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}? " if near else ""
    hint = "--load-format dummy" if short else f"{hint}known without a network: {', '.join(known)}"
    raise UsageError(f"neither a folder nor in the local cache, and {missing}; {hint}")


def _snapshot(hub_id: str, revision: str | None, weights: bool, *, local: bool) -> Path | None:
    """Return the folder of the model's files in the local cache or the hub; None if absent."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(
            hub_id, revision=revision, local_files_only=local, allow_patterns=patterns
        )
    except HFValidationError as error:
        raise UsageError("is neither a folder nor a hub id") from error
    except LocalEntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"the download failed ({error}); try again") from error
    place = Path(folder)
    whole = not (local and weights) or any(place.glob("*.safetensors"))
    return place if whole and (place / "config.json").exists() else None


def _ask_hub(hub_id: str, revision: str | None) -> str | None:
    """Return the reason why the hub cannot give the model, if any, in at most ``REACH_S``."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    answer = ["the hub cannot be reached"]

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, revision=revision, timeout=REACH_S)
            answer[0] = ""
        except RevisionNotFoundError:
            answer[0] = f"the hub has no revision {revision} of it"
        except RepositoryNotFoundError:
            answer[0] = "the hub has no model of that name that you may read"
        except Exception as error:  # any transport's error means the same
            answer[0] = f"the hub cannot be reached ({type(error).__name__})"

    # In a thread: a silent name server blocks for longer than any HTTP timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_S)
    return answer[0] or None


# Checks of files that may come from anyone

_NEEDED = (
    *("vocab_size", "n_positions", "max_position_embeddings", "n_embd", "hidden_size"),
    *("n_layer", "num_hidden_layers", "n_head", "num_attention_heads"),
)
"""Settings of config.json that must be above 0 if they are given."""

_SIZES = re.compile(
    r"(vocab|hidden|intermediate|ffn|d|n|num|max|moe|head)_\w*|n_ctx|d_model|head_dim|ffn_dim"
)
"""Names of settings that are sizes if they are whole numbers."""

_COUNTS = re.compile(r"(n|num)_\w*(layer|head|expert|block|group|stage|codebook)\w*")
"""Names of settings that count the parts of a model."""

MOST_SIZE, MOST_COUNT = 2**31 - 1, 10_000
"""Largest size and count. The largest known model has 126 layers, 160 experts and 10 million
positions."""


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json", constants=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError("is not a checkpoint: config.json is missing") from error
    except (OSError, UsageError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise UsageError(f"its config.json cannot be read: {why}") from error
    if not isinstance(config, dict) or not {"model_type", "vocab_size"} <= config.keys():
        raise UsageError("its config.json lacks model_type or vocab_size")
    if fault := fault_of(config):
        raise UsageError(f"its config.json says {fault}")
    return config


def fault_of(config: Mapping[str, Any]) -> str | None:
    """Return the first setting that no model has, with its value and what would be right."""
    for name, value in config.items():
        most, must = MOST_COUNT if _COUNTS.fullmatch(name) else MOST_SIZE, None
        if name == "model_type" and not isinstance(value, str):
            must = "a text"
        elif name in _NEEDED and not (_is_whole(value) and value > 0):
            must = "a number above 0"
        elif _SIZES.fullmatch(name) and _is_whole(value) and not -1 <= value <= most:
            must = f"0 to {most}"
        elif name == "eos_token_id" and value is not None:
            tokens = value if isinstance(value, list) else [value]
            if not all(_is_whole(token) and -1 <= token <= MOST_SIZE for token in tokens):
                must = "a token id or a list of token ids"
        if must:
            return f"{name} = {shown(json.dumps(value))}; it must be {must}"
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_index(folder: Path) -> None:
    """Check the index of a checkpoint in several files, which may name files of its folder only."""
    file = folder / "model.safetensors.index.json"
    if not file.exists() or (folder / "model.safetensors").exists():
        return
    try:
        index = read_json(file)
    except (OSError, UsageError) as error:
        raise UsageError(f"its {file.name} cannot be read; fetch it again") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UsageError(f"its {file.name} has no weight_map; fetch it again")
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            why = "which is not a safetensors file in its folder; nothing outside it is read"
            raise UsageError(f"its {file.name} names {name[:80]}, {why}")
        if not (folder / name).is_file():
            raise UsageError(f"lacks {name}, named by its {file.name}")


# Tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """Convert text to token ids and back.

    Encoding adds no special tokens. Decoding keeps those that the ids hold: without ``<|im_end|>``
    and ``<|im_start|>`` the role between two turns, ``assistant``, would look like text of the
    model. ``whole`` reads the tokenizer with transformers, which knows its chat template.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    whole: Callable[[], Any]


def find_tokenizer(place: Path | None) -> Tokenizer | None:
    """Return the tokenizer in a checkpoint's folder or a GGUF file, if there is one."""
    if place is None:
        return None
    if place.is_file():
        there = "tokenizer.ggml.model" in read_gguf(place).settings
    else:
        names = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
        there = any((place / name).exists() for name in names)
    if not there:
        return None
    try:
        if (place / "tokenizer.json").exists():
            from tokenizers import Tokenizer as Fast

            fast = Fast.from_file(str(place / "tokenizer.json"))
            return Tokenizer(
                lambda text: list(fast.encode(text, add_special_tokens=False).ids),
                lambda ids: str(fast.decode(list(ids), skip_special_tokens=False)),
                lambda: _transformers_tokenizer(place),
            )
        slow = _transformers_tokenizer(place)
        exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return Tokenizer(
            lambda text: list(slow.encode(text, add_special_tokens=False)),
            lambda ids: str(slow.decode(list(ids), **exact)),
            lambda: slow,
        )
    except Exception as error:  # the libraries raise plain Exception for a damaged file
        why = f"its tokenizer (tokenizer.json or vocab.json) cannot be read: {error}"
        raise UsageError(f"{place}: {why}; fetch it again") from error


def _transformers_tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if place.is_file():
        with alone(place) as folder:
            return AutoTokenizer.from_pretrained(folder, gguf_file=place.name, **options)
    return AutoTokenizer.from_pretrained(place, **options)


def encoder(tokenizer: Tokenizer | None, *, chat: bool) -> Callable[[str], list[int]] | None:
    """Return the function that encodes the texts of a workload; None without a tokenizer.

    With ``chat`` each text becomes a user's message in the tokenizer's own chat template, which
    transformers renders in a sandbox of jinja. Raises UsageError if there is no template.
    """
    if not chat:
        return tokenizer.encode if tokenizer else None
    if tokenizer is None:
        hint = "choose a model that has one, or with --target give --tokenizer"
        raise UsageError(f"--chat-template: no tokenizer is known; {hint}")
    encode = tokenizer.encode
    try:
        whole = tokenizer.whole()
    except Exception as error:
        raise UsageError(f"--chat-template: the tokenizer cannot be read: {error}") from error
    if not whole.chat_template:
        raise UsageError("--chat-template: this model's tokenizer has no template; drop the option")

    def encode_message(text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        try:
            asked = whole.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            why = shown(error, 200)
            raise UsageError(f"--chat-template: the tokenizer's template fails: {why}") from error
        return encode(str(asked))

    return encode_message
