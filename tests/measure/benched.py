"""What is benchmarked, quickly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_fx.measure import benchmark as bench_module

bench = bench_module.bench

X = torch.zeros(2, 3, 8, 8)
QUICK: dict[str, Any] = {"rounds": 2, "min_seconds": 0, "progress": False}


class Labelled(nn.Module):
    """Knows its name, as its copies do."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x
