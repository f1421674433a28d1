"""Matrices: 1x1 convolutions are products with matrices, and are computed as such where that takes less time.

conv(s) = W s + b,  of a gate's vector s, (N, C, 1, 1)

A library for convolutions is called once forward and twice backward: that takes longer than arithmetic. Equal up to rounding.

conv(u * g) = W diag(g_n) u_n + b,  of a scaled map u, (N, C, H, W), and its gate g, (N, C, 1, 1)

With the gradient d of the result, and one product of matrices for each sample, P_n = d_n u_n^T, the gradient of W is the sum
of P_n diag(g_n) over samples, and that of g_n the sum of W * P_n over outputs: no u * g is needed, nor another pass over a map.
Outputs are bit for bit the same. P has few elements where there are few outputs for so many positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.terms import is_pointwise
from se_fx.rewrites.training.calls import is_hooked, is_plain_scale, product, reading, scaled
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.recipes import Recipe
from se_fx.rewrites.training.saving import keep
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped

__all__ = ["convolved", "is_matrix", "linear_gates"]


def is_matrix(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a module multiplies the channels of each position by one matrix, and does nothing else."""
    if not isinstance(module, nn.Conv2d) or is_hooked(module) or module.groups > 1:
        return False
    kind = type(module)
    runs_pytorch = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return runs_pytorch and is_pointwise(module)


# ------------------------------------------------------------------------------------------------------- within gates
def linear_gates(keeping: Keeping) -> Iterator[Change]:
    """1x1 convolutions of the vectors that gates are computed from are matrix products."""
    gates = keeping.gate_nodes()
    for node in list(keeping.graph.nodes):
        conv = keeping.convolution(node) if node.op == "call_module" and node in gates else None
        if conv is None or not is_matrix(conv):
            continue
        source: fx.Node = keeping.given(node)["input"]
        if keeping.vectors.get(source, ())[1:] != (1, 1):
            continue
        with keeping.graph.inserting_before(node):
            exchange(keeping, node, insert_wrapped(keeping, node, multiplied_by_matrix, callee(keeping, node), source))
        yield Change(place_of(node), True, "is a product with a matrix")


def multiplied_by_matrix(conv: nn.Module, value: Tensor, **kwargs: Any) -> Tensor:
    """``conv(value)`` as a product with a matrix, if it still is one."""
    if not is_matrix(conv) or value.shape[1:] != (conv.in_channels, 1, 1):
        return conv(value, **kwargs)  # type: ignore[no-any-return]
    return F.linear(value.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]


# ------------------------------------------------------------------------------------------------------ behind products
def convolved(conv: nn.Module, value: Tensor, gate: Tensor, recipe: Recipe | None) -> Any:
    """``conv(value * gate)``, for which only the recipe of the value is kept, if there is one."""
    if recipe is None:
        return conv(value * gate)
    if not _is_joint(conv, value, gate):
        return reading(conv, product(value, gate, recipe), scaled(recipe, gate))
    result: Tensor = _Convolved.apply(value, gate, conv.weight, conv.bias)
    keep(recipe, result)
    return result


#: Bytes of a map for which one product with a matrix takes less time than passes over it.
LARGE = 2**21


def _is_joint(conv: nn.Module, value: Tensor, gate: Tensor) -> bool:
    """Whether the gradients of a product and of its convolution come from one product with a matrix, and in less time."""
    if value.numel() * value.element_size() <= LARGE or not is_matrix(conv) or not is_plain_scale(value, gate):
        return False
    if 2 * conv.out_channels > value.shape[2:].numel():
        return False
    is_precise = value.dtype == conv.weight.dtype and value.dtype in (torch.float32, torch.float64)
    return is_precise and not torch.is_autocast_enabled("cpu") and (gate.requires_grad or conv.weight.requires_grad)


class _Convolved(torch.autograd.Function):
    """``conv2d(value * gate, weight, bias)`` of a 1x1 convolution; derivatives of gradients are those of the plain formula."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(value, gate, weight)
        ctx.kept, ctx.biases = None, None if bias is None else [*bias.shape]
        map_ = value * gate
        ctx.layout = torch.contiguous_format if map_.is_contiguous() else torch.channels_last
        return F.conv2d(map_, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recipe = ctx.kept and ctx.kept()
        if recipe is None or torch.is_grad_enabled():
            value, gate, weight = ctx.saved_tensors
            map_, for_weight, for_bias = _backward(ctx, gradient, value * gate, weight, ctx.needs_input_grad[2])
            return map_ * gate, (map_ * value).sum_to_size(gate.shape), for_weight, for_bias
        with recipe.spared():
            _, gate, weight = ctx.saved_tensors
        products, for_gate, for_weight = recipe.outer(gradient, gate.shape[1]), None, None
        if ctx.needs_input_grad[1]:
            for_gate = (products * weight.flatten(1)).sum(1)[:, :, None, None]
        if ctx.needs_input_grad[2]:
            for_weight = (products * gate.flatten(1)[:, None]).sum(0)[:, :, None, None]
        shape = (*gate.shape[:2], *gradient.shape[2:])
        map_ = torch.empty(shape, dtype=gradient.dtype, memory_format=ctx.layout)
        map_, _, for_bias = _backward(ctx, gradient, map_, weight, False)
        return map_.mul_(gate), for_gate, for_weight, for_bias


def _backward(ctx: Any, gradient: Tensor, map_: Tensor, weight: Tensor, for_weight: bool) -> Any:
    """The gradients of a convolution's map, whose numbers only the weight's depends on, of its weight, and of its bias."""
    ones, zeros, wanted = [1, 1], [0, 0], (True, for_weight, ctx.biases is not None)
    return torch.ops.aten.convolution_backward(gradient, map_, weight, ctx.biases, ones, zeros, ones, False, zeros, 1, wanted)
