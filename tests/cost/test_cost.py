"""Costs, against counting by hand and against PyTorch's own counter."""

from __future__ import annotations

import copy
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_fx
from se_fx import Cost, Machine
from se_fx.cost import Measurement, Operator, activation_bytes, measure


def counted(model: nn.Module, *args) -> int:
    """FLOPs by PyTorch's counter, on real tensors."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(*args)
    return counter.get_total_flops()


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


class Call(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


#: FLOPs of functions of an image of 2 channels, 4x6: 48 numbers.
OPERATORS = {
    "max pooling": (lambda x: F.max_pool2d(x, (2, 3)), 8 * 6),  # 2x2 windows in each channel, of 6 numbers
    "square windows": (lambda x: F.max_pool2d(x, 2, stride=1), 30 * 4),
    "average pooling": (lambda x: F.avg_pool2d(x, (1, 3), stride=1), 32 * 3),
    "global pooling": (lambda x: F.adaptive_avg_pool2d(x, 1), 48),
    "mean": (lambda x: x.mean((2, 3)), 48),
    "variance": (lambda x: x.var(1), 48),
    "two results": (lambda x: x.max(1), 48),
    "batch norm": (lambda x: F.batch_norm(x, torch.zeros(2), torch.ones(2)), 2 * 48),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), 6 * 48),
    "group norm": (lambda x: F.group_norm(x, 1), 6 * 48),
    "softmax": (lambda x: x.softmax(1), 5 * 48),
    "logarithm of it": (lambda x: x.log_softmax(1), 5 * 48),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 4 * 48 * 7),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 4 * 48 * 39),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), 0),
    "pointwise": (lambda x: F.hardswish(x.exp()), 2 * 48),
    "pointwise, broadcast": (lambda x: x + x[:, :1], 48),
    "pointwise, in place": (lambda x: F.hardswish(x, inplace=True), 48),
    "log-sigmoid": (F.logsigmoid, 48),
    "gated": (lambda x: F.glu(x, 1), 2 * 24),
    "views": (lambda x: x.transpose(1, 2)[0].unsqueeze(0), 0),
    "copies": (lambda x: torch.cat([x, x.clone()]), 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_other_operators_by_hand(name: str) -> None:
    function, flops = OPERATORS[name]
    measurement = measure(Call(function), torch.zeros(1, 2, 4, 6))
    assert measurement.total.flops == sum(operator.flops for operator in measurement.operators) == flops
    assert measurement.total.macs == 0
    assert not measurement.uncounted


def test_attention_by_hand() -> None:
    # 2 heads of 3 queries and 5 keys, of 4 numbers each: 30 scores, of 4 MACs, a softmax (5), and 4 MACs with values.
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    fused = measure(Call(F.scaled_dot_product_attention), (query, key, key)).total
    assert (fused.macs, fused.flops) == (0, 30 * (8 + 5 + 8))
    # With values of 6 numbers, operator by operator: queries and keys are scaled first.
    plain = measure(Call(F.scaled_dot_product_attention), (query, key, torch.zeros(1, 2, 5, 6)))
    assert (plain.total.macs, plain.total.flops) == (30 * (4 + 6), 2 * 30 * (4 + 6) + 30 * 5 + 24 + 40)
    assert not plain.uncounted


def test_what_only_moves_data_moves_bytes() -> None:
    # 48 floats: written and read by a copy, read twice and written twice over by a concatenation, not touched by views.
    x = torch.zeros(1, 2, 4, 6)
    assert measure(Call(torch.clone), x).total == Cost(bytes=4 * 96)
    assert measure(Call(lambda x: torch.cat([x, x])), x).operators == [Operator(flops=0, bytes=4 * 192, part=None)]
    assert measure(Call(lambda x: x.flatten(1).mT), x) == Measurement()
    assert measure(Call(torch.Tensor.double), x).total == Cost(bytes=(4 + 8) * 48)


def test_a_part_is_what_runs_in_a_module_its_hooks_included() -> None:
    relu = nn.ReLU()
    relu.register_forward_pre_hook(lambda module, args: (-args[0],))
    relu.register_forward_hook(lambda module, args, output: output.exp())
    measurement = measure(nn.Sequential(nn.Sigmoid(), relu), torch.zeros(2, 3), {"part": "1"})
    assert measurement.operators == [Operator(6, 48, part) for part in (None, "part", "part", "part")]
    assert measurement.parts == {"part": Cost(flops=18, bytes=144)}
    assert measurement.shapes == {"part": (2, 3)}
    assert measurement.total == Cost(flops=24, bytes=192)


def test_activations_kept_for_training_by_hand() -> None:
    # conv keeps its input (2*3*36 floats); ReLU its output (2*8*16), which linear keeps too, flattened, without a copy.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    assert activation_bytes(model, torch.zeros(2, 3, 6, 6)) == 4 * (2 * 3 * 36 + 2 * 8 * 16)
    assert activation_bytes(model.requires_grad_(False), torch.zeros(2, 3, 6, 6)) == 0


@pytest.mark.parametrize("placement", ["conv", "residual"])
def test_activations_are_what_autograd_keeps(placement: str) -> None:
    model = torchvision.models.resnet18()
    gm = se_fx.transform(model, placement=placement, min_channels=64)
    x = torch.randn(2, 3, 64, 64)
    modes = model.training, gm.training
    report = se_fx.report(gm, x)
    assert report.activation_bytes == (really_kept(model, x), really_kept(gm, x))
    assert report.activation_bytes[0] < report.activation_bytes[1]
    assert (model.training, gm.training) == modes
    assert all(p.grad is None for p in gm.parameters())


def really_kept(model: nn.Module, x: Tensor) -> int:
    model = copy.deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        out = model(x)  # noqa: F841  keeps the graph alive
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def test_activations_are_unknown_where_training_calls_for_other_inputs() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert activation_bytes(model, ([torch.rand(3, 32, 32)],)) is None


def test_rooflines() -> None:
    machine = Machine(flops_per_second=1e9, bytes_per_second=1e8, device="cpu", dtype="float32")
    gm = se_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), min_channels=1, latent_channels=4)
    report = se_fx.report(gm, torch.zeros(1, 3, 6, 6))
    estimate = report.estimate(machine)
    conv_bytes, conv_flops = 4 * (108 + 216 + 128), 2 * 16 * 8 * 27
    assert estimate.base == pytest.approx(max(conv_flops / 1e9, conv_bytes / 1e8))
    assert estimate.added == pytest.approx(report.added.bytes / 1e8)  # every operator of a block is bound by memory
    assert "Estimated, not measured" in str(estimate)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"estimate.*example_inputs"):
        se_fx.report(gm).estimate(machine)
    here = se_fx.measure_machine()
    assert here.flops_per_second > 0
    assert here.bytes_per_second > 0


def test_shared_modules_count_once_for_parameters_and_once_a_call_for_macs() -> None:
    conv = nn.Conv2d(4, 4, 1, bias=False)
    cost = measure(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 4, 3, 3)).total
    assert (cost.params, cost.macs) == (16, 2 * 9 * 16)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vit_b_16", "convnext_tiny", "googlenet"])
def test_macs_are_half_of_pytorchs_flops(name: str) -> None:
    model = torchvision.models.get_model(name)
    x = torch.randn(1, 3, 224, 224) if name.startswith("vit") else torch.randn(2, 3, 64, 64)
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


def test_operators_without_a_rule_are_listed() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(torch.fft.rfft(x).real).real + torch.linalg.det(x)[..., None, None]

    assert measure(Model(), torch.zeros(1, 2, 4, 4)).uncounted == {"aten._fft_r2c": 2, "aten._linalg_det": 1}
    total = measure(Call(torch.linalg.det), torch.zeros(4, 4)).total
    assert (total.macs, total.flops) == (0, 0)


@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_b0", "mobilenet_v3_large", "densenet121", "googlenet", "deeplabv3_resnet50", "vit_b_16"]
)
def test_every_operator_of_these_models_has_a_rule(name: str) -> None:
    options = {"weights_backbone": None} if name.startswith("deeplab") else {}
    model = torchvision.models.get_model(name, **options)
    assert not measure(model, torch.zeros(1, 3, 224, 224)).uncounted


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
    assert not gm.get_submodule("squeeze_excite.0")._forward_hooks


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
