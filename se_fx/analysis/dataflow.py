"""What the nodes of a graph compute: what comes from its inputs, what is pooled, what is attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_fx.analysis.calls import Modules, arguments, called, modules_of
from se_fx.analysis.memo import remembered
from se_fx.regions import Inserted

__all__ = [
    "ADDS",
    "PRODUCTS",
    "attention_convs",
    "describes",
    "inserted",
    "live",
    "pooled",
    "pools_globally",
]


def inserted(node: fx.Node, modules: Modules) -> bool:
    """Whether a node calls a module that a pass has inserted."""
    path = str(node.target).split(".") if node.op == "call_module" else []
    return any(isinstance(modules[".".join(path[:length])], Inserted) for length in range(1, len(path)))


def live(graph: fx.Graph) -> set[fx.Node]:
    """Values computed from the graph's inputs, as opposed to parameters, constants, noise, and sizes of things."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not describes(node) and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def describes(node: fx.Node) -> bool:
    """Whether a node says how large, of what kind or where its input is, or makes another tensor like it."""
    if node.target is getattr:
        return not isinstance(getattr(_TENSOR, str(node.args[1]), None), Tensor)  # such as `data`
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    asks = name in ("size", "dim", "numel", "stride") or (name == "type" and len(node.args) + len(node.kwargs) == 1)
    return asks or name.startswith("new_") or name.endswith("_like")


def pooled(graph: fx.Graph, modules: Modules) -> set[fx.Node]:
    """Values averaged (or maximised, or summed) over all of H and W, and what is computed from no other data."""
    found: set[fx.Node] = set()
    data = live(graph)
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in data]
        if pools_globally(node, modules) or (sources and all(source in found for source in sources)):
            found.add(node)
    return found


@remembered
def attention_convs(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Convs that compute a gate: between a pooling to 1x1 and a product (or sum) with a value that is not pooled.

    Recognised by dataflow, so whoever wrote the gate. A head's convs after global pooling lead back to no feature map,
    and are no gate's.
    """
    modules = modules_of(root)
    gates: list[fx.Node] = []
    values = pooled(graph, modules)
    for node in graph.nodes:
        if node not in values and _merges(node):
            gates += [source for source in node.all_input_nodes if source in values]
    found: set[str] = set()
    seen: set[fx.Node] = set()
    while gates:
        node = gates.pop()
        if node in seen or node not in values:
            continue
        seen.add(node)
        if isinstance(called(node, modules), nn.Conv2d):
            found.add(str(node.target))
        gates += node.all_input_nodes
    return found


#: What adds two values, and what multiplies them.
ADDS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
PRODUCTS: frozenset[Any] = frozenset(
    {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_"}
)
_TENSOR = torch.empty(1, 1, dtype=torch.complex64, device="meta")
_SPATIAL = ({-1, -2}, {2, 3})
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOL_FUNCTIONS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_REDUCTIONS = {torch.mean, torch.amax, torch.sum, torch.logsumexp, "mean", "amax", "sum", "logsumexp"}
_AVG_POOLS = {F.avg_pool2d, F.max_pool2d, torch.nn.functional.lp_pool2d}


def _merges(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in ADDS | PRODUCTS


def pools_globally(node: fx.Node, modules: Modules) -> bool:
    """Whether a node averages (or maximises, or sums) over all of H and W."""
    module = called(node, modules)
    if module is not None:
        return any(isinstance(part, _POOLS) and _to_one(part.output_size) for part in module.modules())
    given = arguments(node, modules) or {}
    if node.target in _POOL_FUNCTIONS:
        return _to_one(given.get("output_size"))
    if node.target in _AVG_POOLS:  # over a window as large as the input, read off its shape
        window = given.get("kernel_size")
        return any(isinstance(part, fx.Node) for part in (window if isinstance(window, (list, tuple)) else [window]))
    if node.op == "call_method" and node.target in ("view", "reshape"):  # to (..., 1, 1), after a weighted sum over space
        return len(node.args) == 5 and node.args[-2:] == (1, 1)
    if node.target in _REDUCTIONS:
        dims, source = given.get("dim"), given.get("input")
        if isinstance(dims, (list, tuple)):
            return set(dims) in _SPATIAL
        return (
            dims in (-1, 2) and isinstance(source, fx.Node) and source.target in ("view", "reshape", "flatten", torch.flatten)
        )
    return False


def _to_one(size: Any) -> bool:
    return size in (1, (1, 1), [1, 1])
