"""A model of two convs, and whether its copy runs exactly as it does."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

import se_fx


class Model(nn.Module):
    """Two convs, of names `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def rewritten(model: nn.Module, sites: int = 2) -> nn.Module:
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert len(se_fx.report(result).sites) == sites, str(se_fx.report(result))
    return result


def outputs(model: nn.Module, *args, **kwargs):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return model(*args, **kwargs)


def assert_same(model: nn.Module, result: nn.Module, *args, modes: tuple[bool, ...] = (True, False, True), **kwargs) -> None:
    for training in modes:
        model.train(training)
        result.train(training)
        expected = outputs(model, *args, **kwargs)
        actual = outputs(result, *args, **kwargs)
        assert torch.equal(actual, expected), f"{training=}"


X = torch.randn(2, 3, 8, 8)
