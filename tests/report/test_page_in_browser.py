"""Reports as pages, in a browser: what is seen, sorted, printed, and read by keyboard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reported import HOSTILE, TIMES, faster_rcnn, resnet50

from se_fx import Report
from se_fx.cost import Cost
from se_fx.planning import Site, Skip
from se_fx.report import html


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("these tests need chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync user-data-dir={tmp_path_factory.mktemp('profile')}".split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    yield opened
    opened.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Any:
    """Open the page of a report, at a width; fails where the console had anything to say."""

    def opened(page: str, width: int = 1200, **media: str) -> Any:
        file = tmp_path / "report.html"
        file.write_text(page, encoding="utf-8")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("kind", "screen"), "features": features})
        browser.get(file.as_uri())
        return browser

    yield opened
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def _column(browser: Any, header: str) -> list[str]:
    script = """
        const headers = [...document.querySelectorAll("table.sortable thead th")].map(cell => cell.textContent);
        const column = headers.indexOf(arguments[0]);
        return [...document.querySelectorAll("table.sortable tbody tr")].map(row => row.cells[column].textContent);"""
    return browser.execute_script(script, header)


@pytest.mark.browser
@pytest.mark.parametrize(("report", "blocks"), [(resnet50, 16), (faster_rcnn, 43)])
def test_the_page_shows_everything_at_a_usual_width(show: Any, report: Any, blocks: int) -> None:
    browser = show(html.render(report()))
    assert browser.find_element("tag name", "h1").text == report().model
    assert f"{blocks} Squeeze-and-Excitation blocks inserted" in browser.find_element("tag name", "main").text
    assert _column(browser, "Conv") == [site.name for site in report().sites]
    for svg in browser.find_elements("tag name", "svg"):
        assert svg.size["width"] > 300
        assert svg.size["height"] > 100
    scrolls = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(scrolls) == 0
    filled = browser.execute_script(
        "const accent = arguments[0]; return [...document.querySelector('svg').querySelectorAll('path')]"
        ".filter(path => getComputedStyle(path).fill === accent).length",
        browser.execute_script("return getComputedStyle(document.querySelector('.legend .with')).backgroundColor"),
    )
    assert filled == blocks


def _sorted_by(browser: Any) -> dict[str, str]:
    headers = browser.find_elements("css selector", "table.sortable thead th")
    return {cell.text: cell.get_attribute("aria-sort") for cell in headers if cell.get_attribute("aria-sort")}


def _button(browser: Any, header: str) -> Any:
    return browser.find_element("xpath", f"//table[contains(@class, 'sortable')]//th/button[normalize-space()='{header}']")


def _numbers(texts: list[str]) -> list[int]:
    return [int(text.replace(",", "")) for text in texts]


@pytest.mark.browser
def test_a_click_on_a_header_sorts_by_number_and_the_next_reverses(show: Any) -> None:
    browser = show(html.render(faster_rcnn()))
    assert _sorted_by(browser) == {}
    for header in ("Parameters", "Bytes moved", "Channels"):
        expected = sorted(_numbers(_column(browser, header)))
        _button(browser, header).click()
        assert _sorted_by(browser) == {header: "ascending"}
        assert _numbers(_column(browser, header)) == expected
        _button(browser, header).click()
        assert _sorted_by(browser) == {header: "descending"}
        assert _numbers(_column(browser, header)) == expected[::-1]
    _button(browser, "Spatial").click()
    assert _column(browser, "Spatial")[0] == f"5{TIMES}7"
    assert _column(browser, "Spatial")[-1] == f"160{TIMES}208"
    _button(browser, "Conv").click()
    names = _column(browser, "Conv")
    assert names.index("backbone.body.2.block.0.0") < names.index("backbone.body.10.block.0.0")


@pytest.mark.browser
def test_the_table_can_be_sorted_from_the_keyboard(show: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser = show(html.render(resnet50()))
    focused = "return document.activeElement.textContent"
    for _ in range(20):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.execute_script(focused) == "Bytes moved":
            break
    assert browser.switch_to.active_element.tag_name == "button"
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert _sorted_by(browser) == {"Bytes moved": "ascending"}
    assert _numbers(_column(browser, "Bytes moved")) == sorted(site.cost.bytes for site in resnet50().sites)
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert _sorted_by(browser) == {"Bytes moved": "descending"}


@pytest.mark.browser
@pytest.mark.parametrize("report", [resnet50, faster_rcnn])
def test_a_narrow_page_scrolls_in_its_tables_alone(show: Any, report: Any) -> None:
    browser = show(html.render(report()), width=400)
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true })")
    root = "document.documentElement"
    assert browser.execute_script(f"return innerWidth === 400 && {root}.scrollWidth <= {root}.clientWidth")
    focusable = "return [...document.querySelectorAll('.scroll')].every(part => part.tabIndex === 0)"
    assert browser.execute_script(focusable)


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    def luminance(colour: tuple[float, ...]) -> float:
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour))
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_colours_follow_the_colour_scheme_and_can_be_read(show: Any) -> None:
    def colours(scheme: str) -> list[tuple[float, ...]]:
        browser = show(html.render(resnet50()), scheme=scheme)
        script = """
            const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
            return [of("body", "backgroundColor"), of(".card", "backgroundColor"), of("h1", "color"),
                    of(".card dt", "color"), of("svg text", "fill")];"""
        return [tuple(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in browser.execute_script(script)]

    light, dark = colours("light"), colours("dark")
    assert min(light[0]) > 200
    assert max(dark[0]) < 60
    for page, card, *texts in (light, dark):
        for text in texts:
            assert min(_contrast(text, page), _contrast(text, card)) >= 4.5  # WCAG 2, level AA


@pytest.mark.browser
@pytest.mark.parametrize("report", [resnet50, faster_rcnn])
def test_print_has_plain_headers_whole_tables_and_light_colours(show: Any, report: Any) -> None:
    browser = show(html.render(report()), width=720, kind="print", scheme="dark")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720
    overflow = "return [...document.querySelectorAll('.scroll')].map(part => getComputedStyle(part).overflowX)"
    assert set(browser.execute_script(overflow)) == {"visible"}
    marker = "return getComputedStyle(document.querySelector('thead button'), '::after').content"
    assert browser.execute_script(marker) == "none"
    closed = "return [...document.querySelectorAll('details .names li')].every(item => item.checkVisibility())"
    assert browser.execute_script(closed)


@pytest.mark.browser
def test_names_run_nothing(show: Any) -> None:
    sites = (Site(HOSTILE, 8, 4, cost=Cost(64)), Site('"><img src=x onerror=alert(1)>', 8, 4, cost=Cost(32)))
    report = Report("<b>Net</b>", sites, (Skip(HOSTILE + "2", 8, HOSTILE),), Cost(9), Cost(96))
    browser = show(html.render(report).replace("alert(1)", "document.documentElement.remove()"))
    assert browser.find_element("tag name", "h1").text == "<b>Net</b>"
    assert browser.find_elements("tag name", "img") == []
    assert len(browser.find_elements("tag name", "script")) == 1


@pytest.mark.browser
def test_two_fragments_in_one_page_sort_each_for_itself_and_leave_the_page_alone(show: Any) -> None:
    parts = html.fragment(resnet50()) + html.fragment(resnet50())
    browser = show(f"<!doctype html><title>notebook</title><table><tr><td>mine</td></tr></table>{parts}")
    button = "document.querySelectorAll('.se-fx')[1].querySelectorAll('thead button')[2]"
    browser.execute_script(f"{button}.click(); {button}.click()")
    firsts = (
        "return [...document.querySelectorAll('table.sortable')].map(table => table.tBodies[0].rows[0].cells[0].textContent)"
    )
    assert browser.execute_script(firsts) == ["layer1.0.conv3", "layer4.0.conv3"]
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert browser.execute_script("return document.querySelectorAll('table.sortable thead th button').length") == 20
    assert browser.execute_script("return getComputedStyle(document.querySelector('td')).fontSize") == "16px"
