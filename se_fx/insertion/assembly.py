"""Assembly: a copy of a captured model, with blocks inserted into its regions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from se_fx.capture import Capture, Region, collector_paused
from se_fx.insertion.containers import attach, container_of, hold
from se_fx.insertion.insert_blocks import InsertBlocks
from se_fx.placement import Spot
from se_fx.regions import add_constants, clone, copied, restore_code, run_graphs, view

__all__ = ["Insertion", "insert"]


@dataclass(frozen=True)
class Insertion:
    """One block to insert in a region.

    Attributes:
        name: the block's name in the region's container of blocks.
        block: the module that scales the values.
        spots: where it goes in each graph, by `training`. Empty for a lone Conv2d.
    """

    name: str
    block: nn.Module
    spots: Mapping[bool, Spot]


def insert(capture: Capture, insertions: Mapping[str, list[Insertion]]) -> nn.Module:
    """A copy of the captured model that shares its tensors, with `insertions` (by region path) made.

    The root is an `fx.GraphModule` where it was captured as a graph, of the model's own class otherwise.
    """
    with collector_paused():
        model = clone(capture.model)
        for region in capture.regions:
            module = model.get_submodule(region.path)
            chosen = insertions.get(region.path, [])
            if region.graphs is None:
                for insertion in chosen:
                    attach(module, insertion.block)
            elif chosen or not region.path:
                _rewrite(module, region, chosen)
    return model


def _rewrite(module: nn.Module, region: Region, insertions: list[Insertion]) -> None:
    assert region.graphs is not None
    restore_code(module)
    add_constants(module, region.constants)
    container = container_of(module) if insertions else ""
    for each in insertions:
        hold(module, container, each.name, each.block)
    views: dict[fx.Graph, fx.GraphModule] = {}
    nowhere = Spot("", 0, ())
    for training, graph in region.graphs.items():
        if graph in views:
            continue
        edited, twin = copied(graph)
        views[graph] = view(module, edited, compiled=False)
        InsertBlocks(
            (f"{container}.{each.name}", each.block, _moved(each.spots[training], twin) if training in each.spots else nowhere)
            for each in insertions
        )(views[graph])
    by_mode = {training: views[graph] for training, graph in region.graphs.items()}
    run_graphs(module, by_mode, as_graph_module=not region.path)


def _moved(spot: Spot, twin: Mapping[fx.Node, fx.Node]) -> Spot:
    """The same spot in a copy of its graph."""
    readers = None if spot.readers is None else frozenset(twin[node] for node in spot.readers)
    return dataclasses.replace(spot, nodes=tuple(twin[node] for node in spot.nodes), readers=readers)
