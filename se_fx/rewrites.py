"""Rewrites of eval graphs that hold Squeeze-and-Excitation: each a function of a graph's algebra, and one entry in a table.

Algebra, with a pointwise convolution W x + b, the average m over space, and a gate's first layer V m + c:

    m(W x + b) = W m(x) + b                      the squeeze can read the convolution's input,
    V (W m(x) + b) + c = (V W) m(x) + (V b + c)  and the two matrices are one, multiplied offline
    s (u g) + t = u (s g) + t                    a norm behind a block puts its scale into the gate
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.algebra import Affine, Algebra, Scale, with_parameters
from se_fx.cloning import clone
from se_fx.dataflow import called, changes_in_place
from se_fx.editing import insert_buffer, insert_call, multiply, replace, sweep
from se_fx.products import VectorLinear, few

__all__ = ["REWRITES", "Change", "Rewrite"]


@dataclass(frozen=True)
class Change:
    """What a rewrite did, or why it did nothing, in one place.

    Attributes:
        place: the module, or node of the graph, that it is about.
        applied: whether anything was done.
        detail: what, or why not.
    """

    place: str
    applied: bool
    detail: str


#: Edits the graph, and tells what it did where.
Rewrite = Callable[[Algebra], Iterator[Change]]


# -------------------------------------------------------------------------------------------------------- constant gates
def constant_gates(algebra: Algebra) -> Iterator[Change]:
    """A gate whose last matrix is zero is the same for every input: a constant factor, or, where that is 1, nothing."""
    for scale in algebra.scales():
        way = _way_to_product(algebra, scale.gate)
        product = algebra.product(way[-1])
        if product is None or bool(product.weight.any()):
            continue
        factor = _through(algebra, way[:-1], product.bias.to(product.dtype)[None, :, None, None])
        if factor is None:
            yield Change(_place(way[-1]), False, "is zero, but what follows isn't known to act on each channel alone")
            continue
        with algebra.graph.inserting_before(scale.node):
            factor_node = insert_buffer(algebra, scale.node, "factor", factor)
            new = algebra.graph.call_function(torch.mul, (scale.value, factor_node))
        place = _place(way[-1])
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


# ------------------------------------------------------------------------------------------------------------ fold norms
def fold_norms(algebra: Algebra) -> Iterator[Change]:
    """A norm with fixed statistics goes into the convolution before it; behind a gate, its scale goes into the gate."""
    for node in list(algebra.graph.nodes):
        norm = algebra.normalization(node)
        if norm is None:
            continue
        conv, scale = algebra.convolution(norm.source), algebra.scale(norm.source)
        if conv is None and scale is None:
            continue
        if algebra.readers(norm.source) != [node]:
            yield Change(_place(node), False, f"others read {_place(norm.source)} too")
        elif conv is not None:
            yield _into_conv(algebra, conv, norm, node)
        elif scale is not None:
            yield _into_gate(algebra, scale, norm, node)


def _into_conv(algebra: Algebra, conv: nn.Conv2d, norm: Affine, node: fx.Node) -> Change:
    like = conv.weight
    weight = like.detach().to(norm.weight) * norm.weight[:, None, None, None]
    bias = norm.bias if conv.bias is None else conv.bias.detach().to(norm.weight) * norm.weight + norm.bias
    folded = with_parameters(cast("nn.Conv2d", clone(conv)), weight.to(like), bias.to(like))
    source = norm.source
    with algebra.graph.inserting_before(source):
        new = insert_call(algebra, source, "folded", folded, source.all_input_nodes[0])
    change = Change(_place(node), True, f"into {_place(source)}")
    replace(algebra, node, new)
    replace(algebra, source, new)
    return change


def _into_gate(algebra: Algebra, scale: Scale, norm: Affine, node: fx.Node) -> Change:
    with algebra.graph.inserting_before(node):
        factor, summand = (
            insert_buffer(algebra, node, name, each.to(norm.dtype)[None, :, None, None])
            for name, each in (("scale", norm.weight), ("shift", norm.bias))
        )
        gate = algebra.graph.call_function(torch.mul, (scale.gate, factor))
        new = algebra.graph.call_function(torch.addcmul, (summand, scale.value, gate))
    change = Change(_place(node), True, f"its scale into the gate of {_place(scale.value)}")
    replace(algebra, node, new)
    sweep(algebra, scale.node)
    return change


# ---------------------------------------------------------------------------------------------------------- hoist squeezes
def hoist_squeezes(algebra: Algebra) -> Iterator[Change]:
    """A gate's average over space is taken before pointwise convolutions and norms, where that moves fewer bytes.

    Their matrices go into the gate's first one.
    """
    gates = algebra.gate_nodes()
    for node in [node for node in algebra.graph.nodes if node in gates]:
        value = algebra.average(node)
        if value is None:
            continue
        stages, stop = _affine_stages(algebra, value, node)
        widths = [algebra.maps[value], *(algebra.maps[affine.source] for _, affine in stages)]
        upstream = widths.index(min(widths))
        if not upstream:
            reason = f"its convolution reads {min(widths[1:])} channels, no fewer" if stages else stop
            yield Change(_place(value), False, reason)
            continue
        first, composed = stages[upstream - 1]
        for _, outer in reversed(stages[: upstream - 1]):
            composed = _composed(outer, composed)
        products = _products_reading(algebra, node)
        matrix = f"{widths[0]} x {widths[upstream]} matrix"
        if products is None and not _saves_bytes(first, widths[0], widths[upstream]):
            known = (
                "moves more bytes than it saves" if "size" in first.meta else "may move more bytes: pass example_inputs to tell"
            )
            yield Change(_place(value), False, f"its {matrix}, which no other absorbs, {known}")
            continue
        replaced = [(product, _composed(affine, composed)) for product, affine in products or ()]
        for old, affine in replaced or [(node, composed)]:
            flat = len(algebra.vectors[old]) == 1
            with algebra.graph.inserting_before(first):
                average = algebra.graph.call_method("mean", (affine.source, (2, 3)), {"keepdim": not flat})
            algebra.vectors[average] = (widths[upstream],) if flat else (widths[upstream], 1, 1)
            multiply(algebra, old, average, affine)
        absorbed = "" if products else f", then multiplies by a {matrix}"
        yield Change(_place(value), True, f"averages {widths[upstream]} channels instead of {widths[0]}{absorbed}")


def _affine_stages(algebra: Algebra, value: fx.Node, reader: fx.Node) -> tuple[list[tuple[fx.Node, Affine]], str]:
    """The affine maps of channels that `value` comes from, the last one first, and why there are no more."""
    stages: list[tuple[fx.Node, Affine]] = []
    while not algebra.is_written(value, reader):
        affine = algebra.affine(value)
        if affine is None:
            return stages, f"{_described(value, algebra)} stands before it"
        if affine.source not in algebra.maps:
            return stages, f"{_described(value, algebra)} reads what need not be (N, C, H, W), such as the model's own input"
        stages.append((value, affine))
        value, reader = affine.source, value
    return stages, "a change in place stands before it"


def _composed(outer: Affine, inner: Affine) -> Affine:
    """``outer(inner(x))`` as one map."""
    if outer.weight.ndim == 1:
        weight, bias = outer.weight[:, None] * inner.matrix, outer.weight * inner.bias
    else:
        weight = outer.weight @ inner.weight if inner.weight.ndim == 2 else outer.weight * inner.weight
        bias = outer.weight @ inner.bias
    return Affine(inner.source, weight, bias + outer.bias, outer.dtype)


def _products_reading(algebra: Algebra, vector: fx.Node) -> list[tuple[fx.Node, Affine]] | None:
    """The products that a vector is read by, through changes of shape; None where it is read otherwise too."""
    found: list[tuple[fx.Node, Affine]] = []
    for reader in algebra.readers(vector):
        product = algebra.product(reader)
        if product is not None:
            found.append((reader, product))
            continue
        inner = _products_reading(algebra, reader) if algebra.is_reshape(reader) else None
        if inner is None:
            return None
        found += inner
    return found


def _saves_bytes(node: fx.Node, wide: int, narrow: int) -> bool:
    """Whether the positions averaged outnumber what the matrix moves, on the example inputs."""
    batch, height, width = node.meta.get("size", (0, 0, 0))
    return bool(batch * height * width * (wide - narrow) > wide * narrow)


# ------------------------------------------------------------------------------------------------------- gates' products
def vector_products(algebra: Algebra) -> Iterator[Change]:
    """A gate's linear layers, or convolutions of one position, become products of vectors and matrices: `VectorLinear`."""
    gates = algebra.gate_nodes()
    for node in [node for node in algebra.graph.nodes if node in gates]:
        product = algebra.product(node)
        if product is None:
            continue
        module, change = called(node, algebra.modules), Change(_place(node), True, "{1} to {0}".format(*product.matrix.shape))
        if not isinstance(module, VectorLinear):
            module = multiply(algebra, node, product.source, product)
        module.few = few(module.weight)
        yield change


# ---------------------------------------------------------------------------------------------------------- fuse scales
def fuse_scales(algebra: Algebra) -> Iterator[Change]:
    """A scaled map is added in the same operator, where a sum alone reads it; else scaled in place, if nobody else reads it."""
    for scale in algebra.scales():
        readers = algebra.readers(scale.node)
        reader, place = readers[0] if len(readers) == 1 else None, _place(scale.value)
        if reader is not None and _adds(algebra, reader, scale) and not algebra.is_written(scale.value, reader):
            summand = next(source for source in reader.all_input_nodes if source is not scale.node)
            with algebra.graph.inserting_before(reader):
                new = algebra.graph.call_function(torch.addcmul, (summand, scale.value, scale.gate))
            replace(algebra, reader, new)
            sweep(algebra, scale.node)
            yield Change(place, True, "with the sum that reads it")
        elif changes_in_place(scale.node, algebra.modules):
            continue
        elif algebra.is_own(scale.value) and not algebra.is_read_after(scale.value, scale.node):
            with algebra.graph.inserting_before(scale.node):
                new = algebra.graph.call_method("mul_", (scale.value, scale.gate))
            replace(algebra, scale.node, new)
            yield Change(place, True, "in place")
        else:
            yield Change(place, False, "others read the value, or may")


def _adds(algebra: Algebra, reader: fx.Node, scale: Scale) -> bool:
    """Whether a node adds the scaled map and another of its shape, and nobody sees whether it does so in place."""
    own = not changes_in_place(reader, algebra.modules) or reader.args[0] is scale.node
    both = algebra.adds(reader) and len(set(reader.args)) == 2
    return both and own and all(algebra.maps.get(each) == algebra.maps[scale.node] for each in reader.all_input_nodes)


#: All rewrites by name, in the order they are applied in.
REWRITES: dict[str, Rewrite] = {
    "constant_gates": constant_gates,
    "fold_norms": fold_norms,
    "hoist_squeezes": hoist_squeezes,
    "vector_products": vector_products,
    "fuse_scales": fuse_scales,
}


# ----------------------------------------------------------------------------------------------------------------- words
def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _described(node: fx.Node, algebra: Algebra) -> str:
    """A node in words, for reasons."""
    module = called(node, algebra.modules)
    if isinstance(module, nn.Conv2d):
        kernel = "x".join(map(str, module.kernel_size))
        return f"a {kernel} convolution of stride {module.stride[0]} ({node.target})"
    if module is not None:
        return f"{type(module).__name__} ({node.target})"
    return str(getattr(node.target, "__name__", node.target))
