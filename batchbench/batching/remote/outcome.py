"""Results of a served run beyond its recordings: the server, agreement of outputs, failures.

The typed dictionaries are parts of ``result.json`` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypedDict

from batchbench.errors import BatchbenchError, shown

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
    passes: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    cached_tokens: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    running_before: int | None = None
    prompt_cache_off: bool | None = None  # None: the server has no such option
    clients: tuple[str, ...] = ()  # machines of the clients that shared the requests, if several


# Failures


class FailedRequest(TypedDict):
    """A request that failed in a trial."""

    request: int
    kind: str  # a FailureKind of the client
    phase: str  # "before its first token" or "after N tokens"
    text: str
    status: int | None


class FailedTrial(TypedDict):
    """A trial in which requests failed; it is no trial, and its times are not used."""

    strategy: str
    trial: int
    requests: int  # of the workload
    failed: list[FailedRequest]


def failure_words(trial: FailedTrial, where: str = "") -> str:
    """Return a trial's failures: their number, and the first with its phase and reason."""
    first = trial["failed"][0]
    where = where or f"trial {trial['trial'] + 1:,} of {trial['strategy']}"
    return (
        f"{len(trial['failed']):,} of {trial['requests']:,} requests failed in {where} "
        f"(request {first['request']:,} {first['phase']}: {first['text']})"
    )


class TrialFailed(BatchbenchError):  # noqa: N818  # the name of what happened
    """Requests failed in a trial; ``is_usage`` if the same requests would fail again."""

    exit_code = 1

    def __init__(self, failed: FailedTrial, *, is_usage: bool, where: str = "") -> None:
        super().__init__(failure_words(failed, where))
        self.failed, self.is_usage, self.where = failed, is_usage, where

    def __reduce__(self) -> tuple[Any, ...]:  # so that another process can raise it
        return partial(TrialFailed, is_usage=self.is_usage, where=self.where), (self.failed,)


# Agreement


class Difference(TypedDict):
    """The first difference of one request between two trials."""

    request: int
    baseline: str  # strategy and trial whose output is the reference
    baseline_trial: int
    strategy: str
    trial: int
    position: int  # token or character, from 0
    expected: str  # what the baseline has there: a token id, or the text from there on
    found: str


class Agreement(TypedDict):
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
    first: list[Difference]


class Output(NamedTuple):
    """The output of one request; ``ids`` is None if the server tells no token ids."""

    ids: Sequence[int] | None
    text: str


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
            for request, (position, one, other) in self._differing(expected, outputs[name]):
                self._differ.add(request)
                difference = Difference(
                    request=request,
                    baseline=self._baseline,
                    baseline_trial=trial,
                    strategy=name,
                    trial=trial,
                    position=position,
                    expected=one,
                    found=other,
                )
                self._differences = [*self._differences, difference][:MOST]
        self._first = self._first or expected
        self._restless |= {request for request, _ in self._differing(self._first, expected)}
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
            first=self._differences,
        )

    def _differing(
        self, expected: Sequence[Output], found: Sequence[Output]
    ) -> Iterator[tuple[int, tuple[int, str, str]]]:
        """Yield each request that differs; and where it does, and what both have there."""
        for request, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one.ids is None or other.ids is None:
                self._by_ids = False
                difference = _first_difference(one.text, other.text)
            else:
                difference = _first_difference(one.ids, other.ids)
            if difference is not None:
                yield request, difference


def _first_difference(
    one: str | Sequence[int], other: str | Sequence[int]
) -> tuple[int, str, str] | None:
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    return place, _from(one, place), _from(other, place)


def _from(values: str | Sequence[int], place: int) -> str:
    if place >= len(values):
        return "the end"
    return shown(values[place:], 20) if isinstance(values, str) else str(values[place])
