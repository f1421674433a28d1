"""Convs with blocks in many styles, in float64, where what is exact but for rounding agrees to 12 digits."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import se_fx
from se_fx import SqueezeExcite2d

WIDE, NARROW = 12, 4


def settled(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with norms that do something: what is exact but for rounding agrees to 12 digits."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval()


def outcomes(model: nn.Module, rewrite: str) -> list[bool]:
    (step,) = (step for step in se_fx.report(model).steps if step.rewrite == rewrite)
    assert all(isinstance(each, str) and each for change in step.changes for each in (change.place, change.detail))
    assert not any("None" in change.place for change in step.changes)
    return [change.applied for change in step.changes]


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (3, NARROW, 7, 5), dtype=torch.float64)


def assert_same(a, b) -> None:
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)  # sums in another order, in float64


class Excited(nn.Module):
    """A conv and what may follow it, then a block written in one of many styles."""

    def __init__(self, before, style="ours", channels=WIDE) -> None:
        super().__init__()
        self.before, self.style = nn.ModuleList(before), style
        self.fc1, self.fc2 = nn.Linear(channels, 5), nn.Linear(5, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, channels, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers = (nn.Linear(channels, 5, bias=False), nn.ReLU(), nn.Linear(5, channels, bias=False), nn.Sigmoid())
        self.pool_and_mlp = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)
        self.blocks = nn.ModuleDict(
            {
                "ours": SqueezeExcite2d(channels, 5),
                "timm": timm.layers.SEModule(channels, rd_channels=5),
                "timm effnet": timm.models._efficientnet_blocks.SqueezeExcite(channels, 0.5, act_layer=nn.SiLU),
                "torchvision": torchvision.ops.SqueezeExcitation(channels, 5),
                "hard": torchvision.ops.SqueezeExcitation(channels, 5, nn.Hardswish, nn.Hardsigmoid),
                "eca": timm.layers.EcaModule(channels),
            }
        )

    def gate(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        if self.style == "sequential":
            n, c, _, _ = x.shape
            return self.pool_and_mlp(x).reshape(n, c, 1, 1)
        if self.style == "linear":
            return torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x).view(n, c))))).view(n, c, 1, 1)
        if self.style == "flattened":
            return self.fc2(self.fc1(x.flatten(2).mean(-1)).relu()).sigmoid()[:, :, None, None].expand_as(x)
        if self.style == "functional":
            squeezed = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.fc1.weight, self.fc1.bias)
            return torch.sigmoid(F.linear(F.silu(squeezed), self.fc2.weight)).unsqueeze(-1).unsqueeze(-1)
        if self.style == "window":
            return self.conv2(F.relu(self.conv1(F.avg_pool2d(x, x.shape[2:])))).sigmoid()
        return F.conv2d(F.conv2d(torch.mean(x, (-1, -2), True), self.conv1.weight), self.conv2.weight).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.before:
            x = module(x)
        return self.blocks[self.style](x) if self.style in self.blocks else x * self.gate(x)


STYLES = (
    "ours",
    "timm",
    "timm effnet",
    "torchvision",
    "hard",
    "sequential",
    "linear",
    "flattened",
    "functional",
    "window",
    "conv2d",
)
