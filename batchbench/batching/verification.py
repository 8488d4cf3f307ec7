"""Proof that batching changed nothing: every token is what the model says alone.

A reference pass reads prompt + output of one request, alone and without a cache, and tells at
each position which token the model prefers. If that is the token that was generated, at every
position, then by induction the output is what greedy generation of this prompt alone gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Recording
from batchbench.workloads import Workload


class Deviation(NamedTuple):
    """A position at which the generated token is not the one that the reference prefers.

    ``gap`` is by how much the reference's logit of its own choice exceeds the one of the generated
    token; ``tolerance`` is what the precision cannot tell apart.
    """

    index: int  # type: ignore[assignment]  # tuple.index gives way
    gap: float
    tolerance: float

    @property
    def is_tie(self) -> bool:
        """Whether the two logits are closer than the precision can tell."""
        return self.gap <= self.tolerance


class Reference(Protocol):
    """The model alone."""

    @property
    def name(self) -> str:
        """How it is computed, for the result."""

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32]
    ) -> Sequence[Deviation]:
        """Positions of ``output`` that the model alone would have filled otherwise."""


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
    """What was checked and found; counts are requests, each with its worst verdict."""

    requests_checked: int
    identical: int
    numerical_ties: int
    wrong: int
    reference: str | None
    max_logit_gap: float | None
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether no request is wrong; None where none was checked."""
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

    A sequence that begins another one of the same prompt is checked with it. With ``limit``, that
    many requests are checked, spread evenly over the queue; with ``chosen``, these.
    """
    if chosen is None:
        count = len(workload) if limit is None else min(limit, len(workload))
        chosen = np.unique(np.linspace(0, len(workload) - 1, count).round().astype(int)).tolist()
    if not chosen:
        return NOT_VERIFIED
    checker = _Checker(reference)
    wanted = {(request, id(r)): r.tokens_of(request) for request in chosen for r in recordings}
    # Longest first, so that what begins another sequence finds it checked.
    for (request, _), tokens in sorted(wanted.items(), key=lambda item: -len(item[1])):
        checker.check(workload.prompt(request), tokens)
    findings: list[Finding] = []
    worst: dict[int, str] = dict.fromkeys(chosen, "identical")
    for request in chosen:
        for recording in recordings:
            tokens = wanted[request, id(recording)]
            found = _count_fault(workload, request, tokens, frozenset(eos), recording)
            if found is None:
                deviations = checker.check(workload.prompt(request), tokens)
                found = _finding(request, recording.header.strategy, deviations)
            if found is None:
                continue
            if worst[request] != "wrong":
                worst[request] = found.verdict
            if not any(
                (f.request, f.strategy, f.verdict) == (request, found.strategy, found.verdict)
                for f in findings
            ):
                findings.append(found)
    verdicts = list(worst.values())
    return Verification(
        requests_checked=len(verdicts),
        identical=verdicts.count("identical"),
        numerical_ties=verdicts.count("numerical tie"),
        wrong=verdicts.count("wrong"),
        reference=reference.name,
        max_logit_gap=max((f.gap for f in findings if f.gap is not None), default=0.0),
        findings=tuple(findings),
    )


class Remembered:
    """A reference that is asked once for each prompt and output, whoever else brings them."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[tuple[bytes, bytes], Sequence[Deviation]] = {}

    @property
    def name(self) -> str:
        return self._reference.name

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32]
    ) -> Sequence[Deviation]:
        key = prompt.tobytes(), output.tobytes()
        if key not in self._known:
            self._known[key] = self._reference.deviations(prompt, output)
        return self._known[key]


class _Checker:
    """Asks the reference once for all sequences of a prompt that begin one another."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[bytes, list[tuple[NDArray[np.int32], Sequence[Deviation]]]] = {}

    def check(self, prompt: NDArray[np.int32], output: NDArray[np.int32]) -> Sequence[Deviation]:
        known = self._known.setdefault(prompt.tobytes(), [])
        for longer, deviations in known:
            # What overflows at its end may, through the attention's sums, spoil all before it.
            reusable = len(longer) == len(output) or all(math.isfinite(d.gap) for d in deviations)
            if reusable and np.array_equal(longer[: len(output)], output):
                return [d for d in deviations if d.index < len(output)]
        deviations = self._reference.deviations(prompt, output)
        known.append((output, deviations))
        return deviations


def _finding(request: int, strategy: str, deviations: Sequence[Deviation]) -> Finding | None:
    if not deviations:
        return None
    wrong = [d for d in deviations if not d.is_tie]
    shown = (wrong or deviations)[0]
    if not math.isfinite(shown.gap):
        reason = f"the model's logits at output token {shown.index} are not finite numbers"
        return Finding(request, strategy, "wrong", shown.index, None, None, reason)
    verdict = "wrong" if wrong else "numerical tie"
    than = "more" if wrong else "less"
    return Finding(
        request,
        strategy,
        verdict,
        shown.index,
        shown.gap,
        shown.tolerance,
        f"output token {shown.index} is not the model's own choice, whose logit is "
        f"{shown.gap:.3g} higher: {than} than the {shown.tolerance:.3g} that the precision leaves "
        "open",
    )


def _count_fault(
    workload: Workload,
    request: int,
    tokens: NDArray[np.int32],
    eos: frozenset[int],
    recording: Recording,
) -> Finding | None:
    """A wrong number of tokens: all that were asked, or up to the first end of text."""
    asked = int(workload.output_tokens[request])
    expected = asked
    if workload.stop_at_eos:
        ends = np.flatnonzero(np.isin(tokens, sorted(eos)))
        expected = min(int(ends[0]) + 1, asked) if len(ends) else asked
    if len(tokens) == expected:
        return None
    return Finding(
        request,
        recording.header.strategy,
        "wrong",
        min(len(tokens), expected),
        None,
        None,
        f"{len(tokens)} output tokens where {expected} are due",
    )
