"""The waiting requests, in the order in which they are served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sortedcontainers import SortedKeyList

from batchbench.errors import UsageError

if TYPE_CHECKING:
    from batchbench.workloads import Request

ORDERS: dict[str, Callable[[Request], tuple[int, int]]] = {
    "fifo": lambda request: (0, request.index),
    "longest-first": lambda request: (-request.output_tokens, request.index),
    "shortest-first": lambda request: (request.output_tokens, request.index),
    "longest-prompt-first": lambda request: (-request.prompt_tokens, request.index),
}
"""The sort key of each ``--order``; requests of equal length keep the order of arrival."""


class WaitingQueue(SortedKeyList):  # type: ignore[misc]  # it has no types
    """A sorted sequence in which every operation takes O(log n) time for each request."""

    def __init__(self, order: str) -> None:
        super().__init__(key=ORDERS[order])
        self._arrived: deque[Request] = deque()  # by age; requests that left go when they are met

    @property
    def oldest(self) -> Request:
        """The request that has waited longest.

        Raises:
            IndexError: no request waits.
        """
        while self._arrived[0] not in self:
            self._arrived.popleft()
        return self._arrived[0]

    def push(self, requests: Sequence[Request]) -> None:
        """Add requests, which come in the order of their index."""
        self.update(requests)
        self._arrived.extend(requests)

    def take(self, chosen: list[Request]) -> None:
        """Remove the chosen requests.

        Raises:
            UsageError: a request is not waiting, or is chosen twice.
        """
        start = self.bisect_key_left(self.key(chosen[0]))
        stop = start + len(chosen)
        if self[start:stop] == chosen:  # policies mostly take neighbours
            del self[start:stop]
        elif len(set(chosen)) == len(chosen) and all(request in self for request in chosen):
            for request in chosen:
                self.remove(request)
        else:
            raise UsageError("a policy admitted a request that is not waiting, or one twice")
