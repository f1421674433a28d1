"""The paper's networks, and timm's, from plain ones.

Source: Hu, Shen, Sun, *Squeeze-and-Excitation Networks*, arXiv 1709.01507, journal version. Its "FLOPs" are multiply-adds, at
224 x 224: those of convolutions and fully connected layers, and here one for each value that a block scales.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import se_fx

timm = pytest.importorskip("timm")


def plain(name: str) -> nn.Module:
    """The paper's network; its ResNets, but not its ResNeXts, stride in the first 1x1 conv of a bottleneck."""
    with torch.device("meta"):
        model = get_model(name, weights=None)
    if "next" not in name:
        for block in model.modules():
            if type(block).__name__ == "Bottleneck":
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


MILLIONS = [(2, 45.7), (4, 35.7), (8, 30.7), (16, 28.1), (32, 26.9)]  # parameters of SE-ResNet-50 by reduction ratio


def stored(report: se_fx.Report, gm: nn.Module) -> int:
    """Parameters, and the norms' running statistics, as the paper's framework stores them."""
    statistics = sum(buffer.numel() for name, buffer in gm.named_buffers() if "running" in name)
    return report.base.params + report.added.params + statistics


@pytest.mark.parametrize(("ratio", "millions"), MILLIONS)
def test_parameters_by_reduction_ratio(ratio: int, millions: float) -> None:
    gm = se_fx.transform(plain("resnet50"), placement="residual", latent_channels=1 / ratio, min_channels=1)
    report = se_fx.report(gm)
    # 2/r times the sum of squares of each block's channels, as in the paper's section 4
    assert report.added.params == 2 * (3 * 256**2 + 4 * 512**2 + 6 * 1024**2 + 3 * 2048**2) // ratio
    # The paper's own formula, on its own 25.6 M, gives 30.63 for r = 8.
    assert round(stored(report, gm) / 1e6, 1) == {8: 30.6}.get(ratio, millions)


@pytest.mark.parametrize(("ratio", "millions"), MILLIONS)
def test_parameters_to_the_papers_digit(ratio: int, millions: float) -> None:
    """The one count found that gives all five: with a bias in the expanding layer, which the text doesn't mention."""

    def block(channels: int) -> nn.Module:
        made = se_fx.SqueezeExcite2d(channels, 1 / ratio)
        made.fc2 = nn.Linear(made.latent_channels, channels)
        return made

    gm = se_fx.transform(plain("resnet50"), placement="residual", min_channels=1, block=block)
    assert round(stored(se_fx.report(gm), gm) / 1e6, 1) == millions


GFLOPS = {
    "resnet50": ("residual", 3.86, 3.87),
    "resnet101": ("residual", 7.58, 7.60),
    "resnet152": ("residual", 11.30, 11.32),
    "resnext50_32x4d": ("residual", 4.24, 4.25),
    "vgg16_bn": ("norm", 15.47, 15.48),
}


@pytest.mark.parametrize("name", GFLOPS)
def test_gflops(name: str) -> None:
    placement, base, with_se = GFLOPS[name]
    options = {"placement": placement, "latent_channels": 1 / 16, "min_channels": 1}
    plan = se_fx.plan(plain(name), example_inputs=torch.zeros(1, 3, 224, 224), **options)
    scaled = sum(site.channels * site.spatial[0] * site.spatial[1] for site in plan.sites)
    added = (plan.added.macs + scaled) / 1e9
    assert plan.base.macs / 1e9 == pytest.approx(base, rel=0.003)
    assert plan.base.macs / 1e9 + added == pytest.approx(with_se, rel=0.003)
    assert added == pytest.approx(with_se - base, abs=0.01)  # both are rounded to 0.01


# timm's network, the plain one and its options. Hidden widths are rounded up to multiples of 8 there.
PAIRS = {
    "seresnet18": ("resnet18", {}, {"layer1.*": {"latent_channels": 8}}),
    "seresnet34": ("resnet34", {}, {"layer1.*": {"latent_channels": 8}}),
    "seresnet50": ("resnet50", {}, None),
    "seresnext50_32x4d": ("resnext50_32x4d", {}, None),
    "seresnext26d_32x4d": ("resnet26d", {"cardinality": 32, "base_width": 4}, None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_timms_se_networks(name: str) -> None:
    base, options, overrides = PAIRS[name]
    theirs, model = timm.create_model(name).eval(), timm.create_model(base, **options).eval()
    gm = se_fx.transform(model, placement="residual", min_channels=1, latent_channels=1 / 16, bias=True, overrides=overrides)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    last = "conv3" if hasattr(model.layer1[0], "conv3") else "conv2"
    weights = {}
    for key, value in theirs.state_dict().items():
        block, is_se, layer = key.partition(".se.")
        weights[f"{block}.squeeze_excite.of_{last}.{layer}" if is_se else key] = value
    for key in weights:
        if "squeeze_excite" in key and key.endswith("weight"):
            weights[key] = weights[key].flatten(1)  # of a 1x1 convolution
    missing, unexpected = gm.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("._extra_state") for key in missing)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        # Their 1x1 convolutions and our linear layers round differently.
        torch.testing.assert_close(gm(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_efficientnet_lite_gets_back_what_efficientnet_has(lite0: nn.Module) -> None:
    efficientnet = timm.create_model("efficientnet_b0")
    se = {name: m for name, m in efficientnet.named_modules() if type(m).__name__ == "SqueezeExcite"}
    theirs = [(name.split(".")[:-1], m.conv_reduce.in_channels) for name, m in se.items()]
    plan = se_fx.plan(lite0, placement="norm", where="*_depthwise_conv", min_channels=1)
    # The depthwise convs of both networks in their order; Lite's blocks are numbered through, B0's by stage.
    blocks = [
        name for name, m in efficientnet.named_modules() if type(m).__name__ in ("DepthwiseSeparableConv", "InvertedResidual")
    ]
    ours = [(blocks[int(site.name.split(".")[1])].split("."), site.channels) for site in plan.sites]
    assert ours == theirs
    assert len(ours) == 16
    gm = se_fx.transform(lite0, plan)
    for node in gm.graph.nodes:
        if node.op == "call_module" and "squeeze_excite" in str(node.target):
            assert str(node.args[0].target).endswith("_bn1")
