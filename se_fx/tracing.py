"""Tracing: a tracer that records faithfully, or says that it can't.

`fx.Tracer` silently drops what its graphs can't hold: grad modes and autocast, activation checkpointing, random numbers,
classes of outputs, the answer to ``isinstance(x, Tensor)``. Here, code that needs these raises while it is traced, and the
module it belongs to is left alone.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_fx.errors import reason_of
from se_fx.randomness import random_state, set_random_state

__all__ = ["DRAWS", "TRACED_HOOKS", "Tracer", "has_traced_hooks"]

_CHECKPOINT = torch.utils.checkpoint.checkpoint
_CHECKPOINTS = "checkpoints activations, which a graph would drop"
DRAWS = "draws random numbers that a graph would freeze"
#: Forward hooks that are looked into where their modules' children are.
TRACED_HOOKS: set[Callable[..., Any]] = set()


class Tracer(fx.Tracer):
    """A tracer that records what `fx.Tracer` silently drops, and leaves alone what it can't record.

    Leaves are all modules but those to be looked into; they stay whole, and so keep their buffers, hooks and modes. When
    the code of a submodule raises, that submodule (the innermost) turns opaque and tracing goes on.

    Args:
        opaque: submodules to keep as `call_module`, by qualified name, with the reason. `self.opaque` gains those found.
        entered: all modules whose code is to be looked into; None for every module to be a leaf.
        inputs: values for the code to see in place of the root's arguments of these names.
        watch_randomness: have submodules turn opaque whose code draws random numbers other than as tensors' values.
    """

    proxy_buffer_attributes = True  # else arithmetic between buffers would be done once, while tracing

    def __init__(
        self,
        opaque: dict[str, str] | None = None,
        entered: set[nn.Module] | None = None,
        inputs: dict[str, Any] | None = None,
        watch_randomness: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=(_CHECKPOINT,))
        self.opaque = dict(opaque or {})
        self.entered = entered or set()
        self.inputs = inputs or {}
        self.watch_randomness = watch_randomness
        self.called: set[str] = set()
        self.made: dict[str, Tensor] = {}
        self.refused: str | None = None
        self.own_tensors: set[int] = set()
        self.thread = threading.get_ident()  # fx patches nn.Module for all threads; others must not notice
        self._ambient = _ambient()
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
            if type(m).__call__ is not nn.Module.__call__ and not isinstance(m, fx.GraphModule):
                raise self.refuse(f"calls a {type(m).__name__}, whose __call__ is its own")
            output = super().call_module(m, forward, args, kwargs)
            through = any(child in self.entered for child in m.children()) and has_traced_hooks(m)
            for hook in m._forward_hooks.values() if through else ():
                output = hook(m, args, output)
            return output
        stack, randomness = self.module_stack.copy(), random_state() if self.watch_randomness else None
        try:
            result = super().call_module(m, forward, args, kwargs)
            if randomness is not None and random_state() != randomness:
                set_random_state(randomness)  # lest the callers be blamed too
                raise fx.proxy.TraceError(DRAWS)
            if self.refused:  # and the code has caught that
                raise fx.proxy.TraceError(self.refused)
            return result
        except Exception as error:
            self.module_stack, self.refused = stack, None
            self.opaque[name] = reason_of(error)
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What the code being traced sees as a module's attribute: tensors are traced values."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record one node, unless it needs what a graph doesn't hold: a grad mode or autocast of its own, checkpointing."""
        if _CHECKPOINT in args:
            raise fx.proxy.TraceError(_CHECKPOINTS)
        if _ambient() != self._ambient:
            raise fx.proxy.TraceError("runs under a grad mode or autocast of its own, which a graph would drop")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Lower an argument, keeping the class of dicts that the model's callers may rely on."""
        if type(a) is _Value:
            if a.node.graph is not self.graph:
                raise self.refuse("uses a value of an earlier call")
            return a.node
        if isinstance(a, nn.Module) and (a in self.entered or isinstance(a, nn.Conv2d)):
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

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node certainly yields a tensor."""
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), _PLAIN)
        if node.op == "get_attr":
            return True
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op != "placeholder" and name not in _TUPLES and any(map(self.is_tensor, node.all_input_nodes))

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
        tensors = (*root.parameters(), *root.buffers()) if self.entered else ()
        self.own_tensors = {id(tensor) for tensor in tensors}
        with torch.enable_grad():
            self._ambient = _ambient()
            with _Functions(self), _no_checkpointing(), _watched_builtins(self):
                graph = super().trace(root, concrete_args)
        if self.refused:
            raise fx.proxy.TraceError(self.refused)
        for node in graph.nodes:
            if isinstance(node.type, str):  # a postponed annotation, whose name means nothing to the graph's code
                node.type = None
        made = {key: value for key, value in root.__dict__.items() if key.startswith("_tensor_constant") and key not in present}
        for key in made:
            del root.__dict__[key]
        self.made = made
        return graph


class _Strict:
    """What a graph can't answer or hold raises: a hash, an attribute that is set, a deep copy."""

    tracer: Any

    def __setattr__(self, k: str, value: Any) -> None:
        if k not in ("node", "tracer", "root", "attr", "_node"):
            raise self.tracer.refuse(f"sets the attribute {k!r} of a value")
        super().__setattr__(k, value)

    def __hash__(self) -> int:
        if not _from_torch(sys._getframe(1)):
            raise self.tracer.refuse("looks a value up in a set or dict")
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self.tracer.refuse("copies a value with copy.deepcopy")


class _Attribute(_Strict, fx.proxy.Attribute):
    """A traced value's attribute."""


class _Value(_Strict, fx.Proxy):
    """A traced value."""

    def __getattr__(self, k: str) -> Any:
        if not hasattr(Tensor, k):  # hasattr() on a Proxy would always be true
            raise self.tracer.refuse(f"reads the attribute {k!r} of a value")
        return _Attribute(self, k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    def operate(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operate


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Value, f"__{_name}__", _in_place(_name))  # fx records `y += 1` as `y + 1`

_TORCH = os.path.dirname(torch.__file__) + os.sep
_isinstance: Callable[[Any, Any], bool] = isinstance  # this and the next are patched while tracing
_is_grad_enabled = torch.is_grad_enabled
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


def _from_torch(frame: Any) -> bool:
    """Whether a frame runs PyTorch's own code, or this module's; `torch.is_tensor` asks for its caller."""
    path = str(frame.f_code.co_filename)
    return path == __file__ or (path.startswith(_TORCH) and frame.f_code.co_name != "is_tensor")


@contextlib.contextmanager
def _watched_builtins(tracer: Tracer) -> Iterator[None]:
    """Answer the questions that code may ask about values where the answer is certain; else raise."""

    def isinstance_(value: Any, kinds: Any) -> bool:
        if type(value) not in _TRACED or _from_torch(sys._getframe(1)):
            return _isinstance(value, kinds)
        if tracer.is_tensor(value.node):
            return bool(issubclass(Tensor, kinds))
        raise tracer.refuse("asks for the class of a value")

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == tracer.thread and not _from_torch(sys._getframe(1)):
                raise tracer.refuse(f"asks {original.__name__}(), which a graph would freeze")
            return original(*args, **kwargs)

        return ask

    questions = {name: getattr(torch, name) for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")}
    try:
        builtins.isinstance = isinstance_
        for name, original in questions.items():
            setattr(torch, name, watched(original))
        yield
    finally:
        builtins.isinstance = _isinstance
        for name, original in questions.items():
            setattr(torch, name, original)


_TRACED = {_Value, _Attribute}
_SHAPES = frozenset({"shape", "size", "dim", "ndim", "numel", "stride", "requires_grad", "is_leaf", "__hash__", "__len__"})


class _Functions(TorchFunctionMode):
    """Records calls that make random tensors, which would otherwise be drawn once; refuses to freeze parameters' values."""

    FACTORIES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal})

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.state = torch.get_rng_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES and torch.get_rng_state().equal(self.state):
            return self.tracer.create_proxy("call_function", func, tuple(args), kwargs)
        if func in self.FACTORIES:
            raise self.tracer.refuse("seeds random numbers of its own")
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        if in_place and args and type(args[0]) is Tensor and len({type(arg) for arg in args} & _TRACED):
            raise self.tracer.refuse("changes a tensor that it has made by a value")
        read = getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", ""))
        if read not in _SHAPES and any(id(arg) in self.tracer.own_tensors for arg in args):
            raise self.tracer.refuse("computes with parameters or buffers that it did not read as attributes")
        return func(*args, **kwargs)


@contextlib.contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Make activation checkpointing raise where it is called as an attribute, which fx does not intercept."""
    thread = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return _CHECKPOINT(*args, **kwargs)
        raise fx.proxy.TraceError(_CHECKPOINTS)

    try:
        torch.utils.checkpoint.checkpoint = refuse
        yield
    finally:
        torch.utils.checkpoint.checkpoint = _CHECKPOINT


def _ambient() -> tuple[bool, int]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return _is_grad_enabled(), nesting


def has_traced_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, and all of them are to be looked into."""
    return bool(module._forward_hooks) and set(module._forward_hooks.values()) <= TRACED_HOOKS
