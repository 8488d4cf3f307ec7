"""The page in a real browser: light and dark, narrow and wide, mouse, keyboard, paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import CHROMIUM, Browser
from support.results import HOSTILE, made, renamed

from batchbench.reports.formats.html import render
from batchbench.reports.side_by_side import Labelled

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    pytest.importorskip("websocket")
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run, of hostile names, and of two results."""
    folder = tmp_path_factory.mktemp("pages")
    small = made(queue_size=20)
    other = made(batch_size=8, strategy="static,static-oracle,continuous", queue_size=20)
    shown = {
        "one": [Labelled("", small)],
        "hostile": [Labelled(HOSTILE, renamed(small, HOSTILE * 4)), Labelled("b", small)],
        "two": [Labelled("four", small), Labelled("eight", other)],
    }
    for name, results in shown.items():
        (folder / f"{name}.html").write_text(render(results), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in shown}


TIP = "document.querySelector('.tip')"
SAID = "document.querySelector('.details').textContent"


@pytest.mark.parametrize("name", ["one", "hostile", "two"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_whole_at_any_width_by_day_and_by_night(
    name: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.show(pages[name], width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [pages[name].as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    text = browser.ask("document.body.innerText")
    assert "Requests in their slots, over time" in text
    assert not re.search(r"\b(NaN|None|undefined|null)\b", text)
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) is dark


TOUCHING = """[...document.querySelectorAll(".ticks")].flatMap((axis) => {
  const shown = [...axis.querySelectorAll("span:not(.crowded)")];
  const boxes = shown.map((label) => label.getBoundingClientRect());
  return boxes.slice(1).filter((box, n) => box.left < boxes[n].right + 4).map((box) => box.left);
})"""
"""Places of the labels of an axis that touch the one before."""


@pytest.mark.parametrize("name", ["one", "two"])
def test_labels_of_an_axis_do_not_touch(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    for width in (1400, 400):
        browser.show(pages[name], width=width)
        assert browser.ask(TOUCHING) == []


def contrast(browser: Browser, chosen: str) -> float:
    """Contrast (WCAG) of an element's text with the page's ground."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = browser.ask(f"getComputedStyle(document.querySelector('{chosen}')).color")
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    one, two = sorted((light(ink), light(ground)))
    return (two + 0.05) / (one + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(dark: bool, browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"], dark=dark)
    for chosen in ("h1", ".what", "thead th", ".ticks span", ".badge"):
        assert contrast(browser, chosen) >= 4.5, chosen


def test_pointing_at_a_bar_tells_its_times(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    assert browser.ask(f"{TIP}.hidden")
    x, y = browser.ask(
        "(() => { document.querySelector('.chart').scrollIntoView({block: 'center'});"
        "const b = document.querySelector('.chart').getBoundingClientRect();"
        "return [b.left + b.width * 0.05, b.top + b.height / 8] })()"
    )
    browser.point(x, y)
    told = browser.ask(f"{TIP}.innerText")
    # Request 0, 100 tokens at 1 ms each, in slot 0.
    assert "static: request 0" in told
    assert re.search(r"E2E latency\s*100 ms", told)
    assert re.search(r"TTFT\s*1 ms", told)
    assert not browser.ask("document.querySelector('.mark').hidden")
    browser.point(x, 2)
    assert browser.ask(f"{TIP}.hidden")
    assert browser.complaints == []


def test_a_keyboard_does_what_a_mouse_does(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    browser.ask("document.querySelector('.chart').focus()")
    browser.press("ArrowRight")
    assert browser.ask(SAID).startswith("static, request 0: slot 0")
    browser.press("ArrowDown")
    assert browser.ask(SAID).startswith("static, request 1: slot 1")
    browser.press("ArrowRight")
    assert browser.ask(SAID).startswith("static, request 5: slot 1")
    browser.press("End")
    assert browser.ask(SAID).startswith("static, request 17: slot 1")
    browser.press("Escape")
    assert browser.ask("document.querySelector('.mark').hidden")
    assert browser.complaints == []


def test_zooming_shows_less_time_and_back(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    box = "document.querySelector('.chart svg').getAttribute('viewBox')"
    ticks = "document.querySelector('.timelines .ticks').innerText"
    whole, labels = browser.ask(box), browser.ask(ticks)
    browser.ask("document.querySelector('[data-zoom=in]').click()")
    assert float(browser.ask(box).split()[2]) == 5000
    assert browser.ask(ticks) != labels
    browser.ask("document.querySelector('.chart').focus()")
    browser.press("0")
    assert browser.ask(box) == whole == "0 0 10000 10000"
    assert browser.complaints == []


def test_without_scripts_the_pictures_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"], scripts=False)
    pixels = browser.picture()
    browser.show(pages["one"])
    assert len(pixels) > 0.7 * len(browser.picture())
    text = pages["one"].read_text(encoding="utf-8")
    assert "<noscript>" in text
    assert len(re.findall(r"<path class=\"(?:long|short)", text)) >= 2


def test_it_prints_on_white(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"], dark=True)
    paper = browser.printed()
    assert paper.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 6
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=features)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.ask("getComputedStyle(document.querySelector('.zoom')).display") == "none"
