"""Reports as text: every inserted block is named with its cost, on a line of its own; very many share lines, in ranges."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import densenet201, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import se_fx
from se_fx import Report
from se_fx.report.stages import ranges

Row = dict[str, str]


def tables(report: Report) -> list[list[Row]]:
    """The tables of a report's text: rows by the words of their header."""
    found = []
    for part in str(report).split("\n\n"):
        lines = part.splitlines()
        rules = [i for i, line in enumerate(lines) if set(line) == {"-", " "}]
        if rules and rules[0] == 1:  # cells are where the rule under the header is
            cells = [match.span() for match in re.finditer("-+", lines[1])]
            header, *rows = ([line[start:end].strip() for start, end in cells] for line in (lines[0], *lines[2:]))
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def expanded(name: str) -> Iterator[str]:
    """What a shell makes of braces: numbers and ranges of them."""
    match = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", name)
    if match is None:
        yield name
        return
    before, inside, after = match.groups()
    for part in inside.split(","):
        first, _, last = part.partition("..")
        for each in range(int(first), int(last or first) + 1):
            yield from (f"{before}{each}{rest}" for rest in expanded(after))


def test_braces_are_expanded_as_by_a_shell() -> None:
    assert list(expanded("a")) == ["a"]
    assert list(expanded("a.{0,2..4}.b{1..2}")) == [f"a.{i}.b{j}" for i in (0, 2, 3, 4) for j in (1, 2)]


# ------------------------------------------------------------------------------------------------------------------ names
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], int]] = {
    "resnet50": (resnet50, {"min_channels": 512}, 512),
    "densenet201": (densenet201, {}, 128),
    "fasterrcnn_resnet50_fpn": (
        lambda: fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None),
        {"min_channels": 256},
        256,
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_block_is_named_on_a_line_of_its_own(model: str) -> None:
    make, options, least = MODELS[model]
    with torch.device("meta"):
        plain = make()
    convs = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels >= least}
    report = se_fx.report(se_fx.transform(plain, **options))
    blocks, stages, _totals, *_ = tables(report)
    assert len(convs) > 20
    assert [row["conv"] for row in blocks] == list(convs)
    assert [number(row["channels"]) for row in blocks] == [conv.out_channels for conv in convs.values()]
    assert [number(row["parameters"]) for row in blocks] == [2 * 64 * conv.out_channels for conv in convs.values()]
    assert str(report).splitlines()[0].split(": ")[1] == f"{len(convs)} Squeeze-and-Excitation blocks inserted."
    assert sum(number(row["parameters"]) for row in stages) == report.added.params


# ----------------------------------------------------------------------------------------------------------------- ranges
def deep(blocks: int, bare: int = 0) -> nn.Sequential:
    """Two stages of blocks of two convs, of which the seventh is wider inside, then `bare` convs, and a stem before all."""

    def block(width: int) -> nn.Sequential:
        return nn.Sequential(OrderedDict(conv1=nn.Conv2d(4, width, 1), relu=nn.ReLU(), conv2=nn.Conv2d(width, 4, 1)))

    def stage(first: int) -> nn.Sequential:
        return nn.Sequential(*(block(8 if i == 7 else 4) for i in range(first)))

    tail = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(bare)))
    layers = {"stem": nn.Conv2d(3, 4, 1), "layer1": stage(blocks), "layer2": stage(blocks), "tail": tail}
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture(scope="module", params=[None, torch.zeros(1, 3, 2, 2)], ids=["parameters", "measured"])
def very_deep(request: pytest.FixtureRequest) -> tuple[nn.Module, Report]:
    model = deep(70)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["se_fx.transform"], "activation_bytes", lambda *_: None)  # which takes longest
        return model, se_fx.report(se_fx.transform(model, min_channels=1, latent_channels=2), request.param)


def test_very_many_blocks_are_folded_into_ranges_that_name_each_once(very_deep: tuple[nn.Module, Report]) -> None:
    model, report = very_deep
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(convs) == 1 + 2 * 2 * 70
    rows = tables(report)[0]
    named: list[str] = []
    for row in rows:
        name, _, count = row["conv"].partition(", ")
        names = list(expanded(name))
        assert count == (f"{len(names)} blocks" if len(names) > 1 else "")
        assert {convs[each].out_channels for each in names} == {number(row["channels"])}
        assert number(row["parameters"]) == len(names) * 2 * 2 * number(row["channels"])
        named += names
    assert sorted(named) == sorted(convs)
    assert [row["conv"] for row in rows] == [
        "stem",
        "layer1.{0..6,8..69}.conv1, 69 blocks",
        "layer1.{0..69}.conv2, 70 blocks",
        "layer{1..2}.7.conv1, 2 blocks",
        "layer2.{0..6,8..69}.conv1, 69 blocks",
        "layer2.{0..69}.conv2, 70 blocks",
    ]


def test_costs_of_rows_sum_to_what_was_added(very_deep: tuple[nn.Module, Report]) -> None:
    _, report = very_deep
    columns = {"parameters": report.added.params} | ({"MACs": report.added.macs} if report.measured else {})
    blocks, stages, totals, *_ = tables(report)
    for column, added in columns.items():
        assert sum(number(row[column]) for row in blocks) == added > 0, column
        assert sum(number(row[column]) for row in stages) == added, column
    assert number(totals[0]["added"]) == report.added.params
    assert [row["stage"] for row in stages] == ["stem", "layer1", "layer2"]
    assert [row["blocks, of convs"] for row in stages] == ["1 of 1", "140 of 140", "140 of 140"]
    assert [row["channels"] for row in stages] == ["4", "4 to 8", "4 to 8"]


@pytest.mark.parametrize(("blocks", "bare", "rows"), [(63, 3, 256), (63, 4, 7)], ids=["256", "257"])
def test_ranges_begin_beyond_256_blocks(blocks: int, bare: int, rows: int) -> None:
    report = se_fx.report(se_fx.transform(deep(blocks, bare), min_channels=1, latent_channels=2))
    assert len(report.sites) == 4 * blocks + 1 + bare
    found = [row["conv"] for row in tables(report)[0]]
    assert len(found) == rows
    assert any("{" in name for name in found) == (len(report.sites) > 256)


@pytest.mark.parametrize("blocks", [5, 4])
def test_stages_are_shown_beyond_20_blocks(blocks: int) -> None:
    report = se_fx.report(se_fx.transform(deep(blocks, 3), min_channels=1, latent_channels=2))
    assert any("stage" in row for table in tables(report) for row in table) == (4 * blocks + 4 > 20)


parts = st.sampled_from(["a", "b", "conv", "0", "1", "2", "3", "10", "11", "99", "01", "001", "block03", "\u0663"])
names = st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), unique=True, max_size=40)


@given(names=names)
def test_whatever_the_names_each_is_in_one_range(names: list[str]) -> None:
    folded = ranges(names)
    assert sorted(each for label in folded for each in expanded(label)) == sorted(names)
    assert all(sorted(expanded(label)) == sorted(members) for label, members in folded.items())
