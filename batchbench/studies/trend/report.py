"""A history on a terminal and in Markdown: a row a series, then every change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.formats.markdown import escape
from batchbench.reports.text import number
from batchbench.studies.gate.evidence import Answer
from batchbench.studies.trend.changes import Change, Judged, Told, Trend, between, describe_recount
from batchbench.studies.trend.history import Line

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 12  # characters
_HEAD = ("", "metric", "over time", "level", "newest change", "at", "drift")
_MOST_RECOUNTS = 12


def render(trend: Trend) -> RenderableType:
    """The sentence, the tables, the changes, the notes."""
    style = {Answer.FAILED: "bold red", Answer.UNKNOWN: "bold yellow"}
    parts: list[RenderableType] = [
        Text(trend.sentence, style=style.get(trend.answer, "bold green")),
        Text(),
    ]
    for judged in trend.lines:
        parts += [Text(judged.line.caption), Text(_span(judged.line), style="dim")]
        if judged.series:
            parts.append(_table(judged))
        parts += [Text(f"  {line}") for line in changes(judged)]
        parts.append(Text())
    parts += [Text(line, style="dim") for line in notes(trend)]
    return Group(*parts)


def render_markdown(trend: Trend) -> str:
    """The same for a pull request."""
    lines = [f"**{escape(trend.sentence)}**", ""]
    for judged in trend.lines:
        lines += [f"{escape(judged.line.caption)} ({escape(_span(judged.line))})", ""]
        if judged.series:
            lines += [
                "| Strategy | Metric | Over time | Level | Newest change | At | Drift |",
                "| --- | --- | --- | ---: | --- | --- | ---: |",
            ]
            lines += [f"| {' | '.join(map(escape, row))} |" for row in map(_row, judged.series)]
            lines.append("")
        lines += [f"- {escape(line)}" for line in changes(judged)]
        lines.append("")
    lines += [escape(" ".join(f"{line}." for line in notes(trend)))]
    return "\n".join(lines).rstrip() + "\n"


def _span(line: Line) -> str:
    entries = line.entries
    suspect = sum(not entry.is_valid for entry in entries)
    parts = [
        f"{len(entries)} result{'s' * (len(entries) != 1)}, "
        f"{entries[0].label} ({entries[0].created:%Y-%m-%d}) to "
        f"{entries[-1].label} ({entries[-1].created:%Y-%m-%d})"
    ]
    if line.dropped:
        parts.append(f"{line.dropped} older left out by --last")
    if suspect:
        parts.append(f"{suspect} suspect, whose times do not count")
    return "; ".join(parts)


def _table(judged: Judged) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in _HEAD:
        right = name in ("level", "drift")
        grid.add_column(name, justify="right" if right else "left", no_wrap=name == "over time")
    for told in judged.series:
        grid.add_row(*map(Text, _row(told)))
    return grid


def _row(told: Told) -> tuple[str, ...]:
    series, newest = told.series, told.newest
    level = number(told.segments[-1].mean) if told.segments else "N/A"
    at, drift = "", "N/A"
    if told.too_few:
        change = f"{len(series.told)} of {told.too_few} results"
    elif newest is None:
        change = f"none ≥ {told.smallest:.1%}"
    else:
        change, at = f"{newest.word} {newest.share:+.1%}", newest.after.label
    if told.drift is not None:
        drift = f"{told.drift.share:+.1%}{'!' if told.drift.counts else ''}"
    return series.strategy, series.metric, sparkline(told), level, change, at, drift


def sparkline(told: Told) -> str:
    """The valid values, oldest first, neighbours averaged where there are many."""
    values = np.array([told.series.values[i].value for i in told.series.told])
    if not len(values):
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(_SPARK, len(values)))])
    span = float(np.ptp(means))
    # Less than a thousandth is flat, not a mountain range.
    if span <= 1e-3 * float(means.max()):
        return _BLOCKS[3] * len(means)
    places = ((means - means.min()) / span * (len(_BLOCKS) - 1)).round().astype(int)
    return "".join(_BLOCKS[place] for place in places)


def changes(judged: Judged) -> Iterator[str]:
    """Each change that counts, the newest first, then the counts."""
    found = [(told, change) for told in judged.series for change in told.changes if change.counts]
    for told, change in sorted(found, key=lambda each: each[1].after.created, reverse=True):
        yield f"{change.word} {told.name} {_short_between(change)}"
    for told in judged.series:
        if (drift := told.drift) is not None and drift.counts:
            yield f"drift, {drift.word}: {told.name} {_short_between(drift)}"
    recounts = list(reversed(judged.recounts))
    for recount in recounts[:_MOST_RECOUNTS]:
        word = "more work" if recount in judged.lost_work else "count"
        yield f"{word} {describe_recount(recount)}"
    if len(recounts) > _MOST_RECOUNTS:
        yield f"and {len(recounts) - _MOST_RECOUNTS} more changed counts, which trend.json has"


def _short_between(change: Change) -> str:
    accepted = "; accepted" if change.accepted else ""
    return (
        f"{change.share:+.1%} ({change.low:+.1%} to {change.high:+.1%}), "
        f"{between(change)}{accepted}"
    )


def notes(trend: Trend) -> Sequence[str]:
    """What the reader should know of."""
    asked = trend.asked
    told = [
        f"A change is significant and beyond {asked.floor:g} %: of histories without one "
        f"{100 * (1 - asked.confidence):.2g} % at most show any. Brackets: 95 % interval",
        "none ≥: about the least change in the middle that would have been found",
        "Drift: newest quarter of the results against the oldest; ! where it counts",
    ]
    if len(trend.lines) > 1:
        told.append(
            f"{len(trend.lines)} series of results, since what is named above differs; only those "
            "with a result of the newest commit can fail"
        )
    if trend.spoiled:
        many = len(trend.spoiled)
        told.append(f"{many} file{'s' * (many != 1)} could not be read")
    return told
