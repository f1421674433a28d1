"""Capture: from a model to graph regions that run exactly as the model did.

A *region* is a module captured as one graph. What can't be traced is made *opaque*: it stays a `call_module` in the graph
around it and runs its own code, and what it calls is captured region by region, down to a lone `nn.Conv2d`. So any
model is captured, in as many regions as it takes. Knows nothing of Squeeze-and-Excitation.

    ResNet                 one region, the root
    Faster R-CNN           runs its own code; regions backbone.body, backbone.fpn.inner_blocks.0.0, ...

Tracing happens on a scratch clone, so that whatever a model's code does to itself while traced is thrown away.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from se_fx.cloning import clone
from se_fx.errors import reason_of
from se_fx.plain import check_plain
from se_fx.randomness import random_state, set_random_state
from se_fx.regions import Inserted, constants_of, hooked
from se_fx.snapshot import Snapshot
from se_fx.tracing import DRAWS, Tracer

__all__ = ["Capture", "Region", "capture", "collector_paused", "is_foreign"]


@dataclass(frozen=True)
class Region:
    """A module captured as graphs, or a lone Conv2d called from code that isn't.

    Attributes:
        path: qualified name in the model; empty at the root.
        module: the module the graphs' targets refer to, in a scratch clone of the model. To be read, never run.
        graphs: the graph by `training`, one object under both keys where the modes agree; None for a lone Conv2d.
        constants: tensors that the model's code made while being traced, by the attribute name the graphs use.
    """

    path: str
    module: nn.Module
    graphs: dict[bool, fx.Graph] | None
    constants: dict[str, Tensor] = field(default_factory=dict)

    def convs(self) -> dict[nn.Module, str]:
        """The Conv2d modules the region calls, with their names in it; a lone Conv2d's is empty."""
        if self.graphs is None:
            return {self.module: ""}
        called = {str(node.target) for graph in self.graphs.values() for node in graph.nodes if node.op == "call_module"}
        modules = dict(self.module.named_modules(remove_duplicate=False))
        return {modules[name]: name for name in sorted(called) if isinstance(modules[name], nn.Conv2d)}

    def qualified(self, name: str) -> str:
        """The name in the model of what is called `name` in the region."""
        return ".".join(filter(None, (self.path, name)))


@dataclass(frozen=True)
class Capture:
    """A model's regions.

    Attributes:
        model: the model, untouched.
        regions: its regions, in the order of its modules.
        opaque: the modules that run their own code, by qualified name (the root's is empty), each with the reason.
    """

    model: nn.Module
    regions: tuple[Region, ...]
    opaque: dict[str, str]


def capture(model: nn.Module, *, finely: bool = False) -> Capture:
    """Capture `model` in as few regions as it allows. The model is left as it is.

    Args:
        model: any module.
        finely: look into all modules that aren't PyTorch's own: normalisation and attention of others, subclasses of
            `nn.Conv2d`, inserted blocks; and in eval mode only. Otherwise into those that hold a Conv2d, in both modes.

    Raises:
        SqueezeExciteError: `model` is not an `nn.Module`, or is wrapped, compiled, scripted or not initialised yet.
    """
    check_plain(model)
    scratch = clone(model)
    entered = set(filter(is_foreign, scratch.modules())) if finely else _conv_holders(scratch)
    names = {id(module): name for name, module in scratch.named_modules()}
    regions: list[Region] = []
    opaque: dict[str, str] = {}

    def visit(module: nn.Module) -> None:
        path = names[id(module)]
        if path in {region.path for region in regions}:
            return
        if isinstance(module, nn.Conv2d):
            regions.append(Region(path, module, None))
        if module not in entered or isinstance(module, nn.Conv2d):
            return
        try:
            tracing = _Tracing(module, entered, (False,) if finely else (True, False))
            region = Region(path, module, tracing.graphs(), tracing.constants)
        except Untraceable as untraceable:
            opaque[path] = str(untraceable)
            for child in _called_children(module, untraceable.called):
                visit(child)
            return
        regions.append(region)
        for name in tracing.opaque:
            visit(module.get_submodule(name))

    with _tracing_lock, collector_paused():
        randomness = random_state()
        try:
            visit(scratch)
        finally:
            set_random_state(randomness)
    _share(regions, scratch)
    order = {name: position for position, name in enumerate(names.values())}
    return Capture(model, tuple(sorted(regions, key=lambda region: order[region.path])), opaque)


def _share(regions: list[Region], scratch: nn.Module) -> None:
    """A Conv2d that more than one region calls becomes a region of its own."""
    callers: dict[nn.Module, set[str]] = {}
    for region in regions:
        for module in region.convs():
            callers.setdefault(module, set()).add(region.path)
    names = {module: name for name, module in scratch.named_modules()}
    alone = {region.path for region in regions if region.graphs is None}
    regions += [
        Region(names[conv], conv, None) for conv, paths in callers.items() if len(paths) > 1 and names[conv] not in alone
    ]


# ------------------------------------------------------------------------------------------------------------ one region
_KEEPS_STATE = "keeps state in attributes, which a graph would not update"


class Untraceable(Exception):
    """The root of a region can't be traced; `called` names the submodules its code called until then."""

    def __init__(self, reason: str, called: set[str]) -> None:
        super().__init__(reason)
        self.called = called


class _Tracing:
    """Traces one module in both modes, retrying with ever more of its submodules opaque until all is faithful."""

    def __init__(self, module: nn.Module, entered: set[nn.Module], modes: tuple[bool, ...]) -> None:
        self.module = module
        self.entered = entered
        self.modes = modes
        self.opaque: dict[str, str] = {}
        self.constants = constants_of(module)
        self.called: set[str] = set()
        for name, child in module.named_modules():
            if child is module or child not in entered:
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
        if self._depends_on_optional_arguments(graphs[False]):
            raise Untraceable("its code depends on optional arguments of forward", self.called)
        nodes = [node for graph in graphs.values() for node in graph.nodes]
        called = {node.target for node in nodes if node.op == "call_module"}
        read = {node.target for node in nodes if node.op == "get_attr"}
        self.opaque = {name: reason for name, reason in self.opaque.items() if name in called}
        self.constants = {name: constant for name, constant in self.constants.items() if name in read}
        one = True not in graphs or _agree(graphs[True], graphs[False])
        return dict.fromkeys((True, False), graphs[False]) if one else graphs

    def _trace(self, training: bool, defaults: dict[str, Any] | None = None, watch: bool = False) -> fx.Graph:
        if "forward" in self.module.__dict__:
            raise Untraceable("its forward was replaced on the instance", self.called)
        snapshot = Snapshot(self._inlined(), training)
        tracer = Tracer(self.opaque, self.entered, defaults, watch)
        randomness = random_state()
        try:
            graph = tracer.trace(self.module)
        except Exception as error:
            raise Untraceable(reason_of(error), self.called | tracer.called) from error
        finally:
            changed = snapshot.undo()
        if random_state() != randomness and not watch:
            return self._trace(training, defaults, watch=True)
        if random_state() != randomness and tracer.opaque == self.opaque:
            raise Untraceable(DRAWS, self.called)
        for name, module in changed.items():
            if module is self.module:
                raise Untraceable(_KEEPS_STATE, self.called | tracer.called)
            tracer.opaque[name] = _KEEPS_STATE
        self.opaque.update(tracer.opaque)
        self.called |= tracer.called
        self._keep(tracer.made, graph, "train" if training else "eval")
        return graph

    def _inlined(self) -> dict[str, nn.Module]:
        """The modules whose own code the trace will run, by name."""
        return {
            name: module
            for name, module in self.module.named_modules()
            if module in self.entered and not any(name == outer or name.startswith(outer + ".") for outer in self.opaque)
        }

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
        except Untraceable:
            return all(value is None for value in values.values())  # and so would the graph fail, run on None


def _called_children(module: nn.Module, called: set[str]) -> Iterator[nn.Module]:
    """The modules that an untraceable module's code calls, as far as can be told without running it."""
    for name, child in module.named_children():
        calls = name in called
        bypassed = not calls and any(other.startswith(name + ".") for other in called)
        # A Sequential may as well be iterated by its owner; so may any container without a forward.
        container = type(child).forward in (nn.Module.forward, nn.Sequential.forward)
        if calls or not (bypassed or container):
            yield child
        else:
            yield from _called_children(
                child, {other.removeprefix(name + ".") for other in called if other.startswith(name + ".")}
            )


# ---------------------------------------------------------------------------------------------------- faithful or not
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


# ------------------------------------------------------------------------------------------------------------- the model
_tracing_lock = threading.RLock()  # one patch of nn.Module at a time


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Graphs are cycles, and hundreds of thousands of objects: the collector would walk them over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _conv_holders(model: nn.Module) -> set[nn.Module]:
    """All modules that hold an `nn.Conv2d`."""
    holders: set[nn.Module] = set()

    def holds(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return True
        found = [holds(child) for child in module.children() if not isinstance(child, Inserted)]
        if any(found):
            holders.add(module)
        return module in holders

    holds(model)
    return holders


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's code isn't PyTorch's own."""
    home = type(module).forward.__module__ or ""  # the code of an fx.GraphModule has none
    return isinstance(module, nn.Sequential) or not home.startswith("torch.nn")
