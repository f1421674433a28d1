"""Counting, by hand and against PyTorch's own counter: modules, parts, inputs of any form."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_fx
from se_fx import Cost
from se_fx.cost import Operator, measure


def test_costs_add_and_subtract() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) - Cost(1, 1, 1, 1) == Cost(10, 21, 32, 43)


def test_a_conv_by_hand() -> None:
    # 2 images of 4x4 outputs, 8 channels, each from 3x3x3 inputs: 2 * 16 * 8 * 27 MACs. Input 2 * 3 * 6 * 6, weights
    # 8 * 27 and output 2 * 8 * 4 * 4 floats of 4 bytes are moved.
    cost = measure(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(2, 3, 6, 6)).total
    macs = 2 * 16 * 8 * 27
    assert cost == Cost(params=216, macs=macs, flops=2 * macs, bytes=4 * (216 + 216 + 256))
    assert {type(count) for count in cost.astuple()} == {int}


def test_a_grouped_strided_conv_and_relu_by_hand() -> None:
    # Outputs 4x4; each from 2 input channels of its group, 1x1. ReLU: one operation an element, read and written.
    cost = measure(nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, groups=2, bias=False), nn.ReLU()), torch.zeros(1, 4, 8, 8)).total
    macs = 16 * 6 * 2
    assert cost == Cost(params=12, macs=macs, flops=2 * macs + 96, bytes=4 * (256 + 12 + 96 + 96 + 96))


def test_a_block_by_hand() -> None:
    # C=8, hidden 4, 5x5, fp32. Mean: reads 200, writes 8. fc1: 8*4 MACs; ReLU 4; fc2: 4*8 MACs; sigmoid 8; scale 200.
    cost = measure(se_fx.SqueezeExcite2d(8, 4), torch.zeros(1, 8, 5, 5)).total
    assert (cost.params, cost.macs, cost.flops) == (64, 64, 2 * 64 + 200 + 4 + 8 + 200)
    floats = (200 + 8) + (8 + 32 + 4) + (4 + 4) + (4 + 32 + 8) + (8 + 8) + (200 + 8 + 200)
    assert cost.bytes == 4 * floats


def test_a_residual_unit_by_hand() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    # A map is 4 * 3 * 3 = 36 floats. Conv: 9 * 4 * 36 MACs. Norm: scale and shift each value, 2 * 36. Add 36, ReLU 36.
    # Moved: conv 36 + 144 + 36; norm 36 + 36, and 4 vectors of 4; add 3 * 36; ReLU 2 * 36.
    cost = measure(Unit(), torch.zeros(1, 4, 3, 3)).total
    macs = 9 * 4 * 36
    assert (cost.params, cost.macs, cost.flops) == (144 + 8, macs, 2 * macs + 72 + 36 + 36)
    assert cost.bytes == 4 * ((36 + 144 + 36) + (36 + 36 + 16) + 3 * 36 + 2 * 36)


def test_a_part_is_what_runs_in_a_module_its_hooks_included() -> None:
    relu = nn.ReLU()
    relu.register_forward_pre_hook(lambda module, args: (-args[0],))
    relu.register_forward_hook(lambda module, args, output: output.exp())
    measurement = measure(nn.Sequential(nn.Sigmoid(), relu), torch.zeros(2, 3), {"part": "1"})
    assert measurement.operators == [Operator(6, 48, part) for part in (None, "part", "part", "part")]
    assert measurement.parts == {"part": Cost(flops=18, bytes=144)}
    assert measurement.shapes == {"part": (2, 3)}
    assert measurement.total == Cost(flops=24, bytes=192)


def test_shared_modules_count_once_for_parameters_and_once_a_call_for_macs() -> None:
    conv = nn.Conv2d(4, 4, 1, bias=False)
    cost = measure(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 4, 3, 3)).total
    assert (cost.params, cost.macs) == (16, 2 * 9 * 16)


def counted(model: nn.Module, *args) -> int:
    """FLOPs by PyTorch's counter, on real tensors."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_macs_are_half_of_pytorchs_flops(name: str) -> None:
    model = torchvision.models.get_model(name)
    x = torch.randn(2, 3, 64, 64)
    gm = se_fx.transform(model, min_channels=1, latent_channels=8)
    report = se_fx.report(gm, x)
    assert 2 * report.base.macs == counted(model, x)
    assert 2 * (report.base.macs + report.added.macs) == counted(gm, x)
    assert report.base.params == sum(p.numel() for p in model.parameters())
    assert report.base.params + report.added.params == sum(p.numel() for p in gm.parameters())


def test_transposed_and_linear_and_matrix_products_count() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(self.up(x))
            return y @ y.mT

    x = torch.randn(2, 3, 4, 4)
    assert 2 * measure(Model(), x).total.macs == counted(Model(), x)


def test_a_billion_parameters_on_the_meta_device_take_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Conv2d(8192 if i else 3, 8192, 1) for i in range(16)))
    start = time.perf_counter()
    tracemalloc.start()
    gm = se_fx.transform(model, min_channels=8192)
    report = se_fx.report(gm, torch.empty(1, 3, 224, 224, device="meta"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.base.params > 1_000_000_000
    assert report.base.macs > 10**13
    assert peak < 50 * 2**20
    assert time.perf_counter() - start < 60


def test_counting_computes_nothing_and_changes_nothing(cnn: nn.Sequential) -> None:
    buffers = {name: buffer.clone() for name, buffer in cnn.named_buffers()}
    gm = se_fx.transform(cnn.train(), min_channels=1)
    state = torch.get_rng_state()
    se_fx.report(gm, torch.empty(100_000, 3, 1000, 1000, device="meta"))  # 1.2 TB
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in cnn.named_buffers())
    assert gm.training
    assert not gm.get_submodule("squeeze_excite.of_0")._forward_hooks


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_example_inputs_in_any_form(inputs, cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1)
    x = torch.zeros(1, 3, 8, 8)
    assert se_fx.report(gm, inputs(x)).base == se_fx.report(gm, x).base


def test_a_model_that_needs_values_is_run_for_real() -> None:
    class NeedsValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return y[y > 0] if y.sum().item() > 0 else y[y < 0]

    model = NeedsValues()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gm = se_fx.transform(model, min_channels=1)
    report = se_fx.report(gm, torch.randn(2, 3, 4, 4))
    assert report.base.macs == 2 * 16 * 24
    assert report.sites[0].spatial == (4, 4)
    assert gm.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_inputs_that_a_model_refuses_are_named_also_where_it_is_run_for_real() -> None:
    class NeedsValues(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1 if float(x.sum()) > 0 else x)

    message = r"^example_inputs: the model could not be called with inputs \(1, 4, 2, 2\): RuntimeError: Given groups=1[^\n]*$"
    for model in (nn.Conv2d(3, 8, 1), NeedsValues(3, 8, 1)):
        with pytest.raises(se_fx.SqueezeExciteError, match=message):
            measure(model, torch.zeros(1, 4, 2, 2))
