"""The page in a browser: zoom, smoothing, log scale, slider, heat map, events, light and dark, keyboard, phone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.browser import CHROMIUM, WITHOUT, Browser
from tests.helpers.run_folders import write_run
from train import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
LOSS = '.charts[data-place="curves"] .chart:first-child svg'
READ = f"document.querySelector('{LOSS}').parentElement.querySelector('.read').textContent"
LINE = f"document.querySelector('{LOSS} .line').getAttribute('d')"
LENGTHS = "[...document.querySelectorAll('.chart')].map(c => c.querySelector('.line').getAttribute('d').length)"
SET_SMOOTHING = "(s => { s.value = 0.9; s.dispatchEvent(new Event('input')) })(document.getElementById('smoothing'))"
ROWS = "[...document.querySelectorAll('.events tbody tr')]"
FOCUSED = "document.activeElement.id || document.activeElement.getAttribute('class') || document.activeElement.tagName"
FOCUS = f"document.querySelector('{LOSS}').focus()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "cats")
    assert report.main([str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    browser.open(page)
    yield browser
    assert browser.errors == []


def test_drag_zooms_all_curves_and_double_click_shows_all(opened: Browser) -> None:
    whole = opened.evaluate(LINE)
    opened.drag(LOSS, 0.3, 0.6)
    text = opened.evaluate("document.getElementById('range').textContent")
    first, last = (int(part) for part in text.removeprefix("steps ").split(" to "))
    assert 20 < first < 35 and 50 < last < 65
    assert opened.evaluate(LINE) != whole
    rate = opened.evaluate(LENGTHS)
    opened.click(LOSS, times=2)
    assert opened.evaluate("document.getElementById('range').textContent") == ""
    assert opened.evaluate(LINE) == whole
    wide = opened.evaluate(LENGTHS)
    assert all(one < other for one, other in zip(rate, wide, strict=True) if other > 300)


def test_buttons_zoom(opened: Browser) -> None:
    opened.click("#zoom-in")
    assert opened.evaluate("document.getElementById('range').textContent") == "steps 25 to 75"
    opened.click("#zoom-out")
    assert opened.evaluate("document.getElementById('range').textContent") == ""


def test_smoothing_and_log_scale(opened: Browser) -> None:
    raw = opened.evaluate(LINE)
    opened.evaluate(SET_SMOOTHING)
    assert opened.evaluate("document.getElementById('smoothed').textContent") == "0.9"
    assert opened.evaluate(LINE) != raw and opened.evaluate(f"document.querySelectorAll('{LOSS} .raw').length") == 1
    # a moving average that is not biased towards 0 begins where the curve begins
    assert opened.evaluate("smooth([2, 2, 2], 0.9).every(v => Math.abs(v - 2) < 1e-12)")
    assert opened.evaluate("Math.abs(smooth([1, 3], 0.5)[1] - 7 / 3) < 1e-12")
    smoothed = opened.evaluate(LINE)
    opened.click("#log")
    assert opened.evaluate(LINE) != smoothed


def test_the_smoothing_slider_answers_keys(opened: Browser) -> None:
    opened.evaluate("document.getElementById('smoothing').focus()")
    for _ in range(3):
        opened.key("ArrowRight")
    assert opened.evaluate("document.getElementById('smoothed').textContent") == "0.03"


def test_a_curve_by_keyboard(opened: Browser) -> None:
    opened.evaluate(FOCUS)
    opened.key("Home")
    assert opened.evaluate(READ).startswith("step 0 ·")
    for _ in range(3):
        opened.key("ArrowRight")
    assert opened.evaluate(READ).startswith("step 3 · loss ")
    opened.key("+")
    opened.key("+")
    assert opened.evaluate("document.getElementById('range').textContent").startswith("steps 2 to 27")
    opened.key("ArrowRight", shift=True)
    assert opened.evaluate("document.getElementById('range').textContent") == "steps 9 to 34"
    opened.key("-")
    opened.key("0")
    assert opened.evaluate("document.getElementById('range').textContent") == ""


def test_hovering_reads_values_and_the_legend_hides_lines(opened: Browser) -> None:
    opened.hover(LOSS, 0.5)
    assert "loss " in opened.evaluate(READ) and "validation_loss " in opened.evaluate(READ)
    lines = f"document.querySelectorAll('{LOSS} .line').length"
    assert opened.evaluate(lines) == 2
    opened.click(".chart .legend button:nth-child(2)")
    assert opened.evaluate(lines) == 1
    assert opened.evaluate(f"document.querySelectorAll('{LOSS} .mark.skip').length") == 1


def test_the_slider_moves_the_pictures_and_play_goes_through(opened: Browser) -> None:
    source = "document.querySelector('.card .pair figure:nth-child(2) img').src"
    last, base = opened.evaluate(source), opened.evaluate("document.querySelector('.card img').src")
    opened.evaluate("document.querySelector('.slider').focus()")
    assert opened.evaluate("document.querySelector('.step').textContent") == "step 100"
    opened.key("ArrowLeft")
    assert opened.evaluate("document.querySelector('.step').textContent") == "step 75"
    assert opened.evaluate(source) != last and opened.evaluate("document.querySelector('.card img').src") == base
    opened.key("Home")
    assert opened.evaluate("document.querySelector('.step').textContent") == "step 25"
    assert opened.evaluate("document.querySelector('.card p').textContent") == "a blue circle"
    opened.click(".play")
    assert opened.evaluate("document.querySelector('.play').getAttribute('aria-label')") == "Pause"
    opened.click(".play")
    assert opened.evaluate("document.querySelector('.play').getAttribute('aria-label')") == "Play"


def test_the_heat_map_reads_cells(opened: Browser) -> None:
    opened.hover('.heat .cell[data-row="2"][data-column="6"]')
    assert opened.evaluate("document.querySelector('.heat .read').textContent") == "σ 0.1 · step 60 · 0.1 (-78.3 %)"
    color = 'document.querySelector(\'.heat .cell[data-row="2"][data-column="0"]\').style.fill'
    before = opened.evaluate(color)
    opened.click("#heat-value")
    assert opened.evaluate(color) != before
    opened.evaluate("document.querySelector('.heat svg').focus()")
    opened.key("ArrowUp")
    opened.key("ArrowRight")
    assert opened.evaluate("document.querySelector('.heat .read').textContent").startswith("σ 0.5 · step 70")


def test_events_are_filtered(opened: Browser) -> None:
    visible = f"{ROWS}.filter(row => !row.hidden).map(row => row.dataset.kind).join()"
    assert opened.evaluate(visible) == "start,skip,warning,end"
    opened.click('.chips [data-kind="note"]')
    opened.click('.chips [data-kind="skip"]')
    assert opened.evaluate(visible) == "start,warning,note,end"


def background(browser: Browser, tmp_path: Path) -> np.ndarray:
    browser.screenshot(tmp_path / "shot.png")
    return np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))[2, 2]


def test_light_dark_and_the_switch(browser: Browser, page: Path, tmp_path: Path) -> None:
    """What a click stores, the next page finds. Both halves by themselves: now and then a new Chromium loses in between what a
    page from a file has stored."""
    browser.open(page, dark=True)
    assert background(browser, tmp_path).max() < 40
    browser.click("#theme")
    assert background(browser, tmp_path).min() > 200
    assert browser.evaluate("localStorage.getItem('theme')") == "light"
    stored = "localStorage.setItem('theme', 'light')"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=stored)["identifier"]
    browser.open(page, dark=True)
    assert background(browser, tmp_path).min() > 200
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    browser.evaluate("document.getElementById('theme').focus()")
    browser.key(" ")
    assert background(browser, tmp_path).max() < 40
    browser.evaluate("localStorage.clear()")


def test_a_phone_shows_all_of_it(browser: Browser, page: Path) -> None:
    browser.open(page, width=360, height=740)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    widths = "[...document.querySelectorAll('.chart svg')].map(s => s.clientWidth).filter(width => width)"
    assert min(browser.evaluate(widths)) > 280
    heights = "[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(height => height)"
    assert min(browser.evaluate(heights)) >= 26  # for a finger


def test_keyboard_alone_reaches_everything(opened: Browser) -> None:
    reached = set()
    for _ in range(60):
        opened.key("Tab")
        reached.add(opened.evaluate(FOCUSED))
    assert {
        "theme",
        "smoothing",
        "log",
        "zoom-in",
        "zoom-all",
        "slider",
        "play",
        "heat-change",
        "scroll",
        "svg",
    } <= reached
