"""WorkloadSpec: what a workload is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchbench import settings
from batchbench.errors import UsageError
from batchbench.settings import setting
from batchbench.workloads.lengths import GRAMMAR, parse_lengths

_PANEL = "Workload"


@dataclass(frozen=True)
class WorkloadSpec:
    """What is asked: how many requests, how long, with which prompts."""

    queue_size: int = setting(32, "Number of requests.", _PANEL, min=1, max=10**8)
    long_every: int | None = setting(
        None,
        "One long request at every position divisible by this.",
        _PANEL,
        min=1,
        default_text="the batch size",
    )
    long_tokens: int = setting(100, "Output tokens of a long request.", _PANEL, min=1, max=10**9)
    short_tokens: int = setting(
        10, "Output tokens of every other request.", _PANEL, min=1, max=10**9
    )
    prompt_tokens: str | None = setting(
        None,
        f"Prompts of random tokens, with lengths as {GRAMMAR}; both ends included.",
        _PANEL,
        metavar="LENGTHS",
        default_text="the same 7-token prompt for all",
    )
    prompts: Path | None = setting(
        None,
        "Your own prompts, a line a prompt, used in turn until the queue is full.",
        _PANEL,
        metavar="FILE",
    )
    stop_at_eos: bool = setting(
        False,
        "A request ends early when the model ends its text; step counts then depend on the model.",
        _PANEL,
    )
    seed: int = setting(
        0, "Seed of random prompts and dummy weights.", _PANEL, min=0, max=2**63 - 1
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.prompts is not None and self.prompt_tokens is not None:
            raise UsageError("--prompts and --prompt-tokens exclude each other: give one of them")
        if self.prompt_tokens is not None:
            parse_lengths(self.prompt_tokens, "--prompt-tokens")
        if self.prompts is not None:
            read_prompts(self.prompts)


def read_prompts(file: Path) -> list[str]:
    """The prompts in a text file, a line each; empty lines are skipped.

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or holds no prompt.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompts {file}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {file}: is not UTF-8 text; save it as UTF-8") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {file}: holds no prompt; write a line a prompt")
    return lines
