"""The block, against its formula, against Composer's layers and against torchvision's block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import se_fx
from se_fx import SqueezeExcite2d, SqueezeExciteError


def test_is_composers_block_layer_by_layer() -> None:
    block = SqueezeExcite2d(12, latent_channels=0.25)
    composers = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3, bias=False),
        nn.ReLU(),
        nn.Linear(3, 12, bias=False),
        nn.Sigmoid(),
    )
    composers[2].weight, composers[4].weight = block.fc1.weight, block.fc2.weight
    x = torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(block(x), x * composers(x)[:, :, None, None])


@pytest.mark.parametrize(("activation", "gate"), [("relu", "sigmoid"), ("silu", "hardsigmoid")])
def test_is_torchvisions_block_with_biases(activation: str, gate: str) -> None:
    classes = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}
    block = SqueezeExcite2d(16, latent_channels=4, bias=True, activation=activation, gate=gate)
    theirs = torchvision.ops.SqueezeExcitation(16, 4, activation=classes[activation], scale_activation=classes[gate])
    for ours, conv in ((block.fc1, theirs.fc1), (block.fc2, theirs.fc2)):
        conv.load_state_dict({"weight": ours.weight[:, :, None, None], "bias": ours.bias})
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(block(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (8, 4, 6), (0, 8, 3, 3), (1, 8, 0, 3), (2, 8, 1, 1)])
def test_identity_is_bitwise(dtype: torch.dtype, gate: str, bias: bool, shape: tuple[int, ...]) -> None:
    block = SqueezeExcite2d(8, latent_channels=4, init="identity", gate=gate, bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype) * 100
    assert torch.equal(block(x), x)
    assert block(x).dtype == dtype
    if x.numel():
        assert bool((block.excitation(x) == 1.0).all())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 5, 6).to(memory_format=layout)
    assert SqueezeExcite2d(8)(x).is_contiguous(memory_format=layout)


def test_a_nan_stays_in_its_own_sample() -> None:
    block = SqueezeExcite2d(8, init="identity")
    x = torch.randn(3, 8, 4, 4)
    y = x.clone()
    y[1, 2, 3, 3] = float("nan")
    assert torch.equal(block(y)[[0, 2]], x[[0, 2]])
    assert bool(block(y)[1].isnan().any())


def test_identity_learns() -> None:
    block = SqueezeExcite2d(8, latent_channels=4, init="identity")
    x = torch.randn(4, 8, 5, 5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (block(x) ** 2).mean().backward()
        optimizer.step()
    assert bool(block.fc1.weight.grad.abs().sum() > 0)
    assert not torch.equal(block(x), x)


def test_gradients_are_right() -> None:
    block = SqueezeExcite2d(4, latent_channels=3, bias=True, activation="silu", dtype=torch.float64)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_any_callable_can_be_the_gate() -> None:
    class OnePlusTanh(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1 + torch.tanh(x)

    x = torch.randn(2, 8, 3, 3)
    block = SqueezeExcite2d(8, gate=OnePlusTanh(), init="identity")
    assert block.gate_scale == 1.0
    assert torch.equal(block(x), x)


def test_copies_and_pickles() -> None:
    block = SqueezeExcite2d(8, bias=True)
    x = torch.randn(1, 8, 3, 3)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(copied(x), block(x))
        assert repr(copied) == repr(block)


def test_is_a_public_name() -> None:
    assert se_fx.SqueezeExcite2d is SqueezeExcite2d
    assert issubclass(SqueezeExciteError, ValueError)
