"""Streams of random numbers, one per purpose, so that using one does not change another."""

from __future__ import annotations

import numpy as np

_PURPOSES = ("prompt lengths", "output lengths", "arrivals", "ids", "prefix", "blocks", "sampling")


def seed_sequence(seed: int, purpose: str, number: int = 0) -> np.random.SeedSequence:
    """Return the seed of a purpose's stream, and of a number if the purpose has several."""
    return np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), number))


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Return the stream of a seed for a purpose, and for a number if the purpose has several.

    Philox and its uniform numbers are fixed by their definition (Salmon et al., SC 2011), so they
    are the same on every machine.
    """
    return np.random.Generator(np.random.Philox(seed_sequence(seed, purpose, number)))
