"""Straight-line programs over feature maps, gates, views and changes in place, as people write by hand. A row is a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["STEPS", "Program"]

WIDE, NARROW = 8, 4


class Program(nn.Module):
    """Steps over the values that there are: `narrow` and `maps`, and `gates` of the maps.

    Args:
        steps: names in `STEPS`, each with two numbers that choose the values it works on, counted from the latest.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.stem, self.first = nn.Conv2d(3, NARROW, 3, padding=1), nn.Conv2d(NARROW, WIDE, 1)
        self.wider, self.same, self.grouped = (
            nn.Conv2d(NARROW, WIDE, 1, bias=False),
            nn.Conv2d(WIDE, WIDE, 1),
            nn.Conv2d(WIDE, WIDE, 1, groups=2),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDE) for _ in range(3))
        self.fc1, self.fc2, self.zero = nn.Linear(WIDE, 3), nn.Linear(3, WIDE), nn.Linear(3, WIDE)
        self.conv1, self.conv2 = nn.Conv2d(WIDE, 3, 1), nn.Conv2d(3, WIDE, 1)
        self.pool, self.flat, self.drop, self.relu = (
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(2),
            nn.Dropout(0.5),
            nn.ReLU(inplace=True),
        )
        self.band, self.line = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(WIDE, WIDE, 1)
        self.padded, self.mask, self.idle = nn.Conv2d(WIDE, 3, 1, padding=1), nn.Conv2d(WIDE, 1, 1), nn.Identity()
        self.replaced, self.replaced_norm = nn.Conv2d(WIDE, WIDE, 1), nn.BatchNorm2d(WIDE)
        for module in (self.replaced, self.replaced_norm):  # as accelerate does
            module.forward = functools.partial(doubled, module.forward)
        self.register_buffer("order", torch.randperm(WIDE))
        self.register_buffer("each", torch.rand(WIDE, 1, 1) + 0.5)
        self.register_buffer("every", torch.rand(1, WIDE, 1, 1) + 0.5)
        self.register_buffer("exact", torch.rand(WIDE, 1, 1, dtype=torch.float64) + 0.5)  # whatever the model's type
        nn.init.zeros_(self.zero.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.narrow = [self.stem(x)]
        self.maps, self.gates, self.read = [self.first(self.narrow[0])], [], []
        self.gates.append(torch.sigmoid(self.fc2(F.relu(self.fc1(self.maps[0].mean((2, 3))))))[:, :, None, None])
        for name, i, j in self.steps:
            STEPS[name](self, i, j)
        read, maps, gates, narrow = self.read, self.maps, self.gates, self.narrow
        del self.read, self.maps, self.gates, self.narrow
        return [*maps[-3:], *gates[-2:], narrow[-1], *read]

    def map(self, i: int) -> Tensor:
        return self.maps[-1 - i % len(self.maps)]

    def gate(self, i: int) -> Tensor:
        return self.gates[-1 - i % len(self.gates)]


def to_maps(function: Callable[[Program, Tensor, Tensor, Tensor], Any]) -> Callable[[Program, int, int], None]:
    """A step that makes a map of a map, another map and a gate."""

    def step(net: Program, i: int, j: int) -> None:
        net.maps.append(function(net, net.map(i), net.map(j), net.gate(j)))

    return step


def to_gates(function: Callable[[Program, Tensor, Tensor], Any]) -> Callable[[Program, int, int], None]:
    """A step that makes a gate of a map, and of another gate."""

    def step(net: Program, i: int, j: int) -> None:
        net.gates.append(function(net, net.map(i), net.gate(j)))

    return step


def does(function: Callable[[Program, Tensor, Tensor, Tensor], Any]) -> Callable[[Program, int, int], None]:
    """A step for its effects alone."""

    def step(net: Program, i: int, j: int) -> None:
        function(net, net.map(i), net.map(j), net.gate(j))

    return step


def to_narrow(function: Callable[[Program, Tensor, Tensor], Any]) -> Callable[[Program, int, int], None]:
    def step(net: Program, i: int, j: int) -> None:
        net.maps.append(function(net, net.narrow[-1], net.gate(j)))

    return step


def doubled(forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    return forward(input) * 2


def mlp(net: Program, v: Tensor) -> Tensor:
    return torch.sigmoid(net.fc2(F.relu(net.fc1(v))))[..., None, None]


def part(x: Tensor) -> Tensor:
    return x.chunk(2, 1)[0]


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def scale_in_place(x: Tensor, y: Tensor) -> Tensor:
    x *= y
    return x


MAPS = {
    "wider": to_narrow(lambda net, x, g: net.wider(x)),
    "narrow, relu": to_narrow(lambda net, x, g: net.wider(F.relu(x))),
    "first again": to_narrow(lambda net, x, g: net.first(input=x)),
    "conv": to_maps(lambda net, x, y, g: net.same(x)),
    "conv in groups": to_maps(lambda net, x, y, g: net.grouped(x)),
    "conv by keywords": to_maps(lambda net, x, y, g: F.conv2d(weight=net.same.weight, input=x)),
    "conv by function": to_maps(lambda net, x, y, g: F.conv2d(x, net.grouped.weight, net.grouped.bias, groups=2)),
    "norm": to_maps(lambda net, x, y, g: net.norms[0](x)),
    "another norm": to_maps(lambda net, x, y, g: net.norms[1](input=x)),
    "norm by function": to_maps(
        lambda net, x, y, g: F.batch_norm(x, running_var=net.norms[2].running_var, running_mean=net.norms[2].running_mean)
    ),
    "conv, norm": to_maps(lambda net, x, y, g: net.norms[1](net.same(x))),
    "scaled": to_maps(lambda net, x, y, g: x * g),
    "scaled, gate first": to_maps(lambda net, x, y, g: g * x),
    "scaled by keyword": to_maps(lambda net, x, y, g: torch.mul(g, other=x)),
    "scaled in place": to_maps(lambda net, x, y, g: x.mul_(g)),
    "scaled by operator": to_maps(lambda net, x, y, g: scale_in_place(x, g)),
    "scaled, expanded": to_maps(lambda net, x, y, g: x * g.expand_as(x)),
    "scaled into another": to_maps(lambda net, x, y, g: torch.mul(x, g, out=torch.empty_like(x))),
    "scaled, norm": to_maps(lambda net, x, y, g: net.norms[0](x * g)),
    "scaled and added": to_maps(lambda net, x, y, g: x * g + y),
    "scaled and added in place": to_maps(lambda net, x, y, g: (x * g).add_(y)),
    "scaled and added into": to_maps(lambda net, x, y, g: add_in_place(y, x * g)),
    "addcmul": to_maps(lambda net, x, y, g: torch.addcmul(y, tensor1=x, tensor2=g)),
    "addcmul, weighted": to_maps(lambda net, x, y, g: torch.addcmul(y, x, g, value=0.5)),
    "added": to_maps(lambda net, x, y, g: x + y),
    "added, weighted": to_maps(lambda net, x, y, g: torch.add(x, y, alpha=0.5)),
    "added in place": to_maps(lambda net, x, y, g: add_in_place(x, y)),
    "gate added": to_maps(lambda net, x, y, g: x + g),
    "factor of each": to_maps(lambda net, x, y, g: x * net.each),
    "factor of every": to_maps(lambda net, x, y, g: net.every * x),
    "summand of each": to_maps(lambda net, x, y, g: x + net.each),
    "factor in place": to_maps(lambda net, x, y, g: x.mul_(net.each)),
    "relu": to_maps(lambda net, x, y, g: F.relu(x)),
    "silu": to_maps(lambda net, x, y, g: F.silu(x, inplace=True)),
    "relu in place": to_maps(lambda net, x, y, g: net.relu(x)),
    "dropped": to_maps(lambda net, x, y, g: net.drop(x)),
    "drop by function": to_maps(lambda net, x, y, g: F.dropout(x, 0.5, training=False)),
    "unary plus": to_maps(lambda net, x, y, g: +x),
    "swapped": to_maps(lambda net, x, y, g: x.swapaxes(2, 3).movedim(3, 2)),
    "reshaped": to_maps(lambda net, x, y, g: x.reshape(x.shape)),
    "contiguous": to_maps(lambda net, x, y, g: x.contiguous()),
    "cast": to_maps(lambda net, x, y, g: x.to(torch.float64)),
    "cast and back": to_maps(lambda net, x, y, g: x.float().double()),
    "of the type": to_maps(lambda net, x, y, g: x.type_as(y)),
    "einsum": to_maps(lambda net, x, y, g: torch.einsum("nchw->nchw", x)),
    "split and joined": to_maps(lambda net, x, y, g: torch.cat(x.tensor_split(2, 1), 1)),
    "expanded": to_maps(lambda net, x, y, g: x.expand(-1, -1, -1, -1)),
    "detached": to_maps(lambda net, x, y, g: x.detach()),
    "clone": to_maps(lambda net, x, y, g: x.clone()),
    "flipped": to_maps(lambda net, x, y, g: x.flip(1)),
    "in another order": to_maps(lambda net, x, y, g: x[:, net.order]),
    "conv that is replaced": to_maps(lambda net, x, y, g: net.replaced(x)),
    "norm that is replaced": to_maps(lambda net, x, y, g: net.replaced_norm(x)),
    "branches": to_maps(lambda net, x, y, g: net.same(x) + net.grouped(x)),
    "scaled into itself": to_maps(lambda net, x, y, g: torch.mul(x, g, out=x)),
    "addcmul in place": to_maps(lambda net, x, y, g: y.addcmul_(tensor2=g, tensor1=x)),
    "addcmul of each": to_maps(lambda net, x, y, g: torch.addcmul(y, net.norms[2](net.same(x)), net.every)),
    "residual of each": to_maps(lambda net, x, y, g: y + net.each * net.norms[2](net.same(x))),
    "gate added in place": to_maps(lambda net, x, y, g: x.add_(g)),
    "gates multiplied and added": to_maps(lambda net, x, y, g: x * g + g),
    "factor of a wide type": to_maps(lambda net, x, y, g: (x * net.exact).to(y.dtype)),
    "summand of a wide type": to_maps(lambda net, x, y, g: net.norms[1](net.same(x) + net.exact.type_as(x)) + net.exact),
    "scaled by a wide gate": to_maps(lambda net, x, y, g: x * g.double()),
    "scaled by a narrow gate": to_maps(lambda net, x, y, g: x * g.bfloat16()),
    "scaled and rounded": to_maps(lambda net, x, y, g: (x * g).bfloat16().to(dtype=x.dtype)),
    "idle": to_maps(lambda net, x, y, g: net.idle(x)),
    "noisy": to_maps(lambda net, x, y, g: x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)),
    "noisy, floored": to_maps(lambda net, x, y, g: x.div(0.8) * (0.8 + x.new_empty(x.shape[0], 1, 1, 1).uniform_()).floor()),
    "where": to_maps(lambda net, x, y, g: torch.where(x > 0, x, y)),
    "scaled by number": to_maps(lambda net, x, y, g: 0.5 * x * g),
}
GATES = {
    "gate": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3)))),
    "gate of a pool": to_gates(lambda net, x, g: mlp(net, net.pool(x).flatten(1))),
    "gate by convs": to_gates(lambda net, x, g: net.conv2(F.relu_(net.conv1(net.pool(x)))).sigmoid_()),
    "gate of a window": to_gates(lambda net, x, g: net.conv2(net.conv1(F.avg_pool2d(x, x.shape[2:])))),
    "gate of square windows": to_gates(
        lambda net, x, g: mlp(net, F.avg_pool2d(x, (x.size(2), x.size(2)), ceil_mode=True).mean((2, 3)))
    ),
    "gate of flat maps": to_gates(lambda net, x, g: mlp(net, net.flat(x).mean(-1))),
    "gate of one by one": to_gates(lambda net, x, g: mlp(net, x.mean(3).mean(2))),
    "gate of a sum": to_gates(lambda net, x, g: mlp(net, x.sum((2, 3)) / 20)),
    "gate of rows": to_gates(lambda net, x, g: mlp(net, F.adaptive_avg_pool1d(x.flatten(2), 1).squeeze(-1))),
    "gate in another order": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3))[:, net.order])),
    "gate shuffled": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3)).view(-1, 2, 4).transpose(1, 2).reshape(-1, WIDE))),
    "gate of the largest": to_gates(lambda net, x, g: mlp(net, x.amax((2, 3)))),
    "gate of a clamped map": to_gates(lambda net, x, g: mlp(net, x.clamp(-50, 0.3).mean((2, 3)))),
    "gate that is changed": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3)).mul_(0.5))),
    "gate, constant": to_gates(lambda net, x, g: torch.sigmoid(net.zero(F.relu(net.fc1(x.mean((2, 3))))))[..., None, None]),
    "gate, constant, softmax": to_gates(lambda net, x, g: net.zero(net.fc1(x.mean((2, 3)))).softmax(1)[..., None, None]),
    "band": to_gates(lambda net, x, g: net.band(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2).unsqueeze(-1)),
    "same gate": to_gates(lambda net, x, g: g),
    "gate's square": to_gates(lambda net, x, g: g * g),
    "gate viewed": to_gates(lambda net, x, g: g.flatten(1).view(-1, WIDE, 1, 1)),
    "gate by a padded conv": to_gates(lambda net, x, g: net.conv2(net.padded(net.pool(x))).mean((2, 3), keepdim=True)),
    "gate of a line": to_gates(lambda net, x, g: net.line(net.flat(x).mean(-1, keepdim=True)).sigmoid()[..., None]),
    "gate of context": to_gates(
        lambda net, x, g: mlp(net, (x.flatten(2) @ net.mask(x).flatten(2).softmax(-1).transpose(1, 2)).squeeze(-1))
    ),
    "gate of square pools": to_gates(
        lambda net, x, g: mlp(net, F.avg_pool2d(x, x.size(2), ceil_mode=True).flatten(2).mean(-1))
    ),
    "gate by views": to_gates(lambda net, x, g: net.conv2(net.conv1(x.mean(dim=(-1, -2)).view(x.size(0), -1, 1, 1)))),
    "gate of a wide type": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3), dtype=torch.float64).type_as(x))),
    "gate by out": to_gates(lambda net, x, g: torch.sigmoid(mlp(net, torch.mean(x, (2, 3))), out=torch.empty_like(g))),
    "gate of two": to_gates(lambda net, x, g: g + mlp(net, x.mean((2, 3)))),
    "of one sample": to_gates(lambda net, x, g: mlp(net, x.mean((2, 3)))[:1]),
}
EFFECTS = {
    "relu_": does(lambda net, x, y, g: F.relu_(x)),
    "view changed": does(lambda net, x, y, g: x.flatten(2).mul_(0.5)),
    "flat view changed": does(lambda net, x, y, g: net.flat(x).add_(0.5)),
    "part changed": does(lambda net, x, y, g: x[:, 1:3].clamp_(min=0)),
    "half changed": does(lambda net, x, y, g: part(x).neg_()),
    "set": does(lambda net, x, y, g: x.__setitem__((slice(None), 0), 0.25)),
    "diagonal changed": does(lambda net, x, y, g: x.diagonal(dim1=2, dim2=3).fill_(1)),
    "unfolded and changed": does(lambda net, x, y, g: x.unfold(3, 2, 2).mul_(2)),
    "ravelled and changed": does(lambda net, x, y, g: x.ravel().mul_(0.5)),
    "written by out": does(lambda net, x, y, g: torch.add(x, 1, out=x)),
    "data changed": does(lambda net, x, y, g: x.data.mul_(0.5)),
    "unary plus changed": does(lambda net, x, y, g: (+x).mul_(0.5)),
    "contiguous changed": does(lambda net, x, y, g: x.contiguous().mul_(0.5)),
    "moved and changed": does(lambda net, x, y, g: x.movedim(1, -1).add_(0.5)),
    "split and changed": does(lambda net, x, y, g: x.tensor_split(2, dim=1)[1].mul_(2)),
    "einsum changed": does(lambda net, x, y, g: torch.einsum("nchw->nhwc", x).mul_(0.5)),
    "dropped and changed": does(lambda net, x, y, g: net.drop(x).mul_(0.5)),
    "idle and changed": does(lambda net, x, y, g: net.idle(x).mul_(0.5)),
    "cast and changed": does(lambda net, x, y, g: x.to(torch.float64).mul_(0.5)),
    "of the type and changed": does(lambda net, x, y, g: x.type_as(y).mul_(0.5)),
    "reshaped and changed": does(lambda net, x, y, g: x.reshape(x.size(0), -1).mul_(0.5)),
    "base of a view changed": does(lambda net, x, y, g: (net.maps.append(x.flatten(2).unflatten(2, x.shape[2:])), x.mul_(0.5))),
    "part added to": does(lambda net, x, y, g: x[:, :2].__iadd__(1)),
    "copied": does(lambda net, x, y, g: x.copy_(y)),
    "swapped in": does(lambda net, x, y, g: x.index_copy_(1, net.order, y)),
    "data added to": does(lambda net, x, y, g: add_in_place(x.data, y)),
    "data set": does(lambda net, x, y, g: x.data.__setitem__((slice(None), 0), 0.25)),
    "real part scaled": does(lambda net, x, y, g: scale_in_place(x.real, g)),
    "gate changed": does(lambda net, x, y, g: g.add_(1)),
    "gate's view changed": does(lambda net, x, y, g: g.flatten(1).mul_(0.5)),
    "gate squashed": does(lambda net, x, y, g: g.sigmoid_()),
    "map added": does(lambda net, x, y, g: x.add_(y)),
    "map scaled": does(lambda net, x, y, g: x.mul_(g)),
    "narrow changed": does(lambda net, x, y, g: net.narrow[-1].mul_(0.5)),
    "read": does(lambda net, x, y, g: net.read.append(x.amax((2, 3)))),
    "view kept": does(lambda net, x, y, g: net.read.append(x.flatten(1))),
    "gate read": does(lambda net, x, y, g: net.read.append(g)),
    "made alike": does(lambda net, x, y, g: net.read.append(torch.zeros_like(x) + x.new_ones(()))),
}
STEPS: dict[str, Callable[[Program, int, int], None]] = {**MAPS, **GATES, **EFFECTS}
