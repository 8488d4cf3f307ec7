"""Prediction: step costs fitted on measured trials, and the times that they predict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import nnls

from batchbench.batching.bench import make_batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Ints, Recording
from batchbench.batching.session import Outcome
from batchbench.batching.step_cost import KnownCost, StepCost
from batchbench.errors import UsageError
from batchbench.reports.latency import ttft_ms
from batchbench.reports.occupancy import prompt_tokens_of_spans
from batchbench.reports.result_data import FitQuality, PredictedStrategy, Prediction
from batchbench.reports.statistics import Floats
from batchbench.reports.text import percent, span
from batchbench.reports.time_budget import between_steps
from batchbench.workloads import Workload

BLOCKS, FOLDS = 10, 5
"""Cross-validation: each trial's steps in ten blocks, of which two at a time are left out."""

FEWEST_STEPS = 20
"""Minimum number of steps that can determine six coefficients."""

WEAK_R2, WEAK_ERROR = 0.5, 0.1
"""A fit is too weak to use if its R² is below the one and its median error above the other. If all
steps take nearly the same time, R² is low and the predictions are good."""

_FIRM = 0.01
"""Weight of the pull of each coefficient towards 0. It matters only where the steps do not decide:
if every pass has eight rows, the cost of a row cannot be told from that of a pass, which then gets
all of it."""

SMALL_SHARE = 0.1
"""Weight of the smaller batches of the warm-up, relative to all steps of the trials. They are few,
and nothing else shows the cost of fewer rows."""

_HUBER = 1.5
"""Residuals beyond this many times their typical size count only in proportion (Huber 1964)."""

SmallBatches = Sequence[Sequence[int]]
"""Steps: rows that decode, cached tokens read, prompt tokens, pieces of prompts, nanoseconds."""


# Steps to fit


@dataclass(frozen=True, eq=False)
class StepSample:
    """The work of each step of measured trials, and its duration; ``[steps]`` each.

    Steps of smaller batches belong to no trial and have -1 as their fold and trial.
    """

    counts: Ints  # [steps, 5]: 1, rows, cached tokens read, prompt tokens, pieces of prompts
    spent_ns: Floats
    fold: Ints  # of the cross-validation
    trial: Ints
    longest: int  # tokens of the longest request
    host_ns: float  # outside the steps, for each new decision
    bends: tuple[int, ...] = ()  # numbers of rows at which the cost of a further row changes

    @classmethod
    def of(cls, recordings: Iterable[Recording], small: SmallBatches = ()) -> StepSample:
        """Return all steps of the measured trials, and of smaller batches.

        Raises:
            UsageError: the trials have no steps, or too few.
        """
        real = [r for r in recordings if r.measured and r.num_steps]
        if sum(r.num_steps for r in real) < FEWEST_STEPS:
            raise UsageError(
                f"has too few measured steps (below {FEWEST_STEPS}) to fit the cost of a step; "
                "give the result of a batchbench run with more requests, not of a simulation"
            )
        smaller = np.array(small, np.int64).reshape(-1, 5)
        none = np.full(len(smaller), -1)
        counts = [counts_of(r) for r in real]
        fold = [np.arange(len(c)) * BLOCKS // len(c) % FOLDS for c in counts]
        trial = [np.full(len(c), i) for i, c in enumerate(counts)]
        spent = [r.step_ends_ns - r.step_starts_ns for r in real]
        between = [between_steps(r, r.waits.end_ns)[1] for r in real]
        host = [max(ns, 0) / max(changes_of(r), 1) for r, ns in zip(real, between, strict=True)]
        return cls(
            counts=np.concatenate([*counts, np.insert(smaller[:, :4], 0, 1, axis=1)]),
            spent_ns=np.concatenate([*spent, smaller[:, 4]]) * 1.0,
            fold=np.concatenate([*fold, none]),
            trial=np.concatenate([*trial, none]),
            longest=max(_longest_request(r) for r in real),
            host_ns=float(np.median(host)),
            bends=tuple(np.unique(smaller[smaller[:, 0] > 0, 0]).tolist()),
        )

    def where(self, chosen: NDArray[np.bool_]) -> StepSample:
        columns = ("counts", "spent_ns", "fold", "trial")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    @property
    def in_trials(self) -> NDArray[np.bool_]:
        """Mask of the steps that are not of smaller batches."""
        return self.trial >= 0

    @cached_property
    def grouped(self) -> tuple[Ints, Floats, Floats]:
        """Steps of equal work as one: counts, their median time, their weight."""
        ours = self.in_trials
        small = max(1.0, SMALL_SHARE * ours.sum() / max(1, (~ours).sum()))
        rows, group = np.unique(self.counts, axis=0, return_inverse=True)
        group = group.reshape(-1)
        medians = ndimage.median(self.spent_ns, group, np.arange(len(rows)))
        return rows, medians, np.bincount(group, np.where(ours, 1.0, small)).astype(np.float64)


def counts_of(recording: Recording) -> Ints:
    """Return 1, rows, cached tokens read, prompt tokens, pieces of prompts, ``[steps, 5]``.

    They come from the log of plans alone and are those that ``StepCost.of_plan`` uses.
    """
    r, s = recording.requests, recording.spans
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
    prompts, pieces = np.repeat([prompt_tokens_of_spans(recording)[0], s.chunks], s.steps, axis=1)
    return np.stack([np.ones_like(rows), rows, rows * longest, prompts, pieces], axis=1)


def small_batches_of(recordings: Iterable[Recording]) -> list[list[int]]:
    """Return the steps of smaller batches of a warm-up, for ``result.json``."""
    columns = ([counts_of(r)[:, 1:], r.step_ends_ns - r.step_starts_ns] for r in recordings)
    return [step for of_trial in columns for step in np.column_stack(of_trial).tolist()]


def _longest_request(recording: Recording) -> int:
    r = recording.requests
    return int((r.prompt_tokens + r.output_tokens).max())


def changes_of(recording: Recording) -> int:
    """Return the number of new decisions: prompts in this pass or the last, or a request left."""
    r, s, first = recording.requests, recording.spans, recording.first_steps
    new = (s.chunks > 0) | np.concatenate([[True], s.chunks[:-1] > 0])
    new |= np.isin(first, r.last + 1) | np.isin(first, r.released)
    return int(new.sum())


# The fit


def fit_cost(work: StepSample) -> StepCost:
    """Return the coefficients, none negative, that fit the steps' times best.

    Least squares over groups of equal steps, weighted by their number and by Huber's function of
    the residual, so that a step in which another process ran does not bend the line. Such steps
    are part of a run's time, so the whole is then scaled to the time that trials took.
    """
    counts, spent, size = work.grouped
    features = _features(counts, work.bends)
    if work.bends:  # a pass of prompts alone costs what one with the fewest rows does
        features[:, 4] = 0.0
    scale = np.maximum(np.linalg.norm(features * np.sqrt(size)[:, None], axis=0), 1e-12)
    firm = np.diag(np.where(np.arange(features.shape[1]) > 0, _FIRM, 0.0))
    weight = np.ones(len(spent))
    for _ in range(20):
        root = np.sqrt(size * weight)
        matrix = np.concatenate([features / scale * root[:, None], firm])
        solution, _ = nnls(matrix, np.concatenate([spent * root, np.zeros(len(firm))]))
        error = np.abs(spent - features @ (solution / scale))
        order = np.argsort(error)
        upto = np.cumsum(size[order])
        middle = float(error[order][np.searchsorted(upto, upto[-1] / 2)])
        typical = middle / 0.6745  # a standard deviation, if they are normal
        weight = np.minimum(1.0, _HUBER * typical / np.maximum(error, 1e-9)) if typical else weight
    step, cached, prompt, chunk, row, *rows = (solution / scale).tolist()
    bends = tuple(zip(work.bends, rows, strict=True))
    cost = StepCost(step, row, cached, prompt, chunk, work.host_ns, bends)
    predicted = spent_of(cost, work.counts)
    trials = [work.trial == trial for trial in np.unique(work.trial[work.in_trials])]
    levels = [work.spent_ns[trial].sum() / predicted[trial].sum() for trial in trials]
    return cost.scaled(float(np.median(levels)))


def _features(counts: Ints, bends: Sequence[int]) -> Floats:
    """Return 1, cached, prompt tokens, pieces; rows up to each bend, ``[steps, 5 + bends]``."""
    rows = counts[:, 1:2]
    edges = np.array([0, *bends])
    wide = np.diff(edges, append=np.iinfo(np.int64).max)
    return np.concatenate([counts[:, [0, 2, 3, 4]], np.clip(rows - edges, 0, wide)], axis=1) * 1.0


def spent_of(cost: StepCost, counts: Ints) -> Floats:
    """Return the time of steps, ``[steps]`` in ns, without the host's time between them."""
    line = [cost.step_ns, cost.cached_ns, cost.prompt_ns, cost.chunk_ns, cost.row_ns]
    slopes = np.array([*line, *(ns for _, ns in cost.bends)])
    spent: Floats = _features(counts, [rows for rows, _ in cost.bends]) @ slopes
    return spent


def quality_of(work: StepSample) -> FitQuality:
    """Predict each fifth of the trials by a fit on the others and on the smaller batches."""
    predicted = np.empty(len(work.spent_ns))
    for fold in range(FOLDS):
        left_out = work.fold == fold
        if left_out.any() and not left_out.all():
            cost = fit_cost(work.where(~left_out))
            predicted[left_out] = spent_of(cost, work.counts[left_out])
    predicted, spent = predicted[work.in_trials], work.spent_ns[work.in_trials]
    error = np.abs(predicted / spent - 1)
    spread = ((spent - spent.mean()) ** 2).sum()
    return {
        "steps": len(spent),
        "r2": float(1 - ((spent - predicted) ** 2).sum() / spread) if spread else None,
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "worst_error": float(error.max()),
        "total_error": float(predicted.sum() / spent.sum() - 1),
    }


def is_weak(fit: FitQuality) -> bool:
    return fit["r2"] is not None and fit["r2"] < WEAK_R2 and fit["median_error"] > WEAK_ERROR


def describe_fit(fit: FitQuality, source: str) -> str:
    """Return the quality of a fit in a sentence; ``source`` names the steps, such as ``static``."""
    head = f"Step-cost fit on {fit['steps']:,} {source} steps (cross-validated)"
    errors = f"median error {percent(fit['median_error'], 1)} per step"
    if is_weak(fit):
        return f"{head}: too weak to predict with (R² {fit['r2']:.2f}, {errors})."
    if fit["r2"] is not None and fit["r2"] >= WEAK_R2:
        errors = f"R² {fit['r2']:.2f}, {errors}"
    return f"{head}: {errors}, {percent(fit['total_error'], 1, '+')} in total."


def known_cost(
    source: str, recordings: Iterable[Recording], small: SmallBatches = ()
) -> tuple[KnownCost, FitQuality]:
    """Return the cost of a step in these trials, and the quality of the fit.

    Raises:
        UsageError: they have no steps, or too few.
    """
    work = StepSample.of(recordings, small)
    rows = tuple(np.unique(work.counts[:, 1]).tolist())
    most = int(work.counts[:, 3].max())
    return KnownCost(source, fit_cost(work), rows, most, work.longest), quality_of(work)


# Extrapolation


def beyond(known: KnownCost, recordings: Sequence[Recording]) -> list[str]:
    """Return in words the parts of simulated trials that lie beyond the fitted steps."""
    parts = _unseen_rows(known, recordings)
    prompt = max(int(prompt_tokens_of_spans(r)[0].max()) for r in recordings)
    longest = max(_longest_request(r) for r in recordings)
    if prompt > known.prompt_tokens:
        parts.append(
            f"up to {prompt:,} prompt tokens in a step (the fit saw up to {known.prompt_tokens:,})"
        )
    if longest > known.longest:
        parts.append(f"requests of up to {longest:,} tokens (the fit saw up to {known.longest:,})")
    return parts


def _unseen_rows(known: KnownCost, recordings: Sequence[Recording]) -> list[str]:
    """Return in words the numbers of rows that are far from every fitted step.

    A straight line holds between two fitted numbers, if the larger is at most about twice the
    smaller.
    """
    decoding = np.unique(np.concatenate([r.spans.decoding for r in recordings]))
    parts, most = [], max(known.rows)
    if decoding[-1] > most:
        parts.append(f"up to {decoding[-1]:,} rows decode together (the fit saw up to {most:,})")
    for low, high in pairwise(sorted({0, *known.rows})):
        within = decoding[(decoding > low) & (decoding < high)].tolist()
        if within and high > 2 * low + 1:
            rows, unseen = _rows(within[0], within[-1]), _rows(low + 1, high - 1)
            parts.append(f"{rows} decode together (the fit saw no step of {unseen})")
    return parts


def _rows(low: int, high: int) -> str:
    return f"{span(low, high)} row{'s' * (high > 1)}"


# Predictions


def predict_outcome(outcome: Outcome) -> Prediction | None:
    """Predict every strategy from the first strategy's trials, for ``result.json``.

    None for a simulation, for texts that end early, and for too few measured steps.
    """
    if outcome.experiment.simulated or outcome.workload.stop_at_eos:
        return None
    fitted_on, trials = next(iter(outcome.recordings.items()))
    try:
        known, quality = known_cost(fitted_on, trials, small_batches_of(outcome.small_batches))
    except UsageError:
        return None
    return {
        "fitted_on": fitted_on,
        "cost": known.as_dict(),
        "held_out": quality,
        "strategies": [
            _beside(known, simulated, outcome.recordings[simulated.header.strategy])
            for simulated in predict(known, outcome.experiment.serving, outcome.workload)
            if simulated.header.strategy in outcome.recordings
        ],
    }


def predict(known: KnownCost, serving: ServingSpec, workload: Workload) -> list[Recording]:
    """Serve the workload under the same scheduler on a virtual clock; one recording per strategy.

    Strategies that schedule by themselves are left out, because no simulation knows them.
    """
    engine = SimulatedEngine(known.cost)
    about = {"cost": known.as_dict()}
    return [
        make_batcher(name, serving, engine, about).serve(workload, Watch())
        for name in serving.policies
    ]


def _beside(
    known: KnownCost, simulated: Recording, trials: Sequence[Recording]
) -> PredictedStrategy:
    duration = simulated.duration_ns / 1e9
    measured = float(np.median([trial.duration_ns for trial in trials])) / 1e9
    return {
        "strategy": simulated.header.strategy,
        "duration": duration,
        "measured_duration": measured,
        "error": duration / measured - 1,
        "output_throughput": int(simulated.requests.output_tokens.sum()) / duration,
        "mean_ttft_ms": float(ttft_ms(simulated).mean()),
        "measured_mean_ttft_ms": float(np.mean([ttft_ms(trial).mean() for trial in trials])),
        "extrapolates": beyond(known, [simulated]),
    }
