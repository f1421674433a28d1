"""Code: what the source of a module's class knows by name, without running it."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Hashable, Iterator
from typing import Any

from torch import nn

__all__ = ["asked_of_others", "goes_through_children", "may_return_none", "set_by", "words"]

#: By which attributes are read and set whose names are strings.
_READS = frozenset({"getattr", "hasattr", "attrgetter", "vars", "__dict__", "__getattribute__"})
_CHILDREN = frozenset({"_modules", "children", "modules", "named_children", "named_modules"})
_WRITES = frozenset({"setattr", "__setattr__", "vars", "__dict__"})


@functools.cache
def words(own: Hashable) -> frozenset[str]:
    """All names, of attributes and in strings, that the source of a class and of its file has."""
    found: set[str] = set()
    for methods, functions in _sources(own):
        for code in (*_codes(methods), *_codes(*functions)):
            found.update(code.co_names, _strings(code))
    return frozenset(found)


def _sources(own: Any) -> Iterator[tuple[dict[str, Any], tuple[dict[str, Any], str]]]:
    """What a class and its bases define, and what the files do that these stand in, with the files' names; not PyTorch's."""
    for kind in own.__mro__:
        if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch."):
            home = sys.modules.get(kind.__module__)
            yield dict(vars(kind)), (dict(vars(home)) if home is not None else {}, kind.__module__)


def _strings(code: types.CodeType) -> Iterator[str]:
    yield from (each for each in code.co_consts if isinstance(each, str) and each.isidentifier())


def _codes(names: Any, home: str | None = None) -> Iterator[types.CodeType]:
    """The code of functions, properties and methods among some names; of those defined in one module, if that is given."""
    for value in list(names.values()):
        function = _function(value)
        if type(function) is types.FunctionType and home in (None, function.__module__):
            yield from _inner(function.__code__)


def _function(value: Any) -> Any:
    """What is run; nothing is asked of objects of others, some of which import a library, or raise, when they are asked."""
    kind = type(value)  # `isinstance` asks for `__class__`
    if issubclass(kind, property):
        return value.fget
    if issubclass(kind, functools.cached_property):
        return value.func
    return value.__func__ if issubclass(kind, (classmethod, staticmethod)) else value


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _inner(constant)


@functools.cache
def asked_of_others(own: Hashable) -> frozenset[str]:
    """The attributes that a class's code, and that of its file, reads of anything but `self`; not in `__init__`."""
    found: set[str] = set()
    for methods, functions in _sources(own):
        methods.pop("__init__", None)
        for code in _codes(methods):
            found.update(_of_others(code, _self(code)))
        for code in _codes(*functions):
            found.update(_of_others(code, None))
    return frozenset(found)


@functools.cache
def set_by(own: Hashable, *, with_own: bool = False) -> frozenset[str]:
    """The attributes that a class's `forward`, and what it knows by name, sets of anything but `self`, or of that, too."""
    codes = _run_by(own)
    names = (_of_others(code, None if file or with_own else _self(code), stored=True) for code, file in codes)
    return frozenset().union(*names)


@functools.cache
def may_return_none(own: Any) -> bool:
    """Whether a class's `forward`, other than PyTorch's, returns None somewhere."""
    forward = getattr(own, "forward", None)
    if type(forward) is not types.FunctionType or str(forward.__module__).startswith("torch."):  # None in code that was run
        return False
    before: Any = None
    nothing: set[Any] = set()  # variables that are None at times
    for each in dis.get_instructions(forward.__code__):
        loaded = before.opname if before is not None else ""
        is_none = loaded == "LOAD_CONST" and before.argval is None
        may_be_none = is_none or (loaded.startswith("LOAD_FAST") and before.argval in nothing)
        if is_none and each.opname == "STORE_FAST":
            nothing.add(each.argval)
        if may_be_none and each.opname == "RETURN_VALUE":
            return True
        if (is_none and each.opname.startswith("JUMP")) or (each.opname == "RETURN_CONST" and each.argval is None):
            return True
        before = each
    return False


@functools.cache
def goes_through_children(own: Hashable) -> bool:
    """Whether a class's `forward`, or what it knows by name, asks modules what their children are, whichever these are."""
    return any(not _CHILDREN.isdisjoint(code.co_names) for code, _ in _run_by(own))


@functools.cache
def _run_by(own: Hashable) -> tuple[tuple[types.CodeType, str | None], ...]:
    """The code of a class's `forward`, and of methods and functions that it knows by name; the file that a function is of."""
    known: dict[str, tuple[Any, str | None]] = {}
    for methods, (functions, home) in _sources(own):
        for values, file in ((methods, None), (functions, home)):
            for name, value in values.items():
                known.setdefault(name, (value, file))
    found: list[tuple[types.CodeType, str | None]] = []
    seen, names = set[str](), ["forward"]
    while names:
        name = names.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        value, file = known[name]
        for code in _codes(_held(name, value), file):
            found.append((code, file))
            names += code.co_names
    return tuple(found)


def _held(name: str, value: Any) -> dict[str, Any]:
    """A function by its name; those in a table of functions by theirs."""
    if issubclass(type(value), dict):
        return {str(key): each for key, each in value.items()}
    return {str(key): each for key, each in enumerate(value)} if issubclass(type(value), (list, tuple)) else {name: value}


def _self(code: types.CodeType) -> str | None:
    return code.co_varnames[0] if code.co_argcount else None


def _of_others(code: types.CodeType, own: str | None, *, stored: bool = False) -> Iterator[str]:
    """The attributes that code loads, or stores, of anything but a local variable."""
    before = last = None
    augmented: set[str] = set()  # of the variable, such as `self.count += 1`, which copies it first
    for each in dis.get_instructions(code):
        is_load, is_store = each.opname in ("LOAD_ATTR", "LOAD_METHOD"), each.opname == "STORE_ATTR"
        if is_load or is_store:
            is_copy = before is not None and before.opname in ("COPY", "DUP_TOP")
            of_own = _is_local(last if is_copy else before, own)
            if is_load and is_copy and of_own:
                augmented.add(each.argval)
            if is_store and before is not None and before.opname in ("SWAP", "ROT_TWO"):
                of_own = each.argval in augmented
                augmented.discard(each.argval)
            if not of_own and is_store == stored:
                yield each.argval
        last, before = before, each
    if (_WRITES if stored else _READS).intersection(code.co_names):
        yield from _strings(code)


def _is_local(instruction: Any, name: str | None) -> bool:
    if instruction is None or name is None or not instruction.opname.startswith("LOAD_FAST"):
        return False
    return bool((instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval) == name)
