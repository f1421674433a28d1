"""Host graphs: a module's own code as a graph in which its children are called, told from what tracing saw of its calls."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from se_fx.capture import EXCITED, Call, Region
from se_fx.errors import SqueezeExciteError, shown
from se_fx.regions import EXCITE, own_class, reserve_names

__all__ = ["HostGraphs", "check_argument", "host_graphs"]


@dataclass(frozen=True)
class HostGraphs:
    """The graphs of a module's own code.

    Attributes:
        graphs: by `training`; one object under both keys where the modes agree.
        steps: likewise, the nodes for what the code did, in its order.
        inputs: likewise, the nodes of its arguments, in their order.
        constants: tensors that the code makes, by the attribute name that the graphs use.
    """

    graphs: dict[bool, fx.Graph] = field(default_factory=dict)
    steps: dict[bool, list[fx.Node]] = field(default_factory=dict)
    inputs: dict[bool, list[fx.Node]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def value(self, training: bool, which: int | str) -> fx.Node:
        """The node of a step, or of an input, by position or name."""
        if isinstance(which, int):
            return self.steps[training][which]
        inputs = self.inputs[training]
        return inputs[int(which)] if which.isdecimal() else next(node for node in inputs if node.target == which)


def host_graphs(region: Region, path: str) -> HostGraphs | None:
    """The graphs of the code of one module in a region; None where its calls differ, or can't be told apart from other code."""
    host = HostGraphs()
    known: dict[fx.Graph, _Derived] = {}
    try:
        for training, flat in (region.graphs or {}).items():
            if flat not in known:
                derived = [_Derived(region, flat, call) for call in region.calls[flat].all() if call.path == path]
                if not derived or any(each.lines() != derived[0].lines() for each in derived):
                    return None
                known[flat] = derived[0]
            host.graphs[training], host.steps[training] = known[flat].graph, known[flat].steps
            host.inputs[training] = known[flat].inputs
            host.constants.update(known[flat].constants)
    except _Unknown:
        return None
    return host


class _Unknown(Exception):
    """The code of a call has more to do with that around it than a graph of its own can say."""


class _Derived:
    """The graph of one call's own code."""

    def __init__(self, region: Region, flat: fx.Graph, call: Call) -> None:
        self.region, self.call = region, call
        self.prefix = f"{call.path}." if call.path else ""
        self.graph = fx.Graph(tracer_cls=flat._tracer_cls)
        reserve_names(self.graph)
        self.twins: dict[fx.Node, fx.Node] = {}
        self.constants: dict[str, Tensor] = {}
        self.steps: list[fx.Node] = []
        self.inputs = self._inputs(flat)
        for step in call.steps:
            self.steps.append(self._inner_call(step) if isinstance(step, Call) else self._step(step))
        self.graph.output(self._given(call.returned))

    def lines(self) -> list[Any]:
        """What the graph does; equal for graphs that do the same."""
        return [(node.op, node.name, node.target, repr((node.args, node.kwargs))) for node in self.graph.nodes]

    def _inputs(self, flat: fx.Graph) -> list[fx.Node]:
        if self.call.caller is None:
            for node in flat.nodes:
                if node.op == "placeholder":
                    self.twins[node] = self.graph.node_copy(node)
            return list(self.twins.values())
        own: Any = own_class(self.region.module.get_submodule(self.call.path))
        try:
            bound = inspect.signature(own.forward).bind(None, *self.call.args, **self.call.kwargs)
        except (TypeError, ValueError) as error:
            raise _Unknown from error
        _, *parameters = bound.signature.parameters.values()
        if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
            raise _Unknown
        made = {each.name: self.graph.placeholder(each.name, default_value=each.default) for each in parameters}
        for parameter in parameters:
            given = bound.arguments.get(parameter.name, parameter.default)
            if isinstance(given, fx.Node):
                self.twins.setdefault(given, made[parameter.name])
            elif type(given) in _ATOMS:
                # The code may have gone another way with another value.
                self.graph.call_function(check_argument, (made[parameter.name], given, own.__name__, parameter.name))
            else:
                raise _Unknown
        return list(made.values())

    def _step(self, step: fx.Node) -> fx.Node:
        if EXCITED in step.meta:  # the module whose value it is scales it by itself
            twin = self._twin(step.all_input_nodes[0])
        else:
            args, kwargs = self._given((step.args, {k: v for k, v in step.kwargs.items() if k != EXCITE}))
            target = self._within(str(step.target)) if step.op == "call_module" else step.target
            twin = self.graph.create_node(step.op, target, args, kwargs, type_expr=step.type)
        self.twins[step] = twin
        return twin

    def _inner_call(self, call: Call) -> fx.Node:
        args, kwargs = self._given((call.args, call.kwargs))
        value = self.graph.call_module(self._within(call.path), args, kwargs)
        self._returned(call.returned, value)
        return value

    def _returned(self, returned: Any, value: fx.Node) -> None:
        if isinstance(returned, fx.Node):
            if returned in self.twins:  # it was known before: which of the two the code reads can't be told
                raise _Unknown
            self.twins[returned] = value
        elif isinstance(returned, (tuple, list, dict)):
            for key, each in returned.items() if isinstance(returned, dict) else enumerate(returned):
                self._returned(each, self.graph.call_function(operator.getitem, (value, key)))
        elif type(returned) not in _ATOMS:
            raise _Unknown

    def _given(self, values: Any) -> Any:
        return fx.node.map_arg(values, self._twin)

    def _twin(self, node: fx.Node) -> fx.Node:
        """What a node of the flat graph is here; tensors are read anew."""
        if node in self.twins:
            return self.twins[node]
        if node.op == "get_attr":
            name = str(node.target)
            if name in self.region.constants:
                self.constants[name] = self.region.constants[name]
            twin = self.graph.get_attr(name if name in self.constants else self._within(name))
        elif node.op == "call_method" and node.target == "clone" and node.all_input_nodes[0].op == "get_attr":
            twin = self.graph.call_method("clone", (self._twin(node.all_input_nodes[0]),))
        else:
            raise _Unknown
        self.twins[node] = twin
        return twin

    def _within(self, name: str) -> str:
        if not name.startswith(self.prefix):
            raise _Unknown
        return name.removeprefix(self.prefix)


def check_argument(given: Any, expected: Any, where: str, name: str) -> None:
    """Raise where a host is called with another argument than the one its code was traced with.

    Raises:
        SqueezeExciteError: names the argument.
    """
    if given is not expected and not (type(given) is type(expected) and given == expected):
        raise SqueezeExciteError(
            f"{where}.forward: {name}={shown(given)}: Squeeze-and-Excitation blocks were put into its code as it runs with "
            f"{name}={shown(expected)}. Call it so; or leave its Conv2d layers without blocks, by where="
        )


_ATOMS = frozenset({bool, int, float, str, type(None)})
