"""Streams of random numbers, one per purpose, so that using one does not change another."""

from __future__ import annotations

import numpy as np

_PURPOSES = ("prompt lengths", "output lengths", "arrivals", "ids", "prefix", "blocks")


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Return the stream of a seed for a purpose, and for a number if the purpose has several.

    Philox and its uniform numbers are fixed by their definition (Salmon et al., SC 2011), so they
    are the same on every machine.
    """
    key = (_PURPOSES.index(purpose), number)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
