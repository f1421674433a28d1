"""Terms: the few kinds of things that the algebra of graphs knows, and the tensors that say them exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

__all__ = ["Affine", "Scale", "affine", "exact", "is_pointwise", "pointwise", "with_parameters"]


@dataclass(frozen=True)
class Affine:
    """``weight @ x + bias`` of the channels x at every position, or of a vector; see `exact` for the tensors' dtype.

    Attributes:
        source: the value it is applied to.
        weight: (O, I), or (C,) where it maps each channel by itself.
        bias: (O,) or (C,).
        dtype: of the parameters it was made from, or of what it yields.
        raw: a constant tensor, of a type of its own, that takes part in deciding the result's: under autocast, too.
    """

    source: fx.Node
    weight: Tensor
    bias: Tensor
    dtype: torch.dtype
    raw: fx.Node | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as (O, I)."""
        return self.weight if self.weight.ndim == 2 else torch.diag(self.weight)


@dataclass(frozen=True)
class Scale:
    """A product of a feature map and a gate.

    Attributes:
        node: the product.
        value: the feature map, (N, C, H, W).
        gate: its factors, (N, C, 1, 1).
    """

    node: fx.Node
    value: fx.Node
    gate: fx.Node


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution maps the channels of each position by itself."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")


def pointwise(source: fx.Node, conv: nn.Conv2d) -> Affine:
    """A 1x1 convolution, over all its groups."""
    weight = conv.weight[..., 0, 0]
    if conv.groups > 1:
        weight = torch.block_diag(*weight.chunk(conv.groups))  # type: ignore[no-untyped-call]
    return affine(source, weight, conv.bias)


def affine(source: fx.Node, weight: Tensor, bias: Tensor | None) -> Affine:
    """A product with (O, I), and a bias."""
    zeros = weight.new_zeros(weight.shape[0])
    return Affine(source, exact(weight), exact(zeros if bias is None else bias), weight.dtype)


def exact(tensor: Tensor) -> Tensor:
    """In float64, for arithmetic that is rounded once; in float32 where the device has no float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def with_parameters(module: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """`module`, with these as its weight and bias, in place; not to be trained."""
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    module.eval()
    return module
