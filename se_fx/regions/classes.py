"""Classes of modules that run something else than their own code, with this own class among their bases.

Modules that run the same code are of one class, as models made alike are.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from se_fx.errors import SqueezeExciteError
from se_fx.regions.alike import first_alike
from se_fx.regions.forwards import (
    UNSCALED,
    Forward,
    Forwards,
    asking_once,
    by_mode,
    forward_of,
    functions_of,
    is_leaf,
    leads_to,
)
from se_fx.regions.freshness import INNER
from se_fx.regions.scripting import scripted_view
from se_fx.regions.sequences import Sequence
from se_fx.regions.surgery import inherited

__all__ = ["ATTRIBUTES", "OF_HOSTS", "GraphRegion", "Rewritten", "give_class", "overrides_module_methods"]

#: The attributes of a host, of what scales its values, and of what is around these.
OF_HOSTS = ("_host_graphs", "_host_watched", "_excited_by", "_between", "_holding", "_length", "_hosting")
#: All in which a rewritten module keeps what it runs; see `se_fx.regions.running`.
ATTRIBUTES = (
    *("_graphs", "_watched", "_reached", "_children", "_hosts", "_leaves"),  # of a region
    *("_replaceable", "_modes_differ", "_edited"),
    *OF_HOSTS,
)


class Rewritten:
    """What such modules do alike: copy and pickle whole, hooks and attributes included, and notice a `forward` that is set."""

    _own_class: type[nn.Module]
    _own_graph: fx.Graph | None = None  # of a module that was an fx.GraphModule before
    _added: tuple[str, ...] = ()  # attributes that only an fx.GraphModule needs
    _host: Forwards | None = None
    _region: Forwards | None = None  # of an fx.GraphModule

    def __init_subclass__(cls) -> None:
        """Nothing: these are no classes that whoever keeps a list of a model's subclasses is to know."""

    def __copy__(self) -> Any:
        return self._copied(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = object.__new__(type(self))
        return self._copied({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}, copied)

    def _copied(self, attributes: Mapping[str, Any], copied: Any = None) -> Any:
        copied = object.__new__(type(self)) if copied is None else copied
        copied.__dict__.update(attributes)
        return copied

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Set a child; another of the kind of one that scales what it returns does so, too."""
        _take_over(self, name, module)
        super().add_module(name, module)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        _take_over(self, name, value)
        if name != "forward" or leads_to(value, type(self).forward):  # type: ignore[attr-defined]
            super().__setattr__(name, value)
        elif self._host is not None:
            raise SqueezeExciteError(
                f"{self._own_class.__name__}.forward was set, and Squeeze-and-Excitation blocks stand in the code of the one "
                'before: they would be lost. Use placement="activation" or "residual", which have blocks outside of units '
                "whose forward is replaced; set it before blocks go in; or optimise by se_fx.optimize_for_inference instead"
            )
        else:  # it runs in place of the code, with the blocks on what it returns
            self.__dict__[INNER] = value

    def __delattr__(self, name: str) -> None:
        if name == "forward" and INNER in self.__dict__:
            del self.__dict__[INNER]
        else:
            super().__delattr__(name)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: a region's graph, that of the mode it can be run in if there is but one.

        Raises:
            SqueezeExciteError: the graphs of the modes differ, or there are none.
        """
        return scripted_view(self, self._own_class.__name__, self.__dict__.get("_graphs", {}))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Graphs have no stable pickled form; fx pickles their generated code, and traces that again on loading.
        module: nn.Module = self  # type: ignore[assignment]
        views = {}
        for kind in ("_graphs", "_host_graphs"):
            graphs = self.__dict__.get(kind, {})
            made = {graph: fx.GraphModule(module, graph) for graph in set(graphs.values())}
            views[kind] = {training: made[graph] for training, graph in graphs.items()}
        state = {
            "attributes": {k: v for k, v in self.__dict__.items() if k not in ("_graphs", "_host_graphs", "_graph")},
            "added": self._added,
            "keeps": isinstance(self, self._own_class),
            "views": views,
            "own": fx.GraphModule(module, self._own_graph) if self._own_graph else None,
        }
        own = fx.GraphModule if self._own_graph else self._own_class
        return _unpickled, (own, isinstance(self, GraphRegion)), state

    def __setstate__(self, state: Any) -> None:
        module: nn.Module = self  # type: ignore[assignment]
        as_graph_module, own = isinstance(self, GraphRegion), self._own_class
        module.__dict__.clear()
        module.__dict__.update(state["attributes"])
        module.__class__ = own if state["own"] is None else type(state["own"])
        if state["own"] is not None:
            module.__dict__["_graph"] = state["own"].graph
        for kind, views in state["views"].items():
            if views:
                module.__dict__[kind] = {training: view.graph for training, view in views.items()}
        own_graph = module.__dict__.get("_graph")
        kinds = {"as_graph_module": as_graph_module, "added": state["added"], "keeps": state["keeps"]}
        give_class(module, module.__class__, own_graph, **kinds)


def _take_over(module: Any, name: str, new: Any) -> None:
    blocks = inherited(module, name, new)
    if blocks is not None:
        old = module.__dict__["_holding"][name]
        new.__dict__.update(_excited_by=blocks, _hosting=True)
        module.__dict__["_holding"][name] = new
        give_class(new, new._own_class if isinstance(new, Rewritten) else type(new))
        if old in set(new.modules()):  # it goes on being called
            del old.__dict__["_excited_by"]
            give_class(old, old._own_class)


def _unpickled(own: type[nn.Module], as_graph_module: bool) -> nn.Module:
    """A module of the right kind of class for pickle to give its state to."""
    return object.__new__(_graph_class(own, None, ()) if as_graph_module else _class(own, None, None, None, excited=False))


class GraphRegion(Rewritten, fx.GraphModule):
    """An `fx.GraphModule` that runs one graph in training and one in evaluation, which may be the same.

    `graph` is that of the current mode. Calling `recompile()` after an edit takes up the edits of both; from then on the graphs
    are what the module is, and none of its own code takes their place.
    """

    def _copied(self, attributes: Mapping[str, Any], copied: Any = None) -> Any:
        copied = super()._copied(attributes, copied)
        edited = copied.__dict__.get("_edited", False)
        copied.__class__ = _anew(type(self))
        copied._generate()
        copied.__dict__["_edited"] = edited
        if not edited:
            _share_class(copied)
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
        """Generate the code of both modes' graphs anew, which this module alone then runs."""
        if hasattr(self, "_own_class"):
            self.__class__ = _anew(type(self))
        code = self._generate()
        self.__dict__["_edited"] = True
        return code

    def _generate(self) -> Any:
        graphs = self.__dict__.get("_graphs", {False: self._graph})
        forwards: dict[fx.Graph, Forward] = {}
        code = None
        for graph in (graphs[training] for training in sorted(graphs, key=lambda mode: mode == self.training)):
            if graph not in forwards:
                self._graph = graph
                graph.owning_module = self
                with asking_once(graph):
                    code = super().recompile()
                forwards[graph] = type(self).forward
        region = {mode: forwards[graphs.get(mode, self._graph)] for mode in (True, False)}
        if "_graphs" not in self.__dict__:  # a view of a graph, for passes
            type(self).forward = by_mode(region)
        else:
            excited = bool(self.__dict__.get("_excited_by"))
            type(self)._region = region
            type(self).forward = forward_of(type(self)._own_class, region, self._host, excited=excited)
        return code


# --------------------------------------------------------------------------------------------------------------- classes
def give_class(
    module: nn.Module,
    own: type[nn.Module],
    own_graph: fx.Graph | None = None,
    *,
    as_graph_module: bool = False,
    added: tuple[str, ...] = (),
    keeps: bool = True,
) -> None:
    """Have `module` run what its `ATTRIBUTES` say, in place.

    Args:
        module: the module; it has the attributes already.
        own: its own class.
        own_graph: its own graph, where it was an `fx.GraphModule`.
        as_graph_module: be an `fx.GraphModule`, too.
        added: the attributes that only an `fx.GraphModule` needs.
        keeps: be of its own class, too; an `fx.GraphModule` need not.
    """
    host, excited = functions_of(module.__dict__.get("_host_graphs")), bool(module.__dict__.get("_excited_by"))
    if not as_graph_module:
        module.__class__ = _class(own, functions_of(module.__dict__.get("_graphs")), host, own_graph, excited=excited)
        return
    graphs = module.__dict__["_graphs"]
    module.__dict__["_graph"] = graphs[module.training]
    module.__class__ = _graph_class(own, own_graph, added, host, keeps=keeps)
    module._generate()  # type: ignore[operator]
    module.__dict__["_edited"] = False
    _share_class(module)


def _graph_class(
    own: type[nn.Module],
    own_graph: fx.Graph | None,
    added: tuple[str, ...],
    host: Forwards | None = None,
    *,
    keeps: bool = True,
) -> type[GraphRegion]:
    """A class for generated code, which is a method, as fx has it. Of fx's name, which fx looks for in bases."""
    keeps = keeps and not issubclass(own, fx.GraphModule)
    bases: tuple[type, ...] = (GraphRegion, own) if keeps else (GraphRegion,)
    bases = (Sequence, *bases) if keeps and issubclass(own, nn.Sequential) else bases
    attributes = {
        "_own_class": own,
        "_own_graph": own_graph,
        "_added": added,
        "_host": host,
        "__doc__": own.__doc__,
        "_furnish": staticmethod(give_class),
    }
    region = types.new_class("GraphModuleImpl", bases, exec_body=lambda body: body.update(attributes))
    region.__name__ = own.__name__
    return region


def _anew(made: type[GraphRegion]) -> type[GraphRegion]:
    """The same class again, for other code."""
    if "_own_class" not in vars(made):  # a class that others have made of it
        return types.new_class(made.__name__, (made,))
    return _graph_class(made._own_class, made._own_graph, made._added, made._host, keeps=issubclass(made, made._own_class))


def _share_class(module: Any) -> None:
    """Have `module`, whose code was just generated, be of the class of another that runs the same code, if there is one."""
    made = type(module)
    if made._own_graph is None:
        keeps, excited = issubclass(made, made._own_class), bool(module.__dict__.get("_excited_by"))
        module.__class__ = first_alike(made, made._own_class, made._added, keeps, excited, made._region, made._host)


def _class(
    own: type[nn.Module], region: Forwards | None, host: Forwards | None, own_graph: fx.Graph | None, *, excited: bool
) -> type[nn.Module]:
    """A class for modules of the class `own`: one for all that run their own code, as models made alike are of one class."""
    if region is not None or host is not None or own_graph is not None:
        return _made_class(own, region, host, own_graph, excited=excited)
    made = _of_code.setdefault(own, {})
    if excited not in made:
        made[excited] = _made_class(own, None, None, None, excited=excited)
    return made[excited]


_of_code: weakref.WeakKeyDictionary[type[nn.Module], dict[bool, type[nn.Module]]] = weakref.WeakKeyDictionary()


#: Without the commas and brackets by which `torch.export.save` splits what it writes about modules.
_SCALED = (
    " scaled by a Squeeze-and-Excitation block - fuse what stands before it alone or place blocks behind what is fused "
    'by placement="activation" or "residual" or use se_fx.optimize_for_inference'
)


def _made_class(
    own: type[nn.Module], region: Forwards | None, host: Forwards | None, own_graph: fx.Graph | None, *, excited: bool
) -> type[nn.Module]:
    # What scales its values is no leaf for the tracers of others, which look at the module. Tables of others lack it, such
    # as that of what can be fused, and what they say of that shows the name.
    apart = excited and is_leaf(own)
    body = {
        "__doc__": own.__doc__,
        "__module__": __name__ if apart else own.__module__,
        "__qualname__": own.__qualname__ + _SCALED if apart else own.__qualname__,
        "_own_class": own,
        "_own_graph": own_graph,
        "_host": host,
        "forward": forward_of(own, region, host, excited=excited),
        UNSCALED: forward_of(own, region, host, excited=False),
        "_furnish": staticmethod(give_class),
    }
    bases = (Sequence, Rewritten, own) if issubclass(own, nn.Sequential) else (Rewritten, own)
    return types.new_class(own.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def overrides_module_methods(own: type[nn.Module]) -> bool:
    """Whether a class changes what `train`, `state_dict` and other methods of every module do, so that they must be kept."""
    theirs = [kind for kind in own.__mro__ if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.nn.")]
    return any(name in _MODULE_METHODS for kind in theirs for name in vars(kind))


_MODULE_METHODS = {name for name, member in vars(nn.Module).items() if isinstance(member, types.FunctionType)}
_MODULE_METHODS -= {"__init__", "forward", "extra_repr", "__repr__", "__dir__", "_get_name"}
