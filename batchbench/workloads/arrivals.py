"""Arrivals: the owner of requests that are not there yet."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from batchbench.workloads.request import Request, Workload


class Arrivals(Protocol):
    """When requests come in. They come in the order of the workload."""

    @property
    def closed_loop(self) -> bool:
        """Whether a request may come because another one is finished.

        Only then does it matter at what time ``finished`` is told.
        """

    @property
    def next_due(self) -> int | None:
        """Time in ns at which the next request is due, if nobody finishes before; None when none
        will be."""

    @property
    def more(self) -> bool:
        """Whether there are requests that have not come yet."""

    def due(self, now: int) -> list[Request]:
        """The requests that have become due by ``now`` since the last call, in order.

        Their ``due_ns`` is when they truly were due.
        """

    def finished(self, request: Request, now: int) -> None:
        """Tell that a request is done: at ``now``, the end of the step of its last token."""


class Timetable:
    """Requests that come at times fixed beforehand, whatever the server does (an open loop)."""

    closed_loop = False

    def __init__(self, workload: Workload) -> None:
        self._requests = iter(workload)
        self._next = next(self._requests, None)

    @property
    def next_due(self) -> int | None:
        return None if self._next is None else self._next.due_ns

    @property
    def more(self) -> bool:
        return self._next is not None

    def due(self, now: int) -> list[Request]:
        if self._next is None or self._next.due_ns > now:
            return []
        due = [self._next]
        self._next = None
        for request in self._requests:
            if request.due_ns > now:
                self._next = request
                break
            due.append(request)
        return due

    def finished(self, request: Request, now: int) -> None:
        """Nothing: the times are fixed."""


class ClosedLoop:
    """Requests that come no sooner than there is room for them.

    There is room for ``workload.max_concurrency`` requests that are not done. A request is due at
    its own time or when room came for it, whichever is later; without own times that is the
    classic closed loop of so many clients that think for no time.
    """

    closed_loop = True

    def __init__(self, workload: Workload) -> None:
        if workload.max_concurrency is None:
            raise ValueError("a closed loop needs the workload's max_concurrency")
        self._requests = iter(workload)
        self._next = next(self._requests, None)
        # When room came, a place each: requests come in order, so the k-th beyond the first N
        # takes the place that the k-th finish left.
        self._room = deque([0] * min(workload.max_concurrency, len(workload)))

    @property
    def next_due(self) -> int | None:
        if self._next is None or not self._room:
            return None
        return max(self._next.due_ns, self._room[0])

    @property
    def more(self) -> bool:
        return self._next is not None

    def due(self, now: int) -> list[Request]:
        due: list[Request] = []
        while self._next is not None and (at := self.next_due) is not None and at <= now:
            due.append(self._next._replace(due_ns=at))
            self._room.popleft()
            self._next = next(self._requests, None)
        return due

    def finished(self, request: Request, now: int) -> None:
        """There is room for one more."""
        self._room.append(now)


def make_arrivals(workload: Workload) -> Arrivals:
    """What lets the requests of a workload come."""
    return Timetable(workload) if workload.max_concurrency is None else ClosedLoop(workload)
