"""Residual units: found where there are some, in whatever style they are written, and nowhere else."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model
from units import UNITS, Unit

import se_fx

# Counted in the source of each model: blocks per stage, less those without a shortcut.
COUNTS = {
    "resnet18": 2 + 2 + 2 + 2,
    "resnet34": 3 + 4 + 6 + 3,
    "resnet50": 3 + 4 + 6 + 3,
    "resnet101": 3 + 4 + 23 + 3,
    "resnext50_32x4d": 3 + 4 + 6 + 3,
    "wide_resnet50_2": 3 + 4 + 6 + 3,
    "regnet_x_400mf": 1 + 2 + 7 + 12,
    "regnet_y_400mf": 1 + 3 + 6 + 6,
    "mobilenet_v2": 0 + 1 + 2 + 3 + 2 + 2 + 0,  # in each group all but the first
    "mobilenet_v3_large": 1 + 1 + 2 + 3 + 1 + 2,
    "mobilenet_v3_small": 0 + 1 + 2 + 1 + 2,
    "efficientnet_b0": 0 + 1 + 1 + 2 + 2 + 3 + 0,
    "efficientnet_v2_s": 2 + 3 + 3 + 5 + 8 + 14,
    "mnasnet1_0": 2 + 2 + 2 + 1 + 3 + 0,
    "convnext_tiny": 3 + 3 + 9 + 3,
    "maxvit_t": 2 + 2 + 5 + 2,  # its attention has no conv
    "fcn_resnet50": 3 + 4 + 6 + 3,
    "timm:resnetv2_50": 3 + 4 + 6 + 3,
    "timm:resnet50d": 3 + 4 + 6 + 3,
    "timm:darknet53": 1 + 2 + 8 + 8 + 4,
    "timm:cspdarknet53": 1 + 2 + 8 + 8 + 4,
    "timm:cspresnet50": 3 + 3 + 5 + 2,
    "timm:convmixer_768_32": 32,
    "timm:convnextv2_nano": 2 + 2 + 8 + 2,
    "timm:dla34": 2 + 4 + 4 + 2,
    "timm:res2net50_26w_4s": 3 + 4 + 6 + 3,
    "timm:tresnet_m": 0 + 0 + 11 + 3,  # the first two stages' branches end in SE
    "timm:xception41": 3 + 8 + 1,  # the exit flow's second has no shortcut
    "timm:inception_resnet_v2": 10 + 20 + 10,
    "timm:resnest26d": 2 + 2 + 2 + 2,
    "timm:skresnet34": 3 + 4 + 6 + 3,
    "timm:gernet_s": 1 + 3 + 7 + 2 + 1,
    "timm:nf_resnet26": 2 + 2 + 2 + 2,
    "timm:starnet_s1": 2 + 2 + 8 + 3,
    "timm:ghostnet_100": 16,
    "timm:hrnet_w18_small": 1 + 2 * 2 + 3 * 2 + 4 * 2 + 4,  # stages of 1, 2, 3, 4 branches; four more in the head
}

timm = pytest.importorskip("timm")


def build(name: str) -> nn.Module:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnets compute widths while they are made
        if name.startswith("timm:"):
            return timm.create_model(name.removeprefix("timm:"))
        weights = {"weights": None, "weights_backbone": None} if name.startswith("fcn") else {"weights": None}
        return get_model(name, **weights, **({"init_weights": False} if name == "googlenet" else {}))


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_as_in_the_source(name: str) -> None:
    assert len(se_fx.plan(build(name), placement="residual", min_channels=1)) == COUNTS[name]


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "mixnet_s", "fbnetc_100", "spnasnet_100",
     "tinynet_a", "hardcorenas_a", "efficientnetv2_rw_s"],
)  # fmt: skip
def test_as_many_as_timms_blocks_say(name: str) -> None:
    model = timm.create_model(name)
    sites = se_fx.plan(model, placement="residual", min_channels=1).sites
    skips = [n for n, m in model.named_modules() if getattr(m, "has_skip", False)]
    assert [site.name.rsplit(".", site.name.count(".") - 2)[0] for site in sites] == skips


@pytest.mark.parametrize(
    "name", ["vgg11_bn", "densenet121", "swin_t", "vit_b_32", "googlenet", "timm:repvgg_a0", "timm:twins_svt_small"]
)
def test_models_without_any_are_told_what_else_there_is(name: str) -> None:
    model = build(name)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"placement='residual'.*no such place.*for 'conv'"):
        se_fx.plan(model, placement="residual")


def test_branches_that_end_in_attention_have_it_already() -> None:
    with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
        se_fx.plan(timm.create_model("seresnet18"), placement="residual")


def test_quantizable_resnets_are_resnets() -> None:
    model = torchvision.models.quantization.resnet18(weights=None)
    assert len(se_fx.plan(model, placement="residual", min_channels=1)) == 8


def test_in_a_bottleneck_it_sits_between_the_last_norm_and_the_addition() -> None:
    gm = se_fx.transform(get_model("resnet50", weights=None), placement="residual", min_channels=1)
    blocks = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    assert len(blocks) == 16
    for node in blocks:
        (user,) = node.users
        assert str(node.args[0].target).endswith("bn3")
        assert user.target is operator.iadd


@pytest.mark.parametrize("name", ["convnext_tiny", "timm:convnext_tiny"])
def test_in_convnext_it_sits_upstream_of_layer_scale_and_drop_path(name: str) -> None:
    gm = se_fx.transform(build(name), placement="residual", min_channels=1)
    blocks = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    for node in blocks:
        (user,) = node.users
        assert node.args[0].target == "permute" or str(node.args[0].target).endswith("block.6")  # a Permute
        assert getattr(user.target, "__name__", user.target) == "mul"


# ------------------------------------------------------------------------------------------------------- by other hands
LAST = {"option A": "wide"}


@pytest.mark.parametrize("name", UNITS)
def test_however_it_is_written(name: str) -> None:
    plan = se_fx.plan(Unit(UNITS[name]), placement="residual", min_channels=1)
    assert [site.name for site in plan.sites] == [LAST.get(name, "b")]


NO_UNITS = {
    "pyramid": lambda m, x: m.down(x) + F.interpolate(m.up(F.relu(m.wide(x))), scale_factor=1),
    "skip across a decoder": lambda m, x: x + m.up(F.relu(m.wide(F.relu(m.a(x))))),
    "position embedding": lambda m, x: F.relu(x + m.position),
    "position encoding": lambda m, x: x + m.a(x),
    "broadcast": lambda m, x: x + m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))),
    "parallel convs": lambda m, x: F.relu(m.norm(m.a(x)) + m.other(m.b(x))),
    "two branches": lambda m, x: m.b(F.relu(m.a(x))) + F.relu(m.down(x)),
    "coupling": lambda m, x: (lambda h: h[0] + m.b(F.relu(m.a(torch.cat([h[1], h[1]], 1))))[:, :4])(x.chunk(2, 1)),
    "product of both": lambda m, x: torch.addcmul(m.position, x, m.b(F.relu(m.a(x)))),
    "twice itself": lambda m, x: x + x,
    "branch read by others": lambda m, x: (lambda y: torch.cat([y, m.b(F.relu(y)) + x], 1))(m.a(x)),
    "branch returned too": lambda m, x: (lambda y: (y, m.b(F.relu(y)) + x))(m.a(x)),
    "ends in a gate": lambda m, x: (lambda y: x + y * y.mean((2, 3), keepdim=True).sigmoid())(m.b(F.relu(m.a(x)))),
    "tokens": lambda m, x: (lambda t: t + m.b(F.gelu(m.a(t.mT.unflatten(2, (4, 4))))).flatten(2).mT)(x.flatten(2).mT),
}


@pytest.mark.parametrize("name", NO_UNITS)
def test_no_residual_unit(name: str) -> None:
    with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
        se_fx.plan(Unit(NO_UNITS[name]), placement="residual", min_channels=1)


def test_units_that_share_their_modules_share_a_block() -> None:
    model = Unit(lambda m, x: UNITS["functional"](m, UNITS["functional"](m, x)))
    gm = se_fx.transform(model, placement="residual", min_channels=1)
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target)]
    assert len(calls) == 2
    assert len({node.target for node in calls}) == 1
    assert len(se_fx.Plan.of(gm)) == 1


def test_units_in_code_that_is_no_graph_are_found_within_their_regions() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.ModuleList(Unit(UNITS["functional"]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for unit in self.units:
                if x.sum() > -1e9:
                    x = unit(x[:, :3])
            return x

    model = Loop()
    gm = se_fx.transform(model, placement="residual", min_channels=1, init="identity")
    assert [site.name for site in se_fx.Plan.of(gm).sites] == ["units.0.b", "units.1.b"]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_a_conv_whose_class_is_named_after_scales_is_a_conv() -> None:
    """timm's weight-standardised one; the block goes behind it, on as many channels as it has."""

    class ScaledConv2d(nn.Conv2d):
        pass

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = ScaledConv2d(4, 6, 1), nn.SiLU(), ScaledConv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x))) * 0.2 + x

    (site,) = se_fx.plan(Unit(), placement="residual", min_channels=1).sites
    assert (site.name, site.channels) == ("last", 4)
    result, x = se_fx.transform(Unit(), placement="residual", min_channels=1, latent_channels=2), torch.randn(2, 4, 5, 5)
    assert result(x).shape == x.shape
