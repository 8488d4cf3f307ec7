"""A moment of a replay on a terminal: a row per slot, the strategies side by side.

The width of a row stands for tokens: long and short requests are to scale, and so are the tokens
that a slot could have yielded while a finished request held it.
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
from batchbench.reports.replay import frames
from batchbench.reports.replay.frames import EMPTY, HELD, PROMPT, RUNNING, Replay, SlotState

_GLYPHS = {PROMPT: "▓", RUNNING: "█", HELD: "╱", EMPTY: "·"}
_TO_COME = "░"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(dict(zip("▓█╱·░▁▂▃▄▅▆▇×━─–", "%#/.-._-=+*#x=--", strict=True)))

_LEGEND = (  # sign, its meaning, and a shorter one
    (_GLYPHS[PROMPT], "prompt", "prompt"),
    (_GLYPHS[RUNNING], "tokens", "run"),
    (_TO_COME, "still to come", "left"),
    (_GLYPHS[HELD], "done, slot still held", "held"),
    (_GLYPHS[EMPTY], "empty", "empty"),
)

_NARROWEST, _GAP = 36, 3
"""Columns of a panel that stands beside another, and between two of them."""

_AROUND, _TALLEST = 4, 4
"""Rows outside the panels (title, legend, time, the shell's), and the most rows of a chart."""


@dataclass(frozen=True)
class _Layout:
    beside: bool  # panels side by side; else one above the other, with a shorter head
    panel: int  # columns of a panel
    slots_per_cell: int  # slots that a character stands for; 0 where each has a row
    chart: int  # rows of the chart below the slots

    @classmethod
    def of(cls, slots: int, panels: int, width: int, height: int) -> _Layout:
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
    replay: Replay,
    frame: frames.Frame,
    width: int,
    height: int,
    speed: float,
    *,
    ascii_only: bool = False,
) -> RenderableType:
    """Return the frame for a terminal of ``width`` columns and ``height`` rows.

    Args:
        ascii_only: the terminal shows no other characters.
    """
    slots = max(trial.slots for trial in replay.trials)
    layout = _Layout.of(slots, len(replay.trials), width, height)
    looks = looks_of([state.name for state in frame.states])
    panels = [
        _panel(replay, trial, state, layout, looks[state.name][0])
        for trial, state in zip(replay.trials, frame.states, strict=True)
    ]
    title = Text(replay.title, "dim", no_wrap=True, overflow="ellipsis")
    last = [_legend(width, layout.slots_per_cell), _clock(replay, frame, width, speed)]
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


def _panel(
    replay: Replay, trial: frames.TrialReplay, state: SlotState, layout: _Layout, colour: str
) -> list[Text]:
    """Return the lines of a strategy: name and numbers, slots, and how busy they have been."""
    lines = _head(replay, state, layout, colour)
    if layout.slots_per_cell:
        lines += _cells(state, layout.panel, layout.slots_per_cell, colour)
    else:
        width = layout.panel
        longest = max(int(t.recording.requests.output_tokens.max()) for t in replay.trials)
        lines += [_slot(state, slot, width, longest, colour) for slot in range(trial.slots)]
    return lines + _chart(replay.end_ns, trial, state, layout, colour)


def _head(replay: Replay, state: SlotState, layout: _Layout, colour: str) -> list[Text]:
    busy = f"{state.busy:,} of {len(state.state):,} slots busy"
    if state.over:
        busy = f"done after {replay.spell(state.now_ns)}"
    rate = f"{_short(round(state.tokens_per_s))} tok/s"
    counts = f"{_short(state.finished)}/{_short(state.requests)} · queue {_short(state.waiting)}"
    below: list[Text] = []
    if layout.beside:
        asides = [busy]
        numbers = _fit([f"done {counts} · {rate}", f"{counts} · {rate}"], layout.panel)
        below = [Text(numbers, no_wrap=True, overflow="ellipsis")]
    else:
        short = busy if state.over else counts
        asides = [f"{short} · {rate}", short]
    aside = _fit(asides, layout.panel - len(state.name) - 1)
    name = Text(state.name, f"bold {colour}", no_wrap=True)
    name.truncate(max(layout.panel - len(aside) - 1, 4), overflow="ellipsis")
    name.append(aside.rjust(layout.panel - name.cell_len), "bold" if state.over else "")
    return [name, *below]


def _fit(texts: Sequence[str], width: int) -> str:
    return next((text for text in texts if len(text) <= width), texts[-1])


def _slot(state: SlotState, slot: int, width: int, longest: int, colour: str) -> Text:
    """Return one slot: its request's tokens, those to come, those lost while it was held."""
    number, most = len(str(len(state.state) - 1)), 12 if width >= 30 else 6
    kind, tokens, output = (int(c[slot]) for c in (state.state, state.tokens, state.output_tokens))
    label = _label(state, slot, most)
    room = max(width - number - 2 - max(len(label), most), 4)
    line = Text(f"{slot:>{number}} ", "dim", no_wrap=True)
    if kind == EMPTY:
        return line.append(_GLYPHS[EMPTY] * room, "dim")
    length = min(max(round(output * room / longest), 1), room)
    filled = length if kind == PROMPT else round(length * tokens / output)
    line.append(_GLYPHS[PROMPT if kind == PROMPT else RUNNING] * filled, colour)
    line.append(_TO_COME * (length - filled), colour)
    held = -int(-state.held[slot] * room / longest // 1) if kind == HELD else 0
    held = min(held, room - length)
    line.append(_GLYPHS[HELD] * held, "dim")
    line.append(" " * (room - length - held + 1))
    return line.append(label, "dim" if kind == HELD else "")


def _label(state: SlotState, slot: int, most: int) -> str:
    kind, request = int(state.state[slot]), f"#{state.request[slot]}"
    if kind == EMPTY:
        return ""
    tokens = f"{state.tokens[slot]}/{state.output_tokens[slot]}"
    progress = {PROMPT: "prompt", HELD: "done"}.get(kind, tokens)
    return next((t for t in (f"{request} {progress}", request) if len(t) <= most), "")


def _cells(state: SlotState, width: int, slots_per_cell: int, colour: str) -> list[Text]:
    """Return a character per slot, or one for the commonest state of several slots."""
    count = -(-len(state.state) // slots_per_cell)
    padded = np.full(count * slots_per_cell, -1)
    padded[: len(state.state)] = state.state
    counts = np.stack([(padded.reshape(count, slots_per_cell) == s).sum(1) for s in _GLYPHS])
    commonest = [list(_GLYPHS)[i] for i in counts.argmax(0)]
    lines = []
    for begin in range(0, count, width):
        line = Text(no_wrap=True)
        for kind in commonest[begin : begin + width]:
            line.append(_GLYPHS[kind], "dim" if kind in (EMPTY, HELD) else colour)
        lines.append(line)
    return lines


def _chart(
    end_ns: int, trial: frames.TrialReplay, state: SlotState, layout: _Layout, colour: str
) -> list[Text]:
    margin, rows = 5, layout.chart
    running, held = trial.levels(state.now_ns, layout.panel - margin, end_ns)
    lines = []
    for row in reversed(range(rows)):
        label = "busy" if row == 0 else _short(trial.slots) if row == rows - 1 else ""
        line = Text(f"{label:>{margin - 1}} ", "dim", no_wrap=True)
        for level, above in zip(running * rows - row, (running + held) * rows - row, strict=True):
            if np.isnan(level):
                line.append(" ")
            elif level > 1 / 16 or (row == 0 and level > 0):
                line.append(_LEVELS[int(np.clip(np.ceil(level * 8 - 0.5 - 1e-9), 1, 8))], colour)
            else:
                line.append(_GLYPHS[HELD] if above > 0.5 and rows > 1 else " ", "dim")
        lines.append(line)
    return lines


def _legend(width: int, slots_per_cell: int) -> Text:
    keys = [key for key in _LEGEND if not slots_per_cell or key[0] != _TO_COME]
    text = "  ".join(f"{sign} {long}" for sign, long, _ in keys)
    shorter = " ".join(f"{sign}{short}" for sign, _, short in keys)
    if slots_per_cell > 1:
        text = f"1 cell = {slots_per_cell:,} slots  {text}"
        shorter = f"{slots_per_cell:,} slots each {shorter}"
    return Text(_fit([text, shorter], width), "dim", no_wrap=True, overflow="ellipsis")


def _clock(replay: Replay, frame: frames.Frame, width: int, speed: float) -> Text:
    if frame.t_ns >= frame.end_ns:
        return Text(replay.verdict, "bold", no_wrap=width < _NARROWEST, overflow="ellipsis")
    text = f"{replay.spell(frame.t_ns).split()[0]} of {replay.spell(frame.end_ns)} "
    pace = "true speed" if speed == 1 else f"{speed:,.3g}× speed"
    pace = f"{speed * 1e9 / UNIT_NS:,.3g} steps/s" if replay.in_steps else pace
    pace = f" played at {pace}" if width >= 60 else f" {pace}"
    room = width - len(text) - len(pace)
    filled = round(room * frame.t_ns / frame.end_ns)
    bar = (("━" * filled, "bold"), ("─" * (room - filled), "dim"))
    return Text.assemble(text, *bar, pace, no_wrap=True)


def _short(count: int) -> str:
    """Return a number in at most six characters."""
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:,.0f}k" if count < 999_500 else f"{count / 1e6:,.1f}M"
