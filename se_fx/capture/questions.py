"""Questions: what code being traced is told when it asks about the class of a value, or for a mode that a graph would freeze.

Where the answer is certain, it is given. Everywhere else it raises, and the module whose code asked is left alone.

    isinstance, issubclass, callable, hasattr      looked up as builtins, which are exchanged for the time of a trace
    value.__class__, match, functools.singledispatch      ask the value itself, see `Value`
    type(value)      goes to no code of the value's: `type` is exchanged where it is looked up, in modules' globals
    match value: case [a, b], case {"a": b}      goes to no code at all: looked for in the bytecode that a module may run
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import os
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

__all__ = ["A_TENSOR", "CLASS", "TRACED", "Asked", "ambient", "asking", "from_torch", "matches_structure"]

#: The classes of traced values.
TRACED: set[type] = set()
#: Stands for tensors of which nothing more is known.
A_TENSOR = torch.empty(0)
CLASS = "asks for the class of a value"


class Asked(Protocol):
    """The tracer that is asked."""

    thread: int

    def refuse(self, reason: str) -> Exception:
        """The error to raise where the code does what a graph can't."""

    def example_of(self, node: fx.Node) -> Tensor | None:
        """What a node yields, `A_TENSOR` for a tensor not known yet, None where it may be something else."""


_TORCH, _HERE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_isinstance, _issubclass, _callable, _hasattr = isinstance, issubclass, callable, hasattr  # these are patched while tracing
_is_tensor_like: Callable[[Any], bool] = torch.overrides.is_tensor_like
_is_grad_enabled = torch.is_grad_enabled
# They ask for their callers.
_ASKING = {torch.is_tensor.__code__, *(getattr(torch._jit_internal, f).__code__ for f in ("_isinstance", "container_checker"))}


def from_torch(frame: Any) -> bool:
    """Whether a frame runs PyTorch's own code, or this package's, on nobody's behalf."""
    path = str(frame.f_code.co_filename)
    return path.startswith(_HERE) or (path.startswith(_TORCH) and frame.f_code not in _ASKING)


def _is_of(value: Any, kinds: Any) -> bool:
    """Whether a traced value is an instance.

    Raises:
        TraceError: that isn't certain.
    """
    example = value.tracer.example_of(value.node)
    if example is None:
        raise value.tracer.refuse(CLASS)
    if example is not A_TENSOR:
        return _isinstance(example, kinds)
    if _issubclass(Tensor, kinds):
        return True
    if any(map(_may_hold, _flat(kinds))):
        raise value.tracer.refuse(CLASS)
    return False


def _flat(kinds: Any) -> Iterator[Any]:
    if _isinstance(kinds, tuple) or typing.get_origin(kinds) in (typing.Union, types.UnionType):
        for kind in kinds if _isinstance(kinds, tuple) else typing.get_args(kinds):
            yield from _flat(kind)
    else:
        yield kinds


def _may_hold(kind: Any) -> bool:
    """Whether a tensor may be of a class that `Tensor` is none of: a subclass, or one that looks at each value."""
    own_check = type(kind).__module__ not in ("builtins", "abc", "typing", "typing_extensions")
    return _isinstance(kind, type) and (_issubclass(kind, Tensor) or own_check)


@contextlib.contextmanager
def asking(tracer: Asked, entered: set[nn.Module]) -> Iterator[None]:
    """Within, questions about traced values are answered where that is certain; else they raise."""
    answers = _Answers(tracer)
    exchanged: list[tuple[Any, str, Any]] = [
        *((torch, name, answers.refusing(getattr(torch, name))) for name in _MODES),
        (torch.overrides, "is_tensor_like", answers.is_tensor_like),
        (builtins, "hasattr", answers.hasattr),
        (builtins, "callable", answers.callable),
        (builtins, "issubclass", answers.issubclass),
        (builtins, "isinstance", _is_instance),
    ]
    originals = [(where, name, getattr(where, name)) for where, name, _ in exchanged]
    places = _globals(entered)
    try:
        for where, name, new in exchanged:
            setattr(where, name, new)
        for place in places:
            place["type"] = _Type
        yield
    finally:
        for where, name, original in originals:
            setattr(where, name, original)
        for place in places:
            place.pop("type", None)


class _Answers:
    """What stands in for functions that tell the class of a value."""

    def __init__(self, tracer: Asked) -> None:
        self.tracer = tracer

    def callable(self, value: Any, /) -> bool:
        return _is_of(value, Callable) if _is_asked(value) else _callable(value)

    def is_tensor_like(self, value: Any) -> bool:
        return _is_of(value, Tensor) if _is_asked(value) else _is_tensor_like(value)

    def issubclass(self, kind: Any, kinds: Any, /) -> bool:
        if _isinstance(kind, type) and kind in TRACED and not from_torch(sys._getframe(1)):
            raise self.tracer.refuse(CLASS)
        return _issubclass(kind, kinds)

    def hasattr(self, value: Any, name: str, /) -> bool:
        if not _is_asked(value):
            return _hasattr(value, name)
        example = value.tracer.example_of(value.node)
        if example is None:
            raise value.tracer.refuse(f"asks whether a value has {name!r}")
        return _hasattr(example, name)

    def refusing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self.tracer.thread and not from_torch(sys._getframe(1)):
                raise self.tracer.refuse(f"asks {original.__name__}(), which a graph would freeze")
            return original(*args, **kwargs)

        return ask


def _is_instance(value: Any, kinds: Any, /, traced: Any = TRACED, plainly: Any = isinstance, type: Any = type) -> bool:
    """In few steps, since all code asks: some ten thousand times in a trace."""
    if type(value) not in traced or from_torch(sys._getframe(1)):
        return plainly(value, kinds)  # type: ignore[no-any-return]
    return _is_of(value, kinds)


def _is_asked(value: Any) -> bool:
    return type(value) in TRACED and not from_torch(sys._getframe(2))


_MODES = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")


def ambient() -> tuple[bool, int]:
    """The grad mode and the depth of autocast, which graphs do not hold."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return _is_grad_enabled(), nesting


# ------------------------------------------------------------------------------------------------------------ type(value)
class _Asking(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not _Type:
            return super().__call__(*args, **kwargs)
        if len(args) == 1 and type(args[0]) in TRACED:
            example = args[0].tracer.example_of(args[0].node)
            if example is None or example is A_TENSOR:
                raise args[0].tracer.refuse(CLASS)
            return type(example)
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return _isinstance(instance, type) if cls is _Type else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return _issubclass(subclass, type) if cls is _Type else super().__subclasscheck__(subclass)

    def __getitem__(cls, item: Any) -> Any:
        return type[item]


class _Type(type, metaclass=_Asking):
    """What ``type`` is to code being traced: it refuses to tell the class of a value. All else is as it was."""


_found: tuple[int, list[dict[str, Any]]] = (0, [])


def _globals(entered: set[nn.Module]) -> list[dict[str, Any]]:
    """The globals of all code that models may run: of all modules but PyTorch's own and Python's, where `type` is `type`."""
    global _found
    if _found[0] != len(sys.modules):
        named = [(name.partition(".")[0], module) for name, module in list(sys.modules.items())]
        places = [vars(module) for room, module in named if room not in _OTHERS and type(module).__call__ is type.__call__]
        _found = len(sys.modules), places
    own = {id(place): place for place in (getattr(f, "__globals__", {}) for f in {type(module).forward for module in entered})}
    known = {id(place) for place in _found[1]}
    others = [p for key, p in own.items() if key not in known and str(p.get("__name__")).partition(".")[0] not in _OTHERS]
    return [place for place in (*_found[1], *others) if "type" not in place]


_OTHERS = sys.stdlib_module_names | {"torch", "numpy", "se_fx", "sympy", "mpmath"}


# ------------------------------------------------------------------------------------------------------------------ match
_SHAPES = {dis.opmap[name] for name in ("MATCH_SEQUENCE", "MATCH_MAPPING") if name in dis.opmap}
_matching: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def matches_structure(kind: type[nn.Module]) -> bool:
    """Whether the code of a class may match something against ``[a, b]`` or ``{"a": b}``, as far as names lead to functions."""
    if kind not in _matching:
        _matching[kind] = any(op in _SHAPES for code in _reached(kind) for op in code.co_code[::2])
    return _matching[kind]


def _reached(kind: type) -> Iterator[types.CodeType]:
    todo: list[Any] = [kind.__dict__.get("forward", getattr(kind, "forward", None))]
    seen: set[Any] = set()
    while todo:
        found = todo.pop()
        found = getattr(found, "fget", None) or getattr(found, "__wrapped__", None) or getattr(found, "__func__", found)
        code = getattr(found, "__code__", None)
        if code is None or code in seen or str(found.__module__).partition(".")[0] in _OTHERS:
            continue
        seen.add(code)
        names: set[str] = set()
        nested = [code]
        for inner in nested:
            yield inner
            names.update(filter(str.isidentifier, inner.co_names))
            nested += [constant for constant in inner.co_consts if _isinstance(constant, types.CodeType)]
        known = [found.__globals__[name] for name in names if name in found.__globals__]
        todo += [value for value in known if _isinstance(value, types.FunctionType)]
        todo += [vars(base)[name] for base in kind.__mro__ for name in names & vars(base).keys()]
        modules = [vars(value) for value in known if _isinstance(value, types.ModuleType)]
        todo += [place[name] for place in modules for name in names & place.keys()]
