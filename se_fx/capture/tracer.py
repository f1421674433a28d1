"""Tracing: a tracer that records faithfully, or says that it can't.

`fx.Tracer` silently drops what its graphs can't hold: grad modes and autocast, activation checkpointing, random numbers,
classes of outputs, the answer to ``isinstance(x, Tensor)``. Here, code that needs these raises while it is traced, and the
module it belongs to is left alone.
"""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from se_fx.capture.calls import Call
from se_fx.capture.questions import A_TENSOR, ambient, matches_structure
from se_fx.capture.randomness import random_state, set_random_state
from se_fx.capture.snapshot import Snapshot
from se_fx.capture.values import CHECKPOINT, CHECKPOINTS, WRITES, Value, watched
from se_fx.errors import reason_of
from se_fx.regions import EXCITE, UNSCALED, excitement, hooked, may_return_none, own_class, reserve_names

__all__ = ["DRAWS", "EXCITED", "Tracer"]

#: The key in the `meta` of a block's node under which it says which module's value it scales, where that does so by itself.
EXCITED = "excited"
DRAWS = "draws random numbers that a graph would freeze"


class Tracer(fx.Tracer):
    """A tracer that records what `fx.Tracer` silently drops, and leaves alone what it can't record.

    Leaves are all modules but those to be looked into; they stay whole, and so keep their buffers, hooks and modes. When
    the code of a submodule raises, that submodule (the innermost) turns opaque and tracing goes on.

    Args:
        opaque: submodules to keep as `call_module`, by qualified name, with the reason. `self.opaque` gains those found.
        entered: all modules whose code is to be looked into; None for every module to be a leaf.
        inputs: values for the code to see in place of the root's arguments of these names.
        snapshot: the state of the root and all within, as it was before; None to ignore what code changes.
        within: the root is a module within a model, of which others may call it.
        watch: find out whose code draws random numbers other than as tensors' values, or changes state; it turns opaque.
    """

    proxy_buffer_attributes = True  # else arithmetic between buffers would be done once, while tracing

    def __init__(
        self,
        opaque: dict[str, str] | None = None,
        entered: set[nn.Module] | None = None,
        inputs: dict[str, Any] | None = None,
        snapshot: Snapshot | None = None,
        watch: bool = False,
        within: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=(CHECKPOINT,))
        self.opaque = dict(opaque or {})
        self.entered = entered or set()
        self.inputs = inputs or {}
        self.snapshot = snapshot
        self.watch, self.within = watch, within
        self.called: set[str] = set()
        self.calls = self._call = Call("")
        self.made: dict[str, Tensor] = {}
        self.refused: str | None = None
        self.own_tensors: set[int] = set()
        self.plain_tensors = frozenset() if snapshot is None else snapshot.tensors.keys()
        self.thread = threading.get_ident()  # fx patches nn.Module for all threads; others must not notice
        self._ambient = ambient()
        self._copies: dict[Any, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of `m` are recorded rather than looked into."""
        return m not in self.entered or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record or look into one call; a module whose code raises is recorded after all."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        self.called.add(name)
        if self.is_leaf_module(m, name):
            if not str(type(m).__call__.__module__).startswith("torch."):
                raise self.refuse(f"calls a {type(m).__name__}, whose __call__ is its own")
            if self.snapshot is not None and self.snapshot.changed(m):
                raise self.refuse(WRITES)
            self._check_result(m)
            blocks = [] if EXCITE in kwargs else excitement(m)
            output = super().call_module(m, forward, args, {**kwargs, EXCITE: False} if blocks else kwargs)
            for container, block in blocks:  # seen as nodes of their own
                output = getattr(container, block)(output)
                output.node.meta[EXCITED] = name
            return output
        self._check_writes()  # of the caller's
        call = Call(name, self._call, *_with_nodes((args, kwargs)))
        steps, self._call = len(self._call.steps), call
        call.caller.steps.append(call)  # type: ignore[union-attr]
        stack, randomness = self.module_stack.copy(), random_state() if self.watch else None
        try:
            _check_code(m)
            result = super().call_module(m, forward, args, kwargs)
            if randomness is not None and random_state() != randomness:
                set_random_state(randomness)  # lest the callers be blamed too
                raise fx.proxy.TraceError(DRAWS)
            self._check_writes()
            if self.refused:  # and the code has caught that
                raise fx.proxy.TraceError(self.refused)
            call.returned = _with_nodes(result)
            self._call = call.caller  # type: ignore[assignment]
            return result
        except Exception as error:
            self.module_stack, self.refused, self._call = stack, None, call.caller  # type: ignore[assignment]
            del self._call.steps[steps:]
            self.opaque[name] = reason_of(error)
            if self.watch and self.snapshot is not None:
                self.snapshot.restore()
            self._check_result(m)
            return super().call_module(m, forward, args, kwargs)

    def _check_result(self, module: nn.Module) -> None:
        """Whether a value is None can be asked without anybody's knowing: `x is None`."""
        own: Any = own_class(module)
        if may_return_none(own):
            raise self.refuse(f"calls a {own.__name__}, which may return None")

    def _check_writes(self) -> None:
        """While watching: undo what the code that runs now has changed, lest others be blamed too, and refuse it."""
        if self.watch and self.snapshot is not None and self.snapshot.changed():
            self.snapshot.restore()
            raise self.refuse(WRITES)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What the code being traced sees as a module's attribute: tensors are traced values."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record one node, unless it needs what a graph doesn't hold: a grad mode or autocast of its own, checkpointing."""
        if CHECKPOINT in args:
            raise fx.proxy.TraceError(CHECKPOINTS)
        if ambient() != self._ambient:
            raise fx.proxy.TraceError("runs under a grad mode or autocast of its own, which a graph would drop")
        node = super().create_node(*args, **kwargs)
        if node.op.startswith("call_"):
            self._call.steps.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        """Lower an argument, keeping the class of dicts that the model's callers may rely on."""
        if type(a) is Value:
            if a.node.graph is not self.graph:
                raise self.refuse("uses a value of an earlier call")
            return a.node
        looks_into = self.snapshot is not None  # not where a pickle is loaded, whose graph may pass modules on
        if isinstance(a, nn.Module) and (a in self.entered or (isinstance(a, nn.Conv2d) and looks_into)):
            raise fx.proxy.TraceError(f"passes a {type(a).__name__} on to a function, which a graph can't look into")
        if type(a) is collections.OrderedDict:
            return self.create_node("call_function", type(a), ([(k, self.create_arg(v)) for k, v in a.items()],), {})
        if isinstance(a, (dict, list, tuple)) and type(a) not in _HELD and not hasattr(a, "_fields"):
            raise self.refuse(f"returns or passes a {type(a).__name__}")
        node = super().create_arg(a)
        made_here = isinstance(a, Tensor) and str(getattr(node, "target", "")).startswith("_tensor_constant")
        return self._anew(a, cast("fx.Node", node)) if made_here else node

    def _anew(self, constant: Tensor, node: fx.Node) -> fx.Node:
        """A copy, for each call of the graph, of a tensor that the code has made: it may change it in place."""
        if constant.grad_fn is not None:
            raise self.refuse("computes with parameters that it did not read as attributes")
        if node.target not in self._copies:
            self._copies[node.target] = self.create_node("call_method", "clone", (node,), {})
        return self._copies[node.target]

    def refuse(self, reason: str) -> fx.proxy.TraceError:
        """The error to raise where the code does what a graph can't; remembered, in case the code catches it."""
        self.refused = reason
        return fx.proxy.TraceError(reason)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Control flow on a value."""
        raise self.refuse("branches on a value")

    def iter(self, obj: fx.Proxy) -> Any:
        """A loop over a value."""
        raise self.refuse("iterates over a value")

    def is_recorded(self, module: nn.Module) -> bool:
        """Whether a module is one of those whose calls are recorded, or within one."""
        if self.snapshot is None or id(module) not in self.snapshot.held:
            return False
        if module not in self.entered:
            return True
        name = self.path_of_module(module)
        return any(name == outer or name.startswith(outer + ".") for outer in self.opaque)

    def example_of(self, node: fx.Node) -> Tensor | None:
        """What a node yields, `A_TENSOR` for a tensor not known yet, None where it may be something else."""
        if node.op != "get_attr":
            return A_TENSOR if self.is_tensor(node) else None
        path, _, name = str(node.target).rpartition(".")
        owner = self.root.get_submodule(path)
        return next((held[name] for held in (owner._parameters, owner._buffers, owner.__dict__) if name in held), None)

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node certainly yields a tensor."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return isinstance(module, _PLAIN) and not hooked(module) and _returns_a_tensor(module)
        if node.op == "get_attr":
            return True
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op != "placeholder" and name not in _TUPLES and any(map(self.is_tensor, node.all_input_nodes))

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The root's function and what to call it with."""
        reserve_names(self.graph)
        function, values = super().create_args_for_root(*args, **kwargs)
        given = [self.inputs.get(str(v.node.target).lstrip("*"), v) if type(v) is Value else v for v in values]
        return function, given

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node for the code being traced."""
        return Value(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`; see `fx.Tracer.trace`."""
        if self.snapshot is not None:
            _check_code(root)
        # What calls a module within the model scales what that returns.
        self.traced_func_name = UNSCALED if self.within and excitement(root) else "forward"
        present = set(root.__dict__)
        tensors = (*root.parameters(), *root.buffers()) if self.entered else ()
        self.own_tensors = {id(tensor) for tensor in tensors}
        with torch.enable_grad():
            self._ambient = ambient()
            with watched(self):
                graph = super().trace(root, concrete_args)
        self.calls.returned = graph.output_node().args[0]
        if self.refused:
            raise fx.proxy.TraceError(self.refused)
        if hidden := _hidden_by_arguments(graph):
            raise fx.proxy.TraceError(f"has an argument called {hidden!r}, a name that generated code needs")
        for node in graph.nodes:
            if isinstance(node.type, str):  # a postponed annotation, whose name means nothing to the graph's code
                node.type = None
        made = {key: value for key, value in root.__dict__.items() if key.startswith("_tensor_constant") and key not in present}
        for key in made:
            del root.__dict__[key]
        self.made = made
        return graph


def _with_nodes(values: Any) -> Any:
    """The same tuples, lists and dicts, with nodes for traced values."""
    kind = type(values)
    if kind is Value:
        return values.node
    if kind in (tuple, list):
        return kind(map(_with_nodes, values))
    return {key: _with_nodes(value) for key, value in values.items()} if kind is dict else values


def _returns_a_tensor(module: nn.Module) -> bool:
    """Whether a module of a class derived from one of PyTorch's returns what these do, or says that it does."""
    forward = type(module).forward
    declared = str(getattr(forward, "__annotations__", {}).get("return"))  # a class, or its name
    own = not forward.__module__.startswith("torch.nn.") and declared not in ("Tensor", "torch.Tensor", str(Tensor))
    return not own and "forward" not in module.__dict__


def _check_code(module: nn.Module) -> None:
    if matches_structure(type(module)):
        raise fx.proxy.TraceError("may match the structure of a value, which a graph would freeze")


def _hidden_by_arguments(graph: fx.Graph) -> str | None:
    """A name that an argument takes from the graph's code, which keeps arguments' names: PyTorch's, or a built-in's."""
    named = {str(node.target).lstrip("*"): node.name for node in graph.nodes if node.op == "placeholder"}
    renamed = [target for target, name in named.items() if target != name]
    needed = {"self", *fx.graph._custom_builtins}
    if not renamed or needed.intersection(renamed):
        return next((target for target in renamed if target in needed), None)
    # Their values are read once, where nodes' names are given to them.
    _, body = graph.python_code("self").src.partition("def forward")[2].split("\n", 1)  # functions to wrap stand before
    return next((each for each in renamed if len(re.findall(rf"(?<![.\w]){each}\b(?!\s*=)", body)) > 1), None)


_TUPLES = frozenset(
    {"split", "chunk", "unbind", "tensor_split", "max", "min", "topk", "sort", "var_mean", "std_mean", "size", "dim", "numel"}
    | {"item", "tolist", "stride", "getattr", "getitem", "ndimension", "meshgrid", "unsafe_chunk", "mode", "median", "unique"}
)
_HELD = (dict, list, tuple, torch.Size, fx.immutable_collections.immutable_list, fx.immutable_collections.immutable_dict)
_PLAIN = (
    nn.Conv2d,
    nn.modules.batchnorm._NormBase,
    nn.ReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
)
