"""The page and Markdown: what stands in them, whatever names people have, and their size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.results import HOSTILE, made, renamed

from batchbench.errors import UsageError
from batchbench.files import check_file
from batchbench.reports.formats import html, markdown
from batchbench.reports.formats.html import MOST_BARS, render
from batchbench.reports.output import check_number, make_document
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled, SideBySide, label_results


@pytest.fixture(scope="module")
def small() -> Result:
    """Twenty requests in four slots."""
    return made(queue_size=20)


class Page(HTMLParser):
    """Elements, texts and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.texts.append(data)

    @property
    def words(self) -> str:
        """The words that a reader sees, on one line."""
        return " ".join(" ".join(self.texts).split())


def test_the_page_holds_what_a_stranger_asks_for(small: Result) -> None:
    page = Page(render([Labelled("", small)]))
    for text in (
        "continuous batching was 2.27× as fast as static batching",
        "gpt2 · simulated · 4 slots · 20 requests",
        "Speed-up",
        "Requests in their slots",
        "Output throughput",
        "Where the time went",
        "From static to continuous , part by part",
        "How long requests wait",
        "How full the slots are",
        "Static batching fills its slots together",
        "Continuous batching gives a slot",
        "Checks",
        "batchbench simulate --batch-size 4 --queue-size 20",
        "transformers",
        small.data["created_at"],
    ):
        assert text in page.words, text
    assert "prediction" not in page.words.lower()
    assert not re.search(r"\b(nan|None|null|undefined|inf)\b", page.words, re.IGNORECASE)


def test_the_page_asks_nothing_of_the_network(small: Result) -> None:
    page = Page(render([Labelled("", small)]))
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "url(" not in render([Labelled("", small)])


def test_every_request_of_a_small_run_is_there_with_its_times(small: Result) -> None:
    page = Page(render([Labelled("", small)]))
    data = [json.loads(text) for text in page.scripts if text.startswith("{")]
    for bars, (recording,) in zip(data, small.recordings.values(), strict=True):
        r = recording.requests
        assert bars["request"] == list(range(20))
        assert bars["slot"] == r.slot.tolist()
        assert [us * 1000 for us in bars["done"]] == recording.step_ends_ns[r.last].tolist()
        assert [us * 1000 for us in bars["first"]] == recording.step_ends_ns[r.first].tolist()


def test_bars_cover_the_slots_as_the_recording_says(small: Result) -> None:
    """The area of all bars, in slots × time, is what requests and held slots take."""
    from batchbench.reports.figures.card import name_strategies

    strategies = name_strategies(small.recordings)
    timelines, window, _, _ = html.draw_timelines(strategies, 1000)
    for timeline, strategy in zip(timelines, strategies, strict=True):
        widths = {
            kind: sum(
                int(width)
                for shape in timeline["shapes"]
                if shape.look.split()[0] in kind
                for width in re.findall(r"h(\d+)", shape.path)
            )
            for kind in (("long", "short"), ("held",))
        }
        r = strategy.typical.requests
        steps = window / 1e6
        ran = (r.last + 1 - r.admitted).sum() / steps
        held = (r.released - r.last - 1).sum() / steps
        assert widths["long", "short"] / html.SCALE == pytest.approx(ran, rel=0.005)
        assert widths["held",] / html.SCALE == pytest.approx(held, rel=0.005, abs=1e-9)


def test_names_of_users_stay_text(small: Result) -> None:
    text = render([Labelled(HOSTILE, renamed(small, HOSTILE)), Labelled("b", small)])
    page = Page(text)
    known = Page(render([Labelled("a", renamed(small, "name")), Labelled("b", small)]))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in known.elements]
    assert [set(a) for _, a in page.elements] == [set(a) for _, a in known.elements]
    assert "7*7" in text
    assert "onerror=alert(1)>" in page.words
    assert "<img src=x" not in text


def test_a_suspect_run_says_so_and_a_missing_value_is_na(small: Result) -> None:
    data = json.loads(json.dumps(small.data))
    data["validity"] = {"status": "suspect", "reasons": ["the machine was busy"]}
    data["strategies"]["static"]["summary"] |= {"p99_ttft_ms": None, "output_throughput": 1.0}
    del data["explain"]
    page = Page(render([Labelled("", Result({**data, "explain": None}, small.recordings))]))
    assert "This run is suspect" in page.words
    assert "the machine was busy" in page.words
    assert "static: N/A ms" in page.words
    assert "Where the time went" not in page.words


def test_one_strategy_and_equal_tiny_requests_can_be_shown() -> None:
    result = made(batch_size=1, strategy="continuous", queue_size=1, output_tokens="1")
    page = Page(render([Labelled("", result)]))
    assert "continuous" in page.words
    assert "N/A" in page.words  # no TPOT of one token
    assert "Speed-up" not in page.words


def test_a_prediction_is_shown_where_there_is_one(small: Result) -> None:
    told = {
        "strategy": "continuous",
        "duration": 1.5,
        "measured_duration": 1.25,
        "error": 0.2,
        "extrapolates": ["9 rows in a step"],
    }
    held_out = {"steps": 1600, "r2": 0.5, "median_error": 0.05, "total_error": -0.002}
    prediction = {"fitted_on": "static", "strategies": [told], "held_out": held_out}
    data = {**small.data, "prediction": prediction}
    page = Page(render([Labelled("", Result(data, small.recordings))]))
    assert "steps of static: continuous takes 1.5 s, 20.0% above the measured" in page.words
    assert "Beyond the fitted range: 9 rows in a step." in page.words
    assert (
        "Step-cost fit on 1,600 static steps (cross-validated): R² 0.50, median error 5.0%"
        in page.words
    )


def test_a_large_run_gives_a_small_page() -> None:
    result = made(batch_size=256, queue_size=40_000, output_tokens="uniform:min=1,max=60")
    text = render([Labelled("", result)])
    assert len(text.encode()) < 2_500_000
    page = Page(text)
    bars = [json.loads(script)["request"] for script in page.scripts if script.startswith("{")]
    assert MOST_BARS / 8 < sum(map(len, bars)) <= MOST_BARS
    assert "Only slots 0 to 63 of 256 are shown." in page.words
    assert re.search(r"Only the beginning is shown, .*\d% .*: all 40,000 requests are", page.words)


# Side by side


@pytest.fixture(scope="module")
def pair() -> SideBySide:
    """Two results that differ in the batch size, one of them on another machine."""
    other = made(batch_size=8, queue_size=20, long_every=4)
    data = json.loads(json.dumps(other.data))
    data["environment"]["cpu"] = "Another CPU"
    return SideBySide(
        [
            Labelled("four", made(queue_size=20, long_every=4)),
            Labelled("eight", Result(data, other.recordings)),
        ]
    )


def test_only_what_varies_is_shown(pair: SideBySide) -> None:
    cpu = pair.shown[0].result.data["environment"]["cpu"] or "N/A"
    assert pair.settings == [["batch size", "4", "8"], ["cpu", cpu, "Another CPU"]]
    same = SideBySide([pair.shown[0], Labelled("again", pair.shown[0].result)])
    assert same.settings == []
    assert "No setting" in Page(render(same.shown)).words


def test_figures_side_by_side_are_each_results_own(pair: SideBySide) -> None:
    assert [tuple(row[:3]) for row in pair.rows] == [
        (one.label, name, ratio)
        for one in pair.shown
        for name, ratio in (
            ("static", "baseline"),
            ("continuous", f"{one.result.data['comparison']['speedup']['median']:.2f}×"),
        )
    ]
    assert "continuous in eight" in pair.sentence
    assert "differ" not in pair.sentence


def test_results_that_should_not_be_compared_are_told_apart(small: Result) -> None:
    other = made(queue_size=24)
    text = SideBySide([Labelled("a", small), Labelled("b", other)]).sentence
    assert "their workloads differ" in text


def test_results_are_called_by_what_tells_them_apart(small: Result) -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run")]
    assert [x.label for x in label_results(paths, [small, small])] == ["a/run", "b/run"]
    assert [x.label for x in label_results([Path("/x/c")], [small])] == ["c"]


def test_a_page_of_several_results_has_them_all(pair: SideBySide) -> None:
    page = Page(render(pair.shown))
    for text in ("What differs", "Side by side", "Another CPU", "four", "eight"):
        assert text in page.words
    assert sum(tag == "article" for tag, _ in page.elements) == 2


def test_too_many_or_the_same_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="25 results: show at most 24"):
        check_number([tmp_path / str(i) for i in range(25)])
    with pytest.raises(UsageError, match="is named twice"):
        check_number([tmp_path, tmp_path / ".." / tmp_path.name])


# Markdown


def cells_of(line: str) -> list[str]:
    """Cells of a table's row: a bar that is escaped parts nothing."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_is_the_sentence_a_table_and_the_command(small: Result) -> None:
    text = markdown.render([Labelled("", small)], [{"timeline": "my run/timeline.png"}])
    assert "![Requests in their slots, over time](my%20run/timeline.png)" in text
    counted = [small.data["strategies"][n]["counters"]["forward_passes"] for n in small.names]
    row = f"| Forward passes |  | {counted[0]} | {counted[1]} | {counted[1] / counted[0]:.2f}× |"
    assert row in text
    assert "```console\nbatchbench simulate --batch-size 4 --queue-size 20\n```" in text


def test_markdown_of_hostile_names_keeps_its_shape(small: Result) -> None:
    text = markdown.render(
        [Labelled(HOSTILE, renamed(small, HOSTILE)), Labelled("b", small)], [{}, {}]
    )
    outside = re.sub(r"^(`{3,})console\n.*?\n\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    widths = [len(cells_of(row)) for row in rows]
    known = markdown.render([Labelled("a", renamed(small, "name")), Labelled("b", small)], [{}, {}])
    assert widths == [len(cells_of(x)) for x in known.splitlines() if x.startswith("|")]


def test_pictures_are_named_as_the_document_sees_them(small: Result, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "timeline.png").touch()
    text = make_document("markdown", [folder], [small], tmp_path / "notes" / "report.md")
    assert "](../runs/mine/timeline.png)" in text
    assert "latency.png" not in text


def test_a_document_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output .*: is a directory"):
        check_file(tmp_path, "--output")
    with pytest.raises(UsageError, match=r"--output .*: cannot be written: not a directory"):
        check_file(tmp_path / "file" / "report.html", "--output")


def test_ticks_are_round_and_end_within(small: Result) -> None:
    for until in (1e-9, 0.3, 1.0, 7.0, 12.5, 999.0, 1e7):
        ticks = html.nice_ticks(until, "s")
        assert 2 <= len(ticks) <= 6
        assert ticks[0].at == 0
        assert ticks[-1].at <= 1 + 1e-9
        numbers = [float(t.text.removesuffix(" s").replace(",", "")) for t in ticks]
        assert [t.at * until for t in ticks] == pytest.approx(numbers)
