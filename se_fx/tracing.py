"""Tracing: a tracer that records faithfully, or says that it can't.

`fx.Tracer` silently drops what its graphs can't hold: grad modes and autocast, activation checkpointing, random numbers,
classes of outputs, the answer to ``isinstance(x, Tensor)``. Here, code that needs these raises while it is traced, and the
module it belongs to is left alone.
"""

from __future__ import annotations

import contextlib
import operator
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

__all__ = ["DRAWS", "Tracer", "random_state", "reason_of", "set_random_state"]

_CHECKPOINT = torch.utils.checkpoint.checkpoint
_CHECKPOINTS = "checkpoints activations, which a graph would drop"
DRAWS = "draws random numbers that a graph would freeze"


class Tracer(fx.Tracer):
    """A tracer that records what `fx.Tracer` silently drops, and leaves alone what it can't record.

    Leaves are every `nn.Conv2d`, subclasses included, and every module that holds none: normalisation, attention and
    drop-path modules stay whole, and so keep their buffers, hooks and modes. When the code of a submodule raises, that
    submodule (the innermost) turns opaque and tracing goes on.

    Args:
        opaque: submodules to keep as `call_module`, by qualified name, with the reason. `self.opaque` gains those found.
        conv_holders: all modules that are or hold an `nn.Conv2d`; None for every module to be a leaf.
        inputs: values for the code to see in place of the root's arguments of these names.
        watch_randomness: have submodules turn opaque whose code draws random numbers other than as tensors' values.
    """

    proxy_buffer_attributes = True  # else arithmetic between buffers would be done once, while tracing

    def __init__(
        self,
        opaque: dict[str, str] | None = None,
        conv_holders: set[nn.Module] | None = None,
        inputs: dict[str, Any] | None = None,
        watch_randomness: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=(_CHECKPOINT,))
        self.opaque = dict(opaque or {})
        self.conv_holders = conv_holders or set()
        self.inputs = inputs or {}
        self.watch_randomness = watch_randomness
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
        stack, randomness = self.module_stack.copy(), random_state() if self.watch_randomness else None
        try:
            result = super().call_module(m, forward, args, kwargs)
            if randomness is not None and random_state() != randomness:
                set_random_state(randomness)  # lest the callers be blamed too
                raise fx.proxy.TraceError(DRAWS)
            return result
        except Exception as error:
            self.module_stack = stack
            self.opaque[name] = reason_of(error)
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What the code being traced sees as a module's attribute: tensors are traced values."""
        if threading.get_ident() != self._thread:
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
            return a.node
        if isinstance(a, nn.Module) and a in self.conv_holders:
            raise fx.proxy.TraceError(f"passes a {type(a).__name__} on to a function, which a graph can't look into")
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
        made = {key: value for key, value in root.__dict__.items() if key.startswith("_tensor_constant") and key not in present}
        for key in made:
            del root.__dict__[key]
        self.made = made
        return graph


class _Value(fx.Proxy):
    """A traced value. To the code being traced, `isinstance(value, Tensor)` is what it will be when the graph runs."""

    def _class_seen(self) -> Any:
        frame = sys._getframe(1)
        ours = frame.f_code.co_filename.startswith(_TORCH) and frame.f_code.co_name != "is_tensor"
        return _Value if ours or _is_size(self.node) else Tensor

    __class__ = property(_class_seen)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


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
    """Make activation checkpointing raise where it is called as an attribute, which fx does not intercept."""
    thread = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return _CHECKPOINT(*args, **kwargs)
        raise fx.proxy.TraceError(_CHECKPOINTS)

    torch.utils.checkpoint.checkpoint = refuse
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = _CHECKPOINT


def _ambient() -> tuple[bool, int]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), nesting


def random_state() -> tuple[Any, ...]:
    """The states of all generators that a model's code may draw random numbers from on the CPU."""
    numpy = sys.modules.get("numpy")
    name, keys, *rest = numpy.random.get_state() if numpy is not None else ("", b"")
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (name, bytes(keys), *rest)


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set the generators back to what `random_state` returned."""
    for_torch, for_random, (name, keys, *rest) = state
    torch.set_rng_state(torch.frombuffer(bytearray(for_torch), dtype=torch.uint8))
    random.setstate(for_random)
    if name:
        numpy = sys.modules["numpy"]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def reason_of(error: BaseException) -> str:
    """An error in a few words."""
    text = str(error).strip().split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
