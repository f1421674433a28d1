"""Products of gates' vectors and matrices, and of maps and gates, in the form that is faster for the call at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VectorLinear", "few", "in_type_of", "scaled", "scaled_sum"]


def scaled(value: Tensor, gate: Tensor) -> Tensor:
    """The product of a feature map that nobody reads afterwards and its gate: in the map's own memory, where that is legal.

    It isn't where gradients may be asked for, since what made the map may have kept it to compute them, nor where the
    product is of another type or shape than the map. Tracers see a plain product.
    """
    if torch.overrides.has_torch_function_variadic(value, gate) or torch.is_grad_enabled():
        return value * gate
    if value.dtype != gate.dtype or value.ndim != gate.ndim:
        return value * gate
    return value.mul_(gate)


def scaled_sum(summand: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """The sum of a map and the product of another and its gate: one operator, and to compilers a product and a sum.

    They fuse the two by themselves; and where the summand is what a convolution yields, Inductor has the convolution add what
    is there already, and apply the activation that follows, while it writes.
    """
    return summand + value * gate if torch.compiler.is_compiling() else torch.addcmul(summand, value, gate)


def in_type_of(value: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A value in the type of a sum or product of two others, which have dimensions: nothing to do, where that is its own."""
    if torch.overrides.has_torch_function_variadic(value, first, second) and not torch.compiler.is_compiling():
        return value.to(torch.result_type(first, second))
    # A call of `promote_types` would be in exported programs, where compilers can't follow it.
    dtype = first.dtype if first.dtype == second.dtype else torch.promote_types(first.dtype, second.dtype)
    return value if value.dtype == dtype else value.to(dtype)


class VectorLinear(nn.Module):
    """A linear layer for the few, short vectors of a gate.

    One library call costs more than the arithmetic of a gate at small batches. Under `torch.compile`, products of up to
    `few` vectors are written out as multiplications and sums, which the compiler fuses with the averaging before and
    the activation after them. All others, and all in eager mode, in ONNX, and in graphs exported with a dynamic batch, are
    one library call.

    Args:
        weight: (O, I).
        bias: (O,), or None.
        spatial: whether vectors are given, and returned, as maps of one position; None where each call shows that.

    Attributes:
        few: the largest batch for which products are written out.

    Shape: (N, I) to (N, O), or (N, I, 1, 1) to (N, O, 1, 1) where `spatial`; N may be missing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, spatial: bool | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.few, self.spatial = 0, spatial

    def forward(self, input: Tensor) -> Tensor:
        """Multiply each sample's vector by the matrix, and add the bias."""
        spatial = input.ndim == 4 if self.spatial is None else self.spatial
        vectors = input.flatten(-3) if spatial else input
        # Under autocast a library's product is of another type than one that is written out.
        if torch.compiler.is_compiling() and not torch.is_autocast_enabled(input.device.type) and self._are_few(vectors):
            product = (vectors[..., None, :] * self.weight).sum(-1)
            product = product if self.bias is None else product + self.bias
        else:
            product = F.linear(vectors, self.weight, self.bias)
        return product[..., None, None] if spatial else product

    def _are_few(self, vectors: Tensor) -> bool:
        batch = vectors.shape[0] if vectors.ndim == 2 else 1
        if _is_exporting() and (torch.onnx.is_in_onnx_export() or not isinstance(batch, int)):
            return False  # to choose by a dynamic batch would fix it in the graph
        return bool(batch <= self.few)

    def extra_repr(self) -> str:
        """The layer's numbers, for `repr`."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}, few={self.few}, spatial={self.spatial}"


#: PyTorch 2.6 can't say; what follows it asks then holds for compilers too, whose batch is an int.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)


def few(weight: Tensor) -> int:
    """The largest batch for which multiplying and adding beats a library's product with (O, I).

    A library call costs as much as some half a million multiply-adds that the compiler writes out, in float32 and in bfloat16:
    measured by ``examples/benchmarks/products.py``.
    """
    return MOST_MACS // max(1, weight.numel())


#: The most multiply-adds that are written out.
MOST_MACS = 2**19
