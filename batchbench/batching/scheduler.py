"""The scheduler: queue, slots and lengths; the same for every policy and every engine.

``plan`` decides, the engine runs the forward pass, and ``apply`` moves the requests.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedKeyList

from batchbench.batching.plan import Chunk, Plan, Wait
from batchbench.batching.policies import ORDERS, Policy, fault_of, own_order
from batchbench.errors import UsageError, shown
from batchbench.workloads import Arrivals, Request

MOST_ASKS = 100_000
"""Largest number of times in a row that a policy may admit no request while nothing runs."""


class WaitingQueue(SortedKeyList):  # type: ignore[misc]  # it has no types
    """A sorted sequence in which every operation takes O(log n) time for each request."""

    def __init__(self, order: str) -> None:
        super().__init__(key=ORDERS[order])
        self._arrived: deque[Request] = deque()  # by age; requests that left go when they are met

    @property
    def oldest(self) -> Request:
        """The request that has waited longest; raises IndexError if none waits."""
        while self._arrived[0] not in self:
            self._arrived.popleft()
        return self._arrived[0]

    def push(self, requests: Sequence[Request]) -> None:
        """Add requests, which come in the order of their index."""
        self.update(requests)
        self._arrived.extend(requests)

    def take(self, chosen: list[Request]) -> None:
        """Remove the chosen requests; raise UsageError for one not waiting, or chosen twice."""
        start = self.bisect_key_left(self.key(chosen[0]))
        stop = start + len(chosen)
        if self[start:stop] == chosen:  # policies mostly take neighbours
            del self[start:stop]
        elif len(set(chosen)) == len(chosen) and all(request in self for request in chosen):
            for request in chosen:
                self.remove(request)
        else:
            raise UsageError("a policy admitted a request that is not waiting, or one twice")


@dataclass(slots=True)
class _Newcomer:
    """A request that holds a slot and whose prompt is not fully computed."""

    request: Request
    slot: int
    done: int = 0  # prompt tokens computed


class Scheduler:
    """Decides what each forward pass computes.

    Args:
        arrivals: the source of requests.
        policy: decides which requests join, and when a slot becomes free.
        slots: the batch size.
        order: the order of the queue, a key of :data:`batchbench.batching.policies.ORDERS`, unless
            the policy has its own.
        prefill: ``separate`` computes the prompts of new requests in a pass of their own, in which
            running requests stall; ``mixed`` computes them together with the running requests.
        max_batched_tokens: most tokens that one mixed pass computes, above ``slots``; running
            requests come first.
        lengths_known: True if each request ends exactly at its requested length. If not, each
            pass is planned alone.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        policy: Policy,
        slots: int,
        *,
        order: str = "fifo",
        prefill: str = "separate",
        max_batched_tokens: int = 2048,
        lengths_known: bool = True,
    ) -> None:
        self.now = 0
        self._name = f"the policy {type(policy).__name__}"
        self.waiting = WaitingQueue(own_order(policy, self._name) or order)
        self.finished: dict[int, None] = {}  # slots, in the order in which their requests ended
        self._released: list[int] = []  # since the last plan
        self.arrivals = arrivals
        self._policy = policy
        self._mixed = prefill == "mixed"
        self._max_batched_tokens = max_batched_tokens
        self._lengths_known = lengths_known
        self._free = list(range(slots))  # a heap: the lowest free slot is given first
        self._admitted: list[tuple[Request, int]] = []  # with their slots, since the last plan
        self._newcomers: deque[_Newcomer] = deque()
        self._occupant: list[Request | None] = [None] * slots
        # Running requests all advance together, so one decode count replaces a length per slot:
        # position = offset + growing × decodes. The request that ends next is on top of a heap.
        self._decodes = 0
        self._offset = np.zeros(slots, np.int64)
        self._growing = np.zeros(slots, np.int64)
        self._decoding = np.zeros(slots, np.bool_)  # running, or finished and held
        self._rows: NDArray[np.int64] | None = None  # slots that decode; None if they changed
        self._ends: list[tuple[int, int, int]] = []  # (decode count at the end, index, slot)
        self._running = 0  # decoding and not finished
        self._asks = 0  # times in a row that the policy admitted no request while nothing ran

    # The view of a policy (policies.View)

    @property
    def oldest(self) -> Request:
        return self.waiting.oldest

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def running(self) -> int:
        return self._running + len(self._newcomers)

    @property
    def more_to_come(self) -> bool:
        arrivals = self.arrivals
        return arrivals.next_due is not None or (arrivals.more and self.running > 0)

    # The two halves of a step

    def plan(self, now: int) -> Plan | Wait | None:
        """Return what to compute next; or a time to wait for; or None if all is done."""
        self.now = now
        if due := self.arrivals.due(now):
            self.waiting.push(due)
        if self.finished:
            self._release()
        ask_again = self._admit() if self.waiting and self.free else None
        chunks = self._chunks() if self._newcomers else ()
        # Also without a free slot: the log counts waiting requests, and a policy may react.
        times = [t for t in (ask_again, self.arrivals.next_due) if t is not None]
        until = min(times, default=None)
        if not chunks and not self._running:
            return self._idle(until)
        stall = chunks and not self._mixed
        rows = np.zeros(0, np.int64) if stall else self._rows_now()
        growing = self._growing[rows]
        positions = self._offset[rows] + growing * self._decodes
        repeat = 1
        if self._lengths_known and not chunks:
            repeat = self._ends[0][0] - self._decodes
        released, self._released = tuple(self._released), []
        admitted, self._admitted = tuple(self._admitted), []
        return Plan(chunks, rows, positions, growing, released, repeat, until, admitted)

    def apply(
        self, plan: Plan, launched: int, stopped: Collection[int] = ()
    ) -> list[tuple[int, Request]]:
        """Advance the requests by ``launched`` passes of ``plan``.

        ``stopped`` lists the slots whose request ended its text in the last of these passes. Return
        (slot, request) for each request that got its last token.
        """
        done: list[tuple[int, Request]] = []
        if len(plan.slots):
            self._decodes += launched
            while self._ends and self._ends[0][0] <= self._decodes:
                _, index, slot = heapq.heappop(self._ends)
                occupant = self._occupant[slot]
                if occupant is not None and occupant.index == index and self._growing[slot]:
                    done.append((slot, self._finish(slot)))
        for chunk in plan.chunks:
            newcomer = self._newcomers[0]
            newcomer.done = chunk.stop
            if not chunk.yields:
                continue
            self._newcomers.popleft()  # chunks are cut in the order of the newcomers
            self._start(chunk)
            if chunk.request.output_tokens == 1:
                done.append((chunk.slot, self._finish(chunk.slot)))
        return done + self.stop(stopped)

    def stop(self, slots: Collection[int]) -> list[tuple[int, Request]]:
        """Finish the requests of these slots, whose text ended in the last pass applied.

        A pass that was launched since then holds their slots: it produces no token for them. Return
        (slot, request) for each.
        """
        return [(slot, self._finish(slot)) for slot in slots if self._growing[slot]]

    # Moves

    def _rows_now(self) -> NDArray[np.int64]:
        if self._rows is None:
            self._rows = self._decoding.nonzero()[0]
        return self._rows

    def _release(self) -> None:
        try:
            released = tuple(self._policy.release(self))
        except (Exception, SystemExit) as error:  # the user's code
            raise fault_of(self._policy, "release", error) from error
        for slot in released:
            if slot not in self.finished:
                raise UsageError(f"a policy released slot {slot}, whose request is not done")
            del self.finished[slot]
            self._occupant[slot] = None
            self._decoding[slot] = False
            heapq.heappush(self._free, slot)
        if released:
            self._released.extend(released)
            self._rows = None

    def _admit(self) -> int | None:
        try:
            chosen, ask_again = self._policy.admit(self)
            count = len(chosen)
        except (Exception, SystemExit) as error:  # the user's code
            raise fault_of(self._policy, "admit", error) from error
        if count > self.free:
            raise UsageError(f"a policy admitted {count} requests into {self.free} slots")
        if chosen:
            chosen = list(chosen)  # it may be the queue itself
            if not all(isinstance(request, Request) for request in chosen):
                raise UsageError("a policy admitted something that is not a request")
            self.waiting.take(chosen)
            for request in chosen:
                slot = heapq.heappop(self._free)
                self._occupant[slot] = request
                self._admitted.append((request, slot))
                self._newcomers.append(_Newcomer(request, slot))
        if not isinstance(ask_again, int | np.integer | None):
            raise UsageError(f"admit returned {shown(ask_again)} as the next time: give ns")
        if ask_again is not None and ask_again <= self.now:
            raise UsageError("admit returned a next time that has passed")
        self._asks = 0 if chosen or self._running or ask_again is None else self._asks + 1
        if self._asks > MOST_ASKS:
            times = f"admitted no request {MOST_ASKS:,} times in a row although nothing runs"
            raise UsageError(f"{self._name} {times}: it would wait forever")
        return ask_again

    def _chunks(self) -> tuple[Chunk, ...]:
        budget = sys.maxsize  # of tokens
        if self._mixed:
            budget = self._max_batched_tokens - len(self._rows_now())
        chunks: list[Chunk] = []
        for newcomer in self._newcomers:  # those beyond the budget stall in their slots
            size = min(budget, newcomer.request.prompt_tokens - newcomer.done)
            stop = newcomer.done + size
            chunks.append(Chunk(newcomer.request, newcomer.slot, newcomer.done, stop))
            budget -= size
            if not budget:
                break
        return tuple(chunks)

    def _start(self, chunk: Chunk) -> None:
        """Let the slot decode, now that its prompt is computed and its first token is known."""
        request, slot = chunk.request, chunk.slot
        self._offset[slot] = request.prompt_tokens - self._decodes
        self._growing[slot] = 1
        self._decoding[slot] = True
        self._rows = None
        self._running += 1
        if request.output_tokens > 1:
            end = self._decodes + request.output_tokens - 1
            heapq.heappush(self._ends, (end, request.index, slot))

    def _finish(self, slot: int) -> Request:
        """Finish the request of a slot; while the slot is held, it recomputes its last position."""
        request = self._occupant[slot]
        assert request is not None
        self._offset[slot] += self._decodes - 1
        self._growing[slot] = 0
        self._running -= 1
        self.finished[slot] = None
        return request

    def _idle(self, until: int | None) -> Wait | None:
        """Return the time of the next event, or None if all is done; nothing runs now."""
        if until is not None:
            return Wait(until)
        if self.waiting:
            fault = "admits no request" if self.free else "releases no slot"
            why = "nothing runs and no more requests will come: it would wait forever"
            raise UsageError(f"{self._name} {fault} although {why}")
        return None
