"""A moment of a replay on a terminal: a lane a slot, the strategies side by side.

A lane's width stands for tokens, so that long and short requests, and what a slot held for a
request that is done could have yielded, are seen to scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures.card import looks_of
from batchbench.reports.replay.frames import EMPTY, HELD, PROMPT, RUNNING, Film, Frame, Reel, Scene

_GLYPHS = {PROMPT: "▓", RUNNING: "█", HELD: "╱", EMPTY: "·"}
_TO_COME = "░"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(dict(zip("▓█╱·░▁▂▃▄▅▆▇×━─–", "%#/.-._-=+*#x=--", strict=True)))

_NARROWEST, _GAP = 36, 3
"""Columns of a panel that stands beside another, and between two of them."""

_AROUND, _TALLEST = 4, 4
"""Rows that are not the panels' (title, legend, time, and the shell's), and most of a chart."""


@dataclass(frozen=True)
class _Layout:
    """Where things go on a terminal."""

    beside: bool  # panels side by side; else one above the other, with a shorter head
    panel: int  # columns of a panel
    per_cell: int  # slots a character stands for; 0 where each has a lane
    chart: int  # rows of the chart below the slots

    @classmethod
    def of(cls, slots: int, panels: int, width: int, height: int) -> _Layout:
        """The layout for so many panels."""
        beside = width >= _NARROWEST * panels + _GAP * (panels - 1)
        panel = (width - _GAP * (panels - 1)) // panels if beside else width
        rows = max((height - _AROUND) // (1 if beside else panels) - (2 if beside else 1), 2)
        if slots < rows:
            return cls(beside, panel, 0, min(rows - slots, _TALLEST))
        chart = min(max(rows // 3, 1), _TALLEST)
        per_cell = -(-slots // (panel * (rows - chart)))
        chart = min(rows - -(-slots // (panel * per_cell)), _TALLEST)
        return cls(beside, panel, per_cell, chart)


def render(
    film: Film, frame: Frame, width: int, height: int, speed: float, *, ascii_only: bool = False
) -> RenderableType:
    """The frame for a terminal of ``width`` columns and ``height`` rows.

    Args:
        ascii_only: whether the terminal can show no other characters.
    """
    slots = max(reel.slots for reel in film.reels)
    layout = _Layout.of(slots, len(film.reels), width, height)
    looks = looks_of([scene.name for scene in frame.scenes])
    panels = [
        _panel(film, reel, scene, layout, looks[scene.name][0])
        for reel, scene in zip(film.reels, frame.scenes, strict=True)
    ]
    title = Text(film.title, "dim", no_wrap=True, overflow="ellipsis")
    last = [_legend(width, layout.per_cell), _clock(film, frame, width, speed)]
    if ascii_only:
        for text in [title, *(line for lines in panels for line in lines), *last]:
            text.plain = text.plain.translate(_ASCII).encode("ascii", "replace").decode()
    if not layout.beside:
        return Group(title, *(line for lines in panels for line in lines), *last)
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for _ in panels:
        grid.add_column(width=layout.panel, no_wrap=True)
    for row in zip(*panels, strict=True):
        grid.add_row(*row)
    return Group(title, grid, *last)


def _panel(film: Film, reel: Reel, scene: Scene, layout: _Layout, colour: str) -> list[Text]:
    """A strategy: its name and figures, its slots, and how busy they have been."""
    lines = _head(film, scene, layout, colour)
    if layout.per_cell:
        lines += _grid(scene, layout.panel, layout.per_cell, colour)
    else:
        lines += [_lane(film, scene, slot, layout.panel, colour) for slot in range(reel.slots)]
    return lines + _chart(film, reel, scene, layout, colour)


def _head(film: Film, scene: Scene, layout: _Layout, colour: str) -> list[Text]:
    """Name and figures in two lines, or in one where panels stand one above the other."""
    busy = scene.count(RUNNING) + scene.count(PROMPT)
    state = f"{busy:,} of {len(scene.state):,} slots busy"
    if scene.over:
        state = f"done after {film.spell(scene.now_ns)}"
    rate = f"{_short(round(scene.tokens_per_s))} tok/s"
    told = f"{_short(scene.finished)}/{_short(scene.requests)} · queue {_short(scene.waiting)}"
    room = layout.panel - len(scene.name) - 1
    if layout.beside:
        asides, below = (
            [state],
            _first_that_fits([f"done {told} · {rate}", f"{told} · {rate}"], layout.panel),
        )
    else:
        told = state if scene.over else told
        asides, below = [f"{told} · {rate}", told], None
    aside = _first_that_fits(asides, room)
    name = Text(scene.name, f"bold {colour}", no_wrap=True)
    name.truncate(max(layout.panel - len(aside) - 1, 4), overflow="ellipsis")
    name.append(aside.rjust(layout.panel - name.cell_len), "bold" if scene.over else "")
    return [name] if below is None else [name, Text(below, no_wrap=True, overflow="ellipsis")]


def _first_that_fits(texts: Sequence[str], width: int) -> str:
    """The first text that is no wider; else the last."""
    return next((text for text in texts if len(text) <= width), texts[-1])


def _lane(film: Film, scene: Scene, slot: int, width: int, colour: str) -> Text:
    """One slot: the request's tokens, those to come, and what was held since it was done."""
    number = len(str(len(scene.state) - 1))
    label = _label(scene, slot, 12 if width >= 30 else 6)
    room = max(width - number - 2 - max(len(label), 12 if width >= 30 else 6), 4)
    line = Text(f"{slot:>{number}} ", "dim", no_wrap=True)
    state = int(scene.state[slot])
    if state == EMPTY:
        line.append(_GLYPHS[EMPTY] * room, "dim")
        return line
    scale = room / film.longest_output
    asked = min(max(round(scene.asked[slot] * scale), 1), room)
    if state == PROMPT:
        line.append(_GLYPHS[PROMPT] * asked, colour)
    else:
        filled = round(asked * scene.tokens[slot] / scene.asked[slot])
        line.append(_GLYPHS[RUNNING] * filled, colour)
        line.append(_TO_COME * (asked - filled), colour)
        held = min(-int(-scene.held[slot] * scale // 1), room - asked) if state == HELD else 0
        line.append(_GLYPHS[HELD] * held, "dim")
        asked += held
    line.append(" " * (room - asked + 1))
    line.append(label, "dim" if state == HELD else "")
    return line


def _label(scene: Scene, slot: int, most: int) -> str:
    """The request, and how far it is."""
    request, state = f"#{scene.request[slot]}", scene.state[slot]
    if state == EMPTY:
        return ""
    how = {PROMPT: "prompt", HELD: "done"}.get(
        int(state), f"{scene.tokens[slot]}/{scene.asked[slot]}"
    )
    both = f"{request} {how}"
    return both if len(both) <= most else request if len(request) <= most else ""


def _grid(scene: Scene, width: int, per_cell: int, colour: str) -> list[Text]:
    """A character a slot, or one for what most of several slots do."""
    cells = -(-len(scene.state) // per_cell)
    padded = np.full(cells * per_cell, -1)
    padded[: len(scene.state)] = scene.state
    counts = np.stack([(padded.reshape(cells, per_cell) == s).sum(1) for s in _GLYPHS])
    most = [list(_GLYPHS)[i] for i in counts.argmax(0)]
    lines = []
    for begin in range(0, cells, width):
        line = Text(no_wrap=True)
        for state in most[begin : begin + width]:
            line.append(_GLYPHS[state], "dim" if state in (EMPTY, HELD) else colour)
        lines.append(line)
    return lines


def _chart(film: Film, reel: Reel, scene: Scene, layout: _Layout, colour: str) -> list[Text]:
    """How many slots ran, and were held, over the whole time, as far as it is shown."""
    margin, rows = 5, layout.chart
    running, held = reel.levels(scene.now_ns, layout.panel - margin, film.end_ns)
    lines = []
    for row in reversed(range(rows)):
        label = "busy" if row == 0 else f"{_short(reel.slots)}" if row == rows - 1 else ""
        line = Text(f"{label:>{margin - 1}} ", "dim", no_wrap=True)
        for level, above in zip(running * rows - row, (running + held) * rows - row, strict=True):
            if np.isnan(level):
                line.append(" ")
            elif level > 1 / 16 or (row == 0 and level > 0):
                line.append(_LEVELS[int(np.clip(np.ceil(level * 8 - 0.5), 1, 8))], colour)
            else:
                line.append(_GLYPHS[HELD] if above > 0.5 and rows > 1 else " ", "dim")
        lines.append(line)
    return lines


def _legend(width: int, per_cell: int) -> Text:
    """What the characters mean; a shorter text where there is less room."""
    names = ("prompt", "tokens", "still to come", "done, slot still held", "empty")
    shorter = ("prompt", "run", "left", "held", "empty")
    signs = (_GLYPHS[PROMPT], _GLYPHS[RUNNING], _TO_COME, _GLYPHS[HELD], _GLYPHS[EMPTY])
    keys = [(s, n) for s, n in zip(signs, zip(names, shorter, strict=True), strict=True)]
    if per_cell:
        keys = [(s, n) for s, n in keys if s != _TO_COME]
    text = "  ".join(f"{sign} {long}" for sign, (long, _) in keys)
    if per_cell > 1:
        text = f"1 cell = {per_cell:,} slots  {text}"
    if len(text) > width:
        text = " ".join(f"{sign}{short}" for sign, (_, short) in keys)
        if per_cell > 1:
            text = f"{per_cell:,} slots each {text}"
    return Text(text, "dim", no_wrap=True, overflow="ellipsis")


def _clock(film: Film, frame: Frame, width: int, speed: float) -> Text:
    """How far the time is; at the end, what it came to."""
    if frame.t_ns >= frame.end_ns:
        return Text(film.verdict, "bold")
    text = f"{film.spell(frame.t_ns).split()[0]} of {film.spell(frame.end_ns)} "
    pace = f" {speed * 1e9 / UNIT_NS:,.3g} steps/s" if film.in_steps else f" {_pace(speed)}"
    room = width - len(text) - len(pace)
    filled = round(room * frame.t_ns / frame.end_ns)
    return Text.assemble(
        text, ("━" * filled, "bold"), ("─" * (room - filled), "dim"), pace, no_wrap=True
    )


def _pace(speed: float) -> str:
    """``true speed``, ``4× faster`` or ``30× slower``."""
    if speed == 1:
        return "true speed"
    return f"{speed:,.3g}× faster" if speed > 1 else f"{1 / speed:,.3g}× slower"


def _short(count: int) -> str:
    """A number in at most six characters."""
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:,.0f}k" if count < 999_500 else f"{count / 1e6:,.1f}M"
