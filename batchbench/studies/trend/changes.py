"""What a history says: where a series changed its level, by how much, and whether it lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
from scipy import stats

from batchbench.reports.statistics import POWER, Floats, Rule, compare_means, mean_interval
from batchbench.studies.gate.evidence import Answer
from batchbench.studies.trend.history import (
    Entry,
    Line,
    Recount,
    Series,
    TrendSpec,
    higher_is_better,
)

SHORTEST = 3
"""Values of a segment, at least: a single outlier is no change of level."""

_PERMUTATIONS = 5
"""Permutations for each 1/α: four of five may exceed and it is still significant."""

_BATCH = 256

_SLACK = 1e-9  # an equal arrangement adds up to an equal statistic but for its rounding


@dataclass(frozen=True)
class ChangePoint:
    """A change of level before the value ``index``, and its p-value by permutation."""

    index: int
    p_value: float


def fewest_values(alpha: float) -> int:
    """Values from which on the clearest change is found at ``alpha``.

    In the most extreme order all small values come before all large ones, or after them. Its
    p-value must be a quarter of α, as so few permutations tell it only roughly.
    """
    n = 2 * SHORTEST
    while 2 / math.comb(n, n // 2) > alpha / 4:
        n += 1
    return n


def find_changes(values: Sequence[float], alpha: float, seed: int = 0) -> list[ChangePoint]:
    """The change points of a series, in its order.

    Args:
        alpha: probability that any is found where the values come in no order.
        seed: of the permutations, so that the same series gives the same answer.
    """
    series = np.asarray(values, np.float64)
    edges, found = [0, len(series)], dict[int, float]()
    random = np.random.default_rng(seed)
    while True:
        segments = [series[a:b] for a, b in itertools.pairwise(edges)]
        scored = [_best_split(segment[None, :]) for segment in segments]
        scores = [float(score[0]) for score, _ in scored]
        chosen = int(np.argmax(scores))
        if scores[chosen] <= 0:  # all values are equal, or the segments too short to be split
            break
        p_value = _p_value(segments, scores[chosen], alpha, random)
        if p_value > alpha:
            break
        place = edges[chosen] + int(scored[chosen][1][0])
        found[place] = p_value
        edges = sorted([*edges, place])
    return [ChangePoint(place, found[place]) for place in sorted(found)]


def _p_value(
    segments: Sequence[Floats], score: float, alpha: float, random: np.random.Generator
) -> float:
    """Share of the permutations with as large a best split; cut short once it is above α."""
    asked = math.ceil(_PERMUTATIONS / alpha) - 1
    allowed = alpha * (asked + 1) - 1
    long = [segment for segment in segments if len(segment) >= 2 * SHORTEST]
    made = exceeding = 0
    while made < asked and exceeding <= allowed:
        count = min(_BATCH, asked - made)
        best = np.full(count, -np.inf)
        for segment in long:
            mixed = random.permuted(np.broadcast_to(segment, (count, len(segment))), axis=1)
            best = np.maximum(best, _best_split(mixed)[0])
        exceeding += int((best >= score * (1 - _SLACK)).sum())
        made += count
    return (exceeding + 1) / (made + 1)


def _best_split(rows: Floats) -> tuple[Floats, Floats]:
    """The largest energy statistic of each row of ``[rows, n]``, and the split it belongs to.

    With m and k values on the two sides it is mk / (m + k) × (2 × mean distance between them −
    mean distance within the one − within the other).
    """
    count, n = rows.shape
    if n < 2 * SHORTEST:
        return np.full(count, -np.inf), np.zeros(count)
    before = np.zeros_like(rows)  # of each value, the sum of its distances to those before it
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
"""Results at each end that a drift is told from: a quarter of them within these bounds."""

_MORE_IS_LOST = ("forward_passes", "prefill_tokens", "padded_prefill_tokens", "slot_steps")
"""Counters that can only be work; the others say where it went."""


@dataclass(frozen=True)
class Change:
    """A change of level between two results, or from one end of a series to the other.

    Attributes:
        share: new / old − 1 in the metric's own direction; low, high: of it, with 95 % confidence.
        is_loss: whether it is for the worse.
        counts: whether it is beyond the floor too.
    """

    before: Entry
    after: Entry
    share: float
    low: float
    high: float
    p_value: float
    is_loss: bool
    counts: bool
    accepted: bool = False

    @property
    def word(self) -> str:
        """Which way it went: the sign alone does not say."""
        return "worse" if self.is_loss else "better"


@dataclass(frozen=True)
class Segment:
    """Results between two changes: places in the series, and the mean with its 95 % interval."""

    first: int
    last: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Told:
    """What can be told of a series.

    Attributes:
        drift: from its oldest to its newest results; None where there are too few.
        smallest: least change in the middle, as a share, that would probably have been found.
        too_few: how many results it would take, where there are fewer.
    """

    series: Series
    segments: Sequence[Segment]
    changes: Sequence[Change]
    drift: Change | None
    smallest: float | None
    too_few: int | None

    @property
    def newest(self) -> Change | None:
        """The newest change that counts."""
        return next((change for change in reversed(self.changes) if change.counts), None)

    @property
    def losses(self) -> list[Change]:
        """What is lost at its newest end and was not accepted."""
        found = [c for c in (self.newest, self.drift) if c is not None and c.counts]
        lost = [c for c in found if c.is_loss and not c.accepted]
        # The drift over one step says the same a second time.
        return lost[:1]

    @property
    def name(self) -> str:
        """Strategy and metric."""
        return f"{self.series.strategy}.{self.series.metric}"


@dataclass(frozen=True, eq=False)
class Judged:
    """A line, its series, and what changed in its counts."""

    line: Line
    series: Sequence[Told]
    recounts: Sequence[Recount]
    lost_work: Sequence[Recount]


@dataclass(frozen=True, eq=False)
class Trend:
    """All that a history says."""

    lines: Sequence[Judged]
    asked: TrendSpec
    spoiled: Sequence[str]
    alpha: float  # of one test

    @property
    def results(self) -> int:
        """How many were looked at."""
        return sum(len(judged.line.entries) for judged in self.lines)

    @property
    def current(self) -> list[Judged]:
        """The lines that go on: only of them anything is asked."""
        return [judged for judged in self.lines if judged.line.is_current]

    @property
    def answer(self) -> Answer:
        """Failed where a line that goes on lost; passed only where all of them can be told."""
        told = [each for judged in self.current for each in judged.series]
        if any(each.losses for each in told) or any(j.lost_work for j in self.current):
            return Answer.FAILED
        if not told or any(each.too_few for each in told):
            return Answer.UNKNOWN
        return Answer.PASSED

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self.answer is Answer.FAILED:
            return f"LOSS: {'; '.join(_first(list(self._lost()), 3))}."
        told = [each for judged in self.current for each in judged.series]
        short = [each for each in told if each.too_few]
        if not told:
            return "CANNOT TELL: no result of the newest commit has any of the metrics."
        if short:
            least = min(short, key=lambda each: len(each.series.told))
            valid = len(least.series.told)
            return (
                f"CANNOT TELL: {least.name} has {valid} valid result{'s' * (valid != 1)}; it "
                f"takes {least.too_few} to tell a change."
            )
        many = len(told)
        gains = list(self._gained())
        if gains:
            return f"no loss found in {many} series; {'; '.join(_first(gains, 3))}."
        worst = max(each.smallest or 0 for each in told)
        return (
            f"no change found in {many} series over {self.results} results; one of {worst:.1%} in "
            "the middle would probably have been found."
        )

    def _lost(self) -> Iterator[str]:
        for judged in self.current:
            for recount in judged.lost_work:
                yield describe_recount(recount)
            for each in judged.series:
                for loss in each.losses:
                    yield f"{each.name} {describe(loss)}"

    def _gained(self) -> Iterator[str]:
        for judged in self.current:
            for each in judged.series:
                if (newest := each.newest) is not None:
                    accepted = ", accepted" if newest.accepted else ""
                    yield f"{each.name} {describe(newest)}{accepted}"

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "command": "trend",
            "answer": str(self.answer),
            "sentence": self.sentence,
            "floor_percent": self.asked.floor,
            "confidence": self.asked.confidence,
            "alpha_of_one_test": self.alpha,
            "lines": [_line_data(judged) for judged in self.lines],
            "spoiled": list(self.spoiled),
        }


def judge(lines: Sequence[Line], asked: TrendSpec, spoiled: Sequence[str] = ()) -> Trend:
    """Look at every series of every line.

    1 − confidence is shared by all series that are long enough to be split, and in each of them
    by its change points and its drift.
    """
    series = [line.series(asked.metric, asked.strategy) for line in lines]
    tests = sum(len(each.told) >= 2 * SHORTEST for found in series for each in found)
    alpha = (1 - asked.confidence) / 2 / max(tests, 1)
    judged = []
    for line, found in zip(lines, series, strict=True):
        recounts = line.recounts(asked.strategy)
        known = _known_until(line, asked.accept)
        told = [judge_series(each, alpha, asked.floor / 100, known) for each in found]
        judged.append(Judged(line, told, recounts, _lost_work(recounts, known)))
    return Trend(judged, asked, spoiled, alpha)


def judge_series(
    series: Series, alpha: float, floor: float, known_until: datetime | None = None
) -> Told:
    """Split a series where its level changed, and compare its ends.

    Args:
        alpha: probability of any change point without a change, and of a drift without one.
        floor: share beyond which a change counts.
        known_until: changes up to then are accepted, and a drift is told from then on.
    """
    entries = [series.entries[i] for i in series.told]
    logs = np.log([series.values[i].value for i in series.told])
    fewest = fewest_values(alpha)
    if len(logs) < fewest:
        segments = _segments(series, logs, []) if len(logs) else []
        return Told(series, segments, [], None, None, fewest)
    places = find_changes(logs.tolist(), alpha)
    edges = [0, *(place.index for place in places), len(logs)]
    changes = []
    for a, place, b in zip(edges, places, edges[2:], strict=False):
        middle = place.index
        pair = entries[middle - 1], entries[middle]
        change = _change(series.metric, pair, (logs[a:middle], logs[middle:b]), floor)
        accepted = _is_known(pair[1], known_until)
        changes.append(replace(change, p_value=place.p_value, accepted=accepted))
    known = sum(_is_known(entry, known_until) for entry in entries)
    start = max(known - 1, 0)  # the newest of them is of the level that is known
    scatter = np.concatenate([logs[a:b] - logs[a:b].mean() for a, b in _pairs(edges)])
    return Told(
        series,
        _segments(series, logs, [place.index for place in places]),
        changes,
        _drift(series.metric, entries[start:], logs[start:], alpha, floor),
        _smallest(scatter, len(places), alpha, floor),
        None,
    )


def _change(metric: str, pair: tuple[Entry, Entry], sides: tuple[Any, Any], floor: float) -> Change:
    """The change from one set of results to another, by Welch's interval."""
    # Without floor and margin its p-value is of «no change», on the one side.
    decision = compare_means(list(sides[0]), list(sides[1]), Rule(floor=0.0, margin=0.0))
    mean, low, high = decision.estimate, decision.low, decision.high
    assert mean is not None
    assert low is not None
    assert high is not None
    share = math.expm1(mean)
    tail = min(decision.p_value or 0.0, 1 - (decision.p_value or 0.0))
    return Change(
        *pair,
        share,
        math.expm1(low),
        math.expm1(high),
        p_value=2 * tail,
        is_loss=(mean < 0) is higher_is_better(metric),
        counts=abs(share) > floor,
    )


def _drift(
    metric: str, entries: Sequence[Entry], logs: Any, alpha: float, floor: float
) -> Change | None:
    """From the oldest quarter to the newest, both fixed beforehand; None without enough."""
    k = max(_FEWEST_AT_AN_END, min(_MOST_AT_AN_END, len(logs) // 4))
    if len(logs) < 2 * k:
        return None
    pair = entries[0], entries[-1]
    found = _change(metric, pair, (logs[:k], logs[-k:]), floor)
    return replace(found, counts=found.counts and found.p_value <= alpha)


def _smallest(scatter: Any, changes: int, alpha: float, floor: float) -> float:
    """About the least change in the middle of so many values that would be found.

    By the t-test of two halves; permuting the best of all splits costs a little more.
    """
    n, free = len(scatter), max(len(scatter) - 1 - changes, 1)
    deviation = math.sqrt(float(scatter @ scatter) / free)
    needed = float(stats.t.isf(alpha / 2, free) + stats.t.ppf(POWER, free))
    return max(floor, math.expm1(needed * deviation * 2 / math.sqrt(n)))


def _segments(series: Series, logs: Any, places: Sequence[int]) -> list[Segment]:
    found = []
    for a, b in _pairs([0, *places, len(logs)]):
        mean = float(logs[a:b].mean())
        low, high = mean_interval(logs[a:b]) if b - a > 1 else (mean, mean)
        ends = series.told[a], series.told[b - 1]
        found.append(Segment(*ends, *(math.exp(x) for x in (mean, low, high))))
    return found


def _pairs(edges: Sequence[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(edges)


def _known_until(line: Line, accepted: str | None) -> datetime | None:
    """When the newest result of the accepted commit was made; None without."""
    made = [
        entry.created
        for entry in line.entries
        if accepted is not None and entry.commit is not None and entry.commit.startswith(accepted)
    ]
    return max(made, default=None)


def _is_known(entry: Entry, known_until: datetime | None) -> bool:
    return known_until is not None and entry.created <= known_until


def _lost_work(recounts: Sequence[Recount], known_until: datetime | None) -> list[Recount]:
    """Of each counter that can only be work, the newest change if it is one for the worse."""
    newest = {(each.counter, each.strategy): each for each in recounts}
    return [
        each
        for each in newest.values()
        if each.counter in _MORE_IS_LOST
        and not isinstance(each.new, str)
        and not isinstance(each.old, str)
        and each.new > each.old
        and not _is_known(each.after, known_until)
    ]


def _first(texts: Sequence[str], most: int) -> list[str]:
    more = len(texts) - most
    return [*texts[:most], *([f"and {more} more"] if more > 0 else [])]


def describe(change: Change) -> str:
    """A change in a few words."""
    interval = f"95 % CI {change.low:+.1%} to {change.high:+.1%}"
    return f"{change.word} by {change.share:+.1%} ({interval}), {between(change)}"


def between(change: Change | Recount) -> str:
    """The two results that a change lies between."""
    if change.before.label == change.after.label:
        return f"within {change.after.label}"
    return f"{change.before.label} → {change.after.label}"


def describe_recount(recount: Recount) -> str:
    """A changed count in a few words."""
    name = f"{recount.strategy}.{recount.counter}"
    return f"{name} {_spell(recount.old)} → {_spell(recount.new)}, {between(recount)}"


def _spell(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _line_data(judged: Judged) -> dict[str, Any]:
    line = judged.line
    return {
        "facts": dict(line.facts),
        "is_current": line.is_current,
        "left_out_by_last": line.dropped,
        "asked": dict(line.entries[0].asked),
        "machine": dict(line.entries[0].machine),
        "series": [_series_data(told) for told in judged.series],
        "counts": [
            {
                "counter": each.counter,
                "strategy": each.strategy,
                "old": each.old,
                "new": each.new,
                "before": _entry_data(each.before),
                "after": _entry_data(each.after),
                "is_loss": each in judged.lost_work,
            }
            for each in judged.recounts
        ],
    }


def _series_data(told: Told) -> dict[str, Any]:
    series = told.series
    return {
        "metric": series.metric,
        "strategy": series.strategy,
        "higher_is_better": higher_is_better(series.metric),
        "too_few": told.too_few,
        "smallest": told.smallest,
        "drift": None if told.drift is None else _change_data(told.drift),
        "changes": [_change_data(change) for change in told.changes],
        "segments": [vars(segment) for segment in told.segments],
        "points": [
            {**_entry_data(entry), **vars(value)}
            for entry, value in zip(series.entries, series.values, strict=True)
        ],
    }


def _change_data(change: Change) -> dict[str, Any]:
    data: Mapping[str, Any] = vars(change)
    entries = {name: _entry_data(data[name]) for name in ("before", "after")}
    return {**data, **entries, "word": change.word}


def _entry_data(entry: Entry) -> dict[str, Any]:
    return {
        "file": str(entry.file),
        "created_at": entry.created.isoformat(),
        "commit": entry.commit,
        "suspect": list(entry.reasons),
    }
