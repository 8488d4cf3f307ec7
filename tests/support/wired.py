"""Runs against servers of known schedule on an integer clock, without sockets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from batchbench.batching.experiment import Experiment
from batchbench.batching.remote import dialects, wire
from batchbench.batching.remote.exchange import (
    Exchange,
    Failure,
    FailureKind,
    Feed,
    Outgoing,
    Wait,
    Watcher,
)
from support.schedules import Schedule
from support.servers import FakeServer, Manner

URL = "http://127.0.0.1:9"
"""An address at which nothing listens: a fake answers for it."""


@dataclass
class Wired:
    """A fake server in place of the network.

    ``breaks`` maps the number of a trial, warm-up included, to requests that fail in it.
    ``in_flight`` has the largest number of requests in flight of each trial.
    """

    server: FakeServer
    breaks: dict[int, Sequence[int]] = field(default_factory=dict)
    failure: Failure = field(default_factory=lambda: Failure(FailureKind.RESET, "it broke"))
    failures: dict[int, Failure] = field(default_factory=dict)  # of trials with another
    trials: list[list[Exchange]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def exchange(
        self,
        address: object,
        feed: Feed,
        watch: Watcher | None = None,
        *,
        until_ns: int | None = None,
        kernel_stamps: bool = True,
    ) -> list[Exchange]:
        done = self.server.exchange(None, self._noted(feed), watch, kernel_stamps=kernel_stamps)
        for request in self.breaks.get(len(self.trials), ()):
            broken = next(exchange for exchange in done if exchange.index == request)
            failure = self.failures.get(len(self.trials), self.failure)
            done[done.index(broken)] = replace(broken, failure=failure)
        self.trials.append(done)
        return done

    def _noted(self, feed: Feed) -> Feed:
        """Return a feed whose requests are written down in ``bodies``."""
        network = self

        class Noted:
            def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
                answer = feed.next(now_ns, in_flight)
                if isinstance(answer, Outgoing):
                    network.bodies.append(json.loads(answer.body or b"{}"))
                return answer

        return Noted()

    @property
    def in_flight(self) -> list[int]:
        return [most_in_flight(exchanges) for exchanges in self.trials]


Wire = Callable[..., Wired]


def most_in_flight(exchanges: Sequence[Exchange]) -> int:
    """Return the largest number of requests that were in flight at once."""
    changes = [(e.sent_ns, 1) for e in exchanges] + [(e.ended_ns, -1) for e in exchanges]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def wired(
    patch: pytest.MonkeyPatch, schedule: Schedule | None = None, manner: Manner | None = None
) -> Wired:
    """Put a fake server in place of the network until the test ends."""
    network = Wired(FakeServer(schedule, manner))
    patch.setattr(wire, "exchange", network.exchange)
    patch.setattr(dialects, "get", network.server.get)
    return network


def experiment(**options: object) -> Experiment:
    """Return an experiment on the fake server: the notebook's workload, two trials."""
    return Experiment.of({"target": URL}, {"trials": 2, **options})
