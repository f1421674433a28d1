"""Squeezes are hoisted above linear layers, whoever wrote the block, and stay where that is not legal."""

from __future__ import annotations

import pytest
import torch
from excited import NARROW, STYLES, WIDE, Excited, assert_same, images, outcomes, settled
from torch import Tensor, nn

import se_fx
from se_fx.rewrites.products import VectorLinear


@pytest.mark.parametrize("style", STYLES)
def test_a_squeeze_is_hoisted_whoever_wrote_the_block(style: str) -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 3), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], style))
    fast = se_fx.optimize_for_inference(model)
    assert outcomes(fast, "hoist_squeezes") == [True]
    assert outcomes(fast, "fold_norms") == [True]
    assert outcomes(fast, "vector_products") == [True, True]
    for x in (images(), images(1, NARROW, 9, 9), images(0, NARROW, 5, 5)):
        assert_same(fast(x), model(x))


def test_the_algebra_by_hand() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)], "linear"))
    model = settled(nn.Sequential(nn.Conv2d(NARROW, NARROW, 1), model))
    fast = se_fx.optimize_for_inference(model)
    conv, norm, block = model[1].before[0], model[1].before[1], model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = scale[:, None] * conv.weight[:, :, 0, 0]
    bias = scale * (conv.bias - norm.running_mean) + norm.bias
    first, second = (module for module in fast.modules() if isinstance(module, VectorLinear))
    torch.testing.assert_close(first.weight, block.fc1.weight @ weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.bias, block.fc1.weight @ bias + block.fc1.bias, rtol=1e-12, atol=1e-12)
    assert torch.equal(second.weight, block.fc2.weight)
    (folded,) = (module for module in fast.modules() if isinstance(module, nn.Conv2d) and module.out_channels == WIDE)
    torch.testing.assert_close(folded.weight[:, :, 0, 0], weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.bias, bias, rtol=1e-12, atol=1e-12)


BETWEEN = {
    "nothing": ([], True),
    "a norm": ([nn.BatchNorm2d(WIDE)], True),
    "a norm without affine": ([nn.BatchNorm2d(WIDE, affine=False)], True),
    "two norms": ([nn.BatchNorm2d(WIDE), nn.BatchNorm2d(WIDE)], True),
    "an identity": ([nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5, inplace=True)], True),
    "another pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, groups=2), nn.BatchNorm2d(WIDE)], True),
    "ReLU": ([nn.ReLU()], False),
    "ReLU in place": ([nn.ReLU(inplace=True)], False),
    "a norm, then SiLU": ([nn.BatchNorm2d(WIDE), nn.SiLU()], False),
    "a norm without statistics": ([nn.BatchNorm2d(WIDE, track_running_stats=False)], False),
    "instance norm": ([nn.InstanceNorm2d(WIDE, affine=True)], False),
    "group norm": ([nn.GroupNorm(3, WIDE)], False),
    "a strided pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, stride=2)], False),
    "a padded pointwise conv": ([nn.Conv2d(WIDE, WIDE, 1, padding=1)], False),
    "a 3x3 conv": ([nn.Conv2d(WIDE, WIDE, 3, padding=1)], False),
    "max pooling": ([nn.MaxPool2d(2)], False),
    "average pooling": ([nn.AvgPool2d(2)], False),
    "pixel shuffle": ([nn.PixelShuffle(2), nn.PixelUnshuffle(2)], False),
    "channel shuffle": ([nn.ChannelShuffle(2)], False),
}


@pytest.mark.parametrize("case", BETWEEN)
@pytest.mark.parametrize("style", ["ours", "timm"])
def test_what_stands_between_decides(case: str, style: str) -> None:
    between, hoisted = BETWEEN[case]
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 3, padding=1), nn.Conv2d(NARROW, WIDE, 1), *between], style))
    fast = se_fx.optimize_for_inference(model)
    assert any(outcomes(fast, "hoist_squeezes")) == hoisted
    x = images()
    assert_same(fast(x), model(x))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(NARROW, WIDE, 1)], "(before.0) reads what need not be (N, C, H, W), such as the model's own input"),
        ([nn.Conv2d(NARROW, WIDE, 3, padding=1)], "a 3x3 convolution of stride 1 (before.0) stands before it"),
        ([nn.Conv2d(NARROW, WIDE, 1), nn.ReLU()], "ReLU (before.1) stands before it"),
    ],
)
def test_a_squeeze_that_stays_says_why(layers: list[nn.Module], reason: str) -> None:
    (step,) = se_fx.report(se_fx.optimize_for_inference(settled(Excited(layers, "ours")), rewrites=["hoist_squeezes"])).steps
    assert [change.detail for change in step.changes if not change.applied and change.detail.endswith(reason)]


def test_eca_is_hoisted_where_the_image_is_large_enough() -> None:
    model = settled(Excited([nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1)], "eca"))
    # 9, 4, 7 or 6 positions save 8 channels each; the matrix has 12 x 4, as many as 6 positions save
    for shape, hoisted in (((1, 3, 3), True), ((1, 2, 2), False), ((7, 1, 1), True), ((2, 1, 3), False)):
        x = images(shape[0], NARROW, *shape[1:])
        fast = se_fx.optimize_for_inference(model, {"x": x})
        assert outcomes(fast, "hoist_squeezes") == [hoisted]
        assert_same(fast(x), model(x))
    assert outcomes(se_fx.optimize_for_inference(model), "hoist_squeezes") == [False]


def test_gates_that_are_added_are_hoisted_too() -> None:
    class Added(Excited):
        def forward(self, x: Tensor) -> Tensor:
            for module in self.before:
                x = module(x)
            return x + self.gate(x)

    before = [nn.Conv2d(NARROW, NARROW, 1), nn.Conv2d(NARROW, WIDE, 1), nn.BatchNorm2d(WIDE)]
    for style in ("linear", "conv2d"):
        model = settled(Added(before, style))
        fast = se_fx.optimize_for_inference(model)
        assert outcomes(fast, "hoist_squeezes") == [True]
        assert outcomes(fast, "vector_products") == [True, True]
        assert_same(fast(x := images()), model(x))


class TwoWays(nn.Module):
    """The average is read by two matrices, by one of them as (N, C), by the other as (N, C, 1, 1)."""

    def __init__(self, flat_first: bool) -> None:
        super().__init__()
        self.flat_first = flat_first
        self.conv = nn.Sequential(nn.Conv2d(NARROW, NARROW, 3), nn.Conv2d(NARROW, WIDE, 1))
        self.flat, self.spatial, self.expand = nn.Linear(WIDE, 5), nn.Conv2d(WIDE, 5, 1), nn.Conv2d(5, WIDE, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        mean = x.mean((2, 3), True)
        ways = [lambda: self.flat(mean.flatten(1))[:, :, None, None], lambda: self.spatial(mean)]
        first, second = (way() for way in (ways if self.flat_first else ways[::-1]))
        return x * self.expand((first + second).relu()).sigmoid()


@pytest.mark.parametrize("flat_first", [True, False])
def test_an_average_that_two_matrices_read(flat_first: bool) -> None:
    model = settled(TwoWays(flat_first))
    fast = se_fx.optimize_for_inference(model, rewrites=["hoist_squeezes"])
    assert outcomes(fast, "hoist_squeezes") == [True]
    assert_same(fast(x := images()), model(x))
    weights = [value for name, value in fast.named_parameters() if not name.startswith("conv.")]
    assert sorted(weight.shape[1] for weight in weights if weight.ndim > 1) == [NARROW, NARROW, 5]
