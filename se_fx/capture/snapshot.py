"""Snapshots: all state that modules' code can reach in Python, to see whether running it has changed any, and to undo that."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """All state that modules' code can reach in Python, before a trace; and their mode, set to `training` for it."""

    def __init__(self, modules: dict[str, nn.Module], training: bool) -> None:
        self.modules = modules
        seen: set[int] = set()
        self.before = {
            name: [(container, _items(container)) for container in _containers(module.__dict__, seen)]
            for name, module in modules.items()
        }
        self.modes = [(module, module.training) for module in modules.values()]
        for module in modules.values():
            module.training = training

    def undo(self) -> dict[str, nn.Module]:
        """Set all back; returns the modules, by name, whose code has changed any of it."""
        for module, training in self.modes:
            module.training = training
        changed: dict[str, nn.Module] = {}
        for name, state in self.before.items():
            for container, items in state:
                if not _same(_items(container), items):
                    changed[name] = self.modules[name]
                    _refill(container, items)
        return changed


def _containers(root: Any, seen: set[int]) -> Iterator[Any]:
    """The built-in containers that are reachable from `root`, also through objects of classes that users define."""
    stack = [root]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _ATOMS or id(value) in seen or isinstance(value, (nn.Module, Tensor, type, types.FunctionType)):
            continue
        seen.add(id(value))
        if kind in _GENERATORS:
            yield value
        elif isinstance(value, (dict, list, set, collections.deque)):
            yield value
            stack += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            stack += value
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, functools.partial):
            stack += (value.func, value.args, value.keywords)
        elif kind.__module__.partition(".")[0] not in _NOT_USERS and hasattr(value, "__dict__"):
            stack.append(value.__dict__)


_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NOT_USERS = sys.stdlib_module_names | {"torch", "numpy"}


_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {  # how to read and set their states
    torch.Generator: (lambda g: g.get_state().tolist(), lambda g, s: g.set_state(torch.tensor(s, dtype=torch.uint8))),
    random.Random: (random.Random.getstate, random.Random.setstate),
}
with contextlib.suppress(ImportError):
    import numpy as np

    _GENERATORS[np.random.Generator] = (
        lambda g: copy.deepcopy(g.bit_generator.state),
        lambda g, s: setattr(g.bit_generator, "state", s),
    )


def _items(container: Any) -> Any:
    if type(container) in _GENERATORS:
        return _GENERATORS[type(container)][0](container)
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, items: Any) -> None:
    if type(container) in _GENERATORS:
        _GENERATORS[type(container)][1](container, items)
        return
    container.clear()
    (container.extend if isinstance(items, list) else container.update)(items)


def _same(a: Any, b: Any) -> bool:
    """Whether two `_items` are the same objects."""
    if not isinstance(a, (dict, list, set)):
        return bool(a == b)
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(value is b[key] for key, value in a.items())
    return a == b if isinstance(a, set) else all(x is y for x, y in zip(a, b, strict=True))
