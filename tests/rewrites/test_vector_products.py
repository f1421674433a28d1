"""Vector products are the same written out as called."""

from __future__ import annotations

import pytest
import torch
from excited import NARROW, WIDE, Excited, assert_same, images, outcomes, settled
from torch import nn

import se_fx
from se_fx.rewrites.products import VectorLinear


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_products_are_the_same_in_both_forms(batch: int) -> None:
    linear = nn.Linear(24, 10).double()
    product = VectorLinear(linear.weight.detach(), linear.bias.detach())
    x = torch.randn(batch, 24, dtype=torch.float64)
    product.few = 1
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=False)
    for form in (product, compiled):
        assert_same(form(x), linear(x))
        assert_same(form(x[:, :, None, None]), linear(x)[:, :, None, None])


@pytest.mark.parametrize("style", ["ours", "timm", "linear", "functional"])
def test_every_matrix_of_a_gate_becomes_a_product_and_no_other(style: str) -> None:
    model = settled(Excited([nn.Conv2d(NARROW, WIDE, 3)], style))
    fast = se_fx.optimize_for_inference(model, rewrites=["vector_products"])
    assert outcomes(fast, "vector_products") == [True, True]
    products = [module for module in fast.modules() if isinstance(module, VectorLinear)]
    assert [tuple(module.weight.shape) for module in products] == [(5, WIDE), (WIDE, 5)]
    convs = [module for module in fast.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3)]
    for batch in (1, 3, 0):
        x = images(batch, NARROW, 7, 5)
        assert_same(fast(x), model(x))
