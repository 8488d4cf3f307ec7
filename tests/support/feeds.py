"""Feeds of requests for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence

from batchbench.batching.remote.exchange import Outgoing, Wait

COMPLETIONS = "/v1/completions"


def body(output_tokens: int, prompt: Sequence[int] = (1, 2, 3), **more: object) -> bytes:
    """Return the body of a request for token ids and usage."""
    usage = {"include_usage": True}
    asks = {"prompt": list(prompt), "max_tokens": output_tokens, "stream": True}
    ids = {"logprobs": 1, "return_token_ids": True}
    return json.dumps({**asks, **ids, "stream_options": usage, **more}).encode()


class Fixed:
    """Requests that are due at the start; at most ``at_once`` are in flight."""

    def __init__(
        self, bodies: Sequence[bytes | None], at_once: int = 1 << 30, path: str = COMPLETIONS
    ) -> None:
        self._bodies, self._at_once, self._path = bodies, at_once, path
        self._sent = 0
        self._begun_ns: int | None = None

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if self._begun_ns is None:
            self._begun_ns = now_ns
        if self._sent == len(self._bodies):
            return None
        if in_flight >= self._at_once:
            return Wait()
        self._sent += 1
        index = self._sent - 1
        return Outgoing(index, self._begun_ns, self._bodies[index], self._path)


class Waves(Fixed):
    """Waves of ``at_once`` requests; the next begins when the last one has ended."""

    def __init__(self, bodies: Sequence[bytes | None], at_once: int) -> None:
        super().__init__(bodies)
        self._wave, self._left = at_once, 0

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if self._left == 0:
            if in_flight:
                return Wait()
            self._left = self._wave
        self._left -= 1
        return super().next(now_ns, in_flight)


class Timed:
    """Requests that are due at times after the first call."""

    def __init__(
        self, due_ns: Sequence[int], bodies: Sequence[bytes | None], path: str = COMPLETIONS
    ) -> None:
        self._due_ns, self._bodies, self._path = due_ns, bodies, path
        self._sent = 0
        self._begun_ns: int | None = None

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if self._begun_ns is None:
            self._begun_ns = now_ns
        if self._sent == len(self._bodies):
            return None
        due_ns = self._begun_ns + self._due_ns[self._sent]
        if now_ns < due_ns:
            return Wait(due_ns)
        self._sent += 1
        index = self._sent - 1
        return Outgoing(index, due_ns, self._bodies[index], self._path)
