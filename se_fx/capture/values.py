"""Values: what code being traced sees in place of tensors, and what it is told when it asks about them.

A question that a graph would answer once and for all (a value's class, a grad mode) is answered where the answer is certain;
everywhere else it raises, and the module whose code asked is left alone.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

__all__ = ["CHECKPOINT", "CHECKPOINTS", "Value", "ambient", "watched"]

CHECKPOINT = torch.utils.checkpoint.checkpoint
CHECKPOINTS = "checkpoints activations, which a graph would drop"


class Recorder(Protocol):
    """What a value knows of the tracer that made it."""

    thread: int
    own_tensors: set[int]

    def refuse(self, reason: str) -> Exception:
        """The error to raise where the code does what a graph can't."""

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node certainly yields a tensor."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node."""


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


class Value(_Strict, fx.Proxy):
    """A traced value."""

    def __getattr__(self, k: str) -> Any:
        if not hasattr(Tensor, k):  # hasattr() on a Proxy would always be true
            raise self.tracer.refuse(f"reads the attribute {k!r} of a value")
        return _Attribute(self, k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[[Value, Any], Any]:
    def operate(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operate


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(Value, f"__{_name}__", _in_place(_name))  # fx records `y += 1` as `y + 1`

_TORCH, _HERE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_isinstance: Callable[[Any, Any], bool] = isinstance  # this and the next are patched while tracing
_is_grad_enabled = torch.is_grad_enabled


def _from_torch(frame: Any) -> bool:
    """Whether a frame runs PyTorch's own code, or this package's; `torch.is_tensor` asks for its caller."""
    path = str(frame.f_code.co_filename)
    return path.startswith(_HERE) or (path.startswith(_TORCH) and frame.f_code.co_name != "is_tensor")


@contextlib.contextmanager
def _watched_builtins(tracer: Recorder) -> Iterator[None]:
    """Answer the questions that code may ask about values where the answer is certain; else raise."""

    def isinstance_(value: Any, kinds: Any) -> bool:
        if type(value) not in _TRACED or _from_torch(sys._getframe(1)):
            return _isinstance(value, kinds)
        if tracer.is_tensor(value.node):
            return bool(issubclass(Tensor, kinds))
        raise tracer.refuse("asks for the class of a value")

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == tracer.thread and not _from_torch(sys._getframe(1)):
                raise tracer.refuse(f"asks {original.__name__}(), which a graph would freeze")
            return original(*args, **kwargs)

        return ask

    questions = {name: getattr(torch, name) for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")}
    try:
        builtins.isinstance = isinstance_
        for name, original in questions.items():
            setattr(torch, name, refusing(original))
        yield
    finally:
        builtins.isinstance = _isinstance
        for name, original in questions.items():
            setattr(torch, name, original)


_TRACED = {Value, _Attribute}
_SHAPES = frozenset({"shape", "size", "dim", "ndim", "numel", "stride", "requires_grad", "is_leaf", "__hash__", "__len__"})


class _Functions(TorchFunctionMode):
    """Records calls that make random tensors, which would otherwise be drawn once; refuses to freeze parameters' values."""

    FACTORIES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal})

    def __init__(self, tracer: Recorder) -> None:
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
            return CHECKPOINT(*args, **kwargs)
        raise fx.proxy.TraceError(CHECKPOINTS)

    try:
        torch.utils.checkpoint.checkpoint = refuse
        yield
    finally:
        torch.utils.checkpoint.checkpoint = CHECKPOINT


@contextlib.contextmanager
def watched(tracer: Recorder) -> Iterator[None]:
    """Within, `tracer` is told of what code asks and does that a graph can't hold."""
    with _Functions(tracer), _no_checkpointing(), _watched_builtins(tracer):
        yield


def ambient() -> tuple[bool, int]:
    """The grad mode and the depth of autocast, which graphs do not hold."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return _is_grad_enabled(), nesting
