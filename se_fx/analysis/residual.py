"""Residual units, found in the graph by dominators: two ways from one value to an addition, one of them a branch of convs."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from se_fx.analysis.calls import Modules, arguments, called, modules_of
from se_fx.analysis.channels import channels
from se_fx.analysis.dataflow import ADDS, attention_convs, inserted, live, pooled
from se_fx.analysis.memo import remembered

__all__ = ["Unit", "activation_after", "is_nonlinear", "residual_units"]


@dataclass(frozen=True)
class Unit:
    """A residual unit: ``add(shortcut(start), branch(start))``.

    Attributes:
        start: the value that both branch and shortcut are computed from.
        end: the end of the residual branch, upstream of what only scales it (drop-path, dropout, layer scale).
        shortcut: the other operand of the addition; `start` itself, or a projection of it.
        add: the addition.
        branch: all nodes of the branch.
        projection: all nodes of the shortcut; none where that is `start` itself.
        conv: the last Conv2d of the branch.
        channels: of the sum, and of both its operands.
        start_channels: of `start`; None where that can't be told from what computes it.
    """

    start: fx.Node
    end: fx.Node
    shortcut: fx.Node
    add: fx.Node
    branch: frozenset[fx.Node]
    projection: frozenset[fx.Node]
    conv: str
    channels: int
    start_channels: int | None


@remembered
def residual_units(graph: fx.Graph, root: nn.Module) -> tuple[Unit, ...]:
    """The residual units of a graph, in its order.

    An addition is the end of one where its operands are feature maps that lead back to one value on disjoint ways at one
    resolution: a *branch*, with a nonlinearity, more convs than the other way, and values that no one else reads; and
    the *shortcut*, which is the value itself or a projection: no nonlinearity. So the merges of pyramids and decoders,
    sums of parallel convolutions, position encodings and broadcasts are none.
    """
    return tuple(_units(graph, root))


def _units(graph: fx.Graph, root: nn.Module) -> Iterator[Unit]:
    modules, data = modules_of(root), live(graph) & _used(graph)
    adds = [node for node in graph.nodes if node in data and _adds(node, modules, data) and len(_operands(node, data)) == 2]
    if not adds:
        return
    attention, small = attention_convs(graph, root), pooled(graph, modules)
    dominators, widths = _immediate_dominators(data), channels(graph, root)
    convs = [node for node in graph.nodes if isinstance(called(node, modules), nn.Conv2d) and node.target not in attention]
    at_one_resolution = {node for node in data if not _upsamples(node, modules)}
    for add in adds:
        operands, start = _operands(add, data), dominators[add]
        if start is None or any(operand in small for operand in operands):
            continue
        ways = [_way(start, operand, data) for operand in operands]
        if ways[0] & ways[1] or _splits(start, ways[0] | ways[1]):
            continue
        names = [[str(conv.target) for conv in convs if conv in way] for way in ways]
        longer = int(len(names[1]) > len(names[0]))
        branch, shortcut = ways[longer], ways[1 - longer]
        width = next((widths[node] for node in (add, *operands) if node in widths), None)
        is_unit = (
            width is not None
            and len(names[longer]) > len(names[1 - longer])
            and not _leaks(branch, add, data)
            and any(is_nonlinear(node, modules) for node in branch)
            and not any(is_nonlinear(node, modules) and not inserted(node, modules) for node in shortcut)
            and all(_leads(start, operand, at_one_resolution) for operand in operands)
        )
        end = _before_scaling(operands[longer], branch, data, modules)
        if is_unit and widths.get(end, width) == width and not _is_scaled_by_attention(end, small, data):
            assert width is not None
            yield Unit(start, end, operands[1 - longer], add, branch, shortcut, names[longer][-1], width, widths.get(start))


def _adds(node: fx.Node, modules: Modules, data: set[fx.Node]) -> bool:
    """Whether a node adds two values, one of them scaled, perhaps."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in ADDS:
        return True
    given = (arguments(node, modules) or {}) if node.target in (torch.addcmul, "addcmul", "addcmul_") else {}
    return given.get("input") in data and given["input"] not in (given["tensor1"], given["tensor2"])


def _operands(add: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
    return [source for source in add.all_input_nodes if source in data]


def _immediate_dominators(data: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """For each value, the last one that all ways from the inputs to it lead through; None where there is no such."""
    import networkx  # takes time to import

    flow, entry = networkx.DiGraph(), object()
    for node in data:
        sources = [source for source in node.all_input_nodes if source in data]
        flow.add_edges_from((source, node) for source in (sources or (entry,)))
    found = networkx.immediate_dominators(flow, entry)
    return {node: found[node] if isinstance(found[node], fx.Node) else None for node in data}


def _way(start: fx.Node, end: fx.Node, data: set[fx.Node]) -> frozenset[fx.Node]:
    """All values between two, the second included, where the first dominates the second."""
    found: set[fx.Node] = set()
    open_ends = [end]
    while open_ends:
        node = open_ends.pop()
        if node is not start and node in data and node not in found:
            found.add(node)
            open_ends += node.all_input_nodes
    return frozenset(found)


def _leads(start: fx.Node, end: fx.Node, through: set[fx.Node]) -> bool:
    """Whether a way from one value to another leads through these alone."""
    return end is start or any(start in node.all_input_nodes for node in _way(start, end, through))


def _used(graph: fx.Graph) -> set[fx.Node]:
    """Values that the graph's output depends on."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found:
            found.update(node.all_input_nodes)
    return found


def _leaks(inside: frozenset[fx.Node], add: fx.Node, data: set[fx.Node]) -> bool:
    """Whether anyone outside reads a value of a branch."""
    readers = {user for node in inside for user in node.users if user in data or user.op == "output"}
    return not readers <= inside | {add}


def _splits(start: fx.Node, inside: frozenset[fx.Node]) -> bool:
    """Whether `start` is several values, of which the ways take one each."""
    return any(node.target is operator.getitem and node.args[0] is start and isinstance(node.args[1], int) for node in inside)


# ---------------------------------------------------------------------------------------------------------- kinds of nodes
def _before_scaling(node: fx.Node, branch: frozenset[fx.Node], data: set[fx.Node], modules: Modules) -> fx.Node:
    """Upstream of drop-path, dropout, layer scale and constant factors."""
    while node in branch and _only_scales(node, data, modules):
        source = next(source for source in node.all_input_nodes if source in data)
        if len(source.users) > 1 or source not in branch:
            break
        node = source
    return node


def _only_scales(node: fx.Node, data: set[fx.Node], modules: Modules) -> bool:
    if len([source for source in node.all_input_nodes if source in data]) != 1:
        return False
    module = called(node, modules)
    if module is None:
        return node.target in _PRODUCTS or _names(node, _SCALINGS)
    is_factor = all(sum(size > 1 for size in each.shape) <= 1 for each in module.parameters())  # not a matrix or kernel
    return is_factor and any(word in type(module).__name__.lower() for word in _SCALINGS)


def _is_scaled_by_attention(node: fx.Node, small: set[fx.Node], data: set[fx.Node]) -> bool:
    return node.target in _PRODUCTS and any(source in small for source in node.all_input_nodes)


_PRODUCTS: set[Any] = {operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div}
_PRODUCTS |= {"mul", "mul_", "div", "div_"}
_SCALINGS = ("drop", "stochastic", "scale", "identity")
_NONLINEAR = (
    *("relu", "silu", "swish", "gelu", "elu", "celu", "selu", "mish", "sigmoid", "tanh", "softplus", "softsign", "shrink"),
    *("threshold", "glu", "evonorm", "tlu", "softmax"),
)
_UPSAMPLING = ("interpolate", "upsample", "pixel_shuffle", "pixelshuffle", "convtranspose", "unpool", "fold", "grid_sample")


def _names(node: fx.Node, words: tuple[str, ...]) -> bool:
    """Whether a function or method is called by one of these names, or one made from them."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(word in name.lower() for word in words)


def _holds(module: nn.Module | None, words: tuple[str, ...]) -> bool:
    parts = module.modules() if module is not None else ()
    return any(word in type(part).__name__.lower() for part in parts for word in words)


def is_nonlinear(node: fx.Node, modules: Modules) -> bool:
    """Whether a node calls an activation, or a module that has one."""
    return _names(node, _NONLINEAR) or _holds(called(node, modules), _NONLINEAR)


def _upsamples(node: fx.Node, modules: Modules) -> bool:
    return _names(node, _UPSAMPLING) or _holds(called(node, modules), _UPSAMPLING)


def activation_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The activation that alone reads a value, if that is so."""
    users = list(node.users)
    if len(users) != 1 or len(users[0].all_input_nodes) != 1 or not is_nonlinear(users[0], modules):
        return None
    module = called(users[0], modules)
    return users[0] if module is None or not list(module.parameters()) else None
