"""Stages: how names of convs fall into groups, and two halves of a model in order again."""

from __future__ import annotations

import pytest
import torch
import torchvision
from reported import faster_rcnn
from torch import nn

from se_fx.names import stages
from se_fx.report.stages import columns, in_order


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
