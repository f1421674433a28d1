"""Small units with Squeeze-and-Excitation, and a training step of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8


def conv(kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=False)


class Gate(nn.Module):
    """Squeeze-and-Excitation as anybody may write it."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(CHANNELS, 4), nn.Linear(4, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.wide(F.relu(self.narrow(x.mean((2, 3))))))[:, :, None, None]


class Residual(nn.Module):
    """conv, norm, SE, sum, ReLU."""

    def __init__(self, norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.se = conv(), norm() if norm else nn.BatchNorm2d(CHANNELS), Gate()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.conv(x)))
        y += x
        return F.relu(y)


class Mobile(nn.Module):
    """conv, norm, activation, SE, conv."""

    def __init__(self, act: nn.Module | None = None, norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), norm() if norm else nn.BatchNorm2d(CHANNELS)
        self.act, self.se, self.last = act or nn.SiLU(inplace=True), Gate(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.se(self.act(self.norm(self.conv(x)))))


class Functional(nn.Module):
    """The same by functions, with statistics of each batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.se = conv(3), Gate()
        self.scale, self.shift = nn.Parameter(torch.rand(CHANNELS)), nn.Parameter(torch.rand(CHANNELS))
        self.last = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.batch_norm(self.conv(x), None, None, self.scale, self.shift, True, 0.1, 1e-5)
        return F.conv2d(self.se(F.hardswish(normed, inplace=True)), self.last)


class Methods(nn.Module):
    """By methods of tensors, and a gate that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = conv(), nn.BatchNorm2d(CHANNELS), conv()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.conv(x)).relu()
        return self.last(u.mul(u.mean((2, 3), keepdim=True).sigmoid().expand_as(u)))


class BeforeNorm(nn.Module):
    """conv, SE, norm, ReLU, conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.se, self.norm, self.last = conv(), Gate(), nn.BatchNorm2d(CHANNELS), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.se(self.conv(x)))))


class Post(nn.Module):
    """SE behind a residual unit, which two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm, self.se = conv(), conv(), nn.BatchNorm2d(CHANNELS), Gate()
        self.left, self.right = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.se(F.relu(self.norm(self.conv(x)) + x))
        return self.left(y) + self.right(y)


#: What autograd keeps of each in maps: as it is, and optimised. The input counts, and the result does where a ReLU keeps it.
UNITS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "residual": (Residual, 4, 3),  # input, conv, norm, ReLU; the norm's is computed again
    "mobile": (Mobile, 5, 2),  # input, conv, norm, SiLU, SE; all but two are
    "functional": (Functional, 5, 2),
    "methods": (Methods, 4, 2),  # input, conv, ReLU, SE
    "before_norm": (BeforeNorm, 4, 3),  # input, conv, SE, ReLU
    "post": (Post, 5, 4),  # input, first, conv, ReLU, SE
    "group_norm": (lambda: Mobile(norm=lambda: nn.GroupNorm(2, CHANNELS)), 5, 2),
}

Step = tuple[Tensor, list[Tensor | None], list[Tensor]]


def step(model: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> Step:
    """What a training step gives: outputs, gradients of all parameters and the input, and buffers, after two forward passes."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    for _ in range(2):  # gradients add up
        out = model(x) if call is None else call(model, x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)).sum().backward()
    gradients = [None if each.grad is None else each.grad.clone() for each in (*model.parameters(), x)]
    return out.detach(), gradients, [buffer.clone() for buffer in model.buffers()]


def assert_alike(found: Step, expected: Step, tolerance: float = 1e-10) -> None:
    """Outputs and buffers bit for bit; gradients so close, of their own size, or of what is left of it where they cancel."""
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[2], expected[2]))
    assert [each is None for each in found[1]] == [each is None for each in expected[1]]
    largest = max(float(each.norm()) for each in expected[1] if each is not None)
    for one, other in zip(found[1], expected[1], strict=True):
        if one is not None and other is not None:
            assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-3 * largest)


def kept_maps(model: nn.Module, x: Tensor) -> float:
    """How many maps of the input's size autograd really keeps for a forward pass."""
    kept = kept_bytes(model, x.detach().clone().requires_grad_(), least=x.shape[0] * x.shape[1] + 1)
    return kept / x.untyped_storage().nbytes()


def kept_bytes(model: nn.Module, x: Tensor, least: int = 0) -> int:
    """Bytes of all that autograd really keeps for a forward pass, each storage once, parameters and buffers left out."""
    kept: dict[int, Tensor] = {}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= least and tensor.untyped_storage()._cdata not in own and not _is_expanded(tensor):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _is_expanded(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def names_of_nodes(result: Tensor) -> list[str]:
    """Of all that autograd has noted to give a result."""
    nodes: list[Any] = [result.grad_fn]
    for node in nodes:  # which grows
        nodes += [before for before, _ in node.next_functions if before is not None and before not in nodes]
    return [type(node).__name__ for node in nodes]
