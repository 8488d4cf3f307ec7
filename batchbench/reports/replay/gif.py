"""The timeline as an animated GIF for slides: its bars grow as the slots filled."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from batchbench.errors import UsageError
from batchbench.reports.figures.card import INK, QUIET, Card, house_style, name_strategies
from batchbench.reports.figures.slots import Panel, Scale, draw_end, lay_out
from batchbench.reports.replay.frames import Frame, Replay
from batchbench.reports.result import Result
from batchbench.reports.text import clean_text, spell_number

FPS, DPI = 10, 100
LASTS_S, STAYS_S, MOST_S = 12.0, 3.0, 30.0
"""Seconds of a GIF by default, of its last picture, and at most without the last picture."""

Update = Callable[[Frame], None]


def draw_gif(result: Result, speed: float | None = None) -> bytes:
    """Return an animated GIF, 800 pixels wide, 10 pictures per second, that repeats forever.

    Args:
        speed: seconds of the trial per second; by default such that the GIF takes 12 s.

    Raises:
        UsageError: at this speed it would take longer than 30 s.
    """
    replay = Replay.of(result)
    stepped = [s for s in name_strategies(result.recordings) if s.typical.has_steps]
    strategies = [replace(strategy, index=i) for i, strategy in enumerate(stepped)]
    # At so few dots an inch, hinting turns sans-serif letters into others.
    with house_style(), rc_context({"text.hinting": "none"}):
        card, scale, panels = lay_out(strategies, clean_text(replay.title), tallest=3.2)
        lasts_s = LASTS_S if speed is None else scale.window_ns / 1e9 / speed
        if lasts_s > MOST_S:
            raise UsageError(
                f"--speed {speed:g}: the GIF would take {lasts_s:,.0f} s, and at most {MOST_S:g} s "
                f"are possible; use --speed {scale.window_ns / 1e9 / LASTS_S:.2g}"
            )
        updates = [_headline_and_ends(card, scale, panels)]
        updates += [_panel(panel, scale, i) for i, panel in enumerate(panels)]
        frames = map(replay.frame_at, _times(scale.window_ns, lasts_s))
        first, *others = _pictures(card.figure, frames, updates)
    shown_ms = [1000 // FPS] * len(others) + [round(STAYS_S * 1000)]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=shown_ms, loop=0)
    return out.getvalue()


def _times(end_ns: float, lasts_s: float) -> list[int]:
    return [int(t) for t in np.linspace(0, end_ns, max(round(lasts_s * FPS), 1) + 1)]


def _pictures(
    figure: Figure, frames: Iterator[Frame], updates: list[Update]
) -> Iterator[Image.Image]:
    """Yield a picture per frame; only animated artists are drawn anew."""
    figure.set_dpi(DPI)
    canvas: Any = FigureCanvasAgg(figure)  # its methods are not annotated
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    moving = figure.findobj(lambda artist: artist.get_animated())
    moving.sort(key=lambda artist: artist.get_zorder())
    for frame in frames:
        for update in updates:
            update(frame)
        canvas.restore_region(still)
        for artist in moving:
            artist.draw(canvas.get_renderer())
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _headline_and_ends(card: Card, scale: Scale, panels: list[Panel]) -> Update:
    """Return a function that shows the headline, and the ends in the last picture."""
    headline = card.figure.texts[0]
    answer = headline.get_text()
    ends: list[Artist] = []
    for panel in panels:
        before = panel.axes.get_children()
        draw_end(panel, scale)
        ends += [artist for artist in panel.axes.get_children() if artist not in before]
    count = len(panels[0].strategy.typical.requests.slot)
    names = " and ".join(panel.strategy.called for panel in panels)
    for artist in (headline, *ends):
        artist.set_animated(True)

    def update(frame: Frame) -> None:
        over = frame.t_ns >= int(scale.window_ns)
        headline.set_text(answer if over else f"The same {count:,} requests under {names}")
        for artist in ends:
            artist.set_visible(over)

    return update


def _panel(panel: Panel, scale: Scale, index: int) -> Update:
    """Return a function that covers a panel's future in white and writes the present above it."""
    curtain = Rectangle((0, 0), 1, 1, fc="#ffffff", ec="none", zorder=-1)  # below all that moves
    curtain.set_transform(panel.axes.get_xaxis_transform())
    panel.axes.add_patch(curtain)
    now = panel.axes.axvline(0, color=INK, lw=1.6, zorder=5)
    for artist in (panel.detail, curtain, now):
        artist.set_animated(True)
    end = scale.window_ns / scale.unit.ns

    def update(frame: Frame) -> None:
        state, at = frame.states[index], frame.t_ns / scale.unit.ns
        curtain.set_bounds(at, -0.05, end - at, 1.1)
        now.set_xdata([at, at])
        now.set_visible(not state.over and frame.t_ns < int(scale.window_ns))
        text = f"{state.finished:,} of {state.requests:,} done, {state.waiting:,} waiting"
        if state.over:
            text = f"done after {scale.unit_of_ends.text(state.now_ns)}"
        panel.detail.set_text(f"{text}, {spell_number(round(state.tokens_per_s))} tokens/s")
        panel.detail.set_color(INK if state.over else QUIET)

    return update
