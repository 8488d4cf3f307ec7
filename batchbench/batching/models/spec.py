"""ModelSpec: which model, with which weights, where and how it computes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.settings import setting

_PANEL = "Model"

DEVICES = "auto, cuda, cuda:N, mps or cpu"


@dataclass(frozen=True)
class ModelSpec:
    """The model as asked for."""

    model: str = setting(
        "openai-community/gpt2",
        "A hub id or a local folder; gpt2, distilgpt2, gpt2-medium, gpt2-large and gpt2-xl need "
        "no network, see --load-format; toy-gpt2 is a small shape with made-up weights.",
        _PANEL,
        metavar="ID|FOLDER",
    )
    load_format: str = setting(
        "auto",
        "pretrained weights; dummy (right shapes, seeded random values); or auto: the local "
        "cache, else the hub, else dummy for the five known names.",
        _PANEL,
        choices=("auto", "pretrained", "dummy"),
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of the model on the hub.", _PANEL, metavar="REV"
    )
    dtype: str = setting(
        "auto",
        "Number format of weights and cache. auto: bfloat16 (or float16) on CUDA, else float32.",
        _PANEL,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", f"Where the model computes: {DEVICES}.", _PANEL, metavar="DEVICE")
    threads: int | None = setting(
        None, "CPU threads.", _PANEL, min=1, max=4096, default_text="one a core"
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.model.strip():
            raise UsageError("--model: must be a hub id or a local folder, such as gpt2")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise UsageError(f"--device {shown(self.device)}: must be {DEVICES}")
