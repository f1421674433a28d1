"""One residual unit of a rewritten model, or what is around a block, as it is drawn."""

from __future__ import annotations

import pytest
import torch
import torchvision
from test_faults import Branches
from trained import resnet10

import se_fx
from se_fx.planning import Part, excerpt_of

WAYS = {
    "transform": se_fx.transform,
    "in place": lambda model, **options: se_fx.apply_squeeze_excite(model, **options) or model,
}


def unit(*names: str) -> list[str]:
    return [f"layer1.0.{name}" if name != "add" else name for name in names]


@pytest.mark.parametrize("way", WAYS)
def test_a_residual_unit_with_its_block(way: str) -> None:
    model = WAYS[way](resnet10(), placement="residual", min_channels=1, latent_channels=2)
    before, *parts = excerpt_of(model)
    assert before == Part("", "", False, ())
    assert [part.name for part in parts] == unit(
        "conv1", "bn1", "relu", "conv2", "bn2", "squeeze_excite.of_conv2", "add", "relu"
    )
    assert [part.name for part in parts if part.block] == unit("squeeze_excite.of_conv2")
    assert [part.reads for part in parts] == [(0,), (1,), (2,), (3,), (4,), (5,), (6, 0), (7,)]
    assert [part.kind for part in parts[3:7]] == ["Conv2d", "BatchNorm2d", "SqueezeExcite2d", ""]


def test_a_projection_is_a_way_of_its_own() -> None:
    model = se_fx.transform(resnet10(), placement="residual", min_channels=128, latent_channels=2)
    parts = excerpt_of(model)
    names = {part.name: place for place, part in enumerate(parts)}
    assert parts[names["layer2.0.downsample.0"]].reads == (0,)
    assert parts[names["add"]].reads == (names["layer2.0.squeeze_excite.of_conv2"], names["layer2.0.downsample.1"])


@pytest.mark.parametrize("way", WAYS)
def test_a_block_outside_units_has_its_neighbours(way: str) -> None:
    model = WAYS[way](torchvision.models.vgg11(), min_channels=512, latent_channels=2)
    assert [part.name for part in excerpt_of(model)] == [
        *("", "features.9", "features.10", "features.11"),
        *("features.squeeze_excite.of_11", "features.12", "features.13"),
    ]


def test_there_is_none_where_no_graph_has_a_block() -> None:
    model = se_fx.transform(Branches(), min_channels=1, latent_channels=2)
    assert excerpt_of(model) == ()
    assert se_fx.report(model, torch.ones(1, 8, 4, 4)).excerpt == ()
