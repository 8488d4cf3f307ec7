"""The way in which the tokens of sampled requests are drawn."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_TEMPERATURE = 0.001
"""Smallest temperature above 0; with less, rounding would decide about the token."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampled requests; names and meanings are vLLM's.

    A token is drawn from softmax(logits / temperature). ``top_k`` keeps the most likely tokens, all
    if it is 0; of these, ``top_p`` keeps the most likely ones that together have at least this
    probability. Tokens with equal logits are kept or removed together.
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
