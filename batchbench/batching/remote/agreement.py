"""Agreement of outputs: each strategy against the baseline, and the baseline against itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchbench.batching.remote.events import Reply
from batchbench.batching.remote.outcome import Agreement, Difference
from batchbench.errors import shown

MOST = 10
"""Differences that are kept."""


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
