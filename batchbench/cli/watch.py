"""The command watch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.output import echo
from batchbench.errors import Interrupted, UsageError
from batchbench.files import claimed, write_file
from batchbench.settings import setting

if TYPE_CHECKING:
    from rich.console import Console

    from batchbench.batching.engines import Clock
    from batchbench.reports.replay.frames import Film
    from batchbench.reports.result import Result

WATCH_HELP = """Replay a result: slots fill and empty as they did, the strategies side by side.

Of each strategy the trial of median duration is shown, at a speed at which the longest lasts about
12 s. The last picture stays; Ctrl-C stops. For slides, --gif writes the film to a file.

Example: batchbench watch batchbench-results/my-run --speed 4"""


@dataclass(frozen=True)
class WatchSpec:
    """The speed of the replay and its destination."""

    speed: float | None = setting(
        None,
        "Seconds of the trial that pass in one second.",
        "Replay",
        min=1e-9,
        max=1e9,
        default_text="so that it lasts about 12 s",
    )
    gif: Path | None = setting(
        None, "Write an animated GIF for slides instead.", "Output", metavar="FILE"
    )
    overwrite: bool = setting(False, "Replace the file if it is there.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"asked": WatchSpec})
def watch(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False),
    ],
    asked: WatchSpec,
) -> None:
    """Show what happened as it happened."""
    speed, gif = asked.speed, asked.gif
    if gif is None and not sys.stdout.isatty():
        raise UsageError("watch: needs a terminal to play on; --gif FILE writes the film to a file")
    from batchbench.reports.replay.frames import Film, usual_speed
    from batchbench.reports.result import load_result

    result = load_result(folder)
    if gif is not None:
        _write_gif(result, speed, gif, overwrite=asked.overwrite)
        return
    from rich.console import Console

    from batchbench.batching.engines import WallClock

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_dumb_terminal:
        raise UsageError("watch: this terminal cannot move its cursor; --gif FILE writes the film")
    film = Film.of(result)
    play(film, usual_speed(film) if speed is None else speed, console, WallClock())


def play(film: Film, speed: float, console: Console, clock: Clock) -> None:
    """Show the film on a terminal, at the times that the clock tells; its last frame stays.

    Raises:
        Interrupted: Ctrl-C; the frame of that moment stays.
    """
    from rich.live import Live

    from batchbench.reports.replay.frames import moments
    from batchbench.reports.replay.terminal import render

    shown = 0
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            for t_ns in moments(film, speed, clock):
                shown = t_ns
                width, height = console.size
                frame = render(
                    film,
                    film.frame_at(t_ns),
                    width,
                    height,
                    speed,
                    ascii_only=console.options.ascii_only,
                )
                live.update(frame, refresh=True)
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at {film.spell(shown)}") from error


def _write_gif(result: Result, speed: float | None, file: Path, *, overwrite: bool) -> None:
    """Draw the film and write it, whole or not at all."""
    from batchbench.files import check_files

    if file.suffix != ".gif":
        raise UsageError(f"--gif {file}: must end in .gif, such as --gif film.gif")
    from batchbench.reports.replay.gif import draw_film

    with claimed(file, f"--gif {file}"):
        check_files(file.parent, [file.name], overwrite=overwrite)
        content = draw_film(result, speed)
        write_file(file, content)
    echo(f"{file}: {len(content) / 1e6:.1f} MB")
