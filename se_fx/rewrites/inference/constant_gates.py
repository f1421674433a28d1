"""Constant gates: a gate whose last matrix is zero is the same for every input.

g = sigma(0 h + b) = sigma(b)      so the block is a constant factor of each channel, or, where that is 1, nothing
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.analysis import called
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.editing import insert_buffer, replace

__all__ = ["constant_gates"]


def constant_gates(algebra: Algebra) -> Iterator[Change]:
    """A gate whose last matrix is zero is the same for every input: a constant factor, or, where that is 1, nothing."""
    for scale in algebra.scales():
        way = _way_to_product(algebra, scale.gate)
        product = algebra.product(way[-1])
        if product is None or bool(product.weight.any()):
            continue
        factor = _through(algebra, way[:-1], product.bias.to(product.dtype)[None, :, None, None])
        if factor is None:
            yield Change(place_of(way[-1]), False, "is zero, but what follows isn't known to act on each channel alone")
            continue
        with algebra.graph.inserting_before(scale.node):
            factor_node = insert_buffer(algebra, scale.node, "factor", factor)
            new = algebra.graph.call_function(torch.mul, (scale.value, factor_node))
        place = place_of(way[-1])
        replace(algebra, scale.node, new)
        is_one = bool((factor == 1).all())
        if is_one and algebra.readers(scale.value) == [new]:
            replace(algebra, new, scale.value)
        yield Change(place, True, "is 1 for every input" if is_one else "is the same for every input")


def _way_to_product(algebra: Algebra, gate: fx.Node) -> list[fx.Node]:
    """The way back from a gate to the product it is computed from, along nodes with a single source."""
    way = [gate]
    while algebra.product(way[-1]) is None:
        sources = [source for source in way[-1].all_input_nodes if source in algebra.vectors]
        if len(sources) != 1:
            break
        way += sources
    return way


def _through(algebra: Algebra, way: list[fx.Node], value: Tensor) -> Tensor | None:
    """What nodes that act on each channel alone make of a constant (1, C, 1, 1); None where some may not."""
    for node in reversed(way):
        if algebra.is_reshape(node) or node.target == "to":
            continue
        module = called(node, algebra.modules)
        pointwise = type(module) in _POINTWISE if module is not None else node.target in _POINTWISE
        if not pointwise or any(isinstance(argument, fx.Node) for argument in node.args[1:]):
            return None
        interpreter = fx.Interpreter(algebra.module, garbage_collect_values=False, graph=algebra.graph)
        interpreter.env[node.all_input_nodes[0]] = value.clone()
        with torch.no_grad():
            value = interpreter.run_node(node)
    return value


_POINTWISE: set[Any] = {nn.Sigmoid, nn.Hardsigmoid, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Tanh, nn.Identity, nn.Hardswish}
_POINTWISE |= {torch.sigmoid, F.sigmoid, F.hardsigmoid, F.relu, torch.relu, torch.tanh, torch.mul, torch.add}
_POINTWISE |= {operator.mul, operator.add, "sigmoid", "relu", "tanh", "mul", "add"}
