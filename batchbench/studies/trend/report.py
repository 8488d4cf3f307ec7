"""A history on a terminal and in Markdown: a row a series, then every change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.files import write_whole
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    QUIET,
    WIDE,
    Card,
    fit_text,
    house_style,
    looks_of,
    make_card,
    strip_axes,
    text_extent,
)
from batchbench.reports.formats.markdown import escape
from batchbench.reports.text import clean_text, number
from batchbench.studies.gate.evidence import Answer
from batchbench.studies.trend.changes import (
    Change,
    Judged,
    Told,
    Trend,
    between,
    describe,
    describe_recount,
)
from batchbench.studies.trend.history import Entry, Line, higher_is_better

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


MOST_PANELS = 8
"""More would be a poster; the table has all."""

_TALL, _NAME_HEIGHT, _LEFT = 1.1, 0.5, 0.62  # inches: a panel, its name, the numbers at its left

_TOP, _FOOT = 0.08, 0.38


def draw_trend(judged: Judged) -> Figure | None:
    """A panel a series over the results of one line; None where there is none to draw."""
    series = sorted(judged.series, key=lambda told: not any(c.counts for c in told.changes))
    drawn = series[:MOST_PANELS]
    if not drawn:
        return None
    with house_style():
        body = _TOP + len(drawn) * (_NAME_HEIGHT + _TALL) + _FOOT
        card = make_card(
            _headline(judged), _title(judged), body, _notes(judged, len(series) - len(drawn))
        )
        _legend(card, judged)
        looks = looks_of(list(dict.fromkeys(told.series.strategy for told in drawn)))
        entries = judged.line.entries
        for i, told in enumerate(drawn):
            top = _TOP + i * (_NAME_HEIGHT + _TALL)
            colour = looks[told.series.strategy][0]
            _name(card, top, told, colour)
            axes = card.axes(_LEFT, top + _NAME_HEIGHT, WIDE - _LEFT, _TALL)
            _panel(axes, told, entries, colour, i)
            if i == len(drawn) - 1:
                _ticks(axes, entries, drawn)
            else:
                axes.set_xticks([])
        return card.figure


def _name(card: Card, top: float, told: Told, colour: str) -> None:
    name = fit_text(clean_text(told.series.strategy), 200, 10.5, "bold")
    better = "higher" if higher_is_better(told.series.metric) else "lower"
    style: dict[str, Any] = {"va": "baseline", "size": 10.5, "weight": "bold"}
    card.write(0, top + _NAME_HEIGHT - 0.1, name, color=colour, **style)
    behind = (text_extent(name, 10.5, "bold") + 7) / 72
    card.write(behind, top + _NAME_HEIGHT - 0.1, told.series.metric, **style)
    behind += (text_extent(told.series.metric, 10.5, "bold") + 7) / 72
    card.write(
        behind,
        top + _NAME_HEIGHT - 0.1,
        f"{better} is better",
        va="baseline",
        size=8.5,
        color=QUIET,
    )


def _panel(axes: Axes, told: Told, entries: Sequence[Entry], colour: str, index: int) -> None:
    place = {id(entry): i for i, entry in enumerate(entries)}
    series = told.series
    at = [place[id(entry)] for entry in series.entries]
    for x, value, entry in zip(at, series.values, series.entries, strict=True):
        if entry.is_valid and value.low is not None and value.high is not None:
            axes.plot([x, x], [value.low, value.high], color=colour, lw=0.8, alpha=0.45)
    for valid, face in ((True, colour), (False, "#ffffff")):
        chosen = [i for i, entry in enumerate(series.entries) if entry.is_valid is valid]
        if chosen:
            axes.scatter(
                [at[i] for i in chosen],
                [series.values[i].value for i in chosen],
                s=16 if valid else 22,
                c=face,
                ec=colour,
                lw=0 if valid else 1.1,
                alpha=0.7 if valid else 1,
                zorder=3,
                gid=f"points-{index}-{'valid' if valid else 'suspect'}",
            )
    for segment in told.segments:
        ends = [at[segment.first] - 0.4, at[segment.last] + 0.4]
        axes.plot(ends, [segment.mean] * 2, color=INK, lw=2, zorder=4, solid_capstyle="butt")
    _fit_height(axes, told)
    axes.set_xlim(-0.8, len(entries) - 0.2)
    _mark_changes(axes, told, place, len(entries))
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    axes.tick_params(axis="y", length=0)


def _fit_height(axes: Axes, told: Told) -> None:
    """What counts fills the panel; a wild suspect value must not flatten it."""
    chosen = told.series.told or range(len(told.series.values))
    values = np.array([told.series.values[i].value for i in chosen])
    low, high = float(values.min()), float(values.max())
    # Less than 4 % from top to bottom would make mountains of noise.
    room = max(high - low, 0.04 * high)
    middle = (low + high) / 2
    axes.set_ylim(middle - 0.62 * room, middle + 0.95 * room)  # names of changes stand on top


def _mark_changes(axes: Axes, told: Told, place: dict[int, int], count: int) -> None:
    top = axes.get_ylim()[1]
    width = (WIDE - _LEFT) * 72
    taken: list[tuple[float, float]] = []
    for change in reversed([change for change in told.changes if change.counts]):
        x = place[id(change.after)] - 0.5
        axes.axvline(x, color=INK, lw=1.2, ls="-" if change.is_loss else ":")
        text = f"{change.word} {change.share:+.1%}  {change.after.label}"
        at = (x + 0.8) / (count + 0.6) * width
        long = text_extent(text, 9.5, "bold") + 6
        left = at + long > width + 4
        start, end = (at - long, at) if left else (at, at + long)
        if any(start < other_end and other < end for other, other_end in taken):
            continue  # a newer change has the place; the table has this one
        taken.append((start, end))
        style: dict[str, Any] = {"size": 9.5, "weight": "bold", "va": "top"}
        axes.annotate(
            text,
            (x, top),
            (-4 if left else 4, -2),
            textcoords="offset points",
            ha="right" if left else "left",
            bbox={"fc": "#ffffff", "ec": "none", "pad": 1, "alpha": 0.85},
            zorder=6,
            **style,
        )


def _ticks(axes: Axes, entries: Sequence[Entry], drawn: Sequence[Told]) -> None:
    """The first, the last, and the commits of the changes, as far as there is room."""
    place = {id(entry): i for i, entry in enumerate(entries)}
    wanted = [0, len(entries) - 1]
    wanted += [place[id(c.after)] for told in drawn for c in told.changes if c.counts]
    wanted += list(range(0, len(entries), max(1, len(entries) // 5)))
    scale = (WIDE - _LEFT) * 72 / (len(entries) + 0.6)
    kept: list[int] = []
    for x in dict.fromkeys(wanted):
        room = text_extent(entries[x].label, 9) + 10
        if all(abs(x - other) * scale > room for other in kept):
            kept.append(x)
    kept.sort()
    axes.set_xticks(kept, [clean_text(entries[x].label) for x in kept])
    for label, x in zip(axes.get_xticklabels(), kept, strict=True):
        if len(entries) > 1 and x in (0, len(entries) - 1):
            label.set_horizontalalignment("left" if x == 0 else "right")


def _legend(card: Card, judged: Judged) -> None:
    handles = [Line2D([], [], ls="", marker="o", ms=4.5, color=QUIET, label="a result")]
    if any(not entry.is_valid for entry in judged.line.entries):
        handles.append(
            Line2D([], [], ls="", marker="o", ms=5, mfc="#ffffff", mec=QUIET, label="suspect")
        )
    handles.append(Line2D([], [], color=INK, lw=2, label="level"))
    found = [c for told in judged.series for c in told.changes if c.counts]
    for is_loss, style in ((True, "-"), (False, ":")):
        if any(change.is_loss is is_loss for change in found):
            name = "worse" if is_loss else "better"
            handles.append(
                Line2D([], [], ls="", marker="|", ms=11, mew=1.3, color=INK, label=name)
                if is_loss
                else Line2D([], [], color=INK, lw=1.3, ls=style, label=name)
            )
    card.figure.legend(
        handles=handles,
        ncols=len(handles),
        loc="upper left",
        bbox_to_anchor=card.at(0, -0.06),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.5,
        columnspacing=1.6,
    )


def _headline(judged: Judged) -> str:
    found: list[tuple[Told, Change]] = [
        (told, told.newest) for told in judged.series if told.newest is not None
    ]
    if found:
        told, change = max(found, key=lambda each: (each[1].is_loss, each[1].after.created))
        return clean_text(f"{told.name} {describe(change)}")
    if any(told.too_few for told in judged.series):
        return "Too few results to tell a change"
    return "No change found"


def _title(judged: Judged) -> str:
    line = judged.line
    asked, machine = line.entries[-1].asked, line.entries[-1].machine
    place = "simulated" if asked["simulated"] else f"{machine['device']} {machine['dtype']}"
    parts = [asked["model"], place, f"{asked['batch size']} slots"]
    parts.append(f"{len(line.entries)} results")
    if line.facts:
        parts.append(line.caption)
    return clean_text(" · ".join(map(str, parts)))


def _notes(judged: Judged, left_out: int) -> str:
    notes = ["Oldest result on the left. Level: mean between two changes."]
    if any(v.low is not None for told in judged.series for v in told.series.values):
        notes.append("Thin line: 95 % interval of a result's trials.")
    if any(not entry.is_valid for entry in judged.line.entries):
        notes.append("Suspect results do not count; those off the scale are not shown.")
    if left_out:
        notes.append(f"{left_out} more series are in the table.")
    return " ".join(notes)


def write_trend(folder: Path, trend: Trend) -> list[Path]:
    """Write ``trend.json`` and a picture of each line that has one; those of an older look go."""
    data = json.dumps(trend.as_data(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    contents: dict[str, bytes | str] = {"trend.json": data}
    drawn = [figure for judged in trend.lines if (figure := draw_trend(judged)) is not None]
    for i, figure in enumerate(drawn, 1):
        name = "trend" if i == 1 else f"trend-{i}"
        contents |= {f"{name}.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    older = {path.name for path in folder.glob("trend*") if path.suffix in (".png", ".svg")}
    return write_whole(folder, contents, stale=sorted(older - contents.keys()))
