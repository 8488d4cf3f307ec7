"""A decision of the scheduler, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchbench.workloads import Request


class Chunk(NamedTuple):
    """A piece of a newcomer's prompt: positions ``start`` up to ``stop`` go into ``slot``."""

    request: Request
    slot: int
    start: int
    stop: int

    @property
    def yields(self) -> bool:
        """Whether this piece ends the prompt, so that the step yields the first output token."""
        return self.stop == self.request.prompt_tokens


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What to compute next: one forward pass, or ``repeat`` equal ones.

    A pass computes the ``chunks`` and one token for each of ``slots``, whose input stands at
    ``positions`` in the first pass. ``growing`` tells the slots that advance by one position a
    pass from those whose request is done: these recompute their last position. ``released`` are
    the slots given up since the last plan. ``repeat`` passes may run with no decision between
    them, ending with the first that ends at or after ``until`` (ns) where that is given.
    ``admitted`` are (request, slot) of those that were given a slot since the last plan; where a
    pass has a token budget, the first piece of a prompt may come later.
    """

    chunks: tuple[Chunk, ...]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    growing: NDArray[np.int64]  # 1 where the request still wants tokens, else 0
    released: tuple[int, ...]
    repeat: int
    until: int | None
    admitted: tuple[tuple[Request, int], ...] = ()

    def advanced(self, steps: int) -> NDArray[np.int64]:
        """Positions of the inputs after ``steps`` passes."""
        return self.positions + self.growing * steps


class Wait(NamedTuple):
    """Nothing can be computed before this time (ns)."""

    until: int
