"""Modules that run something else than their own code: a captured graph, or their code with blocks on what it returns.

All else about such a module stays: children, parameters, buffers, hooks, attributes, methods, and its own class as a base. What
it runs is told by its state:

- a *region's graphs*, of all code within it that can be traced, for compilers and passes; while they are fresh;
- else a *host's graphs*, of its own code, which calls its children as that code did;
- else its code; and then the blocks that scale what it returns.

A region at the root of a model is an `fx.GraphModule`, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn

from se_fx.regions.classes import ATTRIBUTES, OF_HOSTS, GraphRegion, Rewritten, give_class, overrides_module_methods
from se_fx.regions.freshness import INNER, Named, fixed_children, hooked, reached, watch

__all__ = [
    "add_constants",
    "constants_of",
    "copied",
    "excite",
    "excitement",
    "graphs_of",
    "is_region",
    "named",
    "own_class",
    "reserve_names",
    "restore_code",
    "run_graphs",
    "run_host_graphs",
    "run_own_code",
    "view",
]


def view(module: nn.Module, graph: fx.Graph, *, compiled: bool = True) -> fx.GraphModule:
    """An `fx.GraphModule` of `graph` over the children and tensors of `module`, for passes to work on.

    Args:
        module: the module whose graph it is.
        graph: the graph.
        compiled: whether to generate its code, and to have containers of its own; if not, nobody can run it, and what a pass
            adds to a container is added to the module's.
    """
    if compiled:
        return GraphRegion(module, graph, own_class(module).__name__)
    made = GraphRegion(nn.Module(), fx.Graph(tracer_cls=graph._tracer_cls), own_class(module).__name__)
    left_out = {*made.__dict__, *ATTRIBUTES}
    attributes = {name: value for name, value in module.__dict__.items() if name not in left_out}
    containers = {name: dict(module.__dict__[name]) for name in ("_modules", "_parameters", "_buffers")}
    made.__dict__.update(attributes, **containers, training=module.training, _graph=graph)
    graph.owning_module = made
    return made


def reserve_names(graph: fx.Graph) -> None:
    """Keep nodes of a new graph from being called ``self``, as fx would call that of a child of this name."""
    graph._graph_namespace.create_name("self", None)


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The same nodes again, over the same modules; and for each node its twin there."""
    again = fx.Graph(tracer_cls=graph._tracer_cls)
    reserve_names(again)
    twin: dict[fx.Node, fx.Node] = {}
    value, output = cast("tuple[Any, fx.Node]", again.graph_copy(graph, twin, return_output_node=True))
    twin[output] = again.output(value, type_expr=output.type)
    return again, twin


# ------------------------------------------------------------------------------------------------------- what a module is
def is_region(module: nn.Module) -> bool:
    """Whether a module is of one of the classes made here; a `view` is, too."""
    return isinstance(module, Rewritten)


def graphs_of(module: nn.Module) -> dict[bool, fx.Graph] | None:
    """The graphs of all code within a region, by `training`; None where `module` is none."""
    return module.__dict__.get("_graphs") if isinstance(module, Rewritten) else None


def excitement(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The blocks that scale what `module` returns, in their order: what holds each, and its name there."""
    return module.__dict__.get("_excited_by", []) if isinstance(module, Rewritten) else []


def named(module: nn.Module, names: Iterable[str] | None = None) -> list[Named]:
    """Those of a module's submodules with these names, or all, with the classes whose code they run: what `watch` is given."""
    found = module.named_modules() if names is None else ((name, module.get_submodule(name)) for name in names)
    return [(name, each, own_class(each)) for name, each in found]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class `module` had before it ran anything else than its code, or has, where it doesn't."""
    return module._own_class if isinstance(module, Rewritten) and hasattr(module, "_own_class") else type(module)


# ------------------------------------------------------------------------------------------------------- what a module runs
def add_constants(module: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Give `module` the tensors its graphs refer to: buffers that move with it, but are in no state_dict."""
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    if constants:
        module.__dict__["_constants"] = tuple({**dict.fromkeys(module.__dict__.get("_constants", ())), **constants})


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """What `add_constants` has given `module`."""
    return {name: module.get_buffer(name) for name in module.__dict__.get("_constants", ())}


def run_graphs(
    module: nn.Module,
    graphs: Mapping[bool, fx.Graph],
    *,
    as_graph_module: bool,
    entered: Iterable[str] | None = None,
    fixed: Iterable[str] = (),
    read: Iterable[str] = (),
    replaceable: bool = True,
    keeps_class: bool = True,
) -> None:
    """Make `module` a region, in place: its `forward` runs these graphs while they are fresh.

    Args:
        module: the module the graphs were captured from, or a clone of it.
        graphs: by `training`; one object under both keys where the modes agree.
        as_graph_module: become an `fx.GraphModule`.
        entered: the names of the modules whose code is in the graphs, its own (empty) first: what makes the graphs stale is
            watched there. None, and they never are.
        fixed: the names of modules that the graphs call, and that make them stale if others take their places.
        read: the names of modules whose code the graphs know, though these call them, or others that take their places.
        replaceable: whether the module's code holds the same blocks, and may run where the graphs are stale.
        keeps_class: whether an `fx.GraphModule` stays of its own class too, even if that has no `train()` or the like.
    """
    own, own_graph = own_class(module), _own_graph(module)
    added: tuple[str, ...] = ()
    names = tuple(entered or ())
    inner = named(module, names)
    scaling = [name for name, each in module.named_modules() if name not in names and excitement(each)] if names else []
    module.__dict__.update(
        _graphs=dict(graphs),
        _watched=watch(inner),
        _reached=reached(inner, named(module)) + watch(named(module, read)) if names else [],
        _children=[*fixed_children(module, set(graphs.values())), *(_placed(module, each) for each in fixed)] if names else [],
        _hosts=[each for each in module.modules() if "_between" in each.__dict__ or "_holding" in each.__dict__]
        if names
        else [],
        _leaves=[(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in scaling],
        _replaceable=replaceable,
        _modes_differ=graphs[True] is not graphs[False],
    )
    if as_graph_module:
        bare = GraphRegion(nn.Module(), fx.Graph(tracer_cls=graphs[False]._tracer_cls)).__dict__
        added = tuple(name for name in bare if name not in module.__dict__)
        module.__dict__.update({name: bare[name] for name in added})
        for graph in graphs.values():
            graph.owning_module = cast("fx.GraphModule", module)
    keeps = keeps_class or overrides_module_methods(own) or hooked(module)  # hooks may call methods of the model
    give_class(module, own, own_graph, as_graph_module=as_graph_module, added=added, keeps=keeps)


def _placed(module: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """A module within another, with what holds it."""
    holder, _, last = name.rpartition(".")
    return module.get_submodule(holder), last, module.get_submodule(name)


def run_host_graphs(module: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Make `module`, which is no region, run graphs of its own code, in place."""
    own = named(module, [""])
    module.__dict__.update(_host_graphs=dict(graphs), _host_watched=watch(own) + reached(own, named(module)), _hosting=True)
    give_class(module, own_class(module), _own_graph(module))


def run_own_code(module: nn.Module) -> None:
    """Make `module` run its code, if it doesn't run anything else, and notice what is done to it, in place.

    Nothing to do for an `fx.GraphModule`, whose class holds the code that it generates.
    """
    if isinstance(module, fx.GraphModule) or (isinstance(module, Rewritten) and hasattr(module, "_own_class")):
        return
    module.__dict__["_hosting"] = True
    give_class(module, own_class(module), _own_graph(module))


def excite(module: nn.Module, container: nn.Module, name: str) -> None:
    """Scale what `module`, which is no region, returns by the block of a name in a container, in place."""
    module.__dict__.setdefault("_excited_by", []).append((container, name))
    module.__dict__["_hosting"] = True
    give_class(module, own_class(module), _own_graph(module))


def _own_graph(module: nn.Module) -> fx.Graph | None:
    if isinstance(module, Rewritten) and hasattr(module, "_own_class"):
        return type(module)._own_graph
    return module.__dict__.get("_graph") if isinstance(module, fx.GraphModule) else None


def restore_code(module: nn.Module, *, hosts: bool = True) -> None:
    """Have `module` run its own code again, in place. Nothing to do for other modules.

    Args:
        module: the module.
        hosts: also where it hosts or scales; if not, only a region's graphs are taken away.
    """
    if not isinstance(module, Rewritten):
        return
    own, own_graph, state = own_class(module), _own_graph(module), module.__dict__
    kept = OF_HOSTS if not hosts and "_hosting" in state else ()
    for name in (*type(module)._added, *ATTRIBUTES):
        if name not in kept:
            state.pop(name, None)
    if kept:
        give_class(module, own, own_graph)
        return
    module.__class__ = own  # type: ignore[assignment]
    for name in constants_of(module):
        delattr(module, name)
    for name in ("_constants", INNER):
        state.pop(name, None)
    if isinstance(module, fx.GraphModule):
        state["_graph"] = own_graph
        module.recompile()
