"""The waiting requests, in the order in which they are served."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

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


class WaitingQueue(Sequence["Request"]):
    """A sorted sequence in which every operation takes O(log n) time for each request."""

    def __init__(self, order: str) -> None:
        self._items = SortedKeyList(key=ORDERS[order])
        self._arrived: deque[Request] = deque()  # by age; requests that left go when they are met

    @property
    def oldest(self) -> Request:
        """The request that has waited longest.

        Raises:
            IndexError: no request waits.
        """
        while self._arrived[0] not in self._items:
            self._arrived.popleft()
        return self._arrived[0]

    def push(self, requests: Sequence[Request]) -> None:
        """Add requests, which come in the order of their index."""
        self._items.update(requests)
        self._arrived.extend(requests)

    def take(self, chosen: list[Request]) -> None:
        """Remove the chosen requests.

        Raises:
            UsageError: a request is not waiting, or is chosen twice.
        """
        items, count = self._items, len(chosen)
        first = items[:count]  # policies mostly take the first, or else neighbours
        if len(first) == count and all(map(operator.is_, first, chosen)):
            del items[:count]
            return
        start = items.bisect_key_left(items.key(chosen[0]))
        if items[start : start + count] == chosen:
            del items[start : start + count]
        elif len(set(chosen)) == count and all(request in items for request in chosen):
            for request in chosen:
                items.remove(request)
        else:
            raise UsageError("a policy admitted a request that is not waiting, or one twice")

    def index(self, value: object, start: int = 0, stop: int | None = None) -> int:
        """Return the position of a waiting request.

        Raises:
            ValueError: the request does not wait between these positions.
        """
        if not hasattr(value, "output_tokens"):
            raise ValueError(f"{value!r} is not a request")
        position: int = self._items.index(value, start, stop)
        return position

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        chosen: Request | list[Request] = self._items[index]
        return chosen
