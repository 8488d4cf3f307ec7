"""Pictures: what is drawn is what the recordings say, and can be read."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from support.laws import Config, configs, law, workloads

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import ChunkLog, Header, Recording, RequestLog, SpanLog, WaitLog
from batchbench.reports import metrics
from batchbench.reports.figures import draw, figure_bytes
from batchbench.reports.figures.slots import MOST_BARS, MOST_BARS_A_SLOT, MOST_SLOTS
from batchbench.reports.latency import e2el_ms, ttft_ms
from batchbench.reports.statistics import paired_ratio
from batchbench.workloads import Workload, WorkloadSpec, make_workload

PICTURES = ["throughput", "latency", "occupancy", "timeline", "account"]
TITLE = "gpt2 · cpu float32 · 8 slots · 32 requests"
Recordings = Mapping[str, Sequence[Recording]]

few = settings(law, phases=(Phase.generate,))
"""Drawing takes a tenth of a second: to shrink a counter-example would take minutes."""


def simulated(workload: Workload, config: Config) -> Recording:
    """One trial in which a step costs the unit that pictures call a step."""
    batcher = Batcher(
        config.policy,
        SimulatedEngine(),
        config.slots,
        order=config.order,
        prefill=config.prefill,
        max_batched_tokens=config.max_batched_tokens,
    )
    return batcher.serve(workload, Watch())


def classic(requests: int = 32, slots: int = 8) -> Workload:
    """The notebook's workload."""
    spec = WorkloadSpec(queue_size=requests)
    return make_workload(spec, batch_size=slots, vocab_size=50257, encode=None)


def both(workload: Workload, slots: int = 8) -> dict[str, list[Recording]]:
    """Static and continuous, one simulated trial each."""
    names = ("static", "continuous")
    return {name: [simulated(workload, Config(name, slots))] for name in names}


def measured(recording: Recording, seed: int, step_s: float = 0.0115) -> Recording:
    """The trial as a machine would have run it: prompts cost more, no step is like another."""
    rng, spans = np.random.default_rng(seed), recording.spans
    cost = np.repeat(np.where(spans.chunks > 0, 2.7, 1.0), spans.steps) * step_s * 1e9
    ends = np.cumsum(np.ceil(cost * rng.lognormal(0, 0.05, len(cost))).astype(np.int64))
    starts = np.concatenate([[0], ends[:-1]])[recording.first_steps]
    return replace(
        recording,
        header=replace(recording.header, simulated=False, about={}),
        spans=replace(spans, start_ns=starts),
        ends_ns=ends,
        step_ns=None,
    )


def trials(count: int = 4, step_s: float = 0.0115, **kwargs: Any) -> dict[str, list[Recording]]:
    """Static and continuous on the classic workload, measured several times."""
    return {
        name: [measured(once, seed, step_s) for seed in range(count)]
        for name, (once,) in both(classic(**kwargs), kwargs.get("slots", 8)).items()
    }


def named(recordings: Recordings, *names: str) -> dict[str, Sequence[Recording]]:
    """The same trials under other names."""
    return dict(zip(names, recordings.values(), strict=True))


def found(figure: Figure, gid: str) -> Any:
    """The one artist of this id."""
    (artist,) = figure.findobj(lambda artist: artist.get_gid() == gid)
    return artist


def boxes(figure: Figure, gid: str) -> np.ndarray:
    """Left, right and lane of each box of a collection, ``[boxes, 3]``, sorted."""
    rows = [
        (*path.vertices[:, 0][[0, 2]], path.vertices[:4, 1].mean())
        for path in found(figure, gid).get_paths()
    ]
    return np.array(sorted(rows)).reshape(-1, 3)


def texts(figure: Figure) -> list[str]:
    """Everything that is written, spaces made plain."""
    return [t.get_text().replace("\N{NO-BREAK SPACE}", " ") for t in figure.findobj(Text)]


SIMULATED, MEASURED = both(classic()), trials(4)


@pytest.fixture(scope="module")
def steps() -> dict[str, Figure]:
    """The pictures of a simulation. Not to be changed."""
    return draw(SIMULATED, TITLE)


@pytest.fixture(scope="module")
def seconds() -> dict[str, Figure]:
    """The pictures of what was measured. Not to be changed."""
    return draw(MEASURED, TITLE)


# What is drawn


def test_five_pictures(steps: dict[str, Figure]) -> None:
    assert list(steps) == PICTURES


@settings(few, max_examples=6)
@given(workloads(), configs())
def test_timeline_and_occupancy_show_the_recording(workload: Workload, config: Config) -> None:
    """Every request once, from its first step to its last token, then held until its slot is
    free; and the areas of the occupancy are the same times."""
    recording = simulated(workload, config)
    figures = draw({config.policy: [recording]}, TITLE)
    r, ends = recording.requests, recording.step_ends_ns / UNIT_NS
    starts = recording.step_starts_ns[r.admitted] / UNIT_NS
    for gid, left, right in (
        ("requests-0", starts, ends[r.last]),
        ("prefill-0", starts, ends[r.first]),
        ("held-0", ends[r.last], ends[r.released - 1]),
    ):
        rows = np.stack([left, right, r.slot], -1)
        expected = np.array(sorted(map(tuple, rows[left < right]))).reshape(-1, 3)
        np.testing.assert_allclose(boxes(figures["timeline"], gid), expected)
    for gid, left, right in (
        ("running-0", starts, ends[r.last]),
        ("finished-0", ends[r.last], ends[r.released - 1]),
    ):
        area = shown_area(found(figures["occupancy"], gid))
        np.testing.assert_allclose(area, (right - left).sum(), atol=1e-9)


def shown_area(stairs: Any) -> float:
    """Slots × time between a staircase and its baseline."""
    values, edges, baseline = stairs.get_data()
    return float(((values - (0 if baseline is None else baseline)) * np.diff(edges)).sum())


def test_held_time_is_what_the_counters_say(steps: dict[str, Figure]) -> None:
    for i, (recording,) in enumerate(SIMULATED.values()):
        held = boxes(steps["timeline"], f"held-{i}")
        expected = metrics.counters(recording)["finished_slot_steps"]
        assert (held[:, 1] - held[:, 0]).sum() == pytest.approx(expected)
        assert shown_area(found(steps["occupancy"], f"finished-{i}")) == pytest.approx(expected)


def test_timeline_marks_the_ends_and_what_was_saved(steps: dict[str, Figure]) -> None:
    figure = steps["timeline"]
    assert found(figure, "end-0").get_xdata()[0] == 400
    assert found(figure, "end-1").get_xdata()[0] == 132
    assert {"400 steps", "132 steps", "268 steps saved"} <= set(texts(figure))


def test_long_requests_are_darker_and_slot_0_is_on_top(steps: dict[str, Figure]) -> None:
    bars = found(steps["timeline"], "requests-1")
    light = bars.get_facecolor()[:, :3].mean(axis=1)
    long = SIMULATED["continuous"][0].requests.output_tokens == 100
    assert light[long].max() < light[~long].min() - 0.2
    bottom, top = bars.axes.get_ylim()
    assert top < 0 < 7 < bottom


def test_the_trial_of_median_duration_is_drawn() -> None:
    recordings = trials(5)
    figure = draw(recordings, TITLE)["timeline"]
    for i, several in enumerate(recordings.values()):
        median = np.median([trial.duration_ns for trial in several]) / 1e9
        assert found(figure, f"end-{i}").get_xdata()[0] == pytest.approx(median)


def test_throughput_shows_the_summary_every_trial_and_the_paired_ratio(
    seconds: dict[str, Figure],
) -> None:
    figure = seconds["throughput"]
    for i, several in enumerate(MEASURED.values()):
        for what, metric in (("tokens", "output_throughput"), ("requests", "request_throughput")):
            bar = found(figure, f"{what}-{i}").get_width()
            dots = found(figure, f"{what}-trials-{i}").get_offsets()[:, 0]
            each = [metrics.summary([trial])[metric] for trial in several]
            assert bar == pytest.approx(metrics.summary(several)[metric])
            np.testing.assert_allclose(dots, each)
    static, continuous = ([t.duration_ns for t in several] for several in MEASURED.values())
    ratio = paired_ratio(static, continuous)
    assert ratio is not None
    expected = f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f}) vs. static"
    assert expected in texts(figure)


@pytest.mark.parametrize("count", [1, 2])
def test_no_interval_below_three_trials(count: int) -> None:
    figure = draw(trials(count), TITLE)["throughput"]
    (ratio,) = [text for text in texts(figure) if "vs. static" in text]
    assert re.fullmatch(r"\d\.\d\d× vs\. static", ratio)
    assert any("o interval" in text for text in texts(figure))


def test_what_the_trials_do_not_tell_is_no_headline() -> None:
    static = MEASURED["static"]
    for several, words in (
        (static[:3], "No clear difference"),
        (static[:1], "No clear difference"),
    ):
        figure = draw({"static": several, "copy": several}, TITLE)["throughput"]
        assert any(words in text for text in texts(figure))


@settings(few, max_examples=4)
@given(workloads(), configs())
def test_cdfs_are_distribution_functions(workload: Workload, config: Config) -> None:
    """They climb from 0 to 100 %, and at each latency stand at the share that is not above it."""
    recording = simulated(workload, config)
    figure = draw({config.policy: [recording, recording]}, TITLE)["latency"]
    lines = figure.findobj(lambda artist: artist.get_gid() == "cdf-0")
    both_kinds = (ttft_ms(recording), e2el_ms(recording))
    for line, values in zip(lines, both_kinds, strict=True):
        x, y = line.get_xdata(), line.get_ydata()
        assert line.get_drawstyle() == "steps-post"
        assert (y[0], y[-1]) == (0, 100)
        assert (x[0], x[-1]) == (values.min(), values.max())  # 1 ms is a step
        shares = [(values <= at).mean() * 100 for at in x[1:]]
        np.testing.assert_allclose(y[1:], shares)


def test_latency_names_p50_and_p99(seconds: dict[str, Figure]) -> None:
    for several in MEASURED.values():
        summary = metrics.summary(several)
        for value in (summary["median_e2el_ms"], summary["p99_e2el_ms"], summary["p99_ttft_ms"]):
            assert value is not None
            assert f" {value / 1e3:#.3g} s" in " ".join(texts(seconds["latency"]))


def test_simulated_time_is_in_steps_and_measured_time_in_a_unit_that_suits(
    steps: dict[str, Figure], seconds: dict[str, Figure]
) -> None:
    def axes_of(figures: dict[str, Figure]) -> str:
        return " ".join(a.get_xlabel() for figure in figures.values() for a in figure.axes)

    assert {"(steps)", "tokens/step"} <= set(axes_of(steps).split())
    assert {"(s)", "tokens/s"} <= set(axes_of(seconds).split())
    assert "step" not in axes_of(seconds)
    assert "(ms)" in axes_of(draw(trials(1, step_s=1e-4), TITLE))


# Much, little, and strange


@pytest.mark.parametrize(("requests", "slots"), [(1, 1), (12, 1), (30, 256)], ids=str)
def test_few_and_many_slots(requests: int, slots: int) -> None:
    workload = classic(requests, slots)
    figures = draw(both(workload, slots), TITLE)
    assert all(figure_bytes(figure, "svg") for figure in figures.values())
    for i in range(2):
        assert len(boxes(figures["timeline"], f"requests-{i}")) == requests


def continuous_by_hand(requests: int, slots: int) -> Recording:
    """A long trial, written down instead of simulated: each slot serves its share in a row."""
    index = np.arange(requests)
    rounds = -(-requests // slots)
    lengths = np.where(np.arange(rounds * slots) % 7 == 0, 50, 10).reshape(rounds, slots)
    stop = np.cumsum(lengths, 0).ravel()[:requests]
    start = stop - lengths.ravel()[:requests]
    steps = int(stop.max())
    ones, zeros = np.ones(steps, np.int64), np.zeros(requests, np.int64)
    return Recording(
        header=Header("continuous", 0, slots, False, {}),
        requests=RequestLog(
            zeros, zeros + 7, stop - start, index % slots, start, start, start, stop - 1, stop
        ),
        spans=SpanLog(
            ones, np.arange(steps) * 10**7, ones * slots, 0 * ones, np.bincount(start, None, steps)
        ),
        chunks=ChunkLog(np.argsort(start, kind="stable"), zeros, zeros + 7),
        waits=WaitLog(*np.zeros((5, 0), np.int64)),
        ends_ns=np.arange(1, steps + 1) * 10**7,
        step_ns=None,
        tokens=None,
    )


@pytest.mark.parametrize(("requests", "slots"), [(300_000, 256), (5_000, 1)], ids=str)
def test_what_is_cut_is_said(requests: int, slots: int) -> None:
    """Every bar of the drawn slots within the drawn time is there."""
    recording = continuous_by_hand(requests, slots)
    figure = draw({"continuous": [recording]}, TITLE)["timeline"]
    drawn = boxes(figure, "requests-0")
    shown = min(slots, MOST_SLOTS)
    assert len(drawn) <= min(MOST_BARS, MOST_BARS_A_SLOT * shown)
    window = found(figure, "requests-0").axes.get_xlim()[1]
    r = recording.requests
    starts = recording.step_starts_ns[r.admitted] / 1e9
    assert len(drawn) == ((starts < window) & (r.slot < shown)).sum()
    written = " ".join(texts(figure))
    assert "Only the beginning is drawn" in written
    assert "ends at" in written
    assert (f"slots 0 to {MOST_SLOTS - 1} of {slots}" in written) == (slots > MOST_SLOTS)


def test_averaging_keeps_areas() -> None:
    recording = continuous_by_hand(20_000, 4)
    figure = draw({"continuous": [recording]}, TITLE)["occupancy"]
    running = shown_area(found(figure, "running-0"))
    r = recording.requests
    assert running == pytest.approx((r.released - r.admitted).sum() * 0.01)
    assert any("means over" in text for text in texts(figure))


LONG = "mypackage.policies.experimental:MyVeryOwnPolicyWithAnExtraordinarilyLongName"
LONG_TITLE = f"{LONG * 3} · {'words ' * 40}"
ODD = ("模型:政策", "\x00\ud800 <&>\"' $x_1$ \n")


@pytest.mark.parametrize(
    ("recordings", "title"),
    [
        (MEASURED, TITLE),
        (trials(2, requests=70, slots=32), LONG_TITLE),
        (named(trials(3), LONG, LONG[::-1]), LONG_TITLE),
        (named(trials(3), *ODD), TITLE),
        ({**trials(3), **named(trials(3), LONG, "other:Policy")}, TITLE),
        ({"static": both(classic(1, 1), 1)["static"]}, LONG_TITLE),
    ],
    ids=["measured", "32 slots", "long", "odd", "four", "least"],
)
def test_nothing_overlaps_or_leaves_the_card(recordings: Recordings, title: str) -> None:
    for name, figure in draw(recordings, title).items():
        placed = visible_texts(figure)
        for i, (text, box) in enumerate(placed):
            where = f"{name}: {text!r}"
            assert box[0] > 10, where
            assert box[1] > 10, where
            assert box[2] < figure.bbox.x1 - 10, where
            assert box[3] < figure.bbox.y1 - 10, where
            for other, beside in placed[i + 1 :]:
                over = np.minimum(box[2:], beside[2:]) - np.maximum(box[:2], beside[:2])
                # Boxes of text are taller than their letters.
                assert over[0] <= 0.5 or over[1] <= 3, f"{where} on {other!r}"


def visible_texts(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Texts and their boxes in pixels, without labels of ticks beyond the ends of an axis."""
    figure.set_dpi(160)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font here has
        figure.draw_without_rendering()
        hidden = {label for axes in figure.axes for label in labels_beyond(axes)}
        shown = [t for t in figure.findobj(Text) if t.get_visible() and t not in hidden]
        renderer = FigureCanvasAgg(figure).get_renderer()
        return [
            (text.get_text(), text.get_window_extent(renderer).extents)
            for text in shown
            if text.get_text().strip()
        ]


def labels_beyond(axes: Axes) -> list[Text]:
    """Labels of ticks beyond the ends of an axis, which exist and are not drawn."""
    found = []
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick, at in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True):
            if not min(limits) <= at <= max(limits):
                found.append(tick.label1)
    return found


def test_colours_are_kept_by_name() -> None:
    figure = draw(dict(reversed(SIMULATED.items())), TITLE)["timeline"]
    continuous, static = (found(figure, f"requests-{i}").get_facecolor()[0] for i in range(2))
    assert static[0] > static[2]  # more red than blue
    assert continuous[2] > continuous[0]


def test_strategies_look_different() -> None:
    (recording,) = SIMULATED["continuous"]
    figure = draw({f"policies:P{i}": [recording] for i in range(5)}, TITLE)["latency"]
    lines = figure.findobj(lambda artist: str(artist.get_gid()).startswith("cdf-"))
    assert len({line.get_color() for line in lines}) == 5
    assert len({str(line.get_linestyle()) for line in lines[:4]}) > 1


def test_our_own_strategies_look_the_same_whoever_stands_beside_them() -> None:
    (recording,) = SIMULATED["continuous"]
    every = ["static", "static-fixed", "static-bucketed", "static-oracle", "continuous"]

    def looks(names: list[str]) -> dict[str, tuple[str, str]]:
        figure = draw({name: [recording] for name in names}, TITLE)["latency"]
        ttft = figure.axes[0].lines
        lines = [next(x for x in ttft if x.get_gid() == f"cdf-{i}") for i in range(len(names))]
        return {
            name: (line.get_color(), str(line._dash_pattern))
            for name, line in zip(names, lines, strict=True)
        }

    together = looks(every)
    assert len(set(together.values())) == len({dashes for _, dashes in together.values()}) == 5
    assert (
        looks(["mine:P", "static-oracle", "static"])["static-oracle"] == together["static-oracle"]
    )


def test_under_load_the_occupancy_tells_how_many_wait() -> None:
    workload = replace(classic(), due_ns=np.arange(32) * 20 * UNIT_NS)
    assert "wait at once under continuous batching, " in " ".join(
        " ".join(texts(draw(both(workload, 2), TITLE)["occupancy"])).split()
    )


# Files


def test_the_same_recordings_give_the_same_bytes(steps: dict[str, Figure]) -> None:
    again = draw(both(classic()), TITLE)
    for name in PICTURES:
        assert figure_bytes(steps[name], "svg") == figure_bytes(again[name], "svg")
    assert figure_bytes(steps["timeline"], "png") == figure_bytes(again["timeline"], "png")


def test_ones_own_matplotlibrc_changes_nothing(steps: dict[str, Figure]) -> None:
    own = {"savefig.bbox": "tight", "font.size": 30, "axes.grid": True, "savefig.dpi": 50}
    with mpl.rc_context(own):
        before = dict(mpl.rcParams)
        figure = draw(SIMULATED, TITLE)["timeline"]
        assert figure_bytes(figure, "svg") == figure_bytes(steps["timeline"], "svg")
        assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["throughput", "timeline"])
def test_png_is_a_card_without_transparency(name: str, seconds: dict[str, Figure]) -> None:
    image = Image.open(io.BytesIO(figure_bytes(seconds[name], "png")))
    assert image.format == "PNG"
    assert image.width == 1280
    assert 500 < image.height < 1500
    assert np.asarray(image.convert("RGBA"))[..., 3].min() == 255


def test_svg_is_xml_and_its_text_is_text() -> None:
    for figure in draw(named(trials(3), *ODD), f"{TITLE} <&> $1").values():
        root = ElementTree.fromstring(figure_bytes(figure, "svg"))
        written = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
        assert f"{TITLE} <&> $1" in written
        assert any(ODD[0] in text for text in written)
        assert any("$x_1$" in text for text in written)
        assert not any(re.search(r"\d{4}-\d\d-\d\d", text) for text in root.itertext())


def test_draws_without_torch_and_without_pyplot() -> None:
    code = (
        "import sys, batchbench.reports.figures\n"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "[]"
