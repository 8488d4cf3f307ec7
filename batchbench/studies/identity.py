"""What a cell's result depends on, as one digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import batchbench
from batchbench import settings
from batchbench.batching.experiment import Experiment
from batchbench.reports.result_file import SCHEMA_VERSION
from batchbench.workloads.lengths import parse_lengths

LENGTH = 16
"""Hexadecimal digits: among a million cells two agree by chance once in 4 × 10⁷ such sets."""


def digest_of(experiment: Experiment) -> str:
    """SHA-256, shortened, over all settings, the program's version, and the files that are named.

    Files count with their content, a model's folder with names, sizes and times (its weights may
    be many gigabytes), a policy of the user's own with its source.
    """
    depends = {
        "batchbench": batchbench.__version__,
        "schema": SCHEMA_VERSION,
        "simulated": experiment.simulated,
        "config": experiment.config(),
        **({"cost": experiment.cost.as_dict()} if experiment.cost else {}),
        "files": {
            **named_files(experiment),
            **{n: _module(n.partition(":")[0]) for n in experiment.serving.strategies if ":" in n},
        },
    }
    text = json.dumps(depends, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def named_files(experiment: Experiment) -> dict[str, Any]:
    """Of every setting that is a path, and of a model that is a folder."""
    found: dict[str, Any] = {}
    for part in ("workload", "serving", "trials", "model"):
        spec = getattr(experiment, part)
        for field in fields(spec):
            value = getattr(spec, field.name)
            file = value if isinstance(value, Path) else _file_of_lengths(field.name, value)
            if file is not None and file.is_file():
                with file.open("rb") as content:
                    found[field.name] = hashlib.file_digest(content, "sha256").hexdigest()
    folder = Path(experiment.model.model)
    if folder.is_dir():
        found["model"] = [
            (file.name, (about := file.stat()).st_size, about.st_mtime_ns)
            for file in sorted(folder.iterdir())
            if file.is_file()
        ]
    return found


def _file_of_lengths(name: str, value: Any) -> Path | None:
    """The file of lengths that ``empirical:FILE`` names."""
    if name not in ("prompt_tokens", "output_tokens") or value is None:
        return None
    file = getattr(parse_lengths(value, settings.option_name(name)), "file", None)
    return None if file is None else Path(file)


def _module(name: str) -> str | None:
    """Digest of a module's source, where it has a file."""
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
    file = Path(origin) if origin else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
