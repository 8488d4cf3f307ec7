"""Arrivals: the owner of requests that are not there yet."""

from __future__ import annotations

from typing import Protocol

from batchbench.workloads.request import Request, Workload


class Arrivals(Protocol):
    """When requests come in."""

    @property
    def next_due(self) -> int | None:
        """Time in ns at which the next request is due; None when no more will come."""

    def due(self, now: int) -> list[Request]:
        """The requests that have become due by ``now`` since the last call, in order."""

    def finished(self, request: Request, now: int) -> None:
        """Tell that a request is done (a closed loop sends its next one then)."""


class Timetable:
    """Requests that come at times fixed beforehand, whatever the server does."""

    def __init__(self, workload: Workload) -> None:
        self._requests = iter(workload)
        self._next = next(self._requests, None)

    @property
    def next_due(self) -> int | None:
        return None if self._next is None else self._next.due_ns

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
