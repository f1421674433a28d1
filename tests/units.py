"""A residual unit in whatever style its forward is written; `UNITS` has styles that all are one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Module):
    """A stem and one unit, whose forward is given."""

    def __init__(self, forward: Callable[[Unit, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.unit = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self, self.stem(x))


def drop_path(x: Tensor, keep: float = 0.9) -> Tensor:
    mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
    return x.div(keep) * mask


def rand_drop_path(x: Tensor, keep: float = 0.9) -> Tensor:
    mask = (keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype)).floor_()
    return x / keep * mask


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a + b, b], 1)


def added_by_a_statement(m: Unit, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x)))
    y.add_(x)
    return F.relu(y) + y


def added_to_by_a_statement(m: Unit, x: Tensor) -> Tensor:
    y = m.norm(x)
    y += m.b(F.relu(m.a(y)))
    y.relu_()
    return y


UNITS = {
    "functional": lambda m, x: F.relu(x + m.other(m.b(F.relu(m.norm(m.a(x)))))),
    "in place": lambda m, x: F.relu_(m.other(m.b(F.relu_(m.norm(m.a(x))))).add_(x)),
    "torch.add": lambda m, x: torch.add(m.b(m.a(x).relu()), x),
    "alpha": lambda m, x: torch.add(x, m.b(m.a(x).relu()), alpha=0.2),
    "scaled": lambda m, x: x + 0.1 * m.b(m.a(x).relu()),
    "pre-activation": lambda m, x: m.b(F.relu(m.other(m.a(F.relu(m.norm(x)))))) + x,
    "projected": lambda m, x: F.relu(m.down(x) + m.b(F.relu(m.a(x)))),
    "option A": lambda m, x: m.wide(F.relu(m.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "activation last": lambda m, x: F.leaky_relu(m.norm(m.b(F.leaky_relu(m.a(x))))) + x,
    "layer scale": lambda m, x: x + m.b(F.gelu(m.a(x))) * m.position,
    "addcmul": lambda m, x: torch.addcmul(x, m.b(F.gelu(m.a(x))), m.position),
    "added by a statement": added_by_a_statement,
    "added to by a statement": added_to_by_a_statement,
    "drop path": lambda m, x: x + drop_path(m.b(F.gelu(m.a(x)))),
    "drop path, another": lambda m, x: x + rand_drop_path(m.b(F.gelu(m.a(x)))),
    "dropout": lambda m, x: x + F.dropout2d(m.b(F.gelu(m.a(x))), 0.5, m.training),
    "gate inside": lambda m, x: x + m.b(F.relu(m.a(x)) * F.relu(m.a(x)).mean((2, 3), keepdim=True).sigmoid()),
    "split inside": lambda m, x: x + m.b((lambda h: torch.cat([F.relu(h[0]), h[1]], 1))(m.a(x).chunk(2, 1))),
    "after other sums": lambda m, x: (lambda y: y + m.b(F.relu(m.a(y))))(halves(x + x.mean((2, 3), keepdim=True))),
    "shortcut read by others": lambda m, x: torch.cat([m.down(x), m.down(x) + m.b(F.relu(m.a(x)))], 1),
}


class Doubled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return 2 * x


class Scales(nn.Module):
    """Another attention block, which does nothing until it is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
