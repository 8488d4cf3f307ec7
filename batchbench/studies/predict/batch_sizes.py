"""Prediction of other batch sizes: one workload served with each number of slots, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports import metrics
from batchbench.reports.figures import card as cards
from batchbench.reports.figures import picture_files
from batchbench.reports.formats.terminal import make_table
from batchbench.reports.prediction import beyond, predict
from batchbench.reports.result_data import metric
from batchbench.reports.text import clean_text, joined, number, percent, plural
from batchbench.studies.predict.fitted import FittedRun
from batchbench.workloads import Workload

SCHEMA_VERSION = 1

NEARLY_ALL = 0.95
"""Share of the best throughput with which a batch size suffices."""

STILL_GAINS = 0.10
"""Gain of the last doubling of slots above which the best lies at the edge of the range."""

BATCHES = 8
"""Batches of requests at the largest batch size, at least, if all are there at the start.

With fewer, most of the time would be the beginning and the end.
"""

MOST_ROWS = 14
"""Batch sizes that a terminal shows; predict.csv has all."""


@dataclass(frozen=True)
class Point:
    strategy: str
    batch_size: int
    duration: float
    output_throughput: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float | None
    p99_e2el_ms: float
    seen: bool  # no step goes beyond the fitted ones
    measured: bool  # the batch size of the run itself
    beyond: tuple[str, ...]  # in which respects a step does


@dataclass(frozen=True, eq=False)
class Curve:
    """Predictions for all batch sizes, the points of each strategy by batch size."""

    fitted: FittedRun
    points: Sequence[Point]
    requests: int
    measured: int  # the batch size of the run that the costs are from

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(p.strategy for p in self.points))

    @property
    def title(self) -> str:
        return f"{self.fitted.place} · {self.requests:,} requests · predicted"

    def of(self, strategy: str) -> list[Point]:
        return [p for p in self.points if p.strategy == strategy]

    def sufficient(self, strategy: str) -> int:
        """Return the fewest slots with nearly all of the best throughput."""
        points = self.of(strategy)
        most = max(p.output_throughput for p in points)
        return next(p.batch_size for p in points if p.output_throughput >= NEARLY_ALL * most)

    def last_doubling(self, strategy: str) -> tuple[int, int, float] | None:
        """Return the last doubling of slots and the throughput that it adds, as a share."""
        *_, last = points = self.of(strategy)
        half = [p for p in points if 2 * p.batch_size <= last.batch_size]
        if not half:
            return None
        gain = last.output_throughput / half[-1].output_throughput - 1
        return half[-1].batch_size, last.batch_size, gain

    def is_at_edge(self, strategy: str) -> bool:
        """Return True if the last doubling still gains, so that the best lies at the edge."""
        doubling = self.last_doubling(strategy)
        return doubling is not None and doubling[2] > STILL_GAINS


def predict_slots(fitted: FittedRun, sizes: Sequence[int], queue_size: int | None) -> Curve:
    """Serve the result's workload with each number of slots; ``sizes`` rise.

    Raises:
        UsageError: the other settings exclude a batch size, or texts end early.
    """
    config, known = fitted.result.data["config"], fitted.known
    if config["workload"]["stop_at_eos"]:
        raise UsageError(
            f"{known.source}: its texts end where the model ends them (--stop-at-eos), "
            "which cannot be predicted; give a result without --stop-at-eos"
        )
    serving = settings.from_json(ServingSpec, config["serving"], drop_unknown=True)
    workload = recorded_workload(fitted, queue_size, BATCHES * max(sizes))
    names = ("duration", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
    points = []
    for size in sizes:
        for recording in predict(known, replace(serving, batch_size=size), workload):
            summary, outside = metrics.summary([recording]), tuple(beyond(known, [recording]))
            values: dict[str, Any] = {n: metric(summary, n) for n in (*names, "p99_e2el_ms")}
            values |= {"seen": not outside, "measured": size == serving.batch_size}
            points.append(Point(recording.header.strategy, size, beyond=outside, **values))
    return Curve(fitted, points, len(workload), serving.batch_size)


def recorded_workload(fitted: FittedRun, queue_size: int | None, at_least: int) -> Workload:
    """Return the requests of a result, repeated in turn until there are enough.

    Prompts are not in a recording; their lengths and times are, which is all that step costs
    depend on. Requests that came over time are not repeated, since later arrivals are unknown.
    """
    first = next(iter(fitted.result.recordings.values()))[0].requests
    data = fitted.result.data
    loop = data["config"]["workload"].get("max_concurrency")
    closed = data["workload"]["closed"] or loop is not None
    count = len(first.due_ns)
    if closed:
        count = queue_size or max(count, at_least)
    elif queue_size is not None:
        count = min(count, queue_size)
    which = np.arange(count) % len(first.due_ns)
    prompts = first.prompt_tokens[which]
    return Workload(
        name=data["workload"]["name"],
        seed=data["workload"]["seed"],
        prompt_ids=np.zeros(int(prompts.sum()), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(prompts)]),
        output_tokens=first.output_tokens[which],
        due_ns=np.zeros(count, np.int64) if closed else first.due_ns[which],
        max_concurrency=loop,
    )


# Terminal


def sentence(curve: Curve) -> str:
    """Return the number of slots at which throughput stops growing, by strategy, in words."""
    text = f"predicted: {'; '.join(_reached(curve, name) for name in curve.strategies)}."
    at_edge = [name for name in curve.strategies if curve.is_at_edge(name)]
    if at_edge:
        text += (
            f" The best of {joined(at_edge)} lies at the edge of the searched range: search "
            f"further, such as --batch-size 1:{2 * curve.points[-1].batch_size}."
        )
    far = [p.batch_size for p in curve.points if not p.seen]
    if far:
        text += f" From batch size {min(far):,} on, the prediction goes beyond the measured steps."
    return text


def _reached(curve: Curve, name: str) -> str:
    slots, doubling = plural(curve.sufficient(name), "slot"), curve.last_doubling(name)
    text = f"{name} reaches {NEARLY_ALL:.0%} of its best throughput with {slots}"
    if doubling is None or not curve.is_at_edge(name):
        return text
    first, last, gain = doubling
    return f"{text} (still {percent(gain, 0, '+')} from {first:,} to {last:,})"


def render(curve: Curve) -> RenderableType:
    return Group(
        Text(sentence(curve), style="bold"), Text(), _table(curve), Text(), Text(curve.fitted.fit)
    )


_COLUMNS = {"output_throughput": "tok/s", "mean_ttft_ms": "TTFT ms", "mean_tpot_ms": "TPOT ms"}


def _table(curve: Curve) -> Table:
    """Return batch sizes down, strategies side by side."""
    caption = "> measured batch size; = 95 % of the best throughput; * beyond the measured steps"
    head = [f"{label}\n{name}" for label in _COLUMNS.values() for name in curve.strategies]
    sufficient, rows = {curve.sufficient(name) for name in curve.strategies}, []
    sizes = list(dict.fromkeys(p.batch_size for p in curve.points))
    for size in shown_sizes(sizes, {curve.measured, *sufficient}):
        points = [p for p in curve.points if p.batch_size == size]
        mark = ">" * (size == curve.measured) + "=" * (size in sufficient)
        mark += "*" * (not all(p.seen for p in points))
        values = [number(getattr(p, column)) for column in _COLUMNS for p in points]
        rows.append([f"{mark} {size:,}".strip(), *values])
    head = ["batch\nsize", *head]
    return make_table(curve.title, head, rows, left=0, notes=[caption], framed=True)


def shown_sizes(sizes: Sequence[int], always: set[int]) -> list[int]:
    """Return all sizes if they are few; else some at even ratios, and those of ``always``."""
    if len(sizes) <= MOST_ROWS:
        return list(sizes)
    even = np.geomspace(sizes[0], sizes[-1], MOST_ROWS - 2)
    chosen = {min(sizes, key=lambda size: abs(size - target)) for target in even}
    return sorted(chosen | (always & set(sizes)))


# Files


def write_prediction(folder: Path, curve: Curve, command: str) -> tuple[list[Path], str]:
    data = {
        **envelope(SCHEMA_VERSION, command),
        "requests": curve.requests,
        "cost": curve.fitted.known.as_dict(),
        "held_out": curve.fitted.quality,
        "enough": {name: curve.sufficient(name) for name in curve.strategies},
        "last_doubling": {name: curve.last_doubling(name) for name in curve.strategies},
        "points": [asdict(point) for point in curve.points],
    }
    rows = [asdict(p) | {"beyond": "; ".join(p.beyond)} for p in curve.points]
    text, table = json_text(data), pd.DataFrame(rows).to_csv(index=False)
    pictures = picture_files({"slots": draw_slots(curve)})
    return write_whole(folder, {"predict.json": text, "predict.csv": table, **pictures}), text


_PANELS = {
    "output_throughput": "output tokens/s",
    "mean_ttft_ms": "TTFT mean (ms)",
    "mean_tpot_ms": "TPOT mean (ms)",
}


def draw_slots(curve: Curve) -> Figure:
    notes = (
        "Filled points: every step is like the measured ones; hollow points go beyond them. Grey "
        f"line: the measured batch size, {curve.measured:,}. Ring: the fewest slots with 95 % of "
        "the best throughput."
    )
    first, last = curve.points[0].batch_size, curve.points[-1].batch_size
    with cards.house_style():
        strategies = cards.name_strategies(dict.fromkeys(curve.strategies, ()))
        card = cards.make_card(
            _reached(curve, curve.strategies[-1]), clean_text(curve.title), 3.3, notes
        )
        cards.add_line_legend(card, strategies)
        (panels,) = card.grid((1, 3), 0.42, 2.4, gap=0.62, share="col")
        for axes, (name, label) in zip(panels, _PANELS.items(), strict=True):
            for strategy in strategies:
                _draw_line(axes, curve, name, strategy)
            axes.axvline(curve.measured, color=cards.QUIET, lw=1, zorder=0.5)
            cards.count_doublings(axes)
            axes.set(xlim=(first / 1.15, last * 1.15), xlabel="batch size (slots)")
            axes.set_ylim(bottom=0)
            cards.finish_panel(axes, label)
    return card.figure


def _draw_line(axes: Axes, curve: Curve, name: str, strategy: cards.Strategy) -> None:
    points = [p for p in curve.of(strategy.name) if getattr(p, name) is not None]
    values = {p.batch_size: getattr(p, name) for p in points}
    look: dict[str, Any] = {**strategy.line, "lw": 1.6, "gid": f"{name}-{strategy.index}"}
    axes.plot(list(values), list(values.values()), **look)
    marked: list[Point] = []
    for point in points:  # no two marks closer than a quarter of a doubling
        if not marked or point.batch_size / marked[-1].batch_size >= 1.19:
            marked.append(point)
    look = {"ls": "", "marker": "o", "ms": 4.5, "mec": strategy.colour, "mew": 1.1}
    for seen, fill in ((True, strategy.colour), (False, "#ffffff")):
        some = [p.batch_size for p in marked if p.seen is seen]
        axes.plot(some, [values[size] for size in some], mfc=fill, **look)
    if name == "output_throughput":
        ring = curve.sufficient(strategy.name)
        axes.plot([ring], [values[ring]], marker="o", ms=11, mfc="none", mec=cards.INK)
