"""A small network, networks as after training, and how far optimised ones may be off."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

import se_fx


def resnet10() -> nn.Module:
    """torchvision's ResNet-18 with one unit in each stage: 12 convolutions."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with norms that do something, as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.4, 0.9)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # as promised


def applied(fast: nn.Module) -> dict[str, int]:
    return {step.rewrite: sum(change.applied for change in step.changes) for step in se_fx.report(fast).steps}
