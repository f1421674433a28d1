"""Pieces of random networks: layers, code over layers, and code around other pieces, in tables. A row more is a piece more.

All pieces map (N, 4, H, W) to the same, so that they go together in any order; they act on values, modes and state as
real models do, in place, too. What they compute means nothing, and is finite.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import timm.layers.cbam
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

import se_fx

__all__ = ["AROUND", "CODE", "DOWN", "LAYERS", "WIDTH", "Around", "Batch", "Code", "Pair", "conv", "double"]

WIDTH = 4
conv = functools.partial(nn.Conv2d, WIDTH, WIDTH)


class Pair(NamedTuple):
    image: Tensor
    extra: Any = None


@dataclasses.dataclass
class Batch:
    image: Tensor
    extra: Any = None


# ---------------------------------------------------------------------------------------------------------------- layers
class Standardised(nn.Conv2d):
    """Computes its weight, as timm's `StdConv2d` does."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """Only of another name."""


class WithCount(nn.Conv2d):
    """Returns something else than a feature map."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), len(x)


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def inverted_residual() -> nn.Module:
    config = InvertedResidualConfig(
        WIDTH, 3, 2 * WIDTH, WIDTH, use_se=True, activation="HS", stride=1, dilation=1, width_mult=1
    )
    config.input_channels = config.out_channels = WIDTH  # not rounded up to 8
    return InvertedResidual(config, nn.BatchNorm2d)


def with_hook(module: nn.Module, hook: str) -> nn.Module:
    register, function = HOOKS[hook]
    getattr(module, register)(function, **({"with_kwargs": True} if "kwargs" in hook else {}))
    return module


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def double_with_keywords(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output + (args[0] if args else kwargs["x"])


def shift(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1, *args[1:]) if args else None


def shift_with_keywords(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return ((args[0] + 1, *args[1:]), kwargs) if args else (args, {**kwargs, "x": kwargs["x"] + 1})


HOOKS = {
    "forward hook": ("register_forward_hook", double),
    "forward hook, kwargs": ("register_forward_hook", double_with_keywords),
    "pre-hook": ("register_forward_pre_hook", shift),
    "pre-hook, kwargs": ("register_forward_pre_hook", shift_with_keywords),
}
LAYERS = {
    "conv": lambda: conv(3, padding=1),
    "depthwise": lambda: conv(3, padding=1, groups=WIDTH, bias=False),
    "dilated": lambda: conv(3, padding=2, dilation=2, groups=2, padding_mode="circular"),
    "conv, norm, relu": lambda: nn.Sequential(conv(1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)),
    "wider, narrower": lambda: nn.Sequential(nn.Conv2d(WIDTH, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, WIDTH, 1)),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
    "subclass": lambda: Padded(WIDTH, WIDTH, 1),
    "standardised": lambda: Standardised(WIDTH, WIDTH, 3, padding="same"),
    "with count": lambda: First(WithCount(WIDTH, WIDTH, 1)),
    "weight norm, by hooks": lambda: weight_norm(conv(1)),
    "weight norm": lambda: parametrizations.weight_norm(conv(1)),
    "spectral norm": lambda: parametrizations.spectral_norm(conv(1)),
    "hooked conv": lambda: with_hook(conv(1), "forward hook"),
    "pre-hooked conv": lambda: with_hook(conv(1), "pre-hook"),
    "frozen conv": lambda: conv(1).requires_grad_(False),
    "torchvision's conv": lambda: torchvision.ops.Conv2dNormActivation(WIDTH, WIDTH, groups=2),
    "torchvision's SE": lambda: torchvision.ops.SqueezeExcitation(WIDTH, 2),
    "torchvision's ConvNeXt block": lambda: CNBlock(WIDTH, 1.0, 0.5),
    "torchvision's MobileNetV3 block": inverted_residual,
    "timm's SE": lambda: timm.layers.SEModule(WIDTH),
    "timm's ECA": lambda: timm.layers.EcaModule(WIDTH),
    "timm's CBAM": lambda: timm.layers.cbam.CbamModule(WIDTH, rd_channels=2),
    "our SE": lambda: se_fx.SqueezeExcite2d(WIDTH, 2),
}


# ------------------------------------------------------------------------------------------------------------------ code
def straight(net: Any, x: Tensor) -> Tensor:
    try:
        if x.sum() > 1e4:
            raise OverflowError
        return net.a(x)
    except OverflowError:
        return x


def without_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.b(x) + y


def one_by_one(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net.a(row) for row in x.split(1)])


def listed(net: Any, x: Tensor) -> Tensor:
    for layer in net.items:
        x = layer(x)
    return x


def accumulating(net: Any, x: Tensor) -> Tensor:
    y = z = net.a(x)
    y += net.b(x)
    y *= 0.5
    return y + z


def zeroed(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y[:, 0] = 0
    y[:, 1:].mul_(2)
    return y


def in_place_by_another_name(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    view = y.flatten(2)
    view.clamp_(min=0)
    return y + net.b(y)


def branch_in_place_by_another_name(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    y = net.b(x.view_as(x).relu_()).relu()
    return x + net.c(y)


def counting(net: Any, x: Tensor) -> Tensor:
    net.count += 1
    return net.a(x) * net.count


def averaging(net: Any, x: Tensor) -> Tensor:
    if net.training:
        net.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return net.a(x) - net.average[None, :, None, None]


def steps(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.a(x) * net.calls


def attending(net: Any, x: Tensor) -> Tensor:
    tokens = net.a(x).flatten(2).transpose(1, 2)
    tokens = net.attention(tokens, tokens, tokens, need_weights=False)[0]
    return tokens.transpose(1, 2).reshape(x.shape)


CODE = {
    "shared conv": lambda net, x: net.a(net.a(x)),
    "conv, norm, relu": lambda net, x: F.relu_(net.norm(net.a(x))),
    "residual": lambda net, x: x + net.b(torch.relu(net.a(x))),
    "residual, in place": lambda net, x: F.relu_(net.b(F.relu_(net.norm(net.a(x)))).add_(x)),
    "pre-activation": lambda net, x: net.b(F.relu(net.a(F.relu(x)))).mul(0.5) + x,
    "pre-activation, in place": lambda net, x: net.b(F.relu(net.a(x.relu_()))) + x,
    "added to in place": lambda net, x: x.add_(net.b(net.c(x).relu())),
    "projected": lambda net, x: F.relu(net.a(x) + net.c(F.relu(net.b(x)))),
    "scaled sum": lambda net, x: torch.add(x, net.b(net.a(x).relu()), alpha=0.5),
    "concatenated": lambda net, x: net.narrow(torch.cat([net.a(x), x], dim=1)),
    "dense": lambda net, x: net.narrow(torch.cat((x, net.b(torch.relu(x))), 1)).add(net.c(x)),
    "chunks": lambda net, x: net.a(torch.cat(x.chunk(2, 1)[::-1], 1)),
    "split": lambda net, x: net.narrow(torch.cat([*net.wide(x).split([3, 5], 1)][::-1], 1)),
    "shuffled": lambda net, x: net.a(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "expanded": lambda net, x: net.a(x) + net.b(x).mean((2, 3), keepdim=True).expand_as(x),
    "channels last": lambda net, x: net.linear(net.layer_norm(net.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2) + x,
    "gate": lambda net, x: x * torch.sigmoid(net.a(x.mean((2, 3), keepdim=True))),
    "spatial gate": lambda net, x: x * net.a(x).sigmoid(),
    "attention": attending,
    "in place": lambda net, x: net.a(x).mul_(2).add_(x),
    "accumulates": accumulating,
    "parts in place": zeroed,
    "in place by another name": in_place_by_another_name,
    "branch in place by another name": branch_in_place_by_another_name,
    "dropout": lambda net, x: F.dropout(net.a(x), 0.5, net.training),
    "train only": lambda net, x: net.a(x) if net.training else x,
    "other layer in training": lambda net, x: net.a(x) if net.training else net.b(x),
    "noise": lambda net, x: net.a(x) + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype) if net.training else x,
    "stochastic depth": lambda net, x: x if net.training and torch.rand(()) < 0.5 else x + net.b(net.a(x)),
    "branches on a value": lambda net, x: net.a(x) if x.sum() > 0 else net.b(-x),
    "tries": straight,
    "where": lambda net, x: torch.where(x > 0, net.a(x), net.b(x)),
    "asks for the class": lambda net, x: net.a(x) if isinstance(x, Tensor) else x,
    "asks for the dtype": lambda net, x: net.a(x.to(torch.float64 if x.dtype == torch.float64 else net.a.weight.dtype)),
    "loops over values": one_by_one,
    "loops over layers": listed,
    "looks a layer up": lambda net, x: net.table["a"](net.table.get_submodule("b")(x)),
    "slices a Sequential": lambda net, x: net.items[:1](x),
    "calls forward": lambda net, x: net.a.forward(x),
    "calls a partial": lambda net, x: functools.partial(net.a, input=x)(),
    "reads a weight": lambda net, x: F.conv2d(x, net.a.weight) + net.b(x) * net.a.bias.sum(),
    "penalises weights": lambda net, x: net.a(x) + 0.01 * sum(p.square().sum() for p in (net.a.weight, net.a.bias)),
    "without grad": without_grad,
    "detaches": lambda net, x: net.a(x.detach()) + x,
    "checkpoints": lambda net, x: checkpoint(net.a, x, use_reentrant=False),
    "unused": lambda net, x: (net.b(x), net.a(x))[1],
    "counts in a buffer": counting,
    "averages in a buffer": averaging,
    "counts in an attribute": steps,
    "one dimension": lambda net, x: net.conv1d(net.a(x).flatten(2)).view_as(x),
    "three dimensions": lambda net, x: net.conv3d(net.a(x)[:, :, None]).squeeze(2),
    "identity": lambda net, x: x,
}


class Code(nn.Module):
    """A forward of `CODE`, and the layers for it."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code
        self.a, self.b, self.c = conv(1), conv(3, padding=1, groups=2), conv(1, groups=WIDTH, bias=False)
        self.norm, self.wide, self.narrow = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(8, WIDTH, 1)
        self.items, self.table = nn.Sequential(self.a, nn.Tanh(), self.c), nn.ModuleDict({"a": self.a, "b": self.b})
        if code == "attention":
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        if code == "channels last":
            self.layer_norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        if code in ("one dimension", "three dimensions"):
            self.conv1d, self.conv3d = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv3d(WIDTH, WIDTH, 1)
        if code == "counts in an attribute":
            self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(WIDTH), persistent=code == "averages in a buffer")

    def forward(self, x: Tensor) -> Tensor:
        return CODE[self.code](self, x)


# ------------------------------------------------------------------------------------------------------- code around trees
class Many(nn.Module):
    """Returns its feature map in a container."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, kind: str = "dict", *others: Any, scale: float = 1.0, **options: Any) -> Any:
        y = self.inner(x) * scale
        return {"dict": {"out": y}, "tuple": (y, None), "named": Pair(y, x), "list": [y, *others]}[kind]


class Optional(nn.Module):
    """Has arguments that may be left out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return self.inner(x) * scale if mask is None else self.inner(x * mask)


class Frozen(nn.Sequential):
    """Never in train mode."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def first_of_two(net: Any, x: Tensor) -> Tensor:
    out, _ = net.many(x, "tuple")
    return out


def retrying(net: Any, x: Tensor) -> Tensor:
    try:
        y = net.inner(x)
        assert y.shape[1] == WIDTH
    except AssertionError:
        y = x
    return y


AROUND = {
    "one after the other": lambda net, x: net.other(net.inner(x)),
    "residual": lambda net, x: x + net.inner(x),
    "residual, in place": lambda net, x: net.inner(x).add_(x),
    "residual, projected": lambda net, x: F.relu(net.norm(net.inner(x)) + net.conv(x)),
    "shortcut": lambda net, x: net.other(x) + net.inner(x).relu(),
    "branches": lambda net, x: net.narrow(torch.cat([net.inner(x), net.other(x)], 1)),
    "twice": lambda net, x: net.inner(net.inner(x)),
    "two names": lambda net, x: net.alias(net.inner(x)),
    "by keyword": lambda net, x: net.optional(x=x),
    "with a mask": lambda net, x: net.optional(x, (x > 0).to(x.dtype)),
    "with a scalar": lambda net, x: net.optional(x, None, 0.5),
    "out of a dict": lambda net, x: net.many(x, unused=3)["out"],
    "out of a tuple": first_of_two,
    "out of a NamedTuple": lambda net, x: net.many(x, kind="named", scale=0.5).image,
    "out of a list": lambda net, x: net.many(x, "list", None, 3)[0],
    "branches on a value": lambda net, x: net.inner(x) if x.mean() > 0 else net.other(x),
    "skips by a value": lambda net, x: net.inner(x) if x.mean() > 0 else x,
    "loops over values": lambda net, x: torch.cat([net.inner(row) for row in x.split(2)]),
    "tries": retrying,
    "train only": lambda net, x: net.inner(x) if net.training else x,
    "one a mode": lambda net, x: net.inner(x) if net.training else net.other(x),
    "checkpoints": lambda net, x: checkpoint(net.inner, x, use_reentrant=False),
    "hourglass": lambda net, x: F.interpolate(net.inner(F.avg_pool2d(x, 2, ceil_mode=True)), x.shape[-2:]),
    "half of the batch": lambda net, x: torch.cat([net.inner(x[: x.shape[0] // 2]), x[x.shape[0] // 2 :]]),
    "Sequential": lambda net, x: net.row(x),
    "frozen": lambda net, x: net.frozen(x),
    "hidden in a list": lambda net, x: net.hidden[0](x),
} | {hook: lambda net, x: net.inner(x) for hook in HOOKS}


TWO = {"other": lambda inner, other: other}
MANY = {"many": lambda inner, other: Many(inner)}
OPTIONAL = {"optional": lambda inner, other: Optional(inner)}
NEEDS = {
    **dict.fromkeys(("one after the other", "shortcut", "branches", "branches on a value", "one a mode"), TWO),
    **dict.fromkeys(("out of a dict", "out of a tuple", "out of a NamedTuple", "out of a list"), MANY),
    **dict.fromkeys(("by keyword", "with a mask", "with a scalar"), OPTIONAL),
    "two names": {"alias": lambda inner, other: inner},
    "Sequential": {"row": lambda inner, other: nn.Sequential(inner, nn.ReLU(), other)},
    "frozen": {"frozen": Frozen},
    "hidden in a list": {"hidden": lambda inner, other: [inner]},
}


class Around(nn.Module):
    """A forward of `AROUND`, and the trees for it."""

    def __init__(self, code: str, inner: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.code = code
        self.inner = with_hook(inner, code) if code in HOOKS else inner
        self.conv, self.norm, self.narrow = conv(1), nn.BatchNorm2d(WIDTH), nn.Conv2d(8, WIDTH, 1)
        for name, make in NEEDS.get(code, {}).items():
            setattr(self, name, make(inner, other))

    def forward(self, x: Tensor) -> Tensor:
        return AROUND[self.code](self, x)


DOWN = {
    "max pooling": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "strided conv": lambda: conv(3, stride=2, padding=1),
    "strided block": lambda: BasicBlock(WIDTH, WIDTH, 2, nn.Conv2d(WIDTH, WIDTH, 1, stride=2)),
}
