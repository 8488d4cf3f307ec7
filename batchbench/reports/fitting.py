"""What a step costs, fitted on the steps of real runs (docs/prediction.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from batchbench.batching.cost import KnownCost, StepCost
from batchbench.batching.recording import Ints, Recording
from batchbench.errors import UsageError

Floats = NDArray[np.float64]

BLOCKS, FOLDS = 10, 5
"""Each trial's steps in ten blocks, of which two at a time are held out."""

FEWEST_STEPS = 20
"""Fewer steps than this do not tell six coefficients."""

_FIRM = 0.01
"""Weight of the wish that a coefficient be 0. It decides only where the steps do not: where every
pass has eight rows, what a row costs cannot be told from what a pass costs, and is left to that."""

_HUBER = 1.5
"""Residuals beyond this many times their typical size count only in proportion (Huber 1964)."""


@dataclass(frozen=True, eq=False)
class Work:
    """What each step of real trials computed, and how long it took; ``[steps]`` each."""

    counts: Ints  # [steps, 5]: 1, rows, cached tokens read, prompt tokens, pieces of prompts
    spent_ns: Floats
    block: Ints  # tenth of its trial
    trial: Ints
    longest: int  # tokens of the longest request
    host_ns: float  # outside the steps, for each new decision

    @classmethod
    def of(cls, recordings: Iterable[Recording]) -> Work:
        """All steps of some trials that were measured.

        Raises:
            UsageError: they tell no steps, or too few.
        """
        real = [r for r in recordings if r.measured and r.num_steps]
        if sum(r.num_steps for r in real) < FEWEST_STEPS:
            raise UsageError(
                f"has too few measured steps (below {FEWEST_STEPS}) to tell what a step costs; "
                "give the result of a batchbench run with more requests, no simulation"
            )
        counts = [counts_of(r) for r in real]
        return cls(
            counts=np.concatenate(counts),
            spent_ns=np.concatenate([(r.step_ends_ns - r.step_starts_ns) for r in real]) * 1.0,
            block=np.concatenate([np.arange(len(c)) * BLOCKS // len(c) for c in counts]),
            trial=np.repeat(np.arange(len(real)), [len(c) for c in counts]),
            longest=max(
                int((r.requests.prompt_tokens + r.requests.output_tokens).max()) for r in real
            ),
            host_ns=float(np.median([_host_ns(r) for r in real])),
        )

    def where(self, chosen: NDArray[np.bool_]) -> Work:
        """Some of the steps."""
        return Work(
            self.counts[chosen],
            self.spent_ns[chosen],
            self.block[chosen],
            self.trial[chosen],
            self.longest,
            self.host_ns,
        )

    @cached_property
    def alike(self) -> tuple[Ints, Floats, Floats]:
        """Steps that computed as much, as one: counts, their median time, how many they are."""
        import pandas as pd  # an error about what is asked should not wait for it

        frame = pd.DataFrame(self.counts).assign(spent=self.spent_ns)
        grouped = frame.groupby(list(range(self.counts.shape[1])))["spent"].agg(["median", "size"])
        rows = np.array(grouped.index.tolist(), np.int64)
        return rows, grouped["median"].to_numpy(float), grouped["size"].to_numpy(float)


def counts_of(recording: Recording) -> Ints:
    """``[steps, 5]``: 1, rows that decode, cached tokens read, prompt tokens, pieces of prompts.

    From the log of plans alone; the same numbers from which ``StepCost.of_plan`` reckons.
    """
    r, s, c = recording.requests, recording.spans, recording.chunks
    rows = np.repeat(s.decoding, s.steps)
    decodes = np.cumsum(rows > 0)
    longest = np.zeros(len(rows), np.int64)
    final = r.prompt_tokens + r.output_tokens - 1
    for first, released, prompt, most in zip(
        r.first.tolist(), r.released.tolist(), r.prompt_tokens.tolist(), final.tolist(), strict=True
    ):
        held = slice(first + 1, released)
        seen = np.minimum(decodes[held] - decodes[first] + prompt, most)
        np.maximum(longest[held], seen, out=longest[held])
    longest[rows == 0] = 0
    of_chunk = np.repeat(recording.first_steps, s.chunks)
    prompt = np.bincount(of_chunk, c.stop - c.start, minlength=len(rows)).astype(np.int64)
    return np.stack(
        [np.ones_like(rows), rows, rows * longest, prompt, np.repeat(s.chunks, s.steps)], axis=1
    )


def _host_ns(recording: Recording) -> float:
    """Mean time outside the steps and not waiting, for each decision that changed something."""
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    outside = np.maximum(starts - np.concatenate([[0], ends[:-1]]), 0).sum()
    waited = (recording.waits.end_ns - recording.waits.start_ns).sum()
    return float(max(outside - waited, 0) / max(changes_of(recording), 1))


def changes_of(recording: Recording) -> int:
    """Decisions that were new: a prompt in this pass or the last, or somebody done or released."""
    r, s, first = recording.requests, recording.spans, recording.first_steps
    new = (s.chunks > 0) | np.concatenate([[True], s.chunks[:-1] > 0])
    new |= np.isin(first, r.last + 1) | np.isin(first, r.released)
    return int(new.sum())


@dataclass(frozen=True)
class Quality:
    """How well a fit tells steps that were held out of it."""

    steps: int
    r2: float | None  # None where all steps took the same
    median_error: float  # of a step's time, as a share
    p90_error: float
    worst_error: float
    total_error: float  # of all of them together, with its sign

    def as_dict(self) -> dict[str, Any]:
        """For a result."""
        return asdict(self)


def fit_cost(work: Work) -> StepCost:
    """Coefficients, none negative, that tell the steps' times best.

    Least squares over groups of like steps, weighted by their number and, so that a step in which
    something else ran does not bend the line, by Huber's function of the residual. As such steps
    are part of what a run takes, the whole is then stretched to the time that trials took.
    """
    counts, spent, size = work.alike
    scale = np.maximum(np.linalg.norm(counts * np.sqrt(size)[:, None], axis=0), 1e-12)
    firm = np.diag(np.where(np.arange(counts.shape[1]) > 0, _FIRM, 0.0))
    weight = np.ones(len(spent))
    for _ in range(20):
        root = np.sqrt(size * weight)
        matrix = np.concatenate([counts / scale * root[:, None], firm])
        found, _ = nnls(matrix, np.concatenate([spent * root, np.zeros(len(firm))]))
        off = np.abs(spent - counts @ (found / scale))
        typical = _median(off, size) / 0.6745  # a standard deviation, were they normal
        weight = np.minimum(1.0, _HUBER * typical / np.maximum(off, 1e-9)) if typical else weight
    found = found / scale
    told = work.counts @ found
    trials = np.unique(work.trial)
    level = [work.spent_ns[work.trial == t].sum() / told[work.trial == t].sum() for t in trials]
    step, row, cached, prompt, chunk = found.tolist()
    cost = StepCost(step, row, cached, prompt, chunk, work.host_ns)
    return cost.scaled(float(np.median(level)))


def _median(values: Floats, size: Floats) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(size[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])


def spent_of(cost: StepCost, counts: Ints) -> Floats:
    """What steps cost, ``[steps]`` in ns, without the host's time between them."""
    line = [cost.step_ns, cost.row_ns, cost.cached_ns, cost.prompt_ns, cost.chunk_ns]
    told: Floats = counts @ np.array(line)
    return told


def quality_of(work: Work) -> Quality:
    """Each tenth of the trials told by a fit on the others."""
    told = np.empty(len(work.spent_ns))
    for fold in range(FOLDS):
        held = work.block % FOLDS == fold
        if held.any() and not held.all():
            told[held] = spent_of(fit_cost(work.where(~held)), work.counts[held])
    off = np.abs(told / work.spent_ns - 1)
    spread = ((work.spent_ns - work.spent_ns.mean()) ** 2).sum()
    return Quality(
        steps=len(told),
        r2=float(1 - ((work.spent_ns - told) ** 2).sum() / spread) if spread else None,
        median_error=float(np.median(off)),
        p90_error=float(np.quantile(off, 0.9)),
        worst_error=float(off.max()),
        total_error=float(told.sum() / work.spent_ns.sum() - 1),
    )


def known_cost(source: str, recordings: Iterable[Recording]) -> tuple[KnownCost, Quality]:
    """What these trials teach, and how well it tells steps held out.

    Raises:
        UsageError: they tell no steps, or too few.
    """
    work = Work.of(recordings)
    rows = tuple(np.unique(work.counts[:, 1]).tolist())
    most = int(work.counts[:, 3].max())
    return KnownCost(source, fit_cost(work), rows, most, work.longest), quality_of(work)


def cost_of(source: str, recordings: Mapping[str, Sequence[Recording]]) -> KnownCost:
    """What all trials of a result teach."""
    return known_cost(source, (r for trials in recordings.values() for r in trials))[0]


def beyond(known: KnownCost, recordings: Iterable[Recording]) -> list[str]:
    """In what simulated trials go beyond the steps that the cost was fitted on."""
    found = []
    counts = [_extent(r) for r in recordings]
    rows, prompt, longest = (max(c[i] for c in counts) for i in range(3))
    seen = max(known.rows)
    if rows > seen:
        found.append(f"up to {rows:,} rows decode together (the fit saw up to {seen:,})")
    if prompt > known.prompt_tokens:
        found.append(
            f"up to {prompt:,} prompt tokens in a step (the fit saw up to {known.prompt_tokens:,})"
        )
    if longest > known.longest:
        found.append(f"requests of up to {longest:,} tokens (the fit saw up to {known.longest:,})")
    return found


def _extent(recording: Recording) -> tuple[int, int, int]:
    """Most rows and prompt tokens of a step, and the longest request."""
    r, s, c = recording.requests, recording.spans, recording.chunks
    of_chunk = np.repeat(np.arange(len(s.chunks)), s.chunks)
    prompt = np.bincount(of_chunk, c.stop - c.start, minlength=1)
    longest = r.prompt_tokens + r.output_tokens
    return int(s.decoding.max()), int(prompt.max()), int(longest.max())
