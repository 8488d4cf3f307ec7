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
from batchbench.files import check_files, claimed, write_file
from batchbench.settings import setting

if TYPE_CHECKING:
    from rich.console import Console

    from batchbench.batching.engines import Clock
    from batchbench.reports.replay.frames import Replay

WATCH_HELP = """Replay a result: slots fill and empty as they did, the strategies side by side.

Shows the trial of median duration of each strategy, at a speed at which the longest takes about
12 s. The last picture stays; Ctrl-C stops. For slides, --gif writes the replay to a file.

Example: batchbench watch batchbench-results/my-run --speed 4"""


@dataclass(frozen=True)
class WatchSpec:
    """The speed of the replay and its destination."""

    speed: float | None = setting(
        None,
        "Seconds of the trial per second: 1 is true speed, 4 four times as fast.",
        "Replay",
        min=1e-9,
        max=1e9,
        default_text="such that it takes about 12 s",
    )
    gif: Path | None = setting(
        None, "Write an animated GIF for slides instead.", "Output", metavar="FILE"
    )
    overwrite: bool = setting(False, "Replace the file if it exists.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options({"spec": WatchSpec})
def watch(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="The folder of a result.", show_default=False),
    ],
    spec: WatchSpec,
) -> None:
    """Replay a result on the terminal, or write it as a GIF."""
    file = spec.gif
    if file is None and not sys.stdout.isatty():
        raise UsageError("watch: the output is not a terminal; add --gif FILE to write a GIF")
    from batchbench.reports.replay.frames import Replay, usual_speed
    from batchbench.reports.result import load_result

    result = load_result(folder)
    if file is None:
        from rich.console import Console

        from batchbench.batching.engines import WallClock

        console = Console(highlight=False, markup=False, emoji=False)
        if console.is_dumb_terminal:
            raise UsageError(
                "watch: this terminal cannot move its cursor; add --gif FILE to write a GIF"
            )
        replay = Replay.of(result)
        play(replay, spec.speed or usual_speed(replay), console, WallClock())
        return
    if file.suffix != ".gif":
        raise UsageError(f"--gif {file}: must end in .gif, such as --gif replay.gif")
    from batchbench.reports.replay.gif import draw_gif

    with claimed(file, f"--gif {file}"):
        check_files(file.parent, [file.name], overwrite=spec.overwrite)
        content = draw_gif(result, spec.speed)
        write_file(file, content)
    echo(f"{file}: {len(content) / 1e6:.1f} MB")


def play(replay: Replay, speed: float, console: Console, clock: Clock) -> None:
    """Show a replay on a terminal, at the times of the clock; its last frame stays.

    Raises:
        Interrupted: Ctrl-C; the frame of that moment stays.
    """
    from rich.live import Live

    from batchbench.reports.replay.frames import moments
    from batchbench.reports.replay.terminal import render

    shown, plain = 0, console.options.ascii_only
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            for t_ns in moments(replay, speed, clock):
                shown, frame = t_ns, replay.frame_at(t_ns)
                picture = render(replay, frame, *console.size, speed, ascii_only=plain)
                live.update(picture, refresh=True)
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at {replay.spell(shown)}") from error
