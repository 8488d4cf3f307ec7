"""The timeline as a film for slides: its bars grow as the slots filled."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from batchbench.errors import UsageError
from batchbench.reports.figures.card import (
    INK,
    QUIET,
    WIDE,
    Card,
    Strategy,
    add_legend,
    house_style,
    make_card,
    name_strategies,
)
from batchbench.reports.figures.occupancy import share_time
from batchbench.reports.figures.timeline import (
    ROOM,
    Scene,
    draw_end,
    draw_lanes,
    height_of,
    kinds_of_bars,
    scene_of,
    timeline_headline,
    timeline_notes,
)
from batchbench.reports.replay.frames import Film
from batchbench.reports.replay.frames import Scene as Moment
from batchbench.reports.result import Result
from batchbench.reports.text import clean_text, spell_number

FPS, DPI = 10, 100
LASTS_S, STAYS_S, MOST_S = 12.0, 3.0, 30.0
"""Seconds of a film: as a rule, of its last picture, and at most without it."""

Update = Callable[[int, Moment], None]


def draw_film(result: Result, speed: float | None = None) -> bytes:
    """An animated GIF of 800 pixels' width, 10 pictures a second, that begins anew when it ends.

    Args:
        speed: seconds of the trial that pass in one; as a rule such that the film lasts 12 s.

    Raises:
        UsageError: at this speed it would last longer than 30 s.
    """
    film = Film.of(result)
    stepped = [
        strategy for strategy in name_strategies(result.recordings) if strategy.typical.has_steps
    ]
    strategies = [replace(strategy, index=i) for i, strategy in enumerate(stepped)]
    # At so few dots an inch, hinting turns sans-serif letters into others.
    with house_style(), rc_context({"text.hinting": "none"}):
        scene = scene_of(strategies, tallest=3.2)
        lasts = LASTS_S if speed is None else scene.window_ns / 1e9 / speed
        if lasts > MOST_S:
            raise UsageError(
                f"--speed {speed:g}: the film would last {lasts:,.0f} s, and most is {MOST_S:g} s; "
                f"take --speed {scene.window_ns / 1e9 / LASTS_S:.2g}"
            )
        card, updates = _stage(strategies, scene, clean_text(film.title))
        pictures = _Camera(card.figure)
        for t_ns in _times(scene.window_ns, lasts):
            frame = film.frame_at(t_ns)
            moments = (frame.scenes[0], *frame.scenes)
            for update, moment in zip(updates, moments, strict=True):
                update(t_ns, moment)
            pictures.shoot()
    return pictures.developed()


class _Camera:
    """Takes pictures of a figure in which only the animated artists change."""

    def __init__(self, figure: Figure) -> None:
        self._figure = figure
        figure.set_dpi(DPI)
        self._canvas = _canvas_of(figure)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)
        moving = figure.findobj(lambda artist: artist.get_animated())
        self._moving = sorted(moving, key=lambda artist: artist.get_zorder())
        self._taken: list[Image.Image] = []

    def shoot(self) -> None:
        """Take a picture of how it is now."""
        self._canvas.restore_region(self._still)
        for artist in self._moving:
            artist.draw(self._canvas.get_renderer())
        self._taken.append(Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB"))

    def developed(self) -> bytes:
        """Return the pictures as a GIF; the last one stays longer."""
        first, *others = self._taken
        stay = [1000 // FPS] * len(others) + [round(STAYS_S * 1000)]
        out = io.BytesIO()
        first.save(out, "GIF", save_all=True, append_images=others, duration=stay, loop=0)
        return out.getvalue()


def _canvas_of(figure: Figure) -> Any:
    """The canvas, whose methods are not annotated."""
    return FigureCanvasAgg(figure)


def _times(end_ns: float, lasts_s: float) -> list[int]:
    """Times of the pictures, the last being the end."""
    return [int(t) for t in np.linspace(0, end_ns, max(round(lasts_s * FPS), 1) + 1)]


def _stage(strategies: list[Strategy], scene: Scene, title: str) -> tuple[Card, list[Update]]:
    """The picture with everything in it, and what hides of it what has not happened yet.

    The first update is of the whole, the others are of the strategies.
    """
    tall = [height_of(strategy, scene) for strategy in strategies]
    entries = kinds_of_bars(strategies, scene)
    top = 0.24 * -(-len(entries) // 3) + 0.08
    body = top + sum(tall) + 0.46 * len(tall) + 0.36
    headline = timeline_headline(strategies)
    card = make_card(headline, title, body, timeline_notes(strategies, scene))
    add_legend(card, entries)
    panels: list[Axes] = []
    updates: list[Update] = []
    at_end: list[Artist] = []
    for strategy, height in zip(strategies, tall, strict=True):
        card.label(top + 0.22, strategy, "")
        panels.append(card.axes(0.5, top + 0.3, WIDE - 0.5 - ROOM, height))
        draw_lanes(panels[-1], strategy, scene)
        before = set(panels[-1].get_children())
        draw_end(panels[-1], strategy, scene)
        at_end += [artist for artist in panels[-1].get_children() if artist not in before]
        updates.append(_curtain(card, panels[-1], scene))
        top += height + 0.46
    share_time(panels, scene.window_ns, scene.unit)
    panels[-1].spines["bottom"].set_visible(True)
    return card, [_whole(card, strategies, scene, at_end), *updates]


def _whole(card: Card, strategies: list[Strategy], scene: Scene, at_end: list[Artist]) -> Update:
    """The headline and the ends, which are told when all is over."""
    headline = card.figure.texts[0]
    told = headline.get_text()
    for artist in (headline, *at_end):
        artist.set_animated(True)
    count = len(strategies[0].typical.requests.slot)
    names = " and ".join(strategy.called for strategy in strategies)
    asked = f"The same {count:,} requests under {names}"

    def update(t_ns: int, moment: Moment) -> None:
        over = t_ns >= scene.window_ns
        headline.set_text(told if over else asked)
        for artist in at_end:
            artist.set_visible(over)

    return update


def _curtain(card: Card, axes: Axes, scene: Scene) -> Update:
    """White over what is still to come in one panel, and the figures of now above it."""
    detail = card.figure.texts[-1]
    curtain = Rectangle((0, 0), 1, 1, fc="#ffffff", ec="none", zorder=-1)  # before what is told
    curtain.set_transform(axes.get_xaxis_transform())
    axes.add_patch(curtain)
    now = axes.axvline(0, color=INK, lw=1.6, zorder=5)
    for artist in (detail, curtain, now):
        artist.set_animated(True)
    end = scene.window_ns / scene.unit.ns

    def update(t_ns: int, moment: Moment) -> None:
        at = t_ns / scene.unit.ns
        curtain.set_bounds(at, -0.05, end - at, 1.1)
        now.set_xdata([at, at])
        now.set_visible(not moment.over and t_ns < scene.window_ns)
        rate = f"{spell_number(round(moment.tokens_per_s))} tokens/s"
        done = f"{moment.finished:,} of {moment.requests:,} done"
        detail.set_text(
            f"done after {scene.unit_of_ends.text(moment.now_ns)}, {rate}"
            if moment.over
            else f"{done}, {moment.waiting:,} waiting, {rate}"
        )
        detail.set_color(INK if moment.over else QUIET)

    return update
