"""Vector products are the same written out as called."""

from __future__ import annotations

import pytest
import torch
from excited import assert_same
from torch import nn

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
