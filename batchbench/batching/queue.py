"""The waiting requests, in the order in which they are served."""

from __future__ import annotations

import bisect
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast, overload

from batchbench.errors import UsageError

if TYPE_CHECKING:
    from batchbench.workloads import Request

ORDERS: dict[str, Callable[[Request], tuple[int, int]]] = {
    "fifo": lambda request: (0, request.index),
    "longest-first": lambda request: (-request.output_tokens, request.index),
    "shortest-first": lambda request: (request.output_tokens, request.index),
    "longest-prompt-first": lambda request: (-request.prompt_tokens, request.index),
}
"""How each ``--order`` sorts; equals keep the order of arrival."""


class WaitingQueue(Sequence["Request"]):
    """A sorted sequence that is cheap to take from the front, also with a million in it."""

    def __init__(self, order: str) -> None:
        self._key = ORDERS[order]
        self._items: list[Request] = []
        self._head = 0  # items before it have left; they are dropped in bulk
        self._in_order = order == "fifo"
        self._arrived: deque[Request] = deque()  # in the order of arrival; who left goes lazily
        self._left: set[int] = set()  # of those in ``_arrived``

    @property
    def oldest(self) -> Request:
        """Whoever has waited longest.

        Raises:
            IndexError: nobody waits.
        """
        if self._in_order:
            return self[0]
        while self._arrived[0].index in self._left:
            self._left.remove(self._arrived.popleft().index)
        return self._arrived[0]

    def push(self, requests: list[Request]) -> None:
        """Add requests, which come in the order of their index, at their places."""
        if not self._in_order:
            self._arrived.extend(requests)
        if len(requests) > len(self):
            self._items = sorted(self._items[self._head :] + requests, key=self._key)
            self._head = 0
            return
        for request in requests:
            if self._key(request) > self._key(self._items[-1]):
                self._items.append(request)
            else:
                bisect.insort(self._items, request, lo=self._head, key=self._key)

    def take(self, chosen: Sequence[Request]) -> None:
        """Remove the chosen ones.

        Raises:
            UsageError: one of them is not waiting, or stands twice.
        """
        count = len(chosen)
        if not count:
            return
        # Policies mostly take neighbours, and these from the front.
        first = self._head
        if not len(self) or chosen[0] is not self._items[first]:
            first += self._place(chosen[0])
        run = self._items[first : first + count]
        if len(run) == count and all(map(operator.is_, chosen, run)):
            if first == self._head:
                self._head += count
            else:
                del self._items[first : first + count]
        else:
            leaving = {request.index: request for request in chosen}
            kept = [item for item in self if leaving.get(item.index) is not item]
            if len(kept) != len(self) - count:
                raise UsageError("a policy admitted a request that is not waiting, or one twice")
            self._items, self._head = kept, 0
        if not self._in_order:
            self._left.update(request.index for request in chosen)
        if self._head > 1024 and self._head * 2 > len(self._items):
            del self._items[: self._head]
            self._head = 0

    def _place(self, request: Request) -> int:
        """Where a waiting request stands; where it would stand, if it does not wait."""
        return bisect.bisect_left(self._items, self._key(request), self._head, key=self._key) - (
            self._head
        )

    def index(self, value: object, start: int = 0, stop: int | None = None) -> int:
        """Place of a waiting request, found by its key.

        Raises:
            ValueError: it does not wait between these places.
        """
        place = self._place(cast("Request", value)) if isinstance(value, tuple) else len(self)
        if place >= len(self) or self[place] != value or place not in range(len(self))[start:stop]:
            raise ValueError(f"{value!r} does not wait here")
        return place

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
