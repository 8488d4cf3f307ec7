"""Sampling: how the next token of a request is drawn, and the random stream of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from batchbench.workloads.seeds import seed_sequence

LEAST_TEMPERATURE = 0.001
"""Smallest temperature above 0; with less, rounding would decide about the token."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampled requests; names and meanings are vLLM's.

    A token is drawn from softmax(logits / temperature). ``top_k`` keeps the most likely tokens, all
    if it is 0; of these, ``top_p`` keeps the most likely ones that together have at least this
    probability. Tokens of equal logits are kept or cut together.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __str__(self) -> str:
        cuts = [f"top-k {self.top_k}"] * bool(self.top_k) + [f"top-p {self.top_p:g}"] * (
            self.top_p < 1
        )
        return ", ".join([f"sampled at temperature {self.temperature:g}", *cuts])


class Stream(NamedTuple):
    """The random stream of one request; nothing but these two decides its numbers."""

    sampling: Sampling
    request: int

    @property
    def words(self) -> np.ndarray:
        """Two numbers of 32 bits that identify this stream."""
        sequence = seed_sequence(self.sampling.seed, "sampling", self.request)
        return sequence.generate_state(2).view(np.int32)

    @property
    def seed(self) -> int:
        """A seed of 31 bits for this request, for engines with random numbers of their own."""
        return int(self.words[0]) & (2**31 - 1)
