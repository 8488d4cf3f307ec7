"""The report of a trend on a terminal and in Markdown, ``trend.json`` and the pictures."""

from __future__ import annotations

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
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    QUIET,
    WIDE,
    add_line_legend,
    fit_text,
    house_style,
    looks_of,
    make_card,
    strip_axes,
)
from batchbench.reports.formats.markdown import escape, table
from batchbench.reports.text import clean_text, number, percent, plural
from batchbench.studies.gate.evidence import Answer
from batchbench.studies.trend.changes import LineResult, SeriesResult, Trend, describe_count
from batchbench.studies.trend.history import Entry, Line, higher_is_better

SCHEMA_VERSION = 1

_BLOCKS = "▁▂▃▄▅▆▇█"

_SPARK = 12  # characters

_HEAD = ("strategy", "metric", "over time", "newest change", "at", "level", "drift")
_TEXTS = 5  # columns; the others are numbers

_MOST_COUNTS = 12


def render(trend: Trend) -> RenderableType:
    """Return the sentence, and of each line its table and its changes; then notes."""
    style = {Answer.FAILED: "bold red", Answer.UNKNOWN: "bold yellow"}
    parts: list[RenderableType] = [
        Text(trend.sentence, style=style.get(trend.answer, "bold green")),
        Text(),
    ]
    for result in trend.lines:
        parts += [Text(result.line.caption), Text(_span(result.line), style="dim")]
        if result.series:
            grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
            for i, name in enumerate(_HEAD):
                justify: Any = "left" if i < _TEXTS else "right"
                grid.add_column(name, justify=justify, no_wrap=name == "over time")
            for series in result.series:
                grid.add_row(*map(Text, _row(series)))
            parts.append(grid)
        parts += [*(Text(f"  {line}") for line in changes(result)), Text()]
    return Group(*parts, *(Text(line, style="dim") for line in notes(trend)))


def render_markdown(trend: Trend) -> str:
    """Return the same for a pull request."""
    lines = [f"**{escape(trend.sentence)}**", ""]
    for result in trend.lines:
        lines += [f"{escape(result.line.caption)} ({escape(_span(result.line))})", ""]
        if result.series:
            lines += table(_HEAD, [_row(series) for series in result.series], left=_TEXTS)
        lines += [*(f"- {escape(line)}" for line in changes(result)), ""]
    lines.append(escape(" ".join(f"{line}." for line in notes(trend))))
    return "\n".join(lines).rstrip() + "\n"


def _span(line: Line) -> str:
    first, last = (f"{e.label} ({e.created:%Y-%m-%d})" for e in (line.entries[0], line.entries[-1]))
    parts = [f"{plural(len(line.entries), 'result')}, {first} to {last}"]
    if line.dropped:
        parts.append(f"{line.dropped} older left out by --last")
    if suspect := sum(bool(entry.reasons) for entry in line.entries):
        parts.append(f"{suspect} suspect, whose times do not count")
    return "; ".join(parts)


def _row(result: SeriesResult) -> tuple[str, ...]:
    series, newest, drift = result.series, result.newest, result.drift
    at = ""
    if result.too_few:
        change = f"{len(series.valid)} of {result.too_few} results"
    elif newest is None:
        change = f"none ≥ {percent(result.smallest, 1)}"
    else:
        change, at = f"{percent(newest.share, 1, '+')} {newest.word}", newest.after.label
    level = number(result.segments[-1].mean) if result.segments else "N/A"
    drifted = "N/A" if drift is None else percent(drift.share, 1, "+") + "!" * drift.counts
    return series.strategy, series.metric, sparkline(result), change, at, level, drifted


def sparkline(result: SeriesResult) -> str:
    """Return the valid values as blocks, oldest first; many are averaged in groups."""
    values = np.array([result.series.values[i].value for i in result.series.valid])
    if not len(values):
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(_SPARK, len(values)))])
    span = float(np.ptp(means))
    if span <= 1e-3 * float(means.max()):  # below a thousandth it is drawn flat
        return _BLOCKS[3] * len(means)
    places = ((means - means.min()) / span * (len(_BLOCKS) - 1)).round().astype(int)
    return "".join(_BLOCKS[place] for place in places)


def changes(result: LineResult) -> Iterator[str]:
    """Yield each change that counts, the newest first, then drifts and counts."""
    counting = [(series, change) for series in result.series for change in series.counting]
    for series, change in sorted(counting, key=lambda pair: pair[1].after.created, reverse=True):
        yield f"{series.name} {change.text}"
    for series in result.series:
        if series.drift is not None and series.drift.counts:
            yield f"drift: {series.name} {series.drift.text}"
    counts = list(reversed(result.count_changes))
    for count in counts[:_MOST_COUNTS]:
        yield f"{'more work' if count in result.more_work else 'count'}: {describe_count(count)}"
    if len(counts) > _MOST_COUNTS:
        yield f"and {len(counts) - _MOST_COUNTS} more changed counts, which trend.json has"


def notes(trend: Trend) -> Sequence[str]:
    spec = trend.spec
    lines = [
        f"A change must be significant and exceed {spec.floor:g} %: at most "
        f"{100 * (1 - spec.confidence):.2g} % of histories without a change show one",
        "none ≥ 2.0%: no change was found, and one of 2.0 % in the middle of the history would "
        "probably have been found",
        "Drift: newest quarter of the results against the oldest; ! marks a drift that counts",
    ]
    if len(trend.lines) > 1:
        lines.append(
            f"{len(trend.lines)} groups of results, which differ as named above; only those "
            "with a result of the newest commit can fail"
        )
    if trend.unreadable:
        lines.append(f"{plural(len(trend.unreadable), 'file')} could not be read")
    return lines


def to_json(trend: Trend) -> str:
    """Return ``trend.json``."""
    return json_text({**envelope(SCHEMA_VERSION, ""), **trend.as_data()})


def write_trend(folder: Path, trend: Trend) -> list[Path]:
    """Write ``trend.json`` and a picture of each line; remove pictures of an older trend."""
    contents: dict[str, bytes | str] = {"trend.json": to_json(trend)}
    drawn = [figure for result in trend.lines if (figure := draw_trend(result)) is not None]
    for i, figure in enumerate(drawn, 1):
        name = "trend" if i == 1 else f"trend-{i}"
        contents |= {f"{name}.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    older = {path.name for path in folder.glob("trend*") if path.suffix in (".png", ".svg")}
    return write_whole(folder, contents, stale=sorted(older - contents.keys()))


# The picture

MOST_PANELS = 8
"""Panels of a picture; the table has all series."""

_TALL, _NAME_HEIGHT, _LEFT = 1.1, 0.5, 0.62  # inches: a panel, its name, the numbers at its left

_TOP, _FOOT = 0.08, 0.38

_LETTER = 5.9  # points of a letter of a change's label

_POINTS = (WIDE - _LEFT) * 72  # width of a panel


def draw_trend(result: LineResult) -> Figure | None:
    """Draw one panel per series over the results of a line; None if it has no series."""
    drawn = sorted(result.series, key=lambda series: not series.counting)[:MOST_PANELS]
    if not drawn:
        return None
    entries = result.line.entries
    place = {id(entry): i for i, entry in enumerate(entries)}
    with house_style():
        body = _TOP + len(drawn) * (_NAME_HEIGHT + _TALL) + _FOOT
        notes = "Oldest result on the left. Level: mean between two changes."
        if any(v.low is not None for s in drawn for v in s.series.values):
            notes += " Thin line: 95 % interval of a result's trials."
        if any(entry.reasons for entry in entries):
            notes += " Suspect results do not count; those off the scale are not shown."
        if left_out := len(result.series) - len(drawn):
            notes += f" {left_out} more series are in the table."
        card = make_card(_headline(result), _title(result), body, notes)
        add_line_legend(card, [], *_legend(result))
        looks = looks_of(list(dict.fromkeys(s.series.strategy for s in drawn)))
        for i, panel in enumerate(drawn):
            top = _TOP + i * (_NAME_HEIGHT + _TALL) + _NAME_HEIGHT
            axes = card.axes(_LEFT, top, WIDE - _LEFT, _TALL)
            axes.set_xlim(-0.8, len(entries) - 0.2)
            _draw_panel(axes, panel, place, looks[panel.series.strategy][0], i)
            axes.set_xticks([])
        _set_ticks(axes, entries)
        return card.figure


def _draw_panel(
    axes: Axes, result: SeriesResult, place: dict[int, int], colour: str, index: int
) -> None:
    series = result.series
    at = [place[id(entry)] for entry in series.entries]
    better = "higher" if higher_is_better(series.metric) else "lower"
    name = fit_text(f"{clean_text(series.strategy)}  {series.metric}", 350, 10.5, "bold")
    axes.set_title(name, loc="left", size=10.5, weight="bold", color=colour)
    axes.set_title(f"{better} is better", loc="right", size=8.5, color=QUIET)
    for i in series.valid:
        value = series.values[i]
        if value.low is not None and value.high is not None:
            axes.plot([at[i], at[i]], [value.low, value.high], color=colour, lw=0.8, alpha=0.45)
    suspect = [i for i in range(len(at)) if i not in series.valid]
    valid_look: dict[str, Any] = {"s": 16, "c": colour, "lw": 0, "alpha": 0.7}
    suspect_look: dict[str, Any] = {"s": 22, "c": "#ffffff", "lw": 1.1}
    for kind, chosen, look in (
        ("valid", series.valid, valid_look),
        ("suspect", suspect, suspect_look),
    ):
        if chosen:
            x, y = [at[i] for i in chosen], [series.values[i].value for i in chosen]
            axes.scatter(x, y, ec=colour, zorder=3, gid=f"points-{index}-{kind}", **look)
    for segment in result.segments:
        ends = [at[segment.first] - 0.4, at[segment.last] + 0.4]
        axes.plot(ends, [segment.mean] * 2, color=INK, lw=2, zorder=4, solid_capstyle="butt")
    # Valid values fill the panel, and less than 4 % from top to bottom would magnify noise.
    values = [series.values[i].value for i in series.valid or range(len(series.values))]
    low, high = min(values), max(values)
    room, middle = max(high - low, 0.04 * high), (low + high) / 2
    axes.set_ylim(middle - 0.62 * room, middle + 0.95 * room)  # labels of changes are at the top
    _mark_changes(axes, result, place)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    axes.tick_params(axis="y", length=0)


def _mark_changes(axes: Axes, result: SeriesResult, place: dict[int, int]) -> None:
    """Draw a line at each change that counts, and label those that have room, newest first."""
    (first, last), top = axes.get_xlim(), axes.get_ylim()[1]
    free_until = float("inf")
    for change in reversed(result.counting):
        x = place[id(change.after)] - 0.5
        axes.axvline(x, color=INK, lw=1.2, ls="-" if change.is_loss else ":")
        text = f"{change.word} {percent(change.share, 1, '+')}  {change.after.label}"
        at, long = (x - first) / (last - first) * _POINTS, _LETTER * len(text) + 6
        is_left = at + long > min(_POINTS + 4, free_until)
        start, end = (at - long, at) if is_left else (at, at + long)
        if end > free_until:
            continue  # the table has this one
        free_until = start
        axes.annotate(
            text,
            (x, top),
            (-4 if is_left else 4, -2),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="top",
            size=9.5,
            weight="bold",
            bbox={"fc": "#ffffff", "ec": "none", "pad": 1, "alpha": 0.85},
            zorder=6,
        )


def _set_ticks(axes: Axes, entries: Sequence[Entry]) -> None:
    """Label the first, the last and some other results, as far as there is room."""
    longest = max(len(entry.label) for entry in entries)
    # The outer two stand beside their marks, so each needs room for half a label more.
    most = max(2, min(len(entries), int(_POINTS / (1.5 * _LETTER * longest + 10))))
    chosen = sorted({round(x) for x in np.linspace(0, len(entries) - 1, most)})
    axes.set_xticks(chosen, [clean_text(entries[x].label) for x in chosen])
    if len(chosen) > 1:
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[-1].set_horizontalalignment("right")


def _legend(result: LineResult) -> Iterator[Line2D]:
    yield Line2D([], [], ls="", marker="o", ms=4.5, color=QUIET, label="a result")
    if any(entry.reasons for entry in result.line.entries):
        yield Line2D([], [], ls="", marker="o", ms=5, mfc="#ffffff", mec=QUIET, label="suspect")
    yield Line2D([], [], color=INK, lw=2, label="level")
    words = {change.word for series in result.series for change in series.counting}
    if "worse" in words:
        yield Line2D([], [], ls="", marker="|", ms=11, mew=1.3, color=INK, label="worse")
    if "better" in words:
        yield Line2D([], [], color=INK, lw=1.3, ls=":", label="better")


def _headline(result: LineResult) -> str:
    newest = [(series, series.newest) for series in result.series if series.newest is not None]
    if newest:
        series, change = max(newest, key=lambda pair: (pair[1].is_loss, pair[1].after.created))
        return clean_text(f"{series.name} {change.text}")
    if any(series.too_few for series in result.series):
        return "Too few results to find a change"
    return "No change found"


def _title(result: LineResult) -> str:
    line = result.line
    setup, machine = line.entries[-1].setup, line.entries[-1].machine
    place = setup.get("server") or f"{machine.get('device')} {machine.get('dtype')}"
    place = "simulated" if setup["simulated"] else place
    parts = [setup["model"], place, f"{setup['batch size']} slots", f"{len(line.entries)} results"]
    return clean_text(" · ".join(map(str, [*parts, *([line.caption] if line.facts else [])])))
