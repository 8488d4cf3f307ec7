"""The plan: a decision of the scheduler, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchbench.workloads import Request


class Chunk(NamedTuple):
    """A piece of a new request's prompt: tokens ``start`` up to ``stop`` go into ``slot``."""

    request: Request
    slot: int
    start: int
    stop: int

    @property
    def yields(self) -> bool:
        """True if this piece ends the prompt, so that the step yields the first output token."""
        return self.stop == self.request.prompt_tokens


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The next forward pass, or ``repeat`` equal ones.

    A pass computes the ``chunks`` and one token for each of ``slots``. The input of each slot is at
    ``positions`` in the first pass. Slots that are ``growing`` advance by one position per pass;
    the others hold finished requests and recompute their last position. ``released`` are the slots
    given up since the last plan. No decision is needed between the ``repeat`` passes; if ``until``
    (ns) is given, they end with the first pass that ends at or after it. ``admitted`` lists
    (request, slot) for each request that got a slot since the last plan; with a token budget, the
    first piece of its prompt may come in a later plan.
    """

    chunks: tuple[Chunk, ...]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    growing: NDArray[np.int64]  # 1 if the request still needs tokens, else 0
    released: tuple[int, ...]
    repeat: int
    until: int | None
    admitted: tuple[tuple[Request, int], ...] = ()

    def advanced(self, steps: int) -> NDArray[np.int64]:
        """Return the positions of the inputs after ``steps`` passes."""
        return self.positions + self.growing * steps


class Wait(NamedTuple):
    """The decision that nothing can be computed before this time (ns)."""

    until: int
