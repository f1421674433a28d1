"""Tracing: one module as graphs that run exactly as its code does, or the reason why there are none."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from se_fx.capture.calls import Call
from se_fx.capture.randomness import random_state
from se_fx.capture.snapshot import Snapshot
from se_fx.capture.tracer import DRAWS, Tracer
from se_fx.capture.values import WRITES
from se_fx.errors import reason_of
from se_fx.regions import constants_of, hooked, named, reached, set_by, watch

__all__ = ["Tracing", "Untraceable"]

_WRITTEN = "has attributes that code sets which is in no graph"


class Untraceable(Exception):
    """The root of a region can't be traced; `called` names the submodules its code called until then."""

    def __init__(self, reason: str, called: set[str]) -> None:
        super().__init__(reason)
        self.called = called


class Tracing:
    """Traces one module in both modes, retrying with ever more of its submodules opaque until all is faithful.

    Args:
        module: the module, in a scratch clone of the model.
        entered: all modules whose code is to be looked into.
        modes: the values of `training` to trace it for.
        written: gains the ids of the modules that code writes to. These can be part of no graph but of their own callers' code.
        within: whether it is a module within the model.
        finer: more modules whose code is to be looked into, in training mode alone.

    Attributes:
        opaque: the submodules that stay calls, by name in the module, each with the reason.
        constants: tensors that the code has made, by the attribute names that the graphs use.
        called: the submodules that the code has called.
        calls: the tree of calls behind each graph.
    """

    def __init__(
        self,
        module: nn.Module,
        entered: set[nn.Module],
        modes: tuple[bool, ...],
        written: set[int] | None = None,
        within: bool = False,
        finer: Set[nn.Module] = frozenset(),
    ) -> None:
        self.module = module
        self.by_mode = {True: entered | finer, False: entered}
        self.entered = entered | finer
        self.modes, self.within = modes, within
        self.opaque: dict[str, str] = {}
        self.constants = constants_of(module)
        self.called: set[str] = set()
        self.calls: dict[fx.Graph, Call] = {}
        self.snapshot = Snapshot(module, written)
        self._leave_alone_what_is_written()
        for name, child in module.named_modules():
            if child is module or child not in self.entered:
                continue
            if hooked(child):
                self.opaque[name] = "has hooks, which a graph would drop"
            elif type(child).train is not nn.Module.train:
                self.opaque[name] = "has a train() of its own, which sets modes that a graph would not see"
            elif child.training != module.training:
                self.opaque[name] = "is in another mode (train or eval) than the module around it"

    def graphs(self) -> dict[bool, fx.Graph]:
        """The graph by `training`."""
        while True:
            known = len(self.opaque)
            graphs = {training: self._trace(training) for training in self.modes}
            if len(self.opaque) == known:
                break
        self.calls = {graph: self.calls[graph] for graph in graphs.values()}
        if id(self.module) in self.snapshot.written:
            raise Untraceable(_WRITTEN, self.called)
        if self._depends_on_optional_arguments(graphs[False]):
            raise Untraceable("its code depends on optional arguments of forward", self.called)
        nodes = [node for graph in graphs.values() for node in graph.nodes]
        called = {node.target for node in nodes if node.op == "call_module"}
        read = {node.target for node in nodes if node.op == "get_attr"}
        self.opaque = {name: reason for name, reason in self.opaque.items() if name in called}
        self.constants = {name: constant for name, constant in self.constants.items() if name in read}
        self._refuse_what_others_may_set(called)
        one = True not in graphs or _agree(graphs[True], graphs[False])
        return dict.fromkeys((True, False), graphs[False]) if one else graphs

    def _refuse_what_others_may_set(self, called: Set[Any]) -> None:
        """The code that a graph calls runs while the graph does, which knows what it has read by then as constants."""
        everything = named(self.module)
        within = {part for name in called for part in self.module.get_submodule(name).modules()}
        opaque = [(part, own) for _, part, own in everything if part in within]
        may_set = {part: set_by(own, with_own=True) for part, own in opaque}
        if not any(may_set.values()):
            return
        of_others = frozenset[str]().union(*(set_by(own) for _, own in opaque))
        inner = named(self.module, self._paths())
        for name, part, values in (*watch(inner), *reached(inner, everything)):
            for attribute in (of_others | may_set.get(part, frozenset())).intersection(values):
                raise Untraceable(f"reads {f'{name}.{attribute}'.lstrip('.')}, which code in no graph may set", self.called)

    def _trace(self, training: bool, defaults: dict[str, Any] | None = None, watch: bool = False) -> fx.Graph:
        if "forward" in self.module.__dict__:
            raise Untraceable("its forward was replaced on the instance", self.called)
        self.snapshot.set_mode(training)
        tracer = Tracer(self.opaque, self.by_mode[training], defaults, self.snapshot, watch, self.within)
        randomness = random_state()
        try:
            graph = tracer.trace(self.module)
        except Exception as error:
            raise Untraceable(reason_of(error), self.called | tracer.called) from error
        finally:
            wrote = self.snapshot.undo()
        drew = random_state() != randomness
        if (drew or wrote) and tracer.opaque == self.opaque:
            if not watch:  # whose code that was is not known yet
                return self._trace(training, defaults, watch=True)
            raise Untraceable(DRAWS if drew else WRITES, self.called | tracer.called)
        self.opaque.update(tracer.opaque)
        self._leave_alone_what_is_written()
        self.called |= tracer.called
        self.calls[graph] = tracer.calls
        self._keep(tracer.made, graph, "train" if training else "eval")
        return graph

    def _leave_alone_what_is_written(self) -> None:
        for name, child in self.module.named_modules() if self.snapshot.written else ():
            if id(child) in self.snapshot.written and child is not self.module and child in self.entered:
                self.opaque.setdefault(name, _WRITTEN)

    def inlined(self) -> set[int]:
        """The ids of the modules whose code is in the graphs."""
        return {id(self.module.get_submodule(path)) for path in self._paths()} & set(map(id, self.entered))

    def _paths(self) -> set[str]:
        return {call.path for root in self.calls.values() for call in root.all()}

    def _keep(self, made: dict[str, Tensor], graph: fx.Graph, mode: str) -> None:
        """Keep the constants of one trace, under another name where the other mode's trace made a different one."""
        for name, constant in made.items():
            known = self.constants.get(name)
            if known is None or (known.dtype == constant.dtype and torch.equal(known, constant)):
                self.constants[name] = constant
                continue
            self.constants[f"{name}_{mode}"] = constant
            for node in graph.nodes:
                if node.op == "get_attr" and node.target == name:
                    node.target = f"{name}_{mode}"

    def _depends_on_optional_arguments(self, graph: fx.Graph) -> bool:
        """Whether the code goes another way with some arguments left out, or None: `if mask is not None` can't be seen."""
        _, *parameters = inspect.signature(type(self.module).forward).parameters.values()
        used = {node.target for node in graph.nodes if node.op == "placeholder" and node.users}
        if any(f"{stars}{p.name}" in used for p in parameters for stars in ("*", "**")):
            return True
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        variants = [{name: value} for name, value in defaults.items()] + [{p.name: None} for p in parameters[1:]]
        variants += [defaults] if len(defaults) > 1 else []
        variants += [{n: v for n, v in defaults.items() if n != name} for name in defaults if len(defaults) > 2]
        return any(not self._goes_the_same_way(graph, values) for values in variants)

    def _goes_the_same_way(self, graph: fx.Graph, values: dict[str, Any]) -> bool:
        try:
            return _agree(graph, self._trace(False, values), values)
        except Untraceable as untraceable:
            failed = untraceable.__cause__ is not None and not isinstance(untraceable.__cause__, fx.proxy.TraceError)
            return failed and all(value is None for value in values.values())  # and so would the graph fail, run on None


def _agree(a: fx.Graph, b: fx.Graph, inputs: dict[str, Any] | None = None) -> bool:
    """Whether two traces are the same, node by node, once the placeholders of `a` in `inputs` have these values.

    A node's name follows from its target and position, so names stand for nodes.
    """

    def lines(graph: fx.Graph, values: dict[str, Any]) -> list[Any]:
        def value_of(node: fx.Node) -> Any:
            return values.get(str(node.target), node) if node.op == "placeholder" else node

        return [
            (node.op, node.name, node.target, repr(fx.node.map_arg((node.args, node.kwargs), value_of))) for node in graph.nodes
        ]

    return lines(a, inputs or {}) == lines(b, {})
