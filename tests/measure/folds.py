"""Models with constant gates, and how they are folded."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import se_fx
from se_fx import Folding, SqueezeExcite2d

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def blocks(model: nn.Module) -> dict[str, SqueezeExcite2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcite2d)}


def make_constant(block: SqueezeExcite2d, gate: Tensor) -> None:
    """Have `block` return `gate`, (C,), whatever it is given: sigmoid(0 * anything + logit(gate))."""
    with torch.no_grad():
        block.fc2.weight.zero_()
        block.fc2.bias.copy_(torch.logit(gate / block.gate_scale))


def fold(model: nn.Module, tolerance: float = 0.02, x: Tensor = X, **options) -> Folding:
    return se_fx.fold_gates(model, se_fx.profile_gates(model, [x], progress=False), tolerance, progress=False, **options)


def reasons(folding: Folding) -> dict[str, str]:
    return {site.name: site.reason for site in folding.kept}


def assert_same_outputs(one: nn.Module, other: nn.Module, x: Tensor = X) -> None:
    """Bitwise, in both modes, under one seed."""
    for training in (True, False):
        results = []
        for model in (one, other):
            model = copy.deepcopy(model).train(training)
            torch.manual_seed(1)
            results.append(model(x.clone()))
        assert torch.equal(*results)


class Split(nn.Module):
    """Runs its own code: `body` is a region, `head` a lone conv, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(self.head(x)) if x.sum() > -1e9 else x


def split() -> nn.Module:
    return se_fx.transform(Split(), min_channels=1, latent_channels=2, init="identity")


def applied() -> nn.Module:
    model = Split()
    se_fx.apply_squeeze_excite(model, latent_channels=2, min_channels=1)
    for block in blocks(model).values():
        nn.init.zeros_(block.fc2.weight)
    return model
