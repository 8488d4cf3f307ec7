"""Results of a served run beyond its recordings: the server, agreement of outputs, failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchbench.errors import BatchbenchError


@dataclass(frozen=True)
class ServerFacts:
    """The server, by its own word, and its own counts during the trials.

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
