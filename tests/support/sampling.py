"""Sampling written from its definition, with Python's integers and a sort, one token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

Floats = NDArray[np.float64]


def scrambled(x: int, steps: list[tuple[int, int]], last: int, added: int = 0) -> int:
    for shift, factor in steps:
        x = ((x ^ (x >> shift)) * factor + added) % 2**32
        added = 0
    return x ^ (x >> last)


def noise_of(stream: Stream, position: int, vocabulary: int) -> Floats:
    """The noise of every token at a position."""
    short, long = (
        [(16, 0x21F0AAAD), (15, 0x735A2D97)],
        [(17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)],
    )
    words = [int(word) % 2**32 for word in stream.words]
    one, two = (scrambled(word ^ position, short, 15) for word in words)
    bits = [scrambled(token ^ one, long, 14, two) >> 1 for token in range(vocabulary)]
    uniform = np.float32(bits) * np.float32(2**-31) + np.float32(2**-32)
    exact = np.minimum(uniform, np.float32(1 - 2**-24)).astype(np.float64)
    return -np.log(-np.log1p(-exact))


def kept(logits: Floats, sampling: Sampling) -> NDArray[np.bool_]:
    """The tokens that top-k and top-p keep."""
    chosen = np.ones(len(logits), bool)
    if sampling.top_k:
        edge = np.sort(logits)[::-1][min(sampling.top_k, len(logits)) - 1]
        chosen = logits >= edge
    probability = np.exp((logits - logits.max()) / sampling.temperature) * chosen
    probability /= probability.sum()
    above = np.array([probability[logits > logit].sum() for logit in logits])
    return chosen & (above < sampling.top_p) if sampling.top_p < 1 else chosen


def drawn(logits: Floats, stream: Stream, position: int) -> int:
    noise = noise_of(stream, position, len(logits))
    sums = logits + stream.sampling.temperature * noise
    return int(np.where(kept(logits, stream.sampling), sums, -np.inf).argmax())


def drawn_alone(
    model: LoadedModel, prompt: list[int], count: int, stream: Stream | None
) -> list[int]:
    """Generate for one prompt by transformers' model, whole and without a cache."""
    import torch

    model.module.set_attn_implementation("sdpa")
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=model.device)
            logits = model.module(input_ids=inputs).logits[0, -1].double().cpu().numpy()
        ids.append(int(logits.argmax()) if stream is None else drawn(logits, stream, len(ids) - 1))
    return ids[len(prompt) :]
