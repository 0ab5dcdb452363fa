"""The pages in a real browser: plots are drawn, nothing overflows, tables work, no requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fat.report.__main__ import report
from tests.report.fake_runs import HOSTILE, fail, fake_run, fake_sweep, metrics

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -e '.[test]'"
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next((found for name in NAMES if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"needs a browser of the system: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders run, hostile, failed and sweep with their pages, and comparison.html."""
    place = tmp_path_factory.mktemp("browser")
    hostile = metrics(model=HOSTILE, init=HOSTILE, command=HOSTILE)
    runs = [
        fake_run(place / "run"),
        fake_run(place / "hostile", hostile, tensors=8, name=HOSTILE + "{}"),
        fail(place / "failed", error="FatError", message=HOSTILE, command="python " + "x" * 300),
    ]
    report([*runs, fake_sweep(place / "sweep")], place / "comparison.html")
    return place


@dataclass
class Watch:
    """Console messages and requests of a page."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(
    browser: Any, file: Path, size: dict[str, int], *, drawn: bool = False
) -> Iterator[tuple[Any, Watch]]:
    """Open a page; it must log nothing to the console and request nothing.

    Args:
        browser: The browser.
        file: The page.
        size: Size of the window.
        drawn: Wait for all plots, including those out of view.
    """
    watch = Watch()
    phone = size is PHONE
    context = browser.new_context(viewport=size, has_touch=phone, is_mobile=phone)
    page = context.new_page()
    page.on("console", lambda message: watch.complaints.append(message.text))
    page.on("pageerror", lambda error: watch.complaints.append(str(error)))
    page.on("request", lambda request: watch.requests.append(request.url))
    page.goto(file.as_uri())
    if drawn:
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        page.wait_for_function(
            "[...document.querySelectorAll('.canvas')].every((c) => c.querySelector('.main-svg'))"
        )
        page.wait_for_timeout(200)
    yield page, watch
    assert watch.complaints == []
    outside = [url for url in watch.requests if not url.startswith(("data:", "blob:"))]
    assert outside == [file.as_uri()]
    context.close()


NAMES_OF_PAGES = [
    "run/report.html",
    "hostile/report.html",
    "failed/report.html",
    "sweep/report.html",
    "comparison.html",
]


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", NAMES_OF_PAGES)
def test_pages_are_drawn_quiet_and_as_wide_as_the_screen(
    browser: Any, pages: Path, name: str, size: dict[str, int]
) -> None:
    with opened(browser, pages / name, size, drawn=True) as (page, _):
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size["width"]
        figures = page.locator("figure.plot").count()
        assert (figures > 0) == (name != "failed/report.html")
        marks = (
            "(c) => c.querySelectorAll('.point, .points path, .js-line, .heatmaplayer image, "
            ".heatmaplayer .heatmap-label').length"
        )
        drawn = page.evaluate(f"[...document.querySelectorAll('.canvas')].map({marks})")
        assert len(drawn) == figures
        assert all(count > 0 for count in drawn)
        # No plot is wider than its place, but in a box of its own.
        assert page.evaluate(
            "[...document.querySelectorAll('.canvas')].every((c) => "
            "c.querySelector('svg').getBoundingClientRect().width <= c.clientWidth + 1)"
        )


def test_the_check_for_complaints_can_fail(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<script>console.log('x')</script><img src='http://127.0.0.1:9/x.png'>")
    with pytest.raises(AssertionError, match="x"), opened(browser, file, DESKTOP) as (_, watch):
        assert any(url.endswith("x.png") for url in watch.requests)


def test_hostile_names_are_shown_and_do_nothing(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "hostile/report.html", DESKTOP, drawn=True) as (page, _):
        assert page.title() == f"{HOSTILE} W8A8 · finished"
        assert page.locator("[onmouseover]").count() == 0
        shown = page.evaluate(
            "[...document.querySelectorAll('.ytick text')].map((t) => t.textContent)"
        )
        assert HOSTILE[:23] + "…" in shown
        assert HOSTILE + "0" in page.locator("figcaption b").all_inner_texts()


def column(page: Any, title: str) -> tuple[int, list[str]]:
    """Index and texts of a column of the table of all runs."""
    heads = page.locator("#table-all-runs th button").all_inner_texts()
    place = heads.index(title)
    cells = page.locator(f"#table-all-runs tbody tr td:nth-child({place + 1})")
    return place, cells.all_inner_texts()


def test_a_heading_sorts_by_value(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "sweep/report.html", DESKTOP) as (page, _):
        title = "calibrated SQNR, dB"
        place, before = column(page, title)
        head = page.locator("#table-all-runs th").nth(place)
        assert head.get_attribute("aria-sort") is None
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        _, rising = column(page, title)
        head.locator("button").press("Enter")  # with the keyboard, too
        assert head.get_attribute("aria-sort") == "descending"
        _, falling = column(page, title)
        known = [float(text.replace("−", "-")) for text in before if text != "–"]
        assert min(known) < 0 < 2 < max(known)  # which texts put elsewhere: 13.2, 2.1, −4.0
        assert max(known) > 10

        def numbers(texts: list[str]) -> list[float]:
            return [float(text.replace("−", "-")) for text in texts if text != "–"]

        assert numbers(rising) == sorted(known)
        assert numbers(falling) == sorted(known, reverse=True)
        gaps = len(before) - len(known)
        assert gaps > 0
        assert rising[-gaps:] == falling[-gaps:] == ["–"] * gaps  # what is not there comes last
        assert page.locator("#table-all-runs [aria-sort]").count() == 1


def test_names_are_sorted_as_people_count(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "sweep/report.html", DESKTOP) as (page, _):
        page.locator("#table-all-runs th button").first.click()
        _, names = column(page, "run")
        assert names[:3] == ["0-mobilenet_v2", "1-mobilenet_v2", "2-mobilenet_v2"]
        assert names[10] == "10-mobilenet_v2"
        place, _ = column(page, "bits")
        page.locator("#table-all-runs th button").nth(place).click()
        assert column(page, "bits")[1] == ["W4A4"] * 12 + ["W6A6"] * 12 + ["W8A8"] * 12


def test_the_filter_hides_rows(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "sweep/report.html", PHONE) as (page, _):
        box = page.get_by_label("Filter")
        rows = page.locator("#table-all-runs tbody tr:visible")
        assert rows.count() == 36
        box.fill("MNASNET per_tensor")
        assert rows.count() == 6
        assert page.locator(".filter .count").inner_text() == "6 of 36 rows"
        assert all("mnasnet" in text and "per_tensor" in text for text in rows.all_inner_texts())
        box.fill("quant.bits=4 not started")  # a command, and words apart
        assert rows.count() == 2
        box.fill("nothing like this")
        assert rows.count() == 0
        box.fill("")
        assert rows.count() == 36
        assert page.locator(".filter .count").inner_text() == "36 rows"


def test_the_table_of_layers_works_alike(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "run/report.html", DESKTOP) as (page, _):
        table = page.locator("#table-all-quantized-tensors")
        page.get_by_label("Filter").last.fill("weight")
        assert table.locator("tbody tr:visible").count() == 20
        table.get_by_role("button", name="SQNR").click()
        shown = [
            float(text)
            for text in table.locator("tbody tr:visible td:nth-child(5)").all_inner_texts()
        ]
        assert shown == sorted(shown)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_cell_leads_to_its_run(browser: Any, pages: Path, size: dict[str, int]) -> None:
    jobs = json.loads((pages / "sweep/sweep.json").read_text())["jobs"]
    with opened(browser, pages / "sweep/report.html", size) as (page, _):
        page.get_by_label("Filter").fill("nothing")  # the row is hidden, and has to come back
        canvas = page.locator(".canvas").first
        canvas.scroll_into_view_if_needed()
        canvas.locator(".heatmaplayer").first.wait_for(state="attached")
        # The last row, last column of the first panel: job 32, W4A4 of efficientnet_lite0.
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 30, box["y"] + box["height"] - 20)
        page.wait_for_timeout(150)
        tip = page.locator("#tip")
        if size is DESKTOP:  # a finger does not point
            command = "python train.py " + " ".join(jobs[32]["overrides"])
            assert tip.is_visible()
            assert tip.locator("b").inner_text() == "efficientnet_lite0 W4A4 mse"
            assert tip.locator("code").inner_text() == command
        else:
            assert tip.is_hidden()
        page.mouse.click(box["x"] + box["width"] - 30, box["y"] + box["height"] - 20)
        panel = page.locator("#pick")
        panel.wait_for()
        command = "python train.py " + " ".join(jobs[32]["overrides"])
        assert panel.locator("code").inner_text() == command
        assert panel.get_by_text("Run page").get_attribute("href") == (
            "32-efficientnet_lite0/report.html"
        )
        panel.get_by_text("Row in the table").click()
        assert page.locator("#run-32").is_visible()
        page.keyboard.press("Escape")
        assert panel.count() == 0


def test_a_point_leads_to_its_run(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "sweep/report.html", DESKTOP) as (page, _):
        page.locator("#accuracy-and-cost").scroll_into_view_if_needed()
        page.locator("#accuracy-and-cost .scatterlayer .point").first.click(force=True)
        assert page.locator("#pick .picked code").first.inner_text().startswith("python train.py")
        page.get_by_role("button", name="Close").click()
        assert page.locator("#pick").count() == 0


def test_commands_are_copied(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "hostile/report.html", DESKTOP) as (page, _):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        button = page.locator("button.copy").first
        button.click()
        page.wait_for_function("document.querySelector('button.copy').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()") == HOSTILE


def test_where_the_clipboard_is_closed_the_old_way_copies(browser: Any, pages: Path) -> None:
    with opened(browser, pages / "hostile/report.html", DESKTOP) as (page, _):
        page.evaluate(
            "navigator.clipboard.writeText = () => Promise.reject(new Error('closed'));"
            "document.addEventListener('copy', () => {"
            "  window.copied = document.activeElement.value; });"
        )
        page.locator("button.copy").first.click()
        page.wait_for_function("window.copied !== undefined")
        assert page.evaluate("window.copied") == HOSTILE
