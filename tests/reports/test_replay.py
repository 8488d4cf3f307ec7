"""The replay: what every slot did at a moment, its picture on a terminal, and the replay."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from support.laws import Config, configs, law, serve, workloads
from support.occupancy import occupancy
from support.program import on_a_terminal
from support.results import CLASSIC, clean, result_of, simulated, trials_of, verdicts

import batchbench
from batchbench.batching.engines import VirtualClock
from batchbench.batching.recording import Recording, token_steps
from batchbench.cli.main import run_command
from batchbench.cli.report import play
from batchbench.errors import Interrupted, UsageError
from batchbench.reports.output import write_folder
from batchbench.reports.replay.frames import (
    EMPTY,
    FRAMES_PER_SECOND,
    HELD,
    PROMPT,
    RUNNING,
    Replay,
    TrialReplay,
    moments,
    usual_speed,
)
from batchbench.reports.replay.gif import FPS, LASTS_S, STAYS_S, draw_gif
from batchbench.reports.replay.terminal import render
from batchbench.reports.result import Result
from batchbench.studies.reproduce import check_counters
from batchbench.workloads import Workload

MS = 1_000_000

# A moment, as a function of the log


def times_of_tokens(recording: Recording, request: int) -> list[int]:
    """Return the time of each token of a request, step by step."""
    r = recording.requests
    decodes = np.repeat(recording.spans.decoding > 0, recording.spans.steps)
    steps = token_steps(decodes, int(r.first[request]), int(r.last[request]))
    return sorted(recording.step_ends_ns[steps].tolist())


@settings(law, max_examples=60)
@given(workloads(), configs(), st.floats(0, 1.1))
def test_a_moment_is_what_the_log_says(workload: Workload, config: Config, part: float) -> None:
    recording = serve(workload, config)
    trial = TrialReplay("mine", recording)
    t = int(part * trial.end_ns)
    state = trial.at(t, window_ns=trial.end_ns)
    r, starts, ends = recording.requests, recording.step_starts_ns, recording.step_ends_ns
    due = np.minimum(r.due_ns, starts[r.admitted])
    assert state.over == (t >= trial.end_ns)
    assert state.finished == (ends[r.last] <= min(t, trial.end_ns)).sum()
    assert state.waiting == ((due <= t) & (starts[r.admitted] > t)).sum() * (not state.over)
    all_tokens = [times_of_tokens(recording, i) for i in range(len(workload))]
    assert trial.tokens_at(t) == sum(at <= t for each in all_tokens for at in each)
    for slot in range(trial.slots):
        inside = [
            i
            for i in range(len(workload))
            if r.slot[i] == slot and starts[r.admitted[i]] <= t < ends[r.released[i] - 1]
        ]
        if state.over or not inside:
            assert (state.state[slot], state.request[slot]) == (EMPTY, -1)
            continue
        (request,) = inside
        got = sum(at <= t for at in all_tokens[request])
        assert state.request[slot] == request
        assert state.tokens[slot] == got
        assert state.output_tokens[slot] == r.output_tokens[request]
        expected = PROMPT if got == 0 else HELD if got == r.output_tokens[request] else RUNNING
        assert state.state[slot] == expected
        assert (state.held[slot] > 0) <= (expected == HELD)


def test_frames_of_the_classic_workload() -> None:
    result = simulated()
    static, continuous = Replay.of(result).frame_at(50 * MS).states
    assert static.state.tolist() == [RUNNING] + [HELD] * 7
    assert static.tokens.tolist() == [50] + [10] * 7
    assert static.held.tolist() == [0] + [40] * 7
    assert (static.finished, static.waiting, static.tokens_per_s) == (7, 24, 1000)
    assert (continuous.finished, continuous.waiting) == (26, 0)
    assert continuous.request.tolist() == [0, 8, 30, 16, 31, -1, 24, -1]
    static, continuous = Replay.of(result).frame_at(400 * MS).states
    assert static.over
    assert continuous.over
    assert continuous.now_ns == 130 * MS
    assert (continuous.finished, round(continuous.tokens_per_s)) == (32, 5231)
    assert continuous.state.tolist() == [EMPTY] * 8


@settings(law, max_examples=40)
@given(workloads(), configs(), st.integers(1, 40))
def test_levels_are_the_means_of_what_runs_and_what_is_held(
    workload: Workload, config: Config, columns: int
) -> None:
    recording = serve(workload, config)
    trial = TrialReplay("mine", recording)
    end = int(recording.step_ends_ns[-1])
    running, held = trial.levels(end, columns, end)
    seen = occupancy(recording)
    length = seen.end_s - seen.start_s
    for levels, slots in ((running, seen.running), (held, seen.finished)):
        shown = np.nan_to_num(levels).sum() * end / 1e9 / columns * trial.slots
        assert shown == pytest.approx((slots * length).sum(), rel=1e-9, abs=1e-12)


def test_what_is_to_come_has_no_level() -> None:
    trial = Replay.of(simulated()).trials[1]
    running, _ = trial.levels(100 * MS, 40, 400 * MS)
    assert np.isnan(running).tolist() == [False] * 10 + [True] * 30
    assert running[0] == pytest.approx(1)


def test_the_trial_of_median_duration_is_shown() -> None:
    trials = trials_of("static")
    replay = Replay.of(result_of({"static": trials}))
    ranked = sorted(trial.duration_ns for trial in trials)
    assert replay.end_ns == ranked[(len(ranked) - 1) // 2]
    assert replay.verdict == f"static done after {replay.spell(replay.end_ns)}"


# On a terminal


def shown(result: Result, t_ns: int, width: int, height: int, **more: bool) -> list[str]:
    """Lines of a frame on a terminal without colour."""
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    replay = Replay.of(result)
    console.print(render(replay, replay.frame_at(t_ns), width, height, usual_speed(replay), **more))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_frame_on_80_columns() -> None:
    assert shown(simulated(), 40 * MS, 80, 24) == [
        "gpt2 · simulated · 8 slots · 32 requests",
        "static               1 of 8 slots busy   continuous           8 of 8 slots busy",
        "done 7/32 · queue 24 · 1,000 tok/s       done 22/32 · queue 2 · 8,000 tok/s",
        "0 █████████░░░░░░░░░░░░░░ #0 40/100      0 █████████░░░░░░░░░░░░░░ #0 40/100",
        "1 ██╱╱╱╱╱╱╱               #1 done        1 ███████░░░░░░░░░░░░░░░░ #8 30/100",
        "2 ██╱╱╱╱╱╱╱               #2 done        2 ▓▓                      #26 prompt",
        "3 ██╱╱╱╱╱╱╱               #3 done        3 █████░░░░░░░░░░░░░░░░░░ #16 20/100",
        "4 ██╱╱╱╱╱╱╱               #4 done        4 ▓▓                      #27 prompt",
        "5 ██╱╱╱╱╱╱╱               #5 done        5 ▓▓                      #28 prompt",
        "6 ██╱╱╱╱╱╱╱               #6 done        6 ██░░░░░░░░░░░░░░░░░░░░░ #24 10/100",
        "7 ██╱╱╱╱╱╱╱               #7 done        7 ▓▓                      #29 prompt",
        "   8 ▃╱╱╱                                   8 ████",
        "     █╱╱╱                                     ████",
        "     █╱╱╱                                     ████",
        "busy █▄▄▄                                busy ████",
        "▓ prompt  █ tokens  ░ still to come  ╱ done, slot still held  · empty",
        "40 of 400 steps ━━━━─────────────────────────────────────── played at 33 steps/s",
    ]


def test_the_last_frame_on_40_columns() -> None:
    lines = shown(simulated(), 400 * MS, 40, 24)
    assert len(lines) == 23
    assert lines[1] == "static              done after 400 steps"
    assert lines[10] == "busy ▇▁▁▁▁▁▁▁▃▅▁▁▁▁▁▁▁▄▄▁▁▁▁▁▁▁▆▂▁▁▁▁▁▁▁"
    assert lines[-3] == "busy ████▇▄▄▄▄▃▁▁"
    assert lines[-1] == "continuous was 3.08× as fast as static"


@functools.cache
def wide(slots: int) -> Result:
    """A simulation with many slots."""
    from batchbench import simulate

    return simulate(batch_size=slots, queue_size=3 * slots)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 24), (20, 8), (200, 60), (39, 10)])
@pytest.mark.parametrize("slots", [1, 8, 33, 256, 5000])
def test_a_frame_fits_the_terminal(slots: int, width: int, height: int) -> None:
    result = simulated() if slots == 8 else wide(slots)
    end = Replay.of(result).end_ns
    for t in (0, end // 3, end):
        lines = shown(result, t, width, height)
        assert max(map(len, lines)) <= width
        assert len(lines) <= max(height, 10)


def test_many_slots_are_condensed() -> None:
    lines = shown(wide(256), 50 * MS, 80, 24)
    cells = [line for line in lines if set(line) <= set("█▓╱· ") and line.startswith("╱")]
    assert len(cells) >= 5
    assert "slots each" not in " ".join(lines)
    assert "1 cell = 10 slots" in shown(wide(5000), 0, 80, 24)[-2]


def test_a_plain_terminal_gets_plain_characters() -> None:
    assert "\n".join(shown(simulated(), 40 * MS, 80, 24, ascii_only=True)).isascii()


def test_measured_times_are_told_in_seconds_and_their_speed() -> None:
    replay = Replay.of(clean())
    lines = shown(clean(), replay.end_ns // 2, 80, 24)
    assert lines[-1].startswith(f"{replay.end_ns / 2e9:.2f} of {replay.end_ns / 1e9:.2f} s ")


@pytest.mark.parametrize("length_s", [0.001, 1, 12, 600])
def test_the_usual_speed_lasts_about_twelve_seconds(
    length_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replay, "end_ns", int(length_s * 1e9))
    assert 10 <= length_s / usual_speed(Replay("", ())) <= 15


# Time


class Stepping(VirtualClock):
    """A clock on which drawing takes time as well."""

    def __init__(self, drawing_ns: int) -> None:
        super().__init__()
        self._drawing = drawing_ns

    def now(self) -> int:
        self._now += self._drawing
        return super().now()


def test_moments_come_at_their_times() -> None:
    replay = Replay.of(simulated())
    clock = VirtualClock()
    times = [(t, clock.now()) for t in moments(replay, 0.1, clock)]
    period = 10**9 // FRAMES_PER_SECOND
    assert times[:-1] == [(i * period // 10, i * period) for i in range(len(times) - 1)]
    assert times[-1] == (400 * MS, 4 * 10**9)


def test_slow_drawing_leaves_moments_out_and_takes_no_longer() -> None:
    replay = Replay.of(simulated())
    clock = Stepping(70 * MS)
    shown = list(moments(replay, 0.1, clock))
    assert len(shown) < 40
    assert shown[-1] == replay.end_ns
    assert clock.now() < 4.3e9


def test_playing_ends_with_the_last_frame() -> None:
    console = Console(
        file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None
    )
    play(Replay.of(simulated()), 0.1, console, VirtualClock())
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "40 of 400 steps" in said
    assert said.splitlines()[-1].endswith("\x1b[?25h")  # the cursor is back
    assert "continuous was 3.08× as fast as static" in "".join(said.splitlines()[-2:])


def test_ctrl_c_ends_it_and_tells_when(capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(VirtualClock):
        def wait_until(self, t: int) -> None:
            if t > 10**9:
                raise KeyboardInterrupt
            super().wait_until(t)

    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    with pytest.raises(Interrupted, match="stopped at 100 steps"):
        play(Replay.of(simulated()), 0.1, console, Stopped())


# The replay


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result's folder in the working directory."""
    from batchbench.reports import output as folders

    monkeypatch.setattr(folders, "draw", lambda recordings, title: {})
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "mine", simulated())
    return Path("mine")


Program = Callable[..., int]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Runs the program in this process."""

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["batchbench", *words])
        return run_command()

    return call


def test_a_film_is_bounded_and_ends_with_the_whole_picture() -> None:
    content = draw_gif(simulated(), speed=0.2)
    with Image.open(io.BytesIO(content)) as replay:
        assert replay.width == 800
        frames = replay.n_frames
        assert frames == 2 * FPS + 1
        lasts = []
        for i in range(frames):
            replay.seek(i)
            lasts.append(replay.info["duration"])
        last = np.asarray(replay.convert("RGB"))
        replay.seek(0)
        first = np.asarray(replay.convert("RGB"))
    assert lasts == [1000 // FPS] * (frames - 1) + [int(STAYS_S * 1000)]
    assert len(content) < 2**20
    blue = (np.array([0x00, 0x72, 0xB2]) == last).all(-1).sum()
    assert blue > 20 * max((np.array([0x00, 0x72, 0xB2]) == first).all(-1).sum(), 100)
    assert (last[5, 5] == 255).all()


def test_a_film_that_would_not_end_is_refused_with_the_speed_to_type() -> None:
    with pytest.raises(UsageError, match=r"--speed 0.001: .* 400 s, .*; use --speed 0.033"):
        draw_gif(simulated(), speed=0.001)


def test_a_film_lasts_as_long_whatever_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchbench.reports.replay import gif as films

    taken: list[int] = []
    monkeypatch.setattr(films, "_times", lambda end, lasts: taken.append(lasts) or [0])
    draw_gif(clean())
    assert taken == [LASTS_S]


def test_watch_writes_a_film(
    folder: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("watch", "mine", "--speed", "4", "--gif", "out/film.gif") == 0
    assert "out/film.gif: " in capsys.readouterr().out
    assert Path("out/film.gif").read_bytes()[:3] == b"GIF"
    assert [file.name for file in Path("out").iterdir()] == ["film.gif"]
    assert program("watch", "mine", "--gif", "out/film.gif") == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("mine", "the output is not a terminal; add --gif FILE"),
        ("mine --gif film.png", "--gif film.png: must end in .gif"),
        ("mine --speed 0", "--speed 0: must be at least 1e-09"),
        ("mine --speed nan", "--speed nan: must be a number"),
        ("nowhere --gif film.gif", "nowhere: no such folder"),
        ("mine --gif mine/result.json/film.gif", "cannot be written"),
    ],
)
def test_a_bad_question_is_answered_with_one_line(
    words: str, error: str, folder: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("watch", *words.split()) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert error in said.err


def test_watch_on_a_terminal_leaves_its_last_frame(folder: Path) -> None:
    code, said = on_a_terminal("batchbench watch mine --speed 4", Path.cwd())
    assert code == 0
    assert "continuous was 3.08× as fast as static" in said
    assert "Traceback" not in said


# Strategies that show no steps


def without_steps(recording: Recording) -> Recording:
    """The same trial as a strategy that schedules by itself would tell it."""
    workload = CLASSIC
    counts = recording.requests.output_tokens.tolist()
    return Recording.of_tokens(
        replace(recording.header, strategy="own"),
        workload,
        [[1] * n for n in counts],
        [[(i + 1) * 10 * MS for i in range(n)] for n in counts],
        [0] * len(workload),
    )


@functools.cache
def with_own() -> Result:
    """A result in which the first of two strategies shows no steps."""
    trials = trials_of("continuous")
    return result_of({"own": [without_steps(t) for t in trials], "continuous": trials})


def test_a_strategy_that_shows_no_steps_is_left_out() -> None:
    replay = Replay.of(with_own())
    assert [trial.name for trial in replay.trials] == ["continuous"]
    assert draw_gif(with_own(), speed=10)[:3] == b"GIF"
    assert "own" not in " ".join(shown(with_own(), 0, 80, 24)[1:])


def test_nothing_can_be_replayed_where_no_strategy_shows_steps() -> None:
    own = result_of({"own": with_own().recordings["own"]})
    with pytest.raises(UsageError, match="own schedules by itself, so no slots are known"):
        Replay.of(own)


def test_its_frames_and_pictures_say_what_is_known() -> None:
    both = batchbench.Result(with_own().data, with_own().recordings)
    assert np.isnan(both.summary.loc["own", "forward_passes"])
    assert np.isnan(both.summary.loc["own", "utilisation"])
    assert both.summary.loc["own", "completed"] == 32
    assert both.plot.throughput().axes
    assert both.plot.timeline().axes
    own = result_of({"own": with_own().recordings["own"]})
    with pytest.raises(ValueError, match="no timeline: own schedules by itself"):
        batchbench.Result(own.data, own.recordings).plot.timeline()
    assert verdicts(check_counters(with_own(), with_own())) == {"counters, continuous": "agrees"}
