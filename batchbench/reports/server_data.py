"""The parts of ``result.json`` that only runs against a server have, as types."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict


class ClientData(TypedDict):
    """One of several clients: medians over trials, and the worst delay and clock."""

    node: str
    requests: int
    rate: float | None
    late_p99_ms: float
    clock_offset_ms: float
    clock_within_ms: float


class ClientsData(TypedDict):
    """The clients that shared the requests, and the rate of all of them together."""

    rate: float | None
    each: list[ClientData]


class ServerData(TypedDict):
    """The facts that the server reports, and its own counts of each trial by strategy."""

    name: str
    version: str | None
    slots: int | None
    passes: dict[str, list[int | None]]
    cached_tokens: dict[str, list[int | None]]
    running_before: int | None
    prompt_cache_off: bool | None
    stamps: Literal["kernel", "user"] | None
    clients: NotRequired[ClientsData | None]


class DifferenceData(TypedDict):
    """The first difference of one request between two trials."""

    request: int
    baseline: str
    baseline_trial: int
    strategy: str
    trial: int
    position: int
    expected: str
    found: str


class AgreementData(TypedDict):
    """Outputs of the strategies compared with one another, in requests."""

    by: str
    requests: int
    same: int
    differ: int
    baseline_repeat: int | None
    first: list[DifferenceData]


class FailedRequestData(TypedDict):
    request: int
    kind: str
    phase: str
    text: str
    status: int | None


class FailureData(TypedDict):
    """A trial in which requests failed; its times are not used."""

    strategy: str
    trial: int
    requests: int
    failed: list[FailedRequestData]
