"""Norms fold into the conv or the gate before them, where that is legal."""

from __future__ import annotations

import copy

import pytest
import torch
from excited import NARROW, WIDE, Excited, assert_same, images, outcomes, settled
from torch import Tensor, nn

import se_fx
from se_fx import SqueezeExcite2d


def test_a_norm_in_training_mode_stays() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], "ours"))
    model.before[2].train()
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == []
    assert outcomes(fast, "hoist_squeezes") == [False]
    x, y = images(), images()
    expected = model(x), model(y)
    for name, buffer in fast.named_buffers():
        assert buffer is model.get_buffer(name), "statistics are updated, and shared, as they were"
    assert_same((fast(x), fast(y)), expected)


def test_a_shared_conv_is_folded_with_each_norm() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(WIDE), nn.BatchNorm2d(WIDE)])
            self.se = SqueezeExcite2d(WIDE, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.se(self.norms[0](self.conv(x))) + self.se(self.norms[1](self.conv(x)))

    model = settled(Shared())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "fold_norms") == [True, True]
    assert outcomes(fast, "hoist_squeezes") == [True, True]
    assert_same(fast(x := images()), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_behind_a_block_goes_into_its_gate() -> None:
    net = nn.Sequential(nn.Conv2d(NARROW, WIDE, 1, bias=False), nn.BatchNorm2d(WIDE), nn.ReLU())
    gm = settled(se_fx.transform(net, min_channels=1, latent_channels=3))
    fast = se_fx.optimize_for_inference(gm, rewrites=["fold_norms"])
    assert outcomes(fast, "fold_norms") == [True]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert_same(fast(x := images()), gm(x))


class Remembered(nn.Module):
    """A factor that a norm in training mode changes at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x) * self.norm.running_mean[:, None, None], self.norm(x.repeat(1, WIDE // NARROW, 1, 1))


@pytest.mark.parametrize("training", [False, True])
def test_a_factor_is_folded_unless_the_graph_changes_it(training: bool) -> None:
    model = settled(Remembered())
    model.norm.train(training)
    fast = copy.deepcopy(se_fx.optimize_for_inference(model))
    assert any(outcomes(fast, "fold_norms")) is not training
    for _ in range(2):
        assert_same(fast(x := images()), model(x))
