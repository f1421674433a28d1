"""Modules that run captured graphs in place of their own code.

A *region* is a module whose `forward` runs one `torch.fx.Graph` in training and one in evaluation (often the same
one). All else about it stays: children, parameters, buffers, hooks, plain attributes. A region at the root of a model is
an `fx.GraphModule`; any other keeps its own class as a base, so that code around it goes on reading its attributes.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn

__all__ = [
    "GraphRegion",
    "Inserted",
    "add_constants",
    "constants_of",
    "copied",
    "graphs_of",
    "hooked",
    "is_region",
    "own_class",
    "reserve_names",
    "restore_code",
    "run_graphs",
    "view",
]

Forward = Callable[..., Any]


class Inserted(nn.Module):
    """Holds the modules that a pass has inserted into a region. They are no part of the model: capture never enters them."""


def view(module: nn.Module, graph: fx.Graph, *, compiled: bool = True) -> fx.GraphModule:
    """An `fx.GraphModule` of `graph` over the children and tensors of `module`, for passes to work on.

    Args:
        module: the module whose graph it is.
        graph: the graph.
        compiled: whether to generate its code, and to have containers of its own; if not, a pass does the one, in `recompile`,
            and what it adds to a container is added to the module's.
    """
    if compiled:
        return GraphRegion(module, graph, own_class(module).__name__)
    made = GraphRegion(nn.Module(), fx.Graph(tracer_cls=graph._tracer_cls), own_class(module).__name__)
    attributes = {name: value for name, value in module.__dict__.items() if name not in made.__dict__}
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


def is_region(module: nn.Module) -> bool:
    """Whether a module is of one of the classes below; a `view` is, too."""
    return isinstance(module, _Region)


def graphs_of(module: nn.Module) -> dict[bool, fx.Graph] | None:
    """The graphs `module` runs, by `training`; None where it is no region."""
    return module.__dict__.get("_graphs") if isinstance(module, _Region) else None


def add_constants(module: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Give `module` the tensors its graphs refer to: buffers that move with it, but are in no state_dict."""
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    if constants:
        module.__dict__["_constants"] = tuple(constants)


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """What `add_constants` has given `module`."""
    return {name: module.get_buffer(name) for name in module.__dict__.get("_constants", ())}


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class `module` had before it became a region, or has, where it is none."""
    return module._own_class if isinstance(module, _Region) else type(module)


def run_graphs(module: nn.Module, views: Mapping[bool, fx.GraphModule], *, as_graph_module: bool) -> None:
    """Make `module` a region, in place: from now on its `forward` runs the graphs of `views`.

    Args:
        module: the module the graphs were captured from, or a clone of it; no region itself.
        views: the `view` to run by `training`; one object under both keys where the modes agree.
        as_graph_module: become an `fx.GraphModule`, instead of a subclass of the module's own class.
    """
    own: Any = type(module)
    graphs = {training: views[training].graph for training in (True, False)}
    forwards = {training: type(views[training]).forward for training in (True, False)}
    module.__dict__["_graphs"] = graphs
    if not as_graph_module:
        module.__class__ = _region_class(own, forwards)
        return
    current = views[module.training]
    added = tuple(name for name in current.__dict__ if name not in module.__dict__)
    own_graph = module.__dict__.get("_graph")
    module.__dict__.update({name: current.__dict__[name] for name in (*added, "_graph")})
    for graph in graphs.values():
        graph.owning_module = cast("fx.GraphModule", module)
    # Hooks may call methods of the model.
    keep = not issubclass(own, fx.GraphModule) and (_overrides_module_methods(own) or hooked(module))
    if keep:
        module.__class__ = _graph_region_class(own, own_graph, added, keep)
        cast("GraphRegion", module).recompile()
    else:  # the view's class has the generated code already
        region: Any = type(current)
        region._own_class, region._own_graph, region._added = own, own_graph, added
        region.forward, region.__name__ = _by_mode(forwards), own.__name__
        module.__class__ = region


def restore_code(module: nn.Module) -> None:
    """Undo `run_graphs`, in place: `module` runs the code of its own class again. Nothing to do for other modules."""
    if not isinstance(module, _Region):
        return
    region: Any = type(module)
    module.__class__ = region._own_class
    for name in constants_of(module):
        delattr(module, name)
    for name in (*region._added, "_graphs", "_constants"):
        module.__dict__.pop(name, None)
    if isinstance(module, fx.GraphModule):
        module.__dict__["_graph"] = region._own_graph
        module.recompile()


def _by_mode(forwards: Mapping[bool, Forward]) -> Forward:
    train, evaluate = forwards[True], forwards[False]
    if train is evaluate:
        return train

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A plain branch on `training`: torch.compile guards on it, and compiles each mode once.
        if self.training:
            return train(self, *args, **kwargs)
        return evaluate(self, *args, **kwargs)

    # TorchScript compiles the code of what is wrapped, among the globals of what wraps it.
    among = types.FunctionType(forward.__code__, evaluate.__globals__, forward.__name__, None, forward.__closure__)
    return functools.wraps(evaluate)(among)


class _Region:
    """What regions of both kinds do alike: copy and pickle whole, hooks and attributes included."""

    _own_class: type[nn.Module]
    _own_graph: fx.Graph | None = None  # of a module that was an fx.GraphModule before
    _added: tuple[str, ...] = ()  # attributes that only an fx.GraphModule needs

    def __copy__(self) -> Any:
        return self._copied(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = object.__new__(type(self))
        return self._copied({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}, copied)

    def _copied(self, attributes: Mapping[str, Any], copied: Any = None) -> Any:
        copied = object.__new__(type(self)) if copied is None else copied
        copied.__dict__.update(attributes)
        return copied

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Graphs have no stable pickled form; fx pickles their generated code, and traces that again on loading.
        module: nn.Module = self  # type: ignore[assignment]
        graphs = self.__dict__["_graphs"]
        views = {graph: fx.GraphModule(module, graph) for graph in set(graphs.values())}
        state = {
            "attributes": {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "_graph")},
            "added": self._added,
            "views": {training: views[graph] for training, graph in graphs.items()},
            "own": fx.GraphModule(module, self._own_graph) if self._own_graph else None,
        }
        own = fx.GraphModule if self._own_graph else self._own_class
        return _unpickled, (own, isinstance(self, fx.GraphModule)), state

    def __setstate__(self, state: Any) -> None:
        module: nn.Module = self  # type: ignore[assignment]
        as_graph_module, own = isinstance(self, fx.GraphModule), self._own_class
        module.__dict__.clear()
        module.__dict__.update(state["attributes"])
        module.__class__ = own if state["own"] is None else type(state["own"])
        if state["own"] is not None:
            module.__dict__["_graph"] = state["own"].graph
        views = {plain: view(plain, plain.graph) for plain in state["views"].values()}
        by_mode = {training: views[plain] for training, plain in state["views"].items()}
        run_graphs(module, by_mode, as_graph_module=as_graph_module)
        type(module)._added = state["added"]  # type: ignore[attr-defined]


def _unpickled(own: type[nn.Module], as_graph_module: bool) -> nn.Module:
    """A region of the right class for pickle to give its state to."""
    if as_graph_module:
        return object.__new__(_graph_region_class(own, None, (), keep=False))
    return object.__new__(_region_class(own, dict.fromkeys((True, False), own.forward)))


def _graph_region_class(
    own: type[nn.Module], own_graph: fx.Graph | None, added: tuple[str, ...], keep: bool
) -> type[GraphRegion]:
    """A class for one instance, as fx has it: generated code is a method. Of fx's name, which fx looks for in bases."""
    bases = (GraphRegion, own) if keep else (GraphRegion,)
    attributes = {"_own_class": own, "_own_graph": own_graph, "_added": added}
    region = types.new_class("GraphModuleImpl", bases, exec_body=lambda body: body.update(attributes))
    region.__name__ = own.__name__
    return region


def _overrides_module_methods(own: type[nn.Module]) -> bool:
    """Whether a class changes what `train`, `state_dict` and other methods of every module do, so that they must be kept."""
    theirs = [kind for kind in own.__mro__ if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.nn.")]
    return any(name in _MODULE_METHODS for kind in theirs for name in vars(kind))


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than run its forward: it has forward or backward hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(module.__dict__.get(name) for name in names)


_MODULE_METHODS = {name for name, member in vars(nn.Module).items() if isinstance(member, types.FunctionType)}
_MODULE_METHODS -= {"__init__", "forward", "extra_repr", "__repr__", "__dir__", "_get_name"}


def _region_class(own: type[nn.Module], forwards: Mapping[bool, Forward]) -> type[nn.Module]:
    body = {
        "__doc__": own.__doc__,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "_own_class": own,
        "forward": _by_mode(forwards),
    }
    return type(own.__name__, (_Region, own), body)


class GraphRegion(_Region, fx.GraphModule):
    """An `fx.GraphModule` that runs one graph in training and one in evaluation, which may be the same.

    `graph` is that of the current mode. Calling `recompile()` after an edit takes up the edits of both.
    """

    def _copied(self, attributes: Mapping[str, Any], copied: Any = None) -> Any:
        copied = super()._copied(attributes, copied)
        copied.__class__ = _graph_region_class(
            self._own_class, self._own_graph, self._added, issubclass(type(self), self._own_class)
        )
        copied.recompile()
        return copied

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode."""
        graphs = self.__dict__.get("_graphs")
        return graphs[self.training] if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        graphs = self.__dict__.get("_graphs")
        if graphs:
            same = graphs[True] is graphs[False]
            graphs.update(dict.fromkeys((True, False) if same else (self.training,), graph))
        self._graph = graph
        graph.owning_module = self
        self.recompile()

    def recompile(self) -> Any:
        """Generate the code of both modes' graphs anew."""
        graphs = self.__dict__.get("_graphs", {False: self._graph})
        forwards: dict[fx.Graph, Forward] = {}
        code = None
        for graph in (graphs[training] for training in sorted(graphs, key=lambda mode: mode == self.training)):
            if graph not in forwards:
                self._graph = graph
                graph.owning_module = self
                code = super().recompile()
                forwards[graph] = type(self).forward
        type(self).forward = _by_mode({mode: forwards[graphs.get(mode, self._graph)] for mode in (True, False)})
        return code
