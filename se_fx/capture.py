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
import inspect
import operator
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_fx.errors import SqueezeExciteError
from se_fx.regions import Inserted, clone, constants_of

__all__ = ["Capture", "Region", "Tracer", "capture"]


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
        called = [str(n.target) for graph in self.graphs.values() for n in graph.nodes if n.op == "call_module"]
        modules = {self.module.get_submodule(target): target for target in reversed(called)}
        return {module: name for module, name in modules.items() if isinstance(module, nn.Conv2d)}

    def qualified(self, name: str) -> str:
        """The name in the model of what is called `name` in the region."""
        return ".".join(filter(None, (self.path, name)))


@dataclass(frozen=True)
class Capture:
    """A model's regions.

    Attributes:
        model: the model, untouched.
        regions: its regions, in the order of its modules.
        opaque: why a module was not captured in the region around it, by qualified name; the root's is the empty name.
    """

    model: nn.Module
    regions: tuple[Region, ...]
    opaque: dict[str, str]


def capture(model: nn.Module) -> Capture:
    """Capture `model` in as few regions as it allows. The model is left as it is.

    Raises:
        SqueezeExciteError: `model` is not an `nn.Module`, or is wrapped, compiled, scripted or not initialised yet.
    """
    _check(model)
    scratch = clone(model)
    conv_holders = _conv_holders(scratch)
    names = {id(module): name for name, module in scratch.named_modules()}
    regions: list[Region] = []
    opaque: dict[str, str] = {}

    def visit(path: str, module: nn.Module) -> None:
        if module not in conv_holders or path in {region.path for region in regions}:
            return
        if isinstance(module, nn.Conv2d):
            regions.append(Region(path, module, None))
            return
        try:
            tracing = _Tracing(module, conv_holders)
            region = Region(path, module, tracing.graphs(), tracing.constants)
        except Untraceable as untraceable:
            opaque[path] = str(untraceable)
            for child in _called_children(module, untraceable.called):
                visit(names[id(child)], child)
            return
        regions.append(region)
        for name, reason in tracing.opaque.items():
            opaque[region.qualified(name)] = reason
            visit(region.qualified(name), module.get_submodule(name))

    with _tracing_lock, _random_state_kept():
        visit("", scratch)
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
    regions += [Region(names[conv], conv, None) for conv, paths in callers.items() if len(paths) > 1 and names[conv] not in alone]


# ------------------------------------------------------------------------------------------------------------ one region
class Untraceable(Exception):
    """The root of a region can't be traced; `called` names the submodules its code called until then."""

    def __init__(self, reason: str, called: set[str]) -> None:
        super().__init__(reason)
        self.called = called


class _Tracing:
    """Traces one module in both modes, retrying with ever more of its submodules opaque until all is faithful."""

    def __init__(self, module: nn.Module, conv_holders: set[nn.Module]) -> None:
        self.module = module
        self.conv_holders = conv_holders
        self.opaque: dict[str, str] = {}
        self.constants = constants_of(module)
        self.called: set[str] = set()
        for name, child in module.named_modules():
            if child is module or child not in conv_holders or isinstance(child, nn.Conv2d):
                continue
            if _hooked(child):
                self.opaque[name] = "has hooks, which a graph would drop"
            elif child.training != module.training:
                self.opaque[name] = "is in another mode (train or eval) than the module around it"

    def graphs(self) -> dict[bool, fx.Graph]:
        """The graph by `training`."""
        while True:
            known = len(self.opaque)
            graphs = {training: self._trace(training) for training in (True, False)}
            if len(self.opaque) == known:
                break
        if self._depends_on_optional_arguments(graphs[False]):
            raise Untraceable("its code depends on optional arguments of forward", self.called)
        called = {node.target for graph in graphs.values() for node in graph.nodes if node.op == "call_module"}
        self.opaque = {name: reason for name, reason in self.opaque.items() if name in called}
        return dict.fromkeys((True, False), graphs[False]) if _agree(graphs[True], graphs[False]) else graphs

    def _trace(self, training: bool, defaults: dict[str, Any] | None = None) -> fx.Graph:
        inlined = [self.module]  # the modules whose own code the trace runs
        for name, child in self.module.named_modules():
            if child in self.conv_holders and not isinstance(child, nn.Conv2d) and child is not self.module:
                if not any(name == o or name.startswith(o + ".") for o in self.opaque):
                    inlined.append(child)
        before = [(module, _attributes(module)) for module in inlined]
        modes = [(module, module.training) for module in inlined]
        for module in inlined:
            module.training = training
        tracer = Tracer(self.opaque, self.conv_holders, defaults)
        randomness = _random_state()
        try:
            graph = tracer.trace(self.module)
        except Exception as error:
            raise Untraceable(_reason(error), self.called | tracer.called) from error
        finally:
            for module, mode in modes:
                module.training = mode
            changed = [module for module, attributes in before if not _unchanged(module, attributes, tracer.made)]
            for module, attributes in before:
                _reset(module, attributes)
        self.opaque.update(tracer.opaque)
        self.constants.update(tracer.made)
        self.called |= tracer.called
        reason = "keeps state in attributes, which a graph would not update"
        if not changed and randomness != _random_state():
            changed, reason = [self.module], "draws random numbers that a graph would freeze"
        for module in changed:
            name = next(name for name, child in self.module.named_modules() if child is module)
            if module is self.module:
                raise Untraceable(reason, self.called)
            self.opaque[name] = reason
        return graph

    def _depends_on_optional_arguments(self, graph: fx.Graph) -> bool:
        """Whether the code goes another way with the defaults than with values: `if mask is not None` can't be seen."""
        parameters = inspect.signature(type(self.module).forward).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        return bool(defaults) and not _agree(graph, self._trace(False, defaults), defaults)


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
            yield from _called_children(child, {other.removeprefix(name + ".") for other in called if other.startswith(name + ".")})


# --------------------------------------------------------------------------------------------------------------- tracing
class Tracer(fx.Tracer):
    """A tracer that records what `fx.Tracer` silently drops, and leaves alone what it can't record.

    Leaves are every `nn.Conv2d`, subclasses included, and every module that holds none: normalisation, attention and
    drop-path modules stay whole, and so keep their buffers, hooks and modes. When the code of a submodule raises, that
    submodule (the innermost) turns opaque and tracing goes on.

    Args:
        opaque: submodules to keep as `call_module`, by qualified name, with the reason. `self.opaque` gains those found.
        conv_holders: all modules that are or hold an `nn.Conv2d`; None for every module to be a leaf.
        inputs: values for the code to see in place of the root's arguments of these names.
    """

    proxy_buffer_attributes = True  # else arithmetic between buffers would be done once, while tracing

    def __init__(
        self,
        opaque: dict[str, str] | None = None,
        conv_holders: set[nn.Module] | None = None,
        inputs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(autowrap_functions=(torch.utils.checkpoint.checkpoint,))
        self.opaque = dict(opaque or {})
        self.conv_holders = conv_holders or set()
        self.inputs = inputs or {}
        self.called: set[str] = set()
        self.made: dict[str, Tensor] = {}
        self._ambient = _ambient()
        self._thread = threading.get_ident()  # fx patches nn.Module for all threads; others must not notice

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of `m` are recorded rather than looked into."""
        return isinstance(m, nn.Conv2d) or m not in self.conv_holders or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record or look into one call; a module whose code raises is recorded after all."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        self.called.add(name)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.module_stack = stack
            self.opaque[name] = _reason(error)
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What the code being traced sees as a module's attribute: tensors are traced values."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record one node, unless the code changed the ambient grad mode or autocast, which a graph doesn't hold."""
        if _ambient() != self._ambient:
            raise fx.proxy.TraceError("runs under a grad mode or autocast of its own, which a graph would drop")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Lower an argument, keeping the class of dicts that the model's callers may rely on."""
        if isinstance(a, dict) and type(a) is not dict:
            if type(a).__module__ != "collections" or type(a).__name__ != "OrderedDict":
                raise NotImplementedError(f"a graph can't hold a {type(a).__name__}")
            return self.create_node("call_function", type(a), ([(k, self.create_arg(v)) for k, v in a.items()],), {})
        return super().create_arg(a)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The root's function and what to call it with."""
        function, values = super().create_args_for_root(*args, **kwargs)
        given = [self.inputs.get(str(v.node.target).lstrip("*"), v) if type(v) is _Value else v for v in values]
        return function, given

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node for the code being traced."""
        return _Value(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`; see `fx.Tracer.trace`."""
        present = set(root.__dict__)
        with torch.enable_grad():
            self._ambient = _ambient()
            with _RandomFactories(self), _no_checkpointing():
                graph = super().trace(root, concrete_args)
        self.made = {name: value for name, value in root.__dict__.items() if name not in present and isinstance(value, Tensor)}
        return graph


class _Value(fx.Proxy):
    """A traced value. To the code being traced, `isinstance(value, Tensor)` is what it will be when the graph runs."""

    @property
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        ours = frame.f_code.co_filename.startswith(_TORCH) and frame.f_code.co_name != "is_tensor"
        return _Value if ours or _is_size(self.node) else Tensor

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError


_TORCH = os.path.dirname(torch.__file__) + os.sep
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "stride", "item", "tolist"})


def _is_size(node: Any) -> bool:
    """Whether a node yields a number or a size, as opposed to a tensor."""
    if not isinstance(node, fx.Node):
        return True
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
    from_operator = getattr(node.target, "__module__", None) in (operator.__name__, "_operator", "math")
    return from_operator and all(_is_size(arg) for arg in node.all_input_nodes)


class _RandomFactories(TorchFunctionMode):
    """Records calls that make random tensors, which would otherwise be drawn once, while tracing."""

    FACTORIES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal})

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES:
            return self.tracer.create_proxy("call_function", func, tuple(args), kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Make activation checkpointing raise, since a graph would drop it."""

    original, thread = torch.utils.checkpoint.checkpoint, threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        raise fx.proxy.TraceError("checkpoints activations, which a graph would drop")

    torch.utils.checkpoint.checkpoint = refuse
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = original


def _ambient() -> tuple[bool, int]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), nesting


def _reason(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: (value, _shallow(value)) for name, value in module.__dict__.items()}


def _shallow(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set)) else None


def _unchanged(module: nn.Module, before: dict[str, Any], made: dict[str, Tensor]) -> bool:
    after = {name: value for name, value in module.__dict__.items() if not name.startswith("_tensor_constant")}
    if after.keys() != before.keys():
        return False
    for name, value in after.items():
        then, items = before[name]
        now = _shallow(value)
        if name == "training":
            continue
        if value is not then or type(now) is not type(items) or (now is not None and not _same_items(now, items)):
            return False
    return True


def _same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and b[key] is value for key, value in a.items())
    return all(x is y for x, y in zip(a, b, strict=True))


def _reset(module: nn.Module, before: dict[str, Any]) -> None:
    for name in set(module.__dict__) - set(before):
        if not name.startswith("_tensor_constant"):
            del module.__dict__[name]
    for name, (value, items) in before.items():
        module.__dict__[name] = value
        if isinstance(items, dict):
            value.clear()
            value.update(items)
        elif isinstance(value, list):
            value[:] = items


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    state, numbers = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        torch.set_rng_state(numbers)


# ------------------------------------------------------------------------------------------------------------- the model
_tracing_lock = threading.RLock()  # one patch of nn.Module at a time


def _conv_holders(model: nn.Module) -> set[nn.Module]:
    """All modules that are or hold an `nn.Conv2d`."""
    holders: set[nn.Module] = set()

    def holds(module: nn.Module) -> bool:
        found = [holds(child) for child in module.children() if not isinstance(child, Inserted)]
        if isinstance(module, nn.Conv2d) or any(found):
            holders.add(module)
        return module in holders

    holds(model)
    return holders


def _hooked(module: nn.Module) -> bool:
    return any(
        module.__dict__.get(name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SqueezeExciteError(f"model={type(model).__name__}: expected an nn.Module")
    for name, module in model.named_modules():
        where = f"model's submodule {name!r}" if name else "model"
        kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        if kinds & set(_WRAPPERS) or "FSDPModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise SqueezeExciteError(
                f"{where} is compiled or wrapped already ({type(module).__name__}): transform the plain model first, "
                "then compile or wrap the result"
            )
        if isinstance(module, torch.jit.ScriptModule) and any(
            getattr(part, "original_name", "") == "Conv2d" for part in module.modules()
        ):
            raise SqueezeExciteError(f"{where} is TorchScript: transform the Python model first, then script or export the result")
        lazy = [key for key, p in module._parameters.items() if p is not None and nn.parameter.is_lazy(p)]
        if lazy:
            raise SqueezeExciteError(
                f"{where} has the uninitialised lazy parameter {lazy[0]!r}: run the model once on an example, then transform it"
            )
