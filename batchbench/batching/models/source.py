"""Finding a model: its configuration, its files, or the decision to make its weights up.

No torch here, so that a wrong name is answered at once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.models.checking import check_index, read_config
from batchbench.errors import UsageError, shown
from batchbench.settings import setting

_PANEL = "Model"

DEVICES = "auto, cuda, cuda:N, mps or cpu"


@dataclass(frozen=True)
class ModelSpec:
    """The model as asked for."""

    model: str = setting(
        "openai-community/gpt2",
        "Model id on the hub, or a local folder; gpt2, distilgpt2, gpt2-medium, gpt2-large and "
        "gpt2-xl need no network (see --load-format); toy-gpt2 is small, with random weights.",
        _PANEL,
        metavar="ID|FOLDER",
    )
    load_format: str = setting(
        "auto",
        "Weights to load: pretrained; dummy (right shapes, seeded random values); or auto: from "
        "the local cache, else the hub, else dummy for the five known names.",
        _PANEL,
        choices=("auto", "pretrained", "dummy"),
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of the model on the hub.", _PANEL, metavar="REV"
    )
    dtype: str = setting(
        "auto",
        "Number format of weights and KV cache. auto: bfloat16 (or float16) on CUDA, else float32.",
        _PANEL,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", f"Device to run on: {DEVICES}.", _PANEL, metavar="DEVICE")
    threads: int | None = setting(
        None, "Number of CPU threads.", _PANEL, min=1, max=4096, default_text="one per core"
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.model.strip():
            raise UsageError("--model: must be a hub id or a local folder, such as gpt2")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise UsageError(f"--device {shown(self.device)}: must be {DEVICES}")


REACH_S = 1.0
"""How long the hub may take to answer before it counts as out of reach. (The hub client's own
retries take 23 s on a host without network.)"""

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
"""Shapes like GPT-2's that nobody has trained: small enough for a quick run on any machine."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str  # the short name, the hub id, or the folder's name
    load_format: str  # pretrained or dummy, no longer auto
    config: Mapping[str, Any]  # as in config.json
    folder: Path | None  # checkpoint files; None for a built-in shape
    note: str  # one line on what was decided

    @property
    def context(self) -> int | None:
        """Longest sequence that the model takes, in tokens."""
        found = self.config.get("n_positions") or self.config.get("max_position_embeddings")
        return None if found is None else int(found)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        found = self.config.get("eos_token_id")
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (int(found),)


def find_model(spec: ModelSpec, *, weights: bool = True) -> Source:
    """Decide where the model comes from.

    Args:
        weights: whether weights will be loaded; a simulation needs the configuration only.

    Raises:
        UsageError: there is no such model, or its folder is no checkpoint.
    """
    try:
        folder = Path(spec.model).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user's home, a NUL
        raise UsageError(f"--model {spec.model}: is neither a folder nor a hub id") from error
    if is_folder:
        return _from_folder(spec, folder, folder.resolve().name, weights)
    if is_there or spec.model.startswith((".", "/", "~")):
        what = "is a file" if is_there else "no such folder"
        raise UsageError(f"--model {spec.model}: {what}; give a checkpoint's folder or a hub id")
    if spec.model in MADE_UP:
        return _made_up(spec)
    return _from_hub(spec, weights)


def _from_folder(spec: ModelSpec, folder: Path, name: str, weights: bool) -> Source:
    config = read_config(spec.model, folder)
    if spec.load_format == "dummy" or not weights:
        return Source(name, "dummy", config, folder, f"{name}: dummy weights, shape of {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"--model {spec.model}: holds no *.safetensors file (other formats are not loaded); "
            "--load-format dummy makes weights of its shape up"
        )
    check_index(spec.model, folder)
    for file in files:
        _check_safetensors(spec.model, file)
    return Source(name, "pretrained", config, folder, f"{name}: pretrained weights from {folder}")


def _check_safetensors(model: str, file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"--model {model}: {file.name} is torn or no safetensors file ({error}); fetch it again"
        ) from error


def _made_up(spec: ModelSpec) -> Source:
    if spec.load_format == "pretrained":
        raise UsageError(
            f"--model {spec.model}: is a shape that nobody has trained; take --load-format dummy"
        )
    line = f"{spec.model}: a made-up small GPT-2 shape, dummy weights (seeded random values)"
    return Source(spec.model, "dummy", MADE_UP[spec.model], None, line)


def _from_hub(spec: ModelSpec, weights: bool) -> Source:
    short = next((s for s, (hub_id, _) in KNOWN.items() if spec.model in (s, hub_id)), None)
    hub_id = KNOWN[short][0] if short else spec.model
    if short and (spec.load_format == "dummy" or not weights):
        return Source(short, "dummy", KNOWN[short][1], None, f"{short}: dummy weights, as asked")
    cached = _snapshot(hub_id, spec.revision, weights, local=True)
    if cached is None:
        missing = _ask_hub(hub_id, spec.revision)
        if missing is None:
            cached = _snapshot(hub_id, spec.revision, weights, local=False)
            missing = "the download from the hub broke off"
    if cached is not None:
        return _from_folder(spec, cached, short or spec.model, weights)
    if short and spec.load_format == "auto":
        line = f"{short}: {missing}, so dummy weights (right shapes, seeded random values)"
        return Source(short, "dummy", KNOWN[short][1], None, line)
    raise UsageError(
        f"--model {spec.model}: neither a folder nor in the local cache, and {missing}; "
        + ("--load-format dummy" if short else f"known without network: {', '.join(KNOWN)}")
    )


def _snapshot(hub_id: str, revision: str | None, weights: bool, *, local: bool) -> Path | None:
    """The model's files, from the local cache or the hub; None when they are not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(
            snapshot_download(
                hub_id, revision=revision, local_files_only=local, allow_patterns=patterns
            )
        )
    except HFValidationError as error:
        raise UsageError(f"--model {hub_id}: is neither a folder nor a hub id") from error
    except LocalEntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"--model {hub_id}: the download failed ({error}); try again") from error
    whole = (folder / "config.json").exists() and (
        not weights or any(folder.glob("*.safetensors")) or not local
    )
    return folder if whole else None


def _ask_hub(hub_id: str, revision: str | None) -> str | None:
    """Why the hub cannot give the model; None when it can. Takes :data:`REACH_S` at most."""
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

    # In a thread: a name server that is silent blocks for longer than any HTTP timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_S)
    return answer[0] or None
