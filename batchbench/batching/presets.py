"""Presets: named partial experiments, each with the source of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.files import check_there
from batchbench.settings import setting
from batchbench.workloads.spec import read_workload_file

NOTEBOOK = "notebook"  # the default preset


@dataclass(frozen=True)
class Preset:
    """A description, its source, and settings by the names of their fields in any spec."""

    about: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _lengths(prompt: str, output: str, **more: Any) -> dict[str, Any]:
    sizes = {"queue_size": 64, "prompt_tokens": prompt, "output_tokens": output}
    return {**sizes, "overlong": "scale", **more}


PRESETS: Mapping[str, Preset] = {
    NOTEBOOK: Preset(
        "one request of 100 output tokens per batch, the others of 10; prompts of 7 tokens",
        "the notebook whose method the notebook engine follows",
    ),
    "anyscale": Preset(
        "prompts of 512 tokens, exponential outputs, mean 128",
        "Anyscale, How continuous batching enables 23x throughput in LLM inference (2023): 1,000 "
        "requests of 512 prompt tokens, exponential outputs of mean 128, in one of its four runs "
        "up to 512 (longer draws are dropped there, and clipped here)",
        _lengths("512", "exponential:mean=128,max=512"),
    ),
    "chat": Preset(
        "questions of 161 tokens on average, answers of 338",
        "means of ShareGPT in the vLLM paper (Kwon et al., 2023): 161.31 and 337.99; log-normal "
        "shape and bounds chosen for batchbench",
        _lengths(
            "lognormal:mean=161.31,sigma=1,max=1024", "lognormal:mean=337.99,sigma=0.8,max=1024"
        ),
    ),
    "summarize": Preset(
        "articles of 781 tokens on average, summaries of 56",
        "means of CNN/Daily Mail in See et al. (2017): 781 and 56, counted in words there; "
        "log-normal shape and bounds chosen for batchbench",
        _lengths("lognormal:mean=781,sigma=0.5,max=1792", "lognormal:mean=56,sigma=0.4,max=256"),
    ),
    "code": Preset(
        "long prompts (median 1,500 tokens), short completions (median 13)",
        "medians of Azure's code trace in Splitwise (Patel et al., 2024): 1,500 and 13; "
        "log-normal shape and bounds chosen for batchbench",
        _lengths("lognormal:median=1500,sigma=0.7,max=3840", "lognormal:median=13,sigma=1,max=256"),
    ),
    "burst": Preset(
        "short chats that arrive in bursts, 4 per second on average",
        "gamma-distributed gaps as in BurstGPT (Wang et al., 2024); rate, shape 0.25 and lengths "
        "chosen for batchbench",
        _lengths(
            "lognormal:mean=64,sigma=0.8,max=256",
            "lognormal:mean=32,sigma=0.8,max=128",
            request_rate=4.0,
            burstiness=0.25,
        ),
    ),
    "ci": Preset(
        "the default workload on toy-gpt2, a small model with random weights: under a minute on "
        "two cores",
        "chosen for batchbench; all requests arrive at the start, so that steps are exact",
        {"model": "toy-gpt2"},
    ),
}


@dataclass(frozen=True)
class Basis:
    """The preset and the workload file that the options of an experiment start from."""

    preset: str = setting(
        NOTEBOOK,
        "Preset to start from; other options override it. batchbench workload list describes all.",
        "Start from",
        choices=tuple(PRESETS),
        metavar="NAME",
    )
    workload: Path | None = setting(
        None,
        "TOML file with workload options, their names written with underscores. It overrides the "
        "preset; options of the command override it.",
        "Start from",
        metavar="FILE.toml",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.workload is not None:
            check_there(self.workload, f"--workload {self.workload}")

    def layers(self) -> list[Mapping[str, Any]]:
        """Return the preset's settings, then those of the file, if that can be read."""
        file = {} if self.workload is None else read_workload_file(self.workload)
        return [PRESETS[self.preset].settings, file]


def check_preset(name: str) -> None:
    """Raise UsageError if there is no such preset."""
    if name not in PRESETS:
        raise UsageError(f"--preset {shown(name)}: must be one of {', '.join(PRESETS)}")
