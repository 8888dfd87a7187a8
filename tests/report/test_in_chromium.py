"""The page of `mhla report` in a browser, opened from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from tests.helpers.chromium import PROGRAM, Chromium
from tests.helpers.run_folders import write_comparison, write_run

pytestmark = [
    pytest.mark.slow,  # starting the browser takes seconds
    pytest.mark.skipif(PROGRAM is None, reason="needs Debian's package chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / "digits").path, write_run(root / "<i>&lt;b&gt;", top=3.0).path]
    assert main(["report", *map(str, runs), "--to", str(root / "page")]) == 0
    return root / "page" / "index.html"


def text(browser: Chromium, selector: str) -> str:
    return browser.run(f"document.querySelector({selector!r}).textContent")


def lines(browser: Chromium, tag: str) -> int:
    return browser.run(f"document.querySelectorAll('[data-tag=\"{tag}\"] path.curve').length")


def drag(browser: Chromium, selector: str, value: str) -> None:
    """Move a control of the page, as a hand does."""
    browser.run(
        f"{{const one = document.querySelector({selector!r}); one.value = {value!r};"
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change'));}"
    )


def point(browser: Chromium, selector: str, from_right: int, from_top: int) -> None:
    """Move the mouse over a part of the page."""
    browser.run(
        f"{{const one = document.querySelector({selector!r}); const box = one.getBoundingClientRect();"
        f"const place = {{clientX: box.right - {from_right}, clientY: box.top + {from_top}}};"
        "one.dispatchEvent(new PointerEvent('pointermove', place));}"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_opens_from_disk_without_an_error(
    browser: Chromium, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert lines(browser, "val/loss") == 4
    outside = browser.run("performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in outside if not name.startswith("data:")] == []
    white = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert white == (scheme == "light")


def test_the_slider_moves_the_mixing_matrices(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert text(browser, ".mixing output") == "step 12 (3 of 3)"
    pixels = (
        "Array.from(document.querySelector('.maps canvas').getContext('2d').getImageData(0, 0, 2, 2).data)"
    )
    before = browser.run(pixels)
    drag(browser, ".mixing input", "0")
    assert text(browser, ".mixing output") == "step 4 (1 of 3)"
    after = browser.run(pixels)
    assert after[4:] == before[4:]  # the first weight alone differs between the steps
    assert after[:4] != before[:4]
    point(browser, ".maps canvas", from_right=2, from_top=2)
    assert text(browser, ".mixing .read") == "layer 0 (blocks.0): query block 0, key block 1: 0.5000"
    assert browser.errors == []


def test_a_run_can_be_hidden_and_the_curves_are_read(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert text(browser, "#shown") == "2 of 2 shown"
    browser.run("document.querySelector('[data-toggle=\"1\"]').click()")
    assert text(browser, "#shown") == "1 of 2 shown"
    assert lines(browser, "train/loss") == 1
    browser.run(
        "{const one = document.querySelector('[data-tag=\"train/loss\"] svg');"
        "one.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));}"
    )
    assert text(browser, '[data-tag="train/loss"] .tip') == "step 1digits1.6"
    browser.run("document.querySelector('[data-toggle=\"1\"]').click()")
    point(browser, '[data-tag="train/loss"] svg', from_right=11, from_top=50)
    assert text(browser, '[data-tag="train/loss"] .tip') == ("step 12<i>&lt;b&gt;0.75digits0.5")
    drag(browser, "#scale", "log")
    assert "logarithmic" in text(browser, '[data-tag="train/loss"] svg')
    assert browser.errors == []


def test_a_comparison_shows_its_intervals(browser: Chromium, tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0, 2.2], "mhla": [1.0, 1.1]})
    assert main(["report", str(folder), "--to", str(tmp_path / "page")]) == 0
    browser.open(tmp_path / "page" / "index.html")
    assert browser.run("document.querySelectorAll('[data-interval=\"val/loss\"] .span').length") == 2
    browser.run("document.querySelector('[data-toggle=\"0\"]').click()")
    assert browser.run("document.querySelectorAll('[data-interval=\"val/loss\"] .span').length") == 1
    assert browser.errors == []
