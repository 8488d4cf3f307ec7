"""The peak memory of a run, from the shape of its model and batch alone.

``--dry-run`` predicts it, and an engine that would not fit is refused: both add up the same parts.
The coefficients were measured (``benchmarks/dry_run_memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from batchbench.batching.engines.torch.attention import kv_token_bytes
from batchbench.batching.experiment import budget_of

HEADROOM = 0.1
"""Share of the free memory that stays unused."""

LEAN_WIDTHS, EAGER_WIDTHS = 14, 37
"""Peak activations of a token, in hidden sizes: of GPT-2's own pass, and of the modules of
transformers, whose GELU alone keeps four tensors of the inner size (4 hidden sizes)."""

REFERENCE_LOGITS = 3
"""Copies of a request's logits that the verification holds."""


@dataclass(frozen=True)
class Served:
    """The part of an experiment that decides how much memory serving takes.

    Attributes:
        prompt: tokens of the longest prompt.
        longest: tokens of the longest request, prompt and output.
        mixes: prompts are computed in passes with the running requests.
        budget: most tokens of such a pass; None to derive it from the number of slots.
        lean: the pass is GPT-2's own.
    """

    config: Any
    dtype: torch.dtype
    cached: torch.dtype
    engine: str
    prompt: int
    longest: int
    mixes: bool
    budget: int | None
    lean: bool

    def cache_bytes(self, slots: int) -> int:
        """Return the bytes of keys and values of all slots."""
        return slots * self.longest * kv_token_bytes(self.config, self.cached)

    def bytes(self, slots: int) -> int:
        """Return the bytes that serving this many slots takes in addition to weights."""
        text = self.config.get_text_config()
        tokens = slots * self.prompt
        if self.mixes:
            tokens = min(tokens, max(self.budget or budget_of(slots), slots))
        widths = LEAN_WIDTHS if self.lean else EAGER_WIDTHS
        passes = tokens * widths * text.hidden_size * self.dtype.itemsize
        logits = slots * text.vocab_size * (self.dtype.itemsize + 4)
        # While the batch changes, the notebook engine holds the old cache and the new one.
        caches = 2 if self.engine == "notebook" else 1
        return int(caches * self.cache_bytes(slots) + passes + logits)


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """Return the most slots below ``most`` that fit; 0 if not even one does."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
