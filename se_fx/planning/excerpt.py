"""Excerpts: one residual unit of a rewritten model, or what is around one block, as plain data that can be drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import fx, nn

from se_fx.analysis import Modules, activation_after, called, inserted, live, modules_of, residual_units
from se_fx.capture import capture

__all__ = ["Part", "excerpt_of"]

_LONGEST = 24  # parts that are drawn
_BEFORE, _AFTER = 3, 2  # steps around a block that is in no residual unit


@dataclass(frozen=True)
class Part:
    """One step of an excerpt.

    Attributes:
        name: the qualified name of the module that is called, or the name of the function; empty for what comes in.
        kind: the class of the module; empty for a function.
        block: whether it is an inserted block.
        reads: the places in the excerpt of what it reads.
    """

    name: str
    kind: str
    block: bool
    reads: tuple[int, ...]


def excerpt_of(rewritten: nn.Module) -> tuple[Part, ...]:
    """The first residual unit with a block, else what is around the first block; nothing where no graph has one.

    What comes in from outside is the first part; the others are in the order in which they run.
    """
    found: tuple[Part, ...] = ()
    for region in capture(rewritten).regions:
        if region.graphs is None:
            continue
        graph, modules = region.graphs[False], modules_of(region.module)
        blocks = [node for node in graph.nodes if inserted(node, modules)]
        if not blocks:
            continue
        for unit in residual_units(graph, region.module):
            after = activation_after(unit.add, modules)
            nodes = {*unit.branch, *unit.projection, unit.add, *([after] if after is not None else [])}
            if len(nodes) < _LONGEST and not nodes.isdisjoint(blocks):
                return _parts(graph, nodes, modules, region.qualified)
        found = found or _parts(graph, _around(graph, blocks[0]), modules, region.qualified)
    return found


def _around(graph: fx.Graph, block: fx.Node) -> set[fx.Node]:
    """A block, the steps before it and those behind."""
    data, nodes, node = live(graph), {block}, block
    for _ in range(_BEFORE):
        node = next((source for source in node.all_input_nodes if source in data and source.op != "placeholder"), node)
        nodes.add(node)
    node = block
    for _ in range(_AFTER):
        node = next((user for user in node.users if user.op != "output"), node)
        nodes.add(node)
    return nodes


def _parts(graph: fx.Graph, nodes: Collection[fx.Node], modules: Modules, qualified: Callable[[str], str]) -> tuple[Part, ...]:
    data = live(graph)
    ordered = [node for node in graph.nodes if node in nodes and node in data]
    places = {node: place for place, node in enumerate(ordered, 1)}
    parts = [Part("", "", False, ())]
    for node in ordered:
        reads = dict.fromkeys(places.get(source, 0) for source in node.all_input_nodes if source in data)
        module = called(node, modules)
        name = qualified(str(node.target)) if module is not None else _function(node)
        parts.append(Part(name, type(module).__name__ if module is not None else "", inserted(node, modules), tuple(reads)))
    return tuple(parts)


def _function(node: fx.Node) -> str:
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("i") if name in ("iadd", "imul") else name
