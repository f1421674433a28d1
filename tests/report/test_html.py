"""Reports as pages: what they say, that they need nothing else, and how they behave in a browser."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import se_fx
from se_fx import Report, SqueezeExciteError
from se_fx.cost import Cost
from se_fx.planning import Site, Skip
from se_fx.report import html
from se_fx.report.stages import columns, in_order, stages

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link"}


@functools.cache
def resnet50() -> Report:
    gm = se_fx.transform(
        torchvision.models.resnet50(weights=None), placement="residual", min_channels=1, latent_channels=1 / 16
    )
    return se_fx.report(gm, example_inputs=torch.zeros(1, 3, 224, 224))


@functools.cache
def faster_rcnn() -> Report:
    factory = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    gm = se_fx.transform(factory(weights=None, weights_backbone=None), min_channels=64)
    return se_fx.report(gm, example_inputs=([torch.rand(3, 64, 80)],))


class Page(HTMLParser):
    """What a page says: its elements, the text of each kind, and the rows of its first table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ----------------------------------------------------------------------------------------------------------------- content
def test_the_page_of_resnet50_has_the_numbers_of_its_report() -> None:
    report = resnet50()
    page = Page(html.render(report))
    assert page.texts["title"][0] == "ResNet: 16 Squeeze-and-Excitation blocks inserted"
    assert page.texts["h1"] == ["ResNet"]
    (cards,) = (text for text in page.texts["dl"] if "Blocks" in text)
    for number in ("2,514,944", "25,557,032", "4,089,184,256", "+9.841 %", "+0.062 %"):  # as in the paper's SE-ResNet-50
        assert number in cards
    assert f"{report.added.flops:,}" in cards
    assert f"{report.base.bytes:,}" in cards
    header, first, *others = page.rows
    assert header == [
        *("Conv", "Placement", "Channels", "Hidden", "Spatial", "Parameters", "MACs", "FLOPs", "Bytes moved", "MACs of model")
    ]
    flops, moved = report.sites[0].cost.flops, report.sites[0].cost.bytes
    numbers = ["256", "16", f"56{TIMES}56", "8,192", "8,192", f"{flops:,}", f"{moved:,}", "0.000 %"]
    assert first == ["layer1.0.conv3", "residual", *numbers]
    assert len(others) == 15


def test_memory_kept_for_training_has_a_card_where_it_is_known() -> None:
    known = dataclasses.replace(resnet50(), activation_bytes=(1_000_000, 1_250_000))
    (cards,) = (text for text in Page(html.render(known)).texts["dl"] if "Blocks" in text)
    assert "Activation bytes" in cards
    assert "+25.000 %" in cards
    assert "250,000" in cards
    assert "Activation bytes" not in html.render(dataclasses.replace(known, activation_bytes=None))


def test_the_drawing_has_a_cell_for_each_conv_and_says_what_a_block_costs() -> None:
    report = resnet50()
    drawing, bars = re.findall(r"<svg.*?</svg>", html.render(report), re.DOTALL)
    titles = Page(drawing).texts["title"]
    assert len(titles) == 53
    site = report.sites[0]
    assert f"{site.name}: block on 256 channels, hidden width 16; adds 8,192 parameters, 8,192 MACs" in "\n".join(titles)
    assert "conv1: no block; is not the last Conv2d of a residual branch" in titles
    assert [text for text in Page(drawing).texts["text"] if "of" not in text] == [
        "conv1",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]
    assert [text for text in Page(drawing).texts["text"] if "of" in text] == [
        "0 of 1",
        "3 of 10",
        "4 of 13",
        "6 of 19",
        "3 of 10",
    ]
    assert f"{site.name}: {site.cost.bytes:,} bytes" in Page(bars).texts["title"]
    assert {site.name for site in report.sites} <= set(Page(bars).texts["text"])


def test_what_was_skipped_and_what_runs_its_own_code_is_there() -> None:
    report = faster_rcnn()
    page = Page(html.render(report))
    details = "\n".join(page.texts["details"])
    assert "output channels < min_channels=64 10" in details
    assert "computes an attention gate 16" in details
    for skip in report.skipped:
        assert skip.name in details
    for name, reason in report.opaque:
        assert (name or "(the root)") in details
        assert reason in details
    assert "rpn.head.conv.0.0" in details  # captured alone
    assert re.search(r"roi_align\s+2 calls", "\n".join(page.texts["li"]))


def test_without_inputs_parameters_alone(cnn: nn.Sequential) -> None:
    page = Page(html.render(se_fx.report(se_fx.transform(cnn, min_channels=1, latent_channels=4))))
    assert page.rows[0] == ["Conv", "Placement", "Channels", "Hidden", "Parameters"]
    assert page.rows[1:] == [["0", "conv", "16", "4", "128"], ["3", "conv", "32", "4", "256"]]
    assert "Bytes moved" not in "".join(page.texts["dl"][:1])
    assert any("Added parameters" in text for text in page.texts["text"])


def test_blocks_of_others_have_a_column(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1, block=lambda channels: nn.Identity())
    header, first, _ = Page(html.render(se_fx.report(gm, torch.zeros(1, 3, 8, 8)))).rows
    cells = dict(zip(header, first, strict=True))
    assert "lambda" in cells["Block"]
    assert (cells["Hidden"], cells["MACs"]) == (NONE, "0")


def test_a_report_without_blocks_is_a_page_too() -> None:
    page = Page(html.render(Report("Net", (), (Skip("conv", 8, "8 output channels < min_channels=64"),), Cost(10), Cost())))
    assert "no Squeeze-and-Excitation blocks inserted" in page.texts["title"][0]
    assert page.rows == []
    assert "conv" in page.texts["text"]


def test_sites_the_inputs_do_not_reach_are_named() -> None:
    sites = (Site("seen", 64, 4, spatial=(8, 8), cost=Cost(512, 512, 9, 9)), Site("aux.conv", 64, 4, cost=Cost(512)))
    page = Page(html.render(Report("Net", sites, (), Cost(9, 9, 9, 9), Cost(1024, 512, 9, 9), measured=True)))
    assert "Not reached by the example inputs in evaluation mode: aux.conv." in page.texts["p"]
    assert page.rows[2][4] == NONE


# -------------------------------------------------------------------------------------------------------------- the format
@pytest.mark.parametrize("name", [HOSTILE, '" onmouseover="alert(1)', "$x^2$", "{{ 7 * 7 }}", "卷积", "&amp;", "line\nbreak"])
def test_names_are_text_whatever_they_hold(name: str) -> None:
    model = nn.Sequential(nn.ModuleDict({name: nn.Conv2d(3, 8, 1)})[name], nn.Conv2d(8, 8, 1))
    sites = (Site(name, 8, 4, cost=Cost(64)), Site("b", 8, None, placement=name, block=name))
    skipped = (Skip(f"skipped.{name}", 8, name),)
    report = Report(name, sites, skipped, Cost(9), Cost(64), False, ((name, name),), (name,), (name,), ((name, 1),))
    harmless = Page(html.render(se_fx.report(se_fx.transform(model, min_channels=1))))
    for page in (Page(html.render(report)), Page(html.fragment(report))):
        assert len(page.all("script")) == len(harmless.all("script")) == 1
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
        assert page.texts["h1"] == [name]
        assert page.rows[1][0] == name
        assert name in page.texts["text"]
        assert any(title.startswith(f"{name}: block on 8 channels") for title in page.texts["title"])
        assert any(title.startswith(f"skipped.{name}: no block; {name}") for title in page.texts["title"])


def test_a_model_whose_modules_have_hostile_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleDict({HOSTILE: nn.Conv2d(3, 8, 1)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convs[HOSTILE](x)

    page = html.render(se_fx.report(se_fx.transform(Net(), min_channels=1), torch.zeros(1, 3, 8, 8)))
    assert HOSTILE not in page
    assert Page(page).rows[1][0] == f"convs.{HOSTILE}"


@pytest.mark.parametrize("report", [resnet50, faster_rcnn])
def test_nothing_is_loaded_from_elsewhere(report: Any) -> None:
    for text in (html.render(report()), html.fragment(report())):
        assert not re.search(r"https?:|//cdn|@import|url\(|@font-face", text)
        page = Page(text)
        assert all(attributes.get("href", "data:,") == "data:," for _, attributes in page.elements)
        assert not any("src" in attributes for _, attributes in page.elements)


def test_the_page_is_semantic() -> None:
    page = Page(html.render(faster_rcnn()))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("main")) == len(page.all("h1")) == 1
    assert page.texts["caption"]
    header, body = page.rows[0], page.rows[1:44]
    scopes = [attributes.get("scope") for attributes in page.all("th")]
    assert scopes[: len(header)] == ["col"] * len(header)
    assert scopes[len(header) : len(header) + len(body)] == ["row"] * len(body)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_fragment_is_one_element_and_all_its_styles_are_its_own() -> None:
    text = html.fragment(resnet50())
    page = Page(text)
    assert not {"html", "head", "body", "main"} & {tag for tag, _ in page.elements}
    assert page.elements[0] == ("div", {"class": "se-fx"})
    assert page.rows == Page(html.render(resnet50())).rows
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    selectors = re.findall(r"([^{};]+)\{", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL))
    for selector in selectors:
        for part in re.split(r",(?![^(]*\))", selector.strip()):
            assert part.strip().startswith((".se-fx", "@media")), part


def test_the_same_report_gives_the_same_page_and_leaves_matplotlib_as_it_was() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    once = html.render(resnet50())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        assert html.render(resnet50()) == once
        assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SqueezeExciteError, match=re.escape("pip install 'se_fx[html]'")):
        html.render(resnet50())


# ------------------------------------------------------------------------------------------------------------------ stages
def _names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet50", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", ["features"]),
        ("densenet121", ["features.conv0", "features.denseblock1", "features.transition1", "features.denseblock2"]),
        ("shufflenet_v2_x0_5", ["conv1", "stage2", "stage3", "stage4", "conv5"]),
        ("convnext_tiny", [f"features.{i}" for i in range(8)]),
    ],
)
def test_stages_are_those_of_the_source(model: str, expected: list[str]) -> None:
    with torch.device("meta"):
        names = _names(torchvision.models.get_model(model, weights=None))
    found = stages(names)
    assert list(found)[: len(expected)] == expected
    assert [name for members in found.values() for name in members] == names
    for stage, members in found.items():
        assert [name for column in columns(stage, members) for name in column] == members


def test_stages_of_timm_and_of_detectors() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        efficientnet = _names(timm.create_model("efficientnet_b0"))
    assert list(stages(efficientnet)) == ["conv_stem", *(f"blocks.{i}" for i in range(7)), "conv_head"]
    report = faster_rcnn()
    names = in_order([skip.name for skip in report.skipped], [site.name for site in report.sites])
    assert list(stages(names)) == ["backbone.body", "backbone.fpn", "rpn"]


@pytest.mark.parametrize("model", ["resnet50", "densenet121", "mobilenet_v3_large", "googlenet"])
def test_two_halves_of_a_model_are_put_in_order_again(model: str) -> None:
    arguments = {"init_weights": False} if model == "googlenet" else {}
    with torch.device("meta"):
        names = _names(torchvision.models.get_model(model, weights=None, **arguments))
    for some in (slice(None, None, 2), slice(1, None, 3), slice(len(names) // 2), slice(len(names) // 2, None)):
        chosen = names[some]
        assert in_order([name for name in names if name not in chosen], chosen) == names


def test_names_in_no_order_at_all_are_all_kept() -> None:
    assert sorted(in_order(["b", "a.x", "a.y"], ["a.z", "b.c", "c"], ["c", "b"])) == ["a.x", "a.y", "a.z", "b", "b.c", "c"]
    assert stages([]) == {}
    assert stages(["conv"]) == {"conv": ["conv"]}
    assert list(stages(f"c{i}" for i in range(50))) == [""]


# ----------------------------------------------------------------------------------------------------------------- browser
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


def _sorted_by(browser: Any) -> dict[str, str]:
    headers = browser.find_elements("css selector", "table.sortable thead th")
    return {cell.text: cell.get_attribute("aria-sort") for cell in headers if cell.get_attribute("aria-sort")}


def _button(browser: Any, header: str) -> Any:
    return browser.find_element("xpath", f"//table[contains(@class, 'sortable')]//th/button[normalize-space()='{header}']")


def _numbers(texts: list[str]) -> list[int]:
    return [int(text.replace(",", "")) for text in texts]


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


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    def luminance(colour: tuple[float, ...]) -> float:
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour))
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


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
