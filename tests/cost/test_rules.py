"""Rules: what each operator costs, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from se_fx import Cost
from se_fx.cost import Measurement, Operator, measure


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
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options)
    assert not measure(model, torch.zeros(1, 3, 224, 224)).uncounted
