"""Values: what code being traced sees in place of tensors, and what it may not do while it is traced.

What a graph can't hold raises (a value in a set, an attribute that is set, checkpointed activations), and the module whose code
did it is left alone.
"""

from __future__ import annotations

import contextlib
import dis
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Set
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.capture.questions import CLASS, TRACED, Asked, asking, from_torch

__all__ = ["CHECKPOINT", "CHECKPOINTS", "WRITES", "Value", "watched"]

WRITES = "keeps state in attributes, which a graph would not update"
CHECKPOINT = torch.utils.checkpoint.checkpoint
CHECKPOINTS = "checkpoints activations, which a graph would drop"


class Recorder(Asked, Protocol):
    """What a value knows of the tracer that made it."""

    entered: set[nn.Module]
    own_tensors: set[int]
    plain_tensors: Set[int]

    def is_recorded(self, module: nn.Module) -> bool:
        """Whether a module is one of those whose calls are recorded, or within one."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node."""


# How bytecode asks for a class: `value.__class__`, and `case Tensor():`.
_ASKING = {dis.opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS") if name in dis.opmap}


class _Strict:
    """What a graph can't answer or hold raises: a hash, an attribute that is set, a deep copy."""

    tracer: Any
    node: Any

    def _told_class(self) -> type:
        """What code is told that asks for it. Functions written in C, which take tensors apart, are told what the value is."""
        frame = sys._getframe(1)
        if from_torch(frame) or frame.f_code.co_code[frame.f_lasti] not in _ASKING:
            return type(self)
        example = self.tracer.example_of(self.node)
        if example is None:
            raise self.tracer.refuse(CLASS)
        return type(example)

    __class__ = property(_told_class)

    def __setattr__(self, k: str, value: Any) -> None:
        if k not in ("node", "tracer", "root", "attr", "_node"):
            raise self.tracer.refuse(f"sets the attribute {k!r} of a value")
        super().__setattr__(k, value)

    def __hash__(self) -> int:
        if not from_torch(sys._getframe(1)):
            raise self.tracer.refuse("looks a value up in a set or dict")
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self.tracer.refuse("copies a value with copy.deepcopy")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[[_Strict, Any], Any]:
    def operate(self: _Strict, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operate


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Strict, f"__{_name}__", _in_place(_name))  # fx records `y += 1` as `y + 1`


class _Attribute(_Strict, fx.proxy.Attribute):
    """A traced value's attribute."""


class Value(_Strict, fx.Proxy):
    """A traced value."""

    def __getattr__(self, k: str) -> Any:
        if not hasattr(Tensor, k):  # hasattr() on a Proxy would always be true
            raise self.tracer.refuse(f"reads the attribute {k!r} of a value")
        return _Attribute(self, k)

    @property
    def keys(self) -> Any:
        """What tells a dict from a tensor; its keys are unknown."""
        if from_torch(sys._getframe(1)):
            return super().keys
        raise self.tracer.refuse("asks for the keys of a value")


TRACED |= {Value, _Attribute}


class _Functions(TorchFunctionMode):
    """Records calls that make random tensors, which would otherwise be drawn once; refuses to freeze a model's values."""

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
        if in_place and args and type(args[0]) is Tensor and len({type(arg) for arg in args} & TRACED):
            raise self.tracer.refuse("changes a tensor that it has made by a value")
        leaves = [leaf for each in (*args, *kwargs.values()) for leaf in (each if type(each) in (list, tuple) else (each,))]
        given = set(map(id, leaves))
        if given & self.tracer.own_tensors and _reads_values(func, args, kwargs):
            raise self.tracer.refuse("computes with parameters or buffers that it did not read as attributes")
        is_recorded = any(type(leaf) in TRACED for leaf in leaves)
        if given & self.tracer.plain_tensors and not is_recorded and _reads_values(func, args, kwargs):
            raise self.tracer.refuse(
                "computes with tensors that are neither parameters nor buffers, which a graph would freeze"
            )
        return func(*args, **kwargs)


def _reads_values(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a function does anything but tell what tensors without values can tell: a shape, a type."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), (args, kwargs))
    try:
        return not all(isinstance(leaf, _ABOUT) for leaf in tree_leaves(func(*args, **kwargs)))
    except Exception:  # whatever is raised for want of values
        return True


_ABOUT = (int, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)


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
    with _Functions(tracer), _no_checkpointing(), _no_writes(tracer), asking(tracer, tracer.entered):
        yield


@contextlib.contextmanager
def _no_writes(tracer: Recorder) -> Iterator[None]:
    """Refuse attributes that are set on modules whose calls are recorded, be it to what they are now, or for a while."""
    original = nn.Module.__setattr__

    def set_(self: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == tracer.thread and tracer.is_recorded(self):
            raise tracer.refuse(WRITES)
        original(self, name, value)

    try:
        nn.Module.__setattr__ = set_  # type: ignore[method-assign]
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
