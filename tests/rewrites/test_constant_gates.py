"""Constant gates: blocks whose gate is the same for every input are a factor, or nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from excited import NARROW, WIDE, Excited, assert_same, images, outcomes, settled
from torch import Tensor, nn

import se_fx

constant_gates = importlib.import_module("se_fx.rewrites.inference.constant_gates")  # the function has its name


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


@pytest.mark.parametrize(("apart", "is_constant"), [(2.0**-52, True), (1e-9, False), (float("nan"), False)])
def test_a_gate_that_batches_round_otherwise_is_constant(
    apart: float, is_constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel makes of a number may depend on where in a tensor it stands: vector instructions leave a rest to others."""
    computed = constant_gates._at_batch

    def rounded_otherwise(*arguments: Any) -> Tensor | None:
        gate, batch_size = computed(*arguments), arguments[-1]
        return gate if gate is None or batch_size == 1 else gate * (1 + apart)

    monkeypatch.setattr(constant_gates, "_at_batch", rounded_otherwise)
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 3)], "torchvision"))
    nn.init.zeros_(model.blocks["torchvision"].fc2.weight)
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "constant_gates") == [is_constant]
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
