"""Constant gates: blocks whose gate is the same for every input are a factor, or nothing."""

from __future__ import annotations

import pytest
import torch
from excited import NARROW, WIDE, Excited, assert_same, images, outcomes, settled
from torch import Tensor, nn

import se_fx


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_identity_blocks_vanish(gate: str) -> None:
    net = settled(nn.Sequential(nn.Conv2d(NARROW, WIDE, 3), nn.BatchNorm2d(WIDE), nn.ReLU(), nn.Conv2d(WIDE, WIDE, 1)))
    gm = se_fx.transform(net, min_channels=1, latent_channels=3, init="identity", gate=gate).eval()
    fast = se_fx.optimize_for_inference(gm, rewrites=["constant_gates"])
    assert outcomes(fast, "constant_gates") == [True, True]
    assert [str(node.target) for node in fast.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert torch.equal(fast(x := images()), net(x))


@pytest.mark.parametrize("style", ["timm", "timm effnet", "torchvision", "hard"])
def test_gates_that_are_constant_become_factors_of_the_conv(style: str) -> None:
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 3)], style))
    last = [module for module in model.blocks[style].modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "constant_gates") == outcomes(fast, "fold_norms") == [True]
    assert [node.op for node in fast.graph.nodes if node.op not in ("placeholder", "output")] == ["call_module"]
    assert_same(fast(x := images()), model(x))


class Linear(nn.Module):
    """A gate that is a matrix's product, with nothing behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(NARROW, WIDE, 3), nn.Conv2d(WIDE, 4, 1), nn.Conv2d(4, WIDE, 1)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.expand(self.reduce(x.mean((2, 3), True)).relu())


def test_a_constant_gate_without_an_activation() -> None:
    model = settled(Linear())
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "constant_gates") == outcomes(fast, "fold_norms") == [True]
    assert [node.op for node in fast.graph.nodes if node.op not in ("placeholder", "output")] == ["call_module"]
    assert_same(fast(x := images()), model(x))
