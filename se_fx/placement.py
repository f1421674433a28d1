"""Placement policies: from a region's graph to the values that may be scaled. Knows nothing of how nodes are edited.

A policy is a function ``(graph, root) -> Iterator[Spot]``, `root` being the module the graph's targets refer to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["PLACEMENTS", "Policy", "Spot", "attention_convs", "conv"]


@dataclass(frozen=True)
class Spot:
    """Where one block can go.

    Attributes:
        conv: the Conv2d whose output is scaled: its name in the region.
        channels: channels of the scaled value.
        nodes: the values to scale, one for each call of a shared module; all their users are to read the scaled value.
    """

    conv: str
    channels: int
    nodes: tuple[fx.Node, ...]


Policy = Callable[[fx.Graph, nn.Module], Iterator[Spot]]


def conv(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """Directly after each Conv2d (MosaicML Composer's placement): one block for a module, applied at each of its calls."""
    modules, calls = _modules(root), dict[nn.Conv2d, list[fx.Node]]()
    for node in graph.nodes:
        module = _called(node, modules)
        if isinstance(module, nn.Conv2d):
            calls.setdefault(module, []).append(node)
    for module, nodes in calls.items():
        yield Spot(str(nodes[0].target), module.out_channels, tuple(nodes))


#: Placement policies by name.
PLACEMENTS: dict[str, Policy] = {"conv": conv}


Modules = Mapping[str, nn.Module]  # by qualified name


def _modules(root: nn.Module) -> Modules:
    return dict(root.named_modules(remove_duplicate=False))


def _called(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The module that a `call_module` node calls; None for other nodes."""
    return modules[str(node.target)] if node.op == "call_module" else None


# ------------------------------------------------------------------------------------------------------------- attention
def attention_convs(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Convs that compute a gate: between a pooling to 1x1 and a product (or sum) with a value that is not pooled.

    Recognised by dataflow, so whoever wrote the gate. A head's convs after global pooling lead back to no feature map,
    and are no gate's.
    """
    modules = _modules(root)
    pooled: set[fx.Node] = set()
    gates: list[fx.Node] = []
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if _is_data(source)]
        if _pools_globally(node, modules) or (sources and all(source in pooled for source in sources)):
            pooled.add(node)
        elif _merges(node):
            gates += [source for source in sources if source in pooled]
    found: set[str] = set()
    seen: set[fx.Node] = set()
    while gates:
        node = gates.pop()
        if node in seen or node not in pooled:
            continue
        seen.add(node)
        if isinstance(_called(node, modules), nn.Conv2d):
            found.add(str(node.target))
        gates += node.all_input_nodes
    return found


_MERGES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_"}
_MERGES |= {operator.add, operator.iadd, torch.add, "add", "add_"}
_SPATIAL = ({-1, -2}, {2, 3})
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOL_FUNCTIONS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_REDUCTIONS = {torch.mean, torch.amax, torch.sum, torch.logsumexp, "mean", "amax", "sum", "logsumexp"}
_AVG_POOLS = {F.avg_pool2d, F.max_pool2d, torch.nn.functional.lp_pool2d}


def _merges(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _MERGES


def _is_data(node: fx.Node) -> bool:
    """Whether a node is computed from the input, as opposed to a parameter, or a size of something."""
    is_size = (node.op == "call_method" and node.target == "size") or (node.target is getattr)
    return node.op != "get_attr" and not is_size and not (node.op == "call_function" and _only_sizes(node))


def _only_sizes(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    return (
        bool(sources)
        and node.target in (operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub)
        and all(not _is_data(source) for source in sources)
    )


def _pools_globally(node: fx.Node, modules: Modules) -> bool:
    """Whether a node averages (or maximises, or sums) over all of H and W."""
    module = _called(node, modules)
    if module is not None:
        return any(isinstance(part, _POOLS) and _to_one(part.output_size) for part in module.modules())
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _POOL_FUNCTIONS:
        return _to_one(_argument(node, 1, "output_size"))
    if node.target in _AVG_POOLS:  # over a window as large as the input, read off its shape
        window = _argument(node, 1, "kernel_size")
        return any(isinstance(part, fx.Node) for part in (window if isinstance(window, (list, tuple)) else [window]))
    if node.op == "call_method" and node.target in ("view", "reshape"):  # to (..., 1, 1), after a weighted sum over space
        return len(node.args) == 5 and node.args[-2:] == (1, 1)
    if node.target in _REDUCTIONS:
        dims = _argument(node, 1, "dim")
        if isinstance(dims, (list, tuple)):
            return set(dims) in _SPATIAL
        source = node.args[0] if node.args else None
        return (
            dims in (-1, 2) and isinstance(source, fx.Node) and source.target in ("view", "reshape", "flatten", torch.flatten)
        )
    return False


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _to_one(size: Any) -> bool:
    return size in (1, (1, 1), [1, 1])
