"""Prediction: what one strategy's steps say of another, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import GENERATE_BATCH, ServingSpec
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Ints, Recording
from batchbench.batching.session import Outcome, make_batcher
from batchbench.batching.step_cost import KnownCost, StepCost
from batchbench.errors import UsageError
from batchbench.reports.latency import ttft_ms
from batchbench.workloads import Workload

Floats = NDArray[np.float64]

BLOCKS, FOLDS = 10, 5
"""Each trial's steps in ten blocks, of which two at a time are held out."""

FEWEST_STEPS = 20
"""Fewer steps than this do not tell six coefficients."""

_FIRM = 0.01
"""Weight of the wish that a coefficient be 0. It decides only where the steps do not: where every
pass has eight rows, what a row costs cannot be told from what a pass costs, and is left to that."""

SMALL_SHARE = 0.1
"""Weight of the smaller batches of the warm-up, relative to all steps of the trials. They are few,
and nothing else shows the cost of fewer rows."""

_HUBER = 1.5
"""Residuals beyond this many times their typical size count only in proportion (Huber 1964)."""


@dataclass(frozen=True, eq=False)
class Work:
    """The work of each step of real trials, and its duration; ``[steps]`` each.

    Steps of smaller batches, which belong to no trial, have -1 as their block and trial. ``bends``
    are their numbers of rows, between which a row may cost another time.
    """

    counts: Ints  # [steps, 5]: 1, rows, cached tokens read, prompt tokens, pieces of prompts
    spent_ns: Floats
    block: Ints  # tenth of its trial
    trial: Ints
    longest: int  # tokens of the longest request
    host_ns: float  # outside the steps, for each new decision
    bends: tuple[int, ...] = ()

    @classmethod
    def of(cls, recordings: Iterable[Recording], small: SmallBatches = ()) -> Work:
        """Return all steps of some measured trials.

        Args:
            small: steps of smaller batches, as :func:`small_batches_of` returns them.

        Raises:
            UsageError: they have no steps, or too few.
        """
        real = [r for r in recordings if r.measured and r.num_steps]
        if sum(r.num_steps for r in real) < FEWEST_STEPS:
            raise UsageError(
                f"has too few measured steps (below {FEWEST_STEPS}) to tell what a step costs; "
                "give the result of a batchbench run with more requests, no simulation"
            )
        counts = [counts_of(r) for r in real]
        spent = [(r.step_ends_ns - r.step_starts_ns) for r in real]
        block = [np.arange(len(c)) * BLOCKS // len(c) for c in counts]
        trial = [np.full(len(c), i) for i, c in enumerate(counts)]
        bends: list[int] = []
        if len(small):
            told = np.array(small, np.int64)
            counts.append(np.concatenate([np.ones((len(told), 1), np.int64), told[:, :4]], axis=1))
            spent.append(told[:, 4])
            block.append(np.full(len(told), -1))
            trial.append(np.full(len(told), -1))
            bends = np.unique(told[told[:, 0] > 0, 0]).tolist()
        return cls(
            counts=np.concatenate(counts),
            spent_ns=np.concatenate(spent) * 1.0,
            block=np.concatenate(block),
            trial=np.concatenate(trial),
            longest=max(
                int((r.requests.prompt_tokens + r.requests.output_tokens).max()) for r in real
            ),
            host_ns=float(np.median([_host_ns(r) for r in real])),
            bends=tuple(bends),
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
            self.bends,
        )

    @property
    def in_trials(self) -> NDArray[np.bool_]:
        """Return the steps that are not of smaller batches."""
        chosen: NDArray[np.bool_] = self.trial >= 0
        return chosen

    @cached_property
    def alike(self) -> tuple[Ints, Floats, Floats]:
        """Return steps of equal work as one: counts, their median time, their weight."""
        import pandas as pd  # an error about what is asked should not wait for it

        ours = self.in_trials
        small = max(1.0, SMALL_SHARE * ours.sum() / max(1, (~ours).sum()))
        frame = pd.DataFrame(self.counts).assign(
            spent=self.spent_ns, weight=np.where(ours, 1.0, small)
        )
        grouped = frame.groupby(list(range(self.counts.shape[1])))
        rows, medians = np.array(list(grouped.groups), np.int64), grouped["spent"].median()
        return rows, medians.to_numpy(float), grouped["weight"].sum().to_numpy(float)


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


SmallBatches = Sequence[Sequence[int]]
"""Steps: rows that decode, cached tokens read, prompt tokens, pieces of prompts, nanoseconds."""


def small_batches_of(recordings: Iterable[Recording]) -> list[list[int]]:
    """Return the steps of smaller batches of a warm-up, for a result."""
    return [
        [*counted[1:], spent]
        for r in recordings
        for counted, spent in zip(
            counts_of(r).tolist(), (r.step_ends_ns - r.step_starts_ns).tolist(), strict=True
        )
    ]


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
    features = _features(counts, work.bends)
    if work.bends:  # a pass of prompts alone costs what one with the fewest rows does
        features[:, 4] = 0.0
    scale = np.maximum(np.linalg.norm(features * np.sqrt(size)[:, None], axis=0), 1e-12)
    firm = np.diag(np.where(np.arange(features.shape[1]) > 0, _FIRM, 0.0))
    weight = np.ones(len(spent))
    for _ in range(20):
        root = np.sqrt(size * weight)
        matrix = np.concatenate([features / scale * root[:, None], firm])
        found, _ = nnls(matrix, np.concatenate([spent * root, np.zeros(len(firm))]))
        off = np.abs(spent - features @ (found / scale))
        typical = _median(off, size) / 0.6745  # a standard deviation, were they normal
        weight = np.minimum(1.0, _HUBER * typical / np.maximum(off, 1e-9)) if typical else weight
    step, cached, prompt, chunk, row, *rows = (found / scale).tolist()
    bends = tuple(zip(work.bends, rows, strict=True))
    cost = StepCost(step, row, cached, prompt, chunk, work.host_ns, bends)
    told = spent_of(cost, work.counts)
    level = [
        work.spent_ns[work.trial == t].sum() / told[work.trial == t].sum()
        for t in np.unique(work.trial[work.in_trials])
    ]
    return cost.scaled(float(np.median(level)))


def _features(counts: Ints, bends: Sequence[int]) -> Floats:
    """``[steps, 5 + bends]``: 1, cached, prompt tokens, pieces; rows up to each bend and beyond."""
    rows = counts[:, 1:2]
    edges = np.array([0, *bends])
    wide = np.diff(edges, append=np.iinfo(np.int64).max)
    return np.concatenate([counts[:, [0, 2, 3, 4]], np.clip(rows - edges, 0, wide)], axis=1) * 1.0


def _median(values: Floats, size: Floats) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(size[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])


def spent_of(cost: StepCost, counts: Ints) -> Floats:
    """What steps cost, ``[steps]`` in ns, without the host's time between them."""
    line = [cost.step_ns, cost.cached_ns, cost.prompt_ns, cost.chunk_ns, cost.row_ns]
    slopes = np.array([*line, *(ns for _, ns in cost.bends)])
    told: Floats = _features(counts, [rows for rows, _ in cost.bends]) @ slopes
    return told


def quality_of(work: Work) -> Quality:
    """Predict each tenth of the trials by a fit on the others and on the smaller batches."""
    told = np.empty(len(work.spent_ns))
    for fold in range(FOLDS):
        held = work.in_trials & (work.block % FOLDS == fold)
        if held.any() and not held.all():
            told[held] = spent_of(fit_cost(work.where(~held)), work.counts[held])
    told, work = told[work.in_trials], work.where(work.in_trials)
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


def known_cost(
    source: str, recordings: Iterable[Recording], small: SmallBatches = ()
) -> tuple[KnownCost, Quality]:
    """Return the cost of a step in these trials, and the quality of the fit on held-out steps.

    Args:
        small: steps of smaller batches, as :func:`small_batches_of` returns them.

    Raises:
        UsageError: they have no steps, or too few.
    """
    work = Work.of(recordings, small)
    rows = tuple(np.unique(work.counts[:, 1]).tolist())
    most = int(work.counts[:, 3].max())
    return KnownCost(source, fit_cost(work), rows, most, work.longest), quality_of(work)


def beyond(known: KnownCost, recordings: Sequence[Recording]) -> list[str]:
    """Return words for the parts of simulated trials beyond the steps that were fitted."""
    found = _unseen_rows(known, recordings)
    counts = [_extent(r) for r in recordings]
    prompt, longest = (max(c[i] for c in counts) for i in range(2))
    if prompt > known.prompt_tokens:
        found.append(
            f"up to {prompt:,} prompt tokens in a step (the fit saw up to {known.prompt_tokens:,})"
        )
    if longest > known.longest:
        found.append(f"requests of up to {longest:,} tokens (the fit saw up to {known.longest:,})")
    return found


def _unseen_rows(known: KnownCost, recordings: Sequence[Recording]) -> list[str]:
    """Return words for numbers of rows that are far from every fitted step.

    Between two numbers that were fitted, the larger of which is at most about twice the smaller,
    a straight line holds.
    """
    seen = sorted({rows for rows in known.rows if rows})
    decoding = np.unique(np.concatenate([r.spans.decoding for r in recordings]))
    found = []
    if decoding[-1] > max(known.rows):
        found.append(
            f"up to {decoding[-1]:,} rows decode together (the fit saw up to {max(known.rows):,})"
        )
    for low, high in pairwise([0, *seen]):
        within = decoding[(decoding > low) & (decoding < high)].tolist()
        if within and high > 2 * low + 1:
            rows = f"{_spell_range(within[0], within[-1])} decode together"
            found.append(f"{rows} (the fit saw no step of {_spell_range(low + 1, high - 1)})")
    return found


def _spell_range(low: int, high: int) -> str:
    """``1–3 rows``."""
    if low == high:
        return f"{low:,} row{'s' * (low != 1)}"
    return f"{low:,}–{high:,} rows"


def _extent(recording: Recording) -> tuple[int, int]:
    """Return the most prompt tokens of a step, and the longest request."""
    r, s, c = recording.requests, recording.spans, recording.chunks
    of_chunk = np.repeat(np.arange(len(s.chunks)), s.chunks)
    prompt = np.bincount(of_chunk, c.stop - c.start, minlength=1)
    longest = r.prompt_tokens + r.output_tokens
    return int(prompt.max()), int(longest.max())


def predict_outcome(outcome: Outcome) -> dict[str, Any] | None:
    """What the first strategy's trials predict of every strategy; for ``result.json``.

    None of a simulation, where texts end as the model likes, and where too few steps were timed.
    """
    if outcome.experiment.simulated or outcome.workload.stop_at_eos:
        return None
    teacher, trials = next(iter(outcome.recordings.items()))
    try:
        small = small_batches_of(outcome.small_batches)
        known, quality = known_cost(teacher, trials, small)
    except UsageError:
        return None
    told = predict(known, outcome.experiment.serving, outcome.workload)
    return {
        "fitted_on": teacher,
        "cost": known.as_dict(),
        "held_out": quality.as_dict(),
        "strategies": [
            _beside(known, recording, outcome.recordings[recording.header.strategy])
            for recording in told
            if recording.header.strategy in outcome.recordings
        ],
    }


def predict(known: KnownCost, serving: ServingSpec, workload: Workload) -> list[Recording]:
    """A recording a strategy: the workload under the same scheduler, on a virtual clock.

    Not of a strategy that schedules for itself, which no simulation knows.
    """
    engine = SimulatedEngine(known.cost)
    about = {"cost": known.as_dict()}
    return [
        make_batcher(name, serving, engine, about).serve(workload, Watch())
        for name in serving.strategies
        if name != GENERATE_BATCH
    ]


def _beside(known: KnownCost, told: Recording, trials: Sequence[Recording]) -> dict[str, Any]:
    duration = told.duration_ns / 1e9
    measured = float(np.median([trial.duration_ns for trial in trials])) / 1e9
    ttft = np.mean([ttft_ms(trial).mean() for trial in trials])
    return {
        "strategy": told.header.strategy,
        "duration": duration,
        "measured_duration": measured,
        "error": duration / measured - 1,
        "output_throughput": int(told.requests.output_tokens.sum()) / duration,
        "mean_ttft_ms": float(ttft_ms(told).mean()),
        "measured_mean_ttft_ms": float(ttft),
        "extrapolates": beyond(known, [told]),
    }
