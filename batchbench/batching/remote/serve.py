"""Strategies on a server: it schedules by itself, and we decide when each request is sent."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Header, Ints, Recording
from batchbench.batching.remote import wire
from batchbench.batching.remote.dialects import Counts, Dialect, growth_of, read_counts
from batchbench.batching.remote.events import ClientLag, Reply, client_lag, parse
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    Failure,
    FailureKind,
    Outgoing,
    Wait,
)
from batchbench.batching.remote.outcome import FailedRequest, FailedTrial, TrialFailed
from batchbench.errors import OutOfTimeError
from batchbench.workloads import Arrivals, Request, Workload

STATIC, CONTINUOUS = "static", "continuous"

_SHOWN_NS = 50_000_000
"""Time between two reports to the display; a report takes longer than a read."""

_HOPELESS = (FailureKind.TIMEOUT, FailureKind.REFUSED, FailureKind.UNREACHABLE)
"""Failures after which a trial sends no more requests, since each would take long to fail."""

_SPARE_BYTES, _BYTES_PER_TOKEN = 1 << 20, 1 << 14
"""Longest response: a token with the probabilities of twenty others has a tenth of it."""


@dataclass(frozen=True)
class Served:
    """A strategy on a server.

    *static* sends waves: up to ``slots`` requests that are due, and the next wave when the last
    one has ended. *continuous* has at most ``slots`` requests in flight; requests that arrive at
    times of their own are sent when they are due, however many there are.

    ``body`` makes the body of a request of the workload that is served. ``share`` lets several
    clients divide a trial whose requests arrive over time; None: this process sends all.
    """

    name: str
    slots: int
    address: Address
    path: str
    dialect: Dialect
    body: Callable[[Workload, Request], bytes]
    until_ns: int | None = None  # end of the time for trials, on the clock of ``wire``
    share: Callable[[Served, Workload, Watch, int], Played] | None = None

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Serve every request of the workload once.

        Raises:
            TrialFailed: a request failed.
        """
        return self.attempt(workload, watch, trial).recording

    def attempt(self, workload: Workload, watch: Watch, trial: int) -> Attempt:
        """Serve the workload and return the recording with what else is known.

        Raises:
            TrialFailed: a request failed.
            OutOfTimeError: the time for trials is up.
        """
        before = read_counts(self.address, self.dialect)
        if self.share is not None and self.clients_share(workload):
            played = self.share(self, workload, watch, trial)
        else:
            played = self.play(workload, watch, trial)
        after = read_counts(self.address, self.dialect)
        growth = growth_of(before, after)
        cached = _sum([reply.cached_tokens for reply in played.replies])
        return Attempt(
            self._recording(workload, played, trial),
            played.replies,
            before,
            growth.get("cached_tokens") if cached is None else cached,
            growth.get("passes"),
        )

    def clients_share(self, workload: Workload) -> bool:
        """Return True if several clients can share the workload without knowing of each other."""
        return self.is_timed(workload) and workload.max_concurrency is None

    def is_timed(self, workload: Workload) -> bool:
        """Return True if each request is sent when it is due, however many are in flight."""
        return bool(workload.due_ns.any()) and self.name == CONTINUOUS

    def play(self, workload: Workload, watch: Watch, trial: int, zero_ns: int = -1) -> Played:
        """Send every request of the workload once, from ``zero_ns`` on, or at once if it is -1.

        Raises:
            TrialFailed: a request failed.
            OutOfTimeError: the time for trials is up.
        """
        feed = _Feed(workload, self, zero_ns, trial, watch)
        gc.collect()  # a collection takes 0.1 s
        gc.disable()
        try:
            exchanges = wire.exchange(self.address, feed, feed.changed, until_ns=self.until_ns)
        finally:
            gc.enable()
        kinds = {exchange.failure.kind for exchange in exchanges if exchange.failure is not None}
        cut_off = len(exchanges) < len(workload) and not feed.stopped
        if self.until_ns is not None and (cut_off or FailureKind.STOPPED in kinds):
            raise OutOfTimeError("the time is up during a trial")
        exchanges = sorted(exchanges, key=lambda exchange: exchange.index)
        replies = [
            parse(
                exchange,
                int(workload.output_tokens[exchange.index]),
                fewer=workload.stop_at_eos,
                ends_with_done=self.dialect.ends_with_done,
            )
            for exchange in exchanges
        ]
        if failed := [(reply, reply.failure) for reply in replies if reply.failure is not None]:
            told = FailedTrial(
                strategy=self.name,
                trial=trial,
                requests=len(workload),
                failed=[_failed(*each) for each in failed],
            )
            raise TrialFailed(told, is_usage=all(failure.is_usage for _, failure in failed))
        return Played(
            replies,
            [reply.token_times_ns - feed.zero_ns for reply in replies],
            [exchange.sent_ns - feed.zero_ns for exchange in exchanges],
            feed.due_ns,
            client_lag(exchanges, replies),
        )

    def _recording(self, workload: Workload, played: Played, trial: int) -> Recording:
        name, version, replies = self.dialect.name, self.dialect.version, played.replies
        ids = [reply.token_ids for reply in replies if reply.token_ids is not None]
        about = {
            "engine": f"{name} {version}" if version else name,
            "client": asdict(played.lag),
            "assumed_times": sum(not reply.itl_known for reply in replies),
            "prompt_tokens_by_server": _sum([reply.usage_input for reply in replies]),
            **({"clients": played.clients} if played.clients else {}),
        }
        return Recording.of_tokens(
            Header.of(self.name, trial, self.slots, workload, about),
            workload,
            ids if len(ids) == len(replies) else None,
            [times.tolist() for times in played.times_ns],
            played.sent_ns,
            due_ns=played.due_ns,
        )


@dataclass(frozen=True, eq=False)
class Played:
    """The requests of a trial that have all been served; one value for each, in ns from the start.

    ``clients`` are the clients that shared them, as JSON values.
    """

    replies: Sequence[Reply]
    times_ns: Sequence[Ints]  # of the tokens of each
    sent_ns: Sequence[int]
    due_ns: Ints
    lag: ClientLag
    clients: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, eq=False)
class Attempt:
    """A trial whose requests have all been served, and the server's own counts of it."""

    recording: Recording
    replies: Sequence[Reply]
    before: Counts  # when the trial began
    cached_tokens: int | None  # prompt tokens, by the usage of each request, else by a counter
    passes: int | None


class _Feed:
    """The requests of one trial, each sent when the strategy lets it, and their progress.

    ``due_ns`` is when each was due, since ``zero_ns``; it is filled in as the trial goes on. The
    trial begins at ``zero_ns``, or with the first call of ``next`` if it is -1. After a failure
    that would repeat, it is ``stopped`` and sends no more.
    """

    def __init__(
        self, workload: Workload, served: Served, zero_ns: int, trial: int, watch: Watch
    ) -> None:
        self._served, self._arrivals, self._watch = served, Arrivals(workload), watch
        self._bodies = [served.body(workload, request) for request in workload]
        self._waiting: deque[Request] = deque()
        self._wave = 0  # requests that the current wave still lacks
        self._unfinished: list[Request] = []
        self._most = len(workload) if served.is_timed(workload) else served.slots
        self._progress = Progress(served.name, trial, served.slots, len(workload))
        self._sent = self._show_ns = 0
        self.zero_ns = zero_ns
        self.due_ns = np.zeros(len(workload), np.int64)
        self.stopped = False

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        """Return the next request, if it may be sent now."""
        if self.zero_ns == -1:
            self.zero_ns = now_ns
        now_ns -= self.zero_ns
        while len(self._unfinished) > in_flight:  # which one finished does not matter to arrivals
            self._arrivals.finished(self._unfinished.pop(), now_ns)
        self._waiting.extend(self._arrivals.due(now_ns))
        if self.stopped or not (self._waiting or self._arrivals.more):
            return None
        if self._waiting and self._may_send(in_flight):
            return self._send(self._waiting.popleft())
        due_ns = self._arrivals.next_due
        return Wait(None if due_ns is None else self.zero_ns + due_ns)

    def _may_send(self, in_flight: int) -> bool:
        if self._served.name != STATIC:
            return in_flight < self._most
        if not self._wave and not in_flight:
            self._wave = min(self._most, len(self._waiting))
        return self._wave > 0

    def _send(self, request: Request) -> Outgoing:
        self._wave -= self._wave > 0
        self._unfinished.append(request)
        self._sent += 1
        self.due_ns[request.index] = request.due_ns
        body, path = self._bodies[request.index], self._served.path
        most = _SPARE_BYTES + _BYTES_PER_TOKEN * (request.prompt_tokens + request.output_tokens)
        return Outgoing(request.index, self.zero_ns + request.due_ns, body, path, most)

    def changed(self, exchange: Exchange) -> None:
        """Count and show a read or the end of a request."""
        progress, now_ns = self._progress, exchange.ended_ns
        if now_ns:
            progress.done += 1
            failure = exchange.failure
            self.stopped |= failure is not None and failure.kind in _HOPELESS
        else:
            now_ns = exchange.reads[-1].read_ns
            progress.tokens += 1  # nearly so: the bytes are parsed after the trial
        if now_ns >= self._show_ns:
            self._show_ns = now_ns + _SHOWN_NS
            progress.now_ns = now_ns - self.zero_ns
            progress.slots_in_use = min(self._sent - progress.done, progress.slots)
            self._watch.progressed(progress)


def _failed(reply: Reply, failure: Failure) -> FailedRequest:
    count = reply.output_tokens or sum(chunk.tokens or 1 for chunk in reply.chunks)
    return FailedRequest(
        request=reply.index,
        kind=failure.kind.value,
        phase=f"after {count:,} tokens" if count else "before its first token",
        text=failure.text,
        status=failure.status,
    )


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
