"""Results of a served run beyond its recordings: the server, agreement of outputs, failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from batchbench.errors import BatchbenchError, shown

if TYPE_CHECKING:
    from batchbench.batching.remote.events import Reply

MOST = 10
"""Differences between outputs that are kept."""


@dataclass(frozen=True)
class ServerFacts:
    """The facts that the server reports, and its own counts during the trials.

    ``passes`` and ``cached_tokens`` have one value per finished trial of each strategy; a value is
    None if the server does not tell. ``running_before`` is the largest number of requests of
    others that the server was serving when a trial began.
    """

    name: str  # of the dialect: "llama.cpp", "vllm", …
    version: str | None
    slots: int | None
    passes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    cached_tokens: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    running_before: int | None = None
    prompt_cache_off: bool | None = None  # None: the server has no such option
    clients: tuple[str, ...] = ()  # machines of the clients that shared the requests, if several


def rate_of(sent_ns: Sequence[int]) -> float | None:
    """Return the requests per second between the first and the last; None if there is no time."""
    span_ns = max(sent_ns) - min(sent_ns)
    return (len(sent_ns) - 1) / (span_ns / 1e9) if span_ns else None


@dataclass(frozen=True)
class Difference:
    """The first difference of one request between two trials."""

    request: int
    baseline: str  # strategy and trial whose output is the reference
    baseline_trial: int
    strategy: str
    trial: int
    position: int  # token or character, from 0
    expected: str  # what the baseline has there: a token id, or the text from there on
    found: str


@dataclass(frozen=True)
class Agreement:
    """Comparison of the outputs of the strategies, in requests.

    ``same`` and ``differ`` compare each strategy with the baseline of the same round, and count a
    request as different if it differs in any round. ``baseline_repeat`` is the number of requests
    whose output was the same in all trials of the baseline, which shows the server's own noise;
    None with a single trial.
    """

    by: str  # "token ids" or "text"
    requests: int
    same: int
    differ: int
    baseline_repeat: int | None
    first: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class FailedRequest:
    """A request that failed in a trial."""

    request: int
    kind: str  # a FailureKind of the client
    phase: str  # "before the first token" or "after N tokens"
    text: str
    status: int | None = None

    def __str__(self) -> str:
        return f"request {self.request} failed {self.phase}: {self.text}"


@dataclass(frozen=True)
class FailedTrial:
    """A trial in which requests failed; it is no trial, and its times are not used."""

    strategy: str
    trial: int
    requests: int  # of the workload
    failed: tuple[FailedRequest, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.failed)} of {self.requests} requests failed in trial {self.trial + 1} of "
            f"{self.strategy}; {self.failed[0]}"
        )


class TrialFailed(BatchbenchError):  # noqa: N818  # the name of what happened
    """Requests failed in a trial; ``is_usage`` if the same requests would fail again."""

    exit_code = 1

    def __init__(self, failed: FailedTrial, *, is_usage: bool, text: str | None = None) -> None:
        super().__init__(text or str(failed))
        self.failed, self.is_usage = failed, is_usage

    def __reduce__(self) -> tuple[Any, ...]:  # so that another process can raise it
        return partial(TrialFailed, is_usage=self.is_usage, text=str(self)), (self.failed,)


@dataclass(frozen=True)
class Output:
    """The output of one request; ``ids`` is None if the server tells no token ids."""

    ids: tuple[int, ...] | None
    text: str

    @classmethod
    def of(cls, reply: Reply) -> Output:
        return cls(None if reply.token_ids is None else tuple(reply.token_ids), reply.text)


class Comparison:
    """The comparison of rounds, one after another; outputs of the first round are kept."""

    def __init__(self, strategies: Sequence[str]) -> None:
        self._baseline, *self._others = strategies
        self._first: Sequence[Output] = ()
        self._rounds = 0
        self._by_ids = True
        self._differ, self._restless = set[int](), set[int]()
        self._differences: list[Difference] = []

    def add(self, outputs: Mapping[str, Sequence[Output]]) -> None:
        """Compare one round: the outputs of each strategy, by request."""
        expected, trial = outputs[self._baseline], self._rounds
        for name in self._others:
            for request, first in self._compared(expected, outputs[name]):
                self._differ.add(request)
                if len(self._differences) < MOST:
                    place = (request, self._baseline, trial, name, trial)
                    self._differences.append(Difference(*place, *first))
        if self._rounds:
            self._restless |= {request for request, _ in self._compared(self._first, expected)}
        else:
            self._first = expected
        self._rounds += 1

    def agreement(self) -> Agreement | None:
        """Return the result; None before the first round, and for a single strategy."""
        requests, differ = len(self._first), len(self._differ)
        if not self._rounds or not self._others:
            return None
        return Agreement(
            by="token ids" if self._by_ids else "text",
            requests=requests,
            same=requests - differ,
            differ=differ,
            baseline_repeat=requests - len(self._restless) if self._rounds > 1 else None,
            first=tuple(self._differences),
        )

    def _compared(
        self, expected: Sequence[Output], found: Sequence[Output]
    ) -> Iterator[tuple[int, tuple[int, str, str]]]:
        """Yield each request that differs, with its first difference."""
        for request, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one.ids is None or other.ids is None:
                self._by_ids = False
                difference = _text_difference(one.text, other.text)
            else:
                difference = _id_difference(one.ids, other.ids)
            if difference is not None:
                yield request, difference


def _id_difference(one: Sequence[int], other: Sequence[int]) -> tuple[int, str, str] | None:
    place = _first_difference(one, other)
    if place is None:
        return None
    expected, found = (str(ids[place]) if place < len(ids) else "the end" for ids in (one, other))
    return place, expected, found


def _text_difference(one: str, other: str) -> tuple[int, str, str] | None:
    place = _first_difference(one, other)
    if place is None:
        return None
    expected, found = (shown(t[place:], 20) if place < len(t) else "the end" for t in (one, other))
    return place, expected, found


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
