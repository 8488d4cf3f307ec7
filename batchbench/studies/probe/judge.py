"""Judge observations: pure functions from the times of tokens to a verdict.

Three tests decide: ``joining``, ``steps`` and ``slots``; ``docs/probe.md`` explains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from batchbench.studies.probe.joining import Joining, joining_of
from batchbench.studies.probe.observations import Observations, Pace, pace_of
from batchbench.studies.probe.slots import Burst, burst_of
from batchbench.studies.probe.steps import (
    FEWEST_BEGINNINGS,
    FEWEST_COMPARED,
    WINDOW,
    SharedSteps,
    beginnings_of,
    sends_by_timer,
    shared_steps,
    stretch_of,
)

WAITING_ROUNDS = 3  # rounds in which short requests must wait for the end of the long one
MOST_STRETCHED = 1.5
"""Between chunks of tokens, steps are assumed at equal distances. If a long request is slowed down
by more than this factor, turns of a server could fall on them."""


class Kind(StrEnum):
    """The verdict, as in the JSON file."""

    CONTINUOUS = "continuous"
    STATIC = "static"
    SERIAL = "serial"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """The answer, and what each test saw."""

    kind: Kind
    slots: int | None
    slots_is_lower_bound: bool
    reason: str
    pace: Pace | None
    joining: Joining | None
    shared: SharedSteps | None
    bursts: tuple[Burst, ...]
    busy: tuple[str, ...]


def judge(observations: Observations) -> Verdict:
    """Return the verdict on everything that was observed."""
    pace = pace_of(observations.alone)
    if pace is None:
        reason = _because("no request was answered", observations)
        return Verdict(Kind.UNKNOWN, None, False, reason, None, None, None, (), ())
    joining = joining_of(observations, pace)
    shared = shared_steps(observations, pace)
    bursts = tuple(burst_of(round, pace) for round in observations.bursts)
    busy = tuple(signs_of_others(observations, joining))
    kind, reason = _decide(observations, pace, joining, shared, bursts)
    slots, bound = None, False
    if kind is Kind.UNKNOWN:
        reason = _because(reason, observations)
    else:
        slots, bound = _slots(kind, bursts, shared, observations, busy=bool(busy))
    return Verdict(kind, slots, bound, reason, pace, joining, shared, bursts, busy)


def _because(reason: str, observations: Observations) -> str:
    return f"{reason}; {observations.ended}" if observations.ended else reason


def signs_of_others(observations: Observations, joining: Joining) -> list[str]:
    """Return the signs that other people's requests were served too."""
    signs = []
    if observations.server.others:
        signs.append("the server counted requests of others")
    if joining.loose:
        signs.append("some requests waited for longer than those of the probe explain")
    return signs


def _decide(
    observations: Observations,
    pace: Pace,
    joining: Joining,
    shared: SharedSteps,
    bursts: Sequence[Burst],
) -> tuple[Kind, str]:
    if joining.joined and shared.shown:
        late = [b for b in bursts if len(b.groups) > 1 and not pace.buffered]
        if late and not any(b.midway for b in late):
            return Kind.UNKNOWN, (
                "a request joins a running batch, but a finished one makes no room for the next"
            )
        if pace.chunk > 1 and stretch_of(observations, pace) > MOST_STRETCHED:
            return Kind.UNKNOWN, (
                "tokens arrive in chunks, and requests slow one another down as if they took turns"
            )
        if observations.lag_ns > WINDOW * pace.gap_ns:
            return Kind.UNKNOWN, "this machine was too busy to tell at which step a token arrived"
        if len(beginnings_of(observations)) < FEWEST_BEGINNINGS:
            return Kind.UNKNOWN, (
                "too few requests began on an idle server to exclude that a timer sends the tokens"
            )
        if sends_by_timer(observations, pace):
            return Kind.UNKNOWN, (
                "tokens arrive as if a timer sent them, which would hide the steps; "
                "a busy machine can cause it too"
            )
        return Kind.CONTINUOUS, "requests join a running batch and share its steps"
    if joining.joined:
        return Kind.UNKNOWN, _unshared(joining, shared)
    if joining.refused and not joining.waited:
        return Kind.UNKNOWN, "the server refuses requests while it is serving one"
    if joining.rounds_waited < WAITING_ROUNDS or joining.loose:
        return Kind.UNKNOWN, "too few requests clearly waited or clearly joined"
    if not bursts or any(b.midway for b in bursts):
        return Kind.UNKNOWN, (
            "requests wait for a long one to end, but not for one another"
            if bursts
            else "requests wait for a long one to end, but the slots were not counted"
        )
    if max(b.most for b in bursts) > 1:
        return Kind.STATIC, "requests wait until all requests of the running batch have ended"
    if observations.server.others or (observations.server.slots or 1) > 1:
        return Kind.UNKNOWN, "one request ran at a time, but others may hold the rest of the slots"
    if all(b.sequential for b in bursts):
        return Kind.SERIAL, "each request waits until the one before it has ended"
    return Kind.UNKNOWN, "requests of a burst ended in an order that does not show its slots"


def _unshared(joining: Joining, shared: SharedSteps) -> str:
    if shared.compared < FEWEST_COMPARED:
        return f"only {shared.compared} requests that joined could be compared with a running one"
    if shared.in_turns:
        return "requests overlap, but get their tokens as if in turns: they share no steps"
    return (
        "requests overlap, but too few of them seem to share steps; replicas behind one address, "
        "a timer that sends the tokens, or a busy machine can cause it"
    )


def _slots(
    kind: Kind,
    bursts: Sequence[Burst],
    shared: SharedSteps,
    observations: Observations,
    *,
    busy: bool,
) -> tuple[int, bool]:
    """Return the number of slots, and whether there may be more."""
    least = 2 if kind is Kind.CONTINUOUS else 1
    most = max((b.most for b in bursts), default=least)
    if kind is Kind.SERIAL:
        return 1, False
    exact = [b.most for b in bursts if b.exact]
    replicas = shared.apart > 0
    told = observations.server.slots
    sure = (
        len(exact) > 1
        and set(exact) == {most}
        and not busy
        and not (replicas and kind is Kind.CONTINUOUS)
        and told in (None, most)
    )
    return max(most, least), not sure
