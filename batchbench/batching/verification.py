"""Verification that batching changed no output: every token is the model's own choice.

A reference pass computes prompt + output of one request, alone and without a cache, and returns the
token that the model chooses at each position: the one that it prefers or, with sampling, the one
that the request's random stream draws. If that is the generated token at every position, then by
induction the output equals generation of this prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Recording
from batchbench.workloads import Workload
from batchbench.workloads.request import Stream


class Deviation(NamedTuple):
    """A position at which the reference chooses another token than the generated one.

    ``gap`` is the difference between the reference's logits of its own choice and of the generated
    token; ``tolerance`` is the largest difference that the precision may cause. With sampling, the
    logits are those with noise, and ``gap`` is the smallest change of logits for which the
    generated token is drawn.
    """

    index: int  # type: ignore[assignment]  # overrides tuple.index
    gap: float
    tolerance: float

    @property
    def is_tie(self) -> bool:
        """True if the precision alone may explain the gap."""
        return self.gap <= self.tolerance


class Reference(Protocol):
    """The model on its own, without batching."""

    @property
    def name(self) -> str:
        """The method, for the result."""

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: Stream | None = None
    ) -> Sequence[Deviation]:
        """Return the positions of ``output`` for which the model chooses another token.

        ``stream`` draws the tokens of a sampled request; None for a greedy one.
        """


@dataclass(frozen=True)
class Finding:
    """A request whose output is not identical."""

    request: int
    strategy: str
    verdict: str  # "numerical tie" or "wrong"
    index: int  # output token, from 0
    gap: float | None
    tolerance: float | None
    reason: str


@dataclass(frozen=True)
class Verification:
    """The outcome; it counts requests, each by its worst verdict."""

    requests_checked: int
    identical: int
    numerical_ties: int
    wrong: int
    reference: str | None
    max_logit_gap: float | None
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool | None:
        """True if no request is wrong; None if none was checked."""
        return self.wrong == 0 if self.requests_checked else None


NOT_VERIFIED = Verification(0, 0, 0, 0, None, None)


def verify(
    workload: Workload,
    recordings: Sequence[Recording],
    reference: Reference,
    eos: Iterable[int] = (),
    limit: int | None = None,
    chosen: Sequence[int] | None = None,
) -> Verification:
    """Check the outputs of all recordings against the model alone.

    The requests are ``chosen``, or ``limit`` of them spread evenly over the queue, or all. Tokens
    of ``eos`` end a text. A sequence that is the beginning of another one with the same prompt is
    checked with it.
    """
    if chosen is None:
        count = len(workload) if limit is None else min(limit, len(workload))
        chosen = np.unique(np.linspace(0, len(workload) - 1, count).round().astype(int)).tolist()
    if not chosen:
        return NOT_VERIFIED
    reference = Remembered(reference)
    servings = [each for recording in recordings for each in _servings(recording)]
    wanted = {(i, id(r)): (r.tokens_of(i), r) for i in chosen for r in servings}
    # Longest first, so that the beginning of a sequence is checked with it.
    for (request, _), (tokens, _) in sorted(wanted.items(), key=lambda item: -len(item[1][0])):
        reference.deviations(workload.prompt(request), tokens, workload.stream(request))
    found: dict[tuple[int, str, str], Finding] = {}
    for (request, _), (tokens, recording) in wanted.items():
        finding = _finding(workload, request, tokens, recording, reference, sorted(eos))
        if finding is not None:
            found.setdefault((request, finding.strategy, finding.verdict), finding)
    wrong = {finding.request for finding in found.values() if finding.verdict == "wrong"}
    ties = {finding.request for finding in found.values()} - wrong
    checked = len(set(chosen))
    return Verification(
        requests_checked=checked,
        identical=checked - len(ties) - len(wrong),
        numerical_ties=len(ties),
        wrong=len(wrong),
        reference=reference.name,
        max_logit_gap=max((f.gap for f in found.values() if f.gap is not None), default=0.0),
        findings=tuple(found.values()),
    )


def draws_by_itself(recording: Recording) -> bool:
    """Return True if an engine draws tokens from random numbers of its own, not the workload's."""
    return bool(recording.header.about.get("own_random"))


def _servings(recording: Recording) -> list[Recording]:
    """Return the recording of a trial, and its servings with other tokens under the same name."""
    return [recording, *(replace(other, header=recording.header) for other in recording.others)]


class Remembered:
    """A reference that computes a sequence once, together with all its beginnings."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[
            tuple[bytes, Stream | None], list[tuple[NDArray[np.int32], Sequence[Deviation]]]
        ] = {}

    @property
    def name(self) -> str:
        return self._reference.name

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: Stream | None = None
    ) -> Sequence[Deviation]:
        known = self._known.setdefault((prompt.tobytes(), stream), [])
        for longer, deviations in known:
            # An overflow at the end of a sequence may spoil all of it, through attention.
            reusable = len(longer) == len(output) or all(math.isfinite(d.gap) for d in deviations)
            if reusable and np.array_equal(longer[: len(output)], output):
                return [d for d in deviations if d.index < len(output)]
        deviations = self._reference.deviations(prompt, output, stream)
        known.append((output, deviations))
        return deviations


def _finding(
    workload: Workload,
    request: int,
    tokens: NDArray[np.int32],
    recording: Recording,
    reference: Reference,
    eos: Sequence[int],
) -> Finding | None:
    """Return the fault of an output, if any: its number of tokens, or a token.

    With ``--stop-at-eos`` the first end of text ends the output.
    """
    strategy, stream = recording.header.strategy, workload.stream(request)
    expected = int(workload.output_tokens[request])
    if workload.stop_at_eos:
        ends = np.flatnonzero(np.isin(tokens, eos))[:1] + 1
        expected = int(min([expected, *ends]))
    if len(tokens) != expected:
        index = min(len(tokens), expected)
        reason = f"{len(tokens)} output tokens instead of {expected}"
        return Finding(request, strategy, "wrong", index, None, None, reason)
    deviations = reference.deviations(workload.prompt(request), tokens, stream)
    if not deviations:
        return None
    wrong = [d for d in deviations if not d.is_tie]
    index, gap, tolerance = (wrong or deviations)[0]
    if not math.isfinite(gap):
        reason = f"the model's logits at output token {index} are not finite numbers"
        return Finding(request, strategy, "wrong", index, None, None, reason)
    verdict, than = ("wrong", "more") if wrong else ("numerical tie", "less")
    said = f"the model's own choice, whose logit is {gap:.3g} higher"
    if stream is not None:
        said = (
            f"what the model and the random stream draw; logits would have to change by {gap:.3g}"
        )
    reason = (
        f"output token {index} is not {said}: {than} than the {tolerance:.3g} that the precision "
        "may cause"
    )
    return Finding(request, strategy, verdict, index, gap, tolerance, reason)
