"""Linear gates: convolutions that gates are computed by are the matrix products that they are.

conv(s) = W s + b,  of s at one position, (N, C, 1, 1)

Equal up to rounding. A library for convolutions is called once forward and twice backward: that takes longer than arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.terms import is_pointwise
from se_fx.rewrites.training.calls import is_hooked
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped

__all__ = ["linear_gates"]


def multiplied_by_matrix(conv: nn.Module, value: Tensor, **kwargs: Any) -> Tensor:
    """``conv(value)`` as a product with a matrix, if it still is one."""
    if not is_matrix(conv) or value.shape[1:] != (conv.in_channels, 1, 1):
        return conv(value, **kwargs)  # type: ignore[no-any-return]
    return F.linear(value.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]


def is_matrix(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module multiplies the channels of each position by one matrix, and does nothing else."""
    if not isinstance(module, nn.Conv2d) or is_hooked(module) or module.groups > 1:
        return False
    kind = type(module)
    runs_pytorch = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return runs_pytorch and is_pointwise(module)


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
