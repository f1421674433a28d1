"""Reports as pages: what they say, and that they need nothing else."""

from __future__ import annotations

import builtins
import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from reported import HOSTILE, NONE, TIMES, faster_rcnn, resnet50
from torch import nn

import se_fx
from se_fx import Report, SqueezeExciteError
from se_fx.cost import Cost
from se_fx.planning import Site, Skip
from se_fx.report import html

# -------------------------------------------------------------------------------------------------------------- content
VOID = {"meta", "link"}


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
    known = dataclasses.replace(resnet50(), activation_bytes=(1_000_000, 1_250_000), activation_bytes_optimized=1_010_000)
    (cards,) = (text for text in Page(html.render(known)).texts["dl"] if "Blocks" in text)
    assert "Activation bytes" in cards
    assert "+25.000 %" in cards
    assert "250,000" in cards
    assert "Activation bytes, optimized" in cards
    assert "+1.000 %" in cards
    assert "Activation bytes" not in html.render(dataclasses.replace(known, activation_bytes=None))


def test_a_unit_is_drawn_with_its_block() -> None:
    drawing = re.findall(r"<svg.*?</svg>", html.render(resnet50()), re.DOTALL)[1]
    page = Page(drawing)
    assert page.texts["title"][8] == "layer1.0.squeeze_excite.of_conv3 SqueezeExcite2d"
    assert page.texts["title"][9:11] == ["layer1.0.downsample.0 Conv2d", "layer1.0.downsample.1 BatchNorm2d"]
    assert "+" in page.texts["text"]
    assert page.all("svg")[0]["aria-label"] == "A part of the graph of ResNet, with 1 of its blocks"
    assert drawing.count("var(--accent)") == 2  # the block's edge and name
    assert "A block in its place" not in html.render(dataclasses.replace(resnet50(), excerpt=()))


def test_the_drawing_has_a_cell_for_each_conv_and_says_what_a_block_costs() -> None:
    report = resnet50()
    drawing, _, bars = re.findall(r"<svg.*?</svg>", html.render(report), re.DOTALL)
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


# ----------------------------------------------------------------------------------------------------------- the format
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
