"""Streams of random numbers: one a purpose, so that none shifts another."""

from __future__ import annotations

import numpy as np

_PURPOSES = ("prompt lengths", "output lengths", "arrivals", "ids", "prefix", "blocks")


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """The stream of a seed for a purpose (and a number, where it has many).

    Philox is fixed by its definition (Salmon et al., SC 2011), and so are its uniform numbers:
    the same on every machine.
    """
    key = (_PURPOSES.index(purpose), number)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
