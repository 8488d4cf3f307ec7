"""The waiting requests, in the order in which they are served."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, overload

from batchbench.errors import UsageError

if TYPE_CHECKING:
    from batchbench.workloads import Request

ORDERS: dict[str, Callable[[Request], tuple[int, int]]] = {
    "fifo": lambda request: (0, request.index),
    "longest-first": lambda request: (-request.output_tokens, request.index),
    "shortest-first": lambda request: (request.output_tokens, request.index),
}
"""How each ``--order`` sorts; equals keep the order of arrival."""


class WaitingQueue(Sequence["Request"]):
    """A sorted sequence that is cheap to take from the front, also with a million in it."""

    def __init__(self, order: str) -> None:
        self._key = ORDERS[order]
        self._items: list[Request] = []
        self._head = 0  # items before it have left; they are dropped in bulk

    def push(self, requests: list[Request]) -> None:
        """Add requests at their places."""
        if len(requests) > len(self):
            self._items = sorted(self._items[self._head :] + requests, key=self._key)
            self._head = 0
            return
        for request in requests:
            if not len(self) or self._key(request) > self._key(self._items[-1]):
                self._items.append(request)
            else:
                bisect.insort(self._items, request, lo=self._head, key=self._key)

    def take(self, chosen: Sequence[Request]) -> None:
        """Remove the chosen ones.

        Raises:
            UsageError: one of them is not waiting, or stands twice.
        """
        head, count = self._head, len(chosen)
        if all(a is b for a, b in zip(chosen, islice(self._items, head, None), strict=False)):
            if count > len(self):
                raise UsageError("a policy admitted requests that are not waiting")
            self._head += count
        else:
            leaving = {request.index: request for request in chosen}
            kept = [item for item in self if leaving.get(item.index) is not item]
            if len(kept) != len(self) - count:
                raise UsageError("a policy admitted a request that is not waiting, or one twice")
            self._items, self._head = kept, 0
        if self._head > 1024 and self._head * 2 > len(self._items):
            del self._items[: self._head]
            self._head = 0

    def __len__(self) -> int:
        return len(self._items) - self._head

    def __iter__(self) -> Iterator[Request]:
        return islice(self._items, self._head, None)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(index)
            return self._items[index + self._head if index >= 0 else index]
        start, stop, step = index.indices(len(self))
        if step > 0:
            return self._items[start + self._head : max(start, stop) + self._head : step]
        return list(self)[index]
