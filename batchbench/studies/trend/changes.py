"""Changes in results over time: change points of each series, drifts, and changed counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from scipy import stats

from batchbench.reports.statistics import POWER, Floats, Rule, compare_means, mean_interval
from batchbench.reports.text import interval_percent, percent, plural
from batchbench.studies.gate.evidence import Answer, in_short
from batchbench.studies.trend.history import (
    CountChange,
    Entry,
    Line,
    Series,
    TrendSpec,
    higher_is_better,
)

SHORTEST = 3
"""Minimum number of values in a segment, since a single outlier is not a change of level."""

_PERMUTATIONS = 5
"""Permutations for each 1/α; a change is significant if at most four of five exceed it."""

_BATCH = 256

_SLACK = 1e-9  # equal arrangements have equal statistics except for rounding


@dataclass(frozen=True, order=True)
class ChangePoint:
    """A change of level before the value ``index``, and its p-value by permutation."""

    index: int
    p_value: float


def fewest_values(alpha: float) -> int:
    """Return the minimum number of values at which the clearest change is found at ``alpha``.

    In the most extreme order all small values come before all large ones, or after them. Its
    p-value must be a quarter of α, since few permutations estimate it only roughly.
    """
    n = 2 * SHORTEST
    while 2 / math.comb(n, n // 2) > alpha / 4:
        n += 1
    return n


def find_changes(values: Sequence[float], alpha: float) -> list[ChangePoint]:
    """Return the change points of a series, in its order.

    Args:
        alpha: probability of finding any if the values come in no order.
    """
    series = np.asarray(values, np.float64)
    found: list[ChangePoint] = []
    random = np.random.default_rng(0)  # the same series gives the same answer
    while True:
        edges = [0, *(point.index for point in found), len(series)]
        segments = [series[a:b] for a, b in itertools.pairwise(edges)]
        scored = [_best_split(segment[None, :]) for segment in segments]
        scores = [float(score[0]) for score, _ in scored]
        chosen = int(np.argmax(scores))
        if scores[chosen] <= 0:  # all values are equal, or the segments too short to be split
            return found
        p_value = _p_value(segments, scores[chosen], alpha, random)
        if p_value > alpha:
            return found
        found.append(ChangePoint(edges[chosen] + int(scored[chosen][1][0]), p_value))
        found.sort()


def _p_value(
    segments: Sequence[Floats], score: float, alpha: float, random: np.random.Generator
) -> float:
    """Return the share of permutations with as large a best split; stop once it is above α."""
    wanted = math.ceil(_PERMUTATIONS / alpha) - 1
    allowed = alpha * (wanted + 1) - 1
    long = [segment for segment in segments if len(segment) >= 2 * SHORTEST]
    made = exceeding = 0
    while made < wanted and exceeding <= allowed:
        count = min(_BATCH, wanted - made)
        best = np.full(count, -np.inf)
        for segment in long:
            mixed = random.permuted(np.broadcast_to(segment, (count, len(segment))), axis=1)
            best = np.maximum(best, _best_split(mixed)[0])
        exceeding += int((best >= score * (1 - _SLACK)).sum())
        made += count
    return (exceeding + 1) / (made + 1)


def _best_split(rows: Floats) -> tuple[Floats, Floats]:
    """Return the largest energy statistic of each row of ``[rows, n]``, and its split.

    With m and k values on the two sides it is mk / (m + k) × (2 × mean distance between them −
    mean distance within the one − within the other).
    """
    count, n = rows.shape
    if n < 2 * SHORTEST:
        return np.full(count, -np.inf), np.zeros(count)
    before = np.zeros_like(rows)  # sum of distances of each value to those before it
    after = np.zeros_like(rows)
    for i in range(1, n):
        distances = np.abs(rows[:, :i] - rows[:, i : i + 1])
        before[:, i] = distances.sum(axis=1)
        after[:, :i] += distances
    splits = np.arange(SHORTEST, n - SHORTEST + 1)  # values on the left
    left = before.cumsum(axis=1)[:, splits - 1]
    right = after[:, ::-1].cumsum(axis=1)[:, n - splits - 1]
    between = before.sum(axis=1)[:, None] - left - right
    m, k = splits, n - splits
    energy = 2 * between / (m * k) - left / (m * (m - 1) / 2) - right / (k * (k - 1) / 2)
    scores = m * k / n * energy
    best = scores.argmax(axis=1)
    return scores[np.arange(count), best], splits[best].astype(np.float64)


_FEWEST_AT_AN_END, _MOST_AT_AN_END = 4, 20
"""Results at each end that a drift compares: a quarter of all, within these bounds."""

_NEVER = datetime.min.replace(tzinfo=UTC)

_WORK = ("forward_passes", "prefill_tokens", "padded_prefill_tokens", "slot_steps")
"""Counters of which more is worse; the others only show where the work went."""


@dataclass(frozen=True)
class Change:
    """A change of level between two results, or from one end of a series to the other."""

    before: Entry
    after: Entry
    share: float  # new / old − 1 of the metric; low and high bound it with 95 % confidence
    low: float
    high: float
    p_value: float
    is_loss: bool
    counts: bool  # it also exceeds the floor
    accepted: bool = False

    @property
    def word(self) -> str:
        return "worse" if self.is_loss else "better"

    @property
    def text(self) -> str:
        """The change with its interval and the two results."""
        bounds = interval_percent(self.low, self.high)
        text = f"{percent(self.share, 1, '+')}, {self.word} (95 % CI {bounds}), {between(self)}"
        return f"{text}; accepted" if self.accepted else text


@dataclass(frozen=True)
class Segment:
    """Results between two changes: indexes in the series, and the mean with its 95 % interval."""

    first: int
    last: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class SeriesResult:
    """The analysis of a series."""

    series: Series
    segments: Sequence[Segment]
    changes: Sequence[Change] = ()
    drift: Change | None = None  # from its oldest to its newest results; None if they are too few
    smallest: float | None = None  # change in the middle that would probably have been found
    too_few: int | None = None  # number of results needed, if there are fewer

    @property
    def counting(self) -> list[Change]:
        return [change for change in self.changes if change.counts]

    @property
    def newest(self) -> Change | None:
        """The newest change that counts."""
        return self.counting[-1] if self.counting else None

    @property
    def loss(self) -> Change | None:
        """The loss at its newest end, if it was not accepted."""
        for change in (*self.counting[-1:], self.drift):
            if change and change.counts and change.is_loss and not change.accepted:
                return change
        return None

    @property
    def name(self) -> str:
        return f"{self.series.strategy}.{self.series.metric}"


@dataclass(frozen=True, eq=False)
class LineResult:
    """The analysis of a line: its series, and its changed counts."""

    line: Line
    series: Sequence[SeriesResult]
    count_changes: Sequence[CountChange]
    more_work: Sequence[CountChange]  # those that are a loss


@dataclass(frozen=True, eq=False)
class Trend:
    """The analysis of all results; only lines with a result of the newest commit can fail."""

    lines: Sequence[LineResult]
    spec: TrendSpec
    unreadable: Sequence[str]
    alpha: float  # of one test

    @property
    def _series(self) -> list[SeriesResult]:
        return [series for r in self.lines if r.line.is_current for series in r.series]

    @property
    def _losses(self) -> list[str]:
        counts = [c for r in self.lines if r.line.is_current for c in r.more_work]
        losses = [f"{s.name} {s.loss.text}" for s in self._series if s.loss is not None]
        return [*map(describe_count, counts), *losses]

    @property
    def answer(self) -> Answer:
        """FAILED after a loss in a current line; PASSED only if all of them have enough results."""
        if self._losses:
            return Answer.FAILED
        if not self._series or any(series.too_few for series in self._series):
            return Answer.UNKNOWN
        return Answer.PASSED

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self._losses:
            return f"LOSS: {in_short(self._losses)}."
        if not self._series:
            return "CANNOT TELL: no result of the newest commit has any of the metrics."
        if short := [series for series in self._series if series.too_few]:
            least = min(short, key=lambda result: len(result.series.valid))
            valid = plural(len(least.series.valid), "valid result")
            return f"CANNOT TELL: {least.name} has {valid}, but needs {least.too_few}."
        many = len(self._series)
        changes = [f"{s.name} {s.newest.text}" for s in self._series if s.newest is not None]
        if changes:
            return f"no loss found in {many} series; {in_short(changes)}."
        worst = max(result.smallest or 0 for result in self._series)
        results = sum(len(result.line.entries) for result in self.lines)
        return (
            f"no change found in {many} series over {results} results; one of {worst:.1%} in "
            "the middle would probably have been found."
        )

    def as_data(self) -> dict[str, Any]:
        """Return ``trend.json`` as values."""
        return {
            "command": "trend",
            "answer": str(self.answer),
            "sentence": self.sentence,
            "floor_percent": self.spec.floor,
            "confidence": self.spec.confidence,
            "alpha_of_one_test": self.alpha,
            "lines": [_line_data(result) for result in self.lines],
            "spoiled": list(self.unreadable),
        }


def judge(lines: Sequence[Line], spec: TrendSpec, unreadable: Sequence[str] = ()) -> Trend:
    """Analyse every series of every line.

    1 − confidence is shared by all series that are long enough to split, and within each by its
    change points and its drift.
    """
    series = [line.series(spec.metric, spec.strategy) for line in lines]
    tests = sum(len(s.valid) >= 2 * SHORTEST for own in series for s in own)
    alpha = (1 - spec.confidence) / 2 / max(tests, 1)
    results = []
    for line, own in zip(lines, series, strict=True):
        of_commit = (
            e.created
            for e in line.entries
            if spec.accept and (e.commit or "").startswith(spec.accept)
        )
        accepted = max(of_commit, default=_NEVER)
        analysed = [judge_series(s, alpha, spec.floor / 100, accepted) for s in own]
        changes = line.count_changes(spec.strategy)
        newest = {(change.counter, change.strategy): change for change in changes}
        more_work = [
            change
            for change in newest.values()
            if change.counter in _WORK
            and float(change.new) > float(change.old)
            and change.after.created > accepted
        ]
        results.append(LineResult(line, analysed, changes, more_work))
    return Trend(results, spec, unreadable, alpha)


def judge_series(
    series: Series, alpha: float, floor: float, accepted_until: datetime = _NEVER
) -> SeriesResult:
    """Split a series where its level changed, and compare its ends.

    Args:
        alpha: probability of a false change point, and of a false drift.
        floor: share that a change must exceed to count.
        accepted_until: time until which changes are accepted, and from which a drift is measured.
    """
    entries = [series.entries[i] for i in series.valid]
    logs = np.log([series.values[i].value for i in series.valid])
    if len(logs) < (fewest := fewest_values(alpha)):
        segments = _segments(series, logs, [0, len(logs)]) if len(logs) else []
        return SeriesResult(series, segments, too_few=fewest)
    points = find_changes(logs.tolist(), alpha)
    edges = [0, *(point.index for point in points), len(logs)]
    changes = []
    for start, point, end in zip(edges, points, edges[2:], strict=False):
        middle = point.index
        pair = entries[middle - 1], entries[middle]
        change = _change(series.metric, pair, logs[start:middle], logs[middle:end], floor)
        accepted = pair[1].created <= accepted_until
        changes.append(replace(change, p_value=point.p_value, accepted=accepted))
    known = sum(entry.created <= accepted_until for entry in entries)
    start = max(known - 1, 0)  # the newest accepted result is of the accepted level
    parts = [logs[a:b] for a, b in itertools.pairwise(edges)]
    scatter = np.concatenate([part - part.mean() for part in parts])
    return SeriesResult(
        series,
        _segments(series, logs, edges),
        changes,
        _drift(series.metric, entries[start:], logs[start:], alpha, floor),
        _smallest(scatter, len(points), alpha, floor),
    )


def _change(
    metric: str, pair: tuple[Entry, Entry], old: Floats, new: Floats, floor: float
) -> Change:
    """Return the change from one set of logarithms to another, with Welch's interval."""
    # Without floor and margin, the p-value is one-sided for "no change".
    decision = compare_means(old.tolist(), new.tolist(), Rule(floor=0.0, margin=0.0))
    share, low, high = (
        math.expm1(log or 0.0) for log in (decision.estimate, decision.low, decision.high)
    )
    p_value = decision.p_value or 0.0
    return Change(
        *pair,
        share,
        low,
        high,
        p_value=2 * min(p_value, 1 - p_value),
        is_loss=(share < 0) is higher_is_better(metric),
        counts=abs(share) > floor,
    )


def _drift(
    metric: str, entries: Sequence[Entry], logs: Floats, alpha: float, floor: float
) -> Change | None:
    """Compare the oldest quarter with the newest; None if there are too few results."""
    k = max(_FEWEST_AT_AN_END, min(_MOST_AT_AN_END, len(logs) // 4))
    if len(logs) < 2 * k:
        return None
    change = _change(metric, (entries[0], entries[-1]), logs[:k], logs[-k:], floor)
    return replace(change, counts=change.counts and change.p_value <= alpha)


def _smallest(scatter: Floats, changes: int, alpha: float, floor: float) -> float:
    """Estimate the smallest change in the middle of these values that would be found.

    This is the t-test of two halves; permuting the best of all splits needs a little more.
    """
    n, free = len(scatter), max(len(scatter) - 1 - changes, 1)
    deviation = math.sqrt(float(scatter @ scatter) / free)
    needed = float(stats.t.isf(alpha / 2, free) + stats.t.ppf(POWER, free))
    return max(floor, math.expm1(needed * deviation * 2 / math.sqrt(n)))


def _segments(series: Series, logs: Floats, edges: Sequence[int]) -> list[Segment]:
    segments = []
    for a, b in itertools.pairwise(edges):
        mean = float(logs[a:b].mean())
        low, high = mean_interval(logs[a:b]) if b - a > 1 else (mean, mean)
        bounds = (math.exp(value) for value in (mean, low, high))
        segments.append(Segment(series.valid[a], series.valid[b - 1], *bounds))
    return segments


# In words and as JSON


def between(change: Change | CountChange) -> str:
    """Return the two results that a change lies between."""
    if change.before.label == change.after.label:
        return f"within {change.after.label}"
    return f"{change.before.label} → {change.after.label}"


def describe_count(change: CountChange) -> str:
    values = [v if isinstance(v, str) else f"{v:,}" for v in (change.old, change.new)]
    return f"{change.strategy}.{change.counter} {' → '.join(values)}, {between(change)}"


def _line_data(result: LineResult) -> dict[str, Any]:
    line = result.line
    return {
        "facts": dict(line.facts),
        "is_current": line.is_current,
        "left_out_by_last": line.dropped,
        "asked": dict(line.entries[0].setup),
        "machine": dict(line.entries[0].machine),
        "series": [_series_data(series) for series in result.series],
        "counts": [
            {**_change_data(change), "is_loss": change in result.more_work}
            for change in result.count_changes
        ],
    }


def _series_data(result: SeriesResult) -> dict[str, Any]:
    series = result.series
    points = zip(series.entries, series.values, strict=True)
    return {
        "metric": series.metric,
        "strategy": series.strategy,
        "higher_is_better": higher_is_better(series.metric),
        "too_few": result.too_few,
        "smallest": result.smallest,
        "drift": result.drift and _change_data(result.drift),
        "changes": [_change_data(change) for change in result.changes],
        "segments": [vars(segment) for segment in result.segments],
        "points": [{**_entry_data(entry), **vars(value)} for entry, value in points],
    }


def _change_data(change: Change | CountChange) -> dict[str, Any]:
    entries = {"before": _entry_data(change.before), "after": _entry_data(change.after)}
    word = {"word": change.word} if isinstance(change, Change) else {}
    return {**vars(change), **entries, **word}


def _entry_data(entry: Entry) -> dict[str, Any]:
    return {
        "file": str(entry.file),
        "created_at": entry.created.isoformat(),
        "commit": entry.commit,
        "suspect": list(entry.reasons),
    }
