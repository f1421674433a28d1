"""Insertion: the pass that edits a graph, and the assembly of a rewritten model. Knows nothing of policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from se_fx.capture import Capture, Region, collector_paused
from se_fx.cloning import clone
from se_fx.errors import SqueezeExciteError
from se_fx.placement import Spot
from se_fx.regions import Inserted, add_constants, restore_code, run_graphs, view
from se_fx.tracing import TRACED_HOOKS, Tracer

__all__ = ["CONTAINER", "InsertBlocks", "Insertion", "attach", "blocks_of", "copied_graph", "insert", "withdraw"]

#: The child of a region that holds the blocks inserted there, and of a lone Conv2d that is its block.
CONTAINER = "squeeze_excite"
_CONTAINER = "_squeeze_excite_container"  # attributes of a region: its container's name,
_NAMES = "_squeeze_excite_names"  # and those of the blocks in it


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


class InsertBlocks(PassBase):
    """Inserts `call_module` nodes that scale given values, and has their readers read what these return.

    Two blocks on one value follow each other, whichever is inserted first.

    Args:
        blocks: for each block its target in the graph module, the module, and where it goes.
    """

    def __init__(self, blocks: Iterable[tuple[str, nn.Module, Spot]]) -> None:
        self.blocks = tuple(blocks)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that every node belongs to this graph.

        Raises:
            SqueezeExciteError: one doesn't.
        """
        present = set(graph_module.graph.nodes)
        for target, _, spot in self.blocks:
            for node in (*spot.nodes, *(spot.readers or ())):
                if node not in present:
                    raise SqueezeExciteError(
                        f"block {target!r}: the node {node.name!r} is not in this graph, of which spots must be"
                    )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Edit `graph_module` in place."""
        graph = graph_module.graph
        scaled_by_all: dict[fx.Node, fx.Node] = {}
        for target, block, spot in self.blocks:
            graph_module.add_submodule(target, block)
            for node in spot.nodes:
                value = scaled_by_all.get(node, node)
                readers = [user for user in value.users if spot.readers is None or user in spot.readers]
                # For some readers alone, as late as they allow: the value may be changed in place until then.
                with graph.inserting_after(value) if spot.readers is None else graph.inserting_before(min(readers)):
                    scaled = graph.call_module(target, (value,))
                for reader in readers:
                    reader.replace_input_with(value, scaled)
                if spot.readers is None:
                    scaled_by_all[node] = scaled
                scaled.meta["nn_module_stack"] = {
                    **node.meta.get("nn_module_stack", {}),
                    target: (target, type(block)),
                }
                if "stack_trace" in node.meta:
                    scaled.meta["stack_trace"] = node.meta["stack_trace"]
        graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, bool(self.blocks))


# ------------------------------------------------------------------------------------------------------------- assembly
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
    container = _container(module) if insertions else ""
    for each in insertions:
        _hold(module, container, each)
    views: dict[fx.Graph, fx.GraphModule] = {}
    nowhere = Spot("", 0, ())
    for training, graph in region.graphs.items():
        if graph in views:
            continue
        copied, twin = _copied(graph)
        views[graph] = view(module, copied)
        if container:
            views[graph].add_submodule(container, module.get_submodule(container))
        InsertBlocks(
            (f"{container}.{each.name}", each.block, _moved(each.spots[training], twin) if training in each.spots else nowhere)
            for each in insertions
        )(views[graph])
    by_mode = {training: views[graph] for training, graph in region.graphs.items()}
    run_graphs(module, by_mode, as_graph_module=not region.path)


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes again, over the same modules."""
    return _copied(graph)[0]


def _copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    copied = fx.Graph(tracer_cls=Tracer)
    twin: dict[fx.Node, fx.Node] = {}
    value, output = cast("tuple[Any, fx.Node]", copied.graph_copy(graph, twin, return_output_node=True))
    twin[output] = copied.output(value, type_expr=output.type)
    return copied, twin


def _moved(spot: Spot, twin: Mapping[fx.Node, fx.Node]) -> Spot:
    """The same spot in a copy of its graph."""
    readers = None if spot.readers is None else frozenset(twin[node] for node in spot.readers)
    return dataclasses.replace(spot, nodes=tuple(twin[node] for node in spot.nodes), readers=readers)


def _container(module: nn.Module) -> str:
    """The name of a region's container of blocks, which is made if there is none."""
    if _CONTAINER not in module.__dict__:
        taken = _has(module, CONTAINER)  # by a child of the model's own
        if taken:
            module.add_module("se_fx", nn.Module())
        (module.get_submodule("se_fx") if taken else module).add_module(CONTAINER, Inserted())
        module.__dict__[_CONTAINER] = f"se_fx.{CONTAINER}" if taken else CONTAINER
        module.__dict__[_NAMES] = []
    return str(module.__dict__[_CONTAINER])


def _has(module: nn.Module, name: str) -> bool:
    """`hasattr`, for modules whose `__getattr__` has an answer to everything."""
    return name in module._modules or name in module.__dict__ or hasattr(type(module), name)


def _hold(module: nn.Module, container: str, insertion: Insertion) -> None:
    *path, last = insertion.name.split(".")
    inner = module.get_submodule(container)
    for part in path:
        inner = inner._modules.setdefault(part, nn.Module()) or inner
    inner._modules[last] = insertion.block
    module.__dict__[_NAMES].append(insertion.name)


def blocks_of(model: nn.Module) -> dict[str, str]:
    """The qualified names of all inserted blocks in a rewritten model, by the qualified names of their sites."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        region = f"{path}." if path else ""
        if _CONTAINER in module.__dict__:
            container = module.__dict__[_CONTAINER]
            found.update({f"{region}{name}": f"{region}{container}.{name}" for name in module.__dict__[_NAMES]})
        elif _excite in module._forward_hooks.values():
            found[path] = f"{region}{CONTAINER}"
    return found


def withdraw(module: nn.Module) -> None:
    """Undo what `insert` or `attach` did to one module, in place. Nothing to do for other modules."""
    restore_code(module)
    if _CONTAINER in module.__dict__:
        del module._modules[module.__dict__.pop(_CONTAINER).split(".")[0]], module.__dict__[_NAMES]
    for key, hook in list(module._forward_hooks.items()):
        if hook is _excite:
            del module._forward_hooks[key]
            module._modules.pop(CONTAINER, None)


# ------------------------------------------------------------------------------------------------------------ lone convs
def attach(conv: nn.Module, block: nn.Module) -> None:
    """Scale what `conv` returns by `block`, wherever it is called from, in place. The conv keeps its class and keys."""
    conv.register_forward_hook(_excite)  # first, since it tells `withdraw` of the block
    conv.add_module(CONTAINER, block)


def _excite(conv: nn.Module, args: Any, output: Tensor) -> Tensor:
    return conv.get_submodule(CONTAINER)(output)  # type: ignore[no-any-return]


TRACED_HOOKS.add(_excite)
