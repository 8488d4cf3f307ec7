"""The check of a checkpoint's files before a library reads them: its configuration and its index.

A checkpoint may come from anyone. None of its code is run, nothing outside its folder is read, and
sizes that no model has are refused before anything of that size is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.json_file import read_json

_NEEDED = (
    *("vocab_size", "n_positions", "max_position_embeddings", "n_embd", "hidden_size"),
    *("n_layer", "num_hidden_layers", "n_head", "num_attention_heads"),
)
"""Names of settings that must be above 0 if they are given."""

_SIZES = re.compile(
    r"(vocab|hidden|intermediate|ffn|d|n|num|max|moe|head)_\w*|n_ctx|d_model|head_dim|ffn_dim"
)
"""Names of settings that are sizes if they are whole numbers."""

_COUNTS = re.compile(r"(n|num)_\w*(layer|head|expert|block|group|stage|codebook)\w*")
"""Names of settings that count the parts of a model."""

MOST_SIZE, MOST_COUNT = 2**31 - 1, 10_000
"""Largest size and count. The largest known model has 126 layers, 160 experts and 10 million
positions."""


def read_config(model: str, folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``, and check that a model can be made of it.

    Raises:
        UsageError: it is missing, is not JSON, or holds impossible sizes.
    """
    try:
        config = read_json(folder / "config.json", constants=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"--model {model}: is not a checkpoint: config.json is missing") from error
    except (OSError, UsageError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise UsageError(f"--model {model}: its config.json cannot be read: {why}") from error
    if not isinstance(config, dict) or not {"model_type", "vocab_size"} <= config.keys():
        raise UsageError(f"--model {model}: its config.json names no model_type and vocab_size")
    if fault := _fault(config):
        raise UsageError(f"--model {model}: its config.json says {fault}")
    return config


def _fault(config: Mapping[str, Any]) -> str | None:
    if not isinstance(config["model_type"], str):
        return f"model_type = {_shown(config['model_type'])}; it must be a text"
    for name in _NEEDED:
        if name in config and not (_is_whole(config[name]) and config[name] > 0):
            return f"{name} = {_shown(config[name])}; it must be a number above 0"
    for name, value in config.items():
        if not _is_whole(value):
            continue
        most = MOST_COUNT if _COUNTS.fullmatch(name) else MOST_SIZE
        if _SIZES.fullmatch(name) and not -1 <= value <= most:
            return f"{name} = {value}; it must be 0 to {most}"
    eos = config.get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos] if eos is not None else []
    if not all(_is_whole(token) and -1 <= token <= MOST_SIZE for token in tokens):
        return f"eos_token_id = {_shown(eos)}; it must be a token's number or a list of them"
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return shown(json.dumps(value))


def check_index(model: str, folder: Path) -> None:
    """Check the index of a checkpoint in several files: it may name files of its folder only.

    Raises:
        UsageError: it is not an index, or names a file that is missing or outside the folder.
    """
    file = folder / "model.safetensors.index.json"
    if not file.exists() or (folder / "model.safetensors").exists():
        return
    try:
        index = read_json(file)
    except (OSError, UsageError) as error:
        raise UsageError(f"--model {model}: its {file.name} cannot be read; fetch it again") from (
            error
        )
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UsageError(f"--model {model}: its {file.name} has no weight_map; fetch it again")
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UsageError(
                f"--model {model}: its {file.name} names {name[:80]}, which is not a safetensors "
                "file of its folder; nothing outside the folder is read"
            )
        if not (folder / name).is_file():
            raise UsageError(f"--model {model}: lacks {name}, named by its {file.name}")
