"""Snapshots: all state that modules' code can reach in Python, to see whether running it has changed any, and to undo that."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """All state that the code of a module, and of those within it, can reach in Python; and their mode.

    That is what they hold, leaves too, and what the modules and objects hold that they refer to; and their classes' attributes.
    Of tensors, it is the values of those that are neither parameters nor buffers: code's changes to these are in no graph.

    Args:
        root: the module.
        written: gains the ids of modules within whose state has been changed.

    Attributes:
        tensors: those that are neither parameters nor buffers, by their ids.
    """

    def __init__(self, root: nn.Module, written: set[int] | None = None) -> None:
        self.root = root
        self.written = set() if written is None else written
        # What is scripted keeps its state elsewhere, and is not the clone's own.
        modules = {id(module): module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)}
        kinds = {kind for module in modules.values() for kind in type(module).__mro__}
        self.classes = [(kind, dict(vars(kind))) for kind in kinds if kind.__module__.partition(".")[0] not in _NOT_USERS]
        roots: dict[int, Any] = {key: module.__dict__ for key, module in modules.items()}
        roots[_CLASSES] = tuple(tuple(items.values()) for _, items in self.classes)
        # Its own parameters and buffers are changed by graphs as well as by code.
        seen = {id(tensor) for module in modules.values() for own in _own_tensors(module) for tensor in own.values()}
        self.held: dict[int, list[tuple[Any, Any]]] = {key: [] for key in roots}
        self.empty: dict[int, list[Any]] = {key: [] for key in roots}  # most are, as those of hooks, and looked at together
        self.tensors: dict[int, Tensor] = {}
        self.kept: dict[int, list[_Kept]] = {}
        for key, holder in roots.items():
            for found in _reachable(holder, seen, modules):
                if isinstance(found, Tensor):
                    self.tensors[id(found)] = found
                    if _can_be_kept(found):
                        self.kept.setdefault(key, []).append(_Kept(found))
                elif items := _items(found):
                    self.held[key].append((found, items))
                else:
                    self.empty[key].append(found)
        self.modes = [(self.held[key][0], module.training) for key, module in modules.items() if self.held[key]]
        self.mode = root.training

    def set_mode(self, training: bool) -> None:
        """Set the mode for what follows, as `root.train(training)` would; where that is the root's own, all modes stay."""
        same = training == self.mode
        for (attributes, items), mode in self.modes:
            attributes["training"] = items["training"] = mode if same else training

    def changed(self, module: nn.Module | None = None) -> bool:
        """Whether any of it has changed, or any that `module` holds, which is one of those within."""
        if module is None:
            return any(map(self._has_changed, self.held)) or any(not _same(dict(vars(k)), items) for k, items in self.classes)
        within = [module] if not module._modules else module.modules()
        return any(self._has_changed(id(part)) for part in within if id(part) in self.held)

    def _has_changed(self, key: int) -> bool:
        kept = self.kept.get(key, ())
        return any(self.empty[key]) or self._differs(self.held[key]) or any(tensor.has_changed() for tensor in kept)

    def restore(self) -> None:
        """Set all back, but for the mode, and for the tensors that `fx.Tracer` has given the root."""
        for key, empty in self.empty.items():
            for container in filter(None, empty):
                self.written.add(key)
                container.clear()
        for key, (container, items) in ((key, each) for key, held in self.held.items() for each in held):
            if not _same(container, items):
                if self._differs([(container, items)]):
                    self.written.add(key)
                made = self._made() if container is self.root.__dict__ else {}
                _refill(container, items)
                container.update(made) if made else None
        for key, tensor in ((key, each) for key, kept in self.kept.items() for each in kept):
            if tensor.has_changed():
                self.written.add(key)
                tensor.restore()
        self._restore_classes()

    def _restore_classes(self) -> None:
        for kind, items in self.classes:
            for name, value in items.items():
                if vars(kind).get(name, kind) is not value:
                    setattr(kind, name, value)
            for name in vars(kind).keys() - items.keys():
                delattr(kind, name)

    def undo(self) -> bool:
        """Set all back; returns whether there was anything to."""
        changed = self.changed()
        if changed:
            self.restore()
        for name in self._made():
            del self.root.__dict__[name]
        for (attributes, items), mode in self.modes:
            attributes["training"] = items["training"] = mode
        return changed

    def _made(self) -> dict[str, Any]:
        before = self.held[id(self.root)][0][1]
        now = self.root.__dict__
        return {name: value for name, value in now.items() if name.startswith("_tensor_constant") and name not in before}

    def _differs(self, held: Any) -> bool:
        for container, items in held:
            if not _same(container, items):
                made = self._made() if container is self.root.__dict__ else {}
                if not made or not _same({name: value for name, value in container.items() if name not in made}, items):
                    return True
        return False


class _Kept:
    """A tensor as it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory = tensor, tensor.data
        self.values = self.memory.clone()

    def has_changed(self) -> bool:
        """Whether it has other values, or is in another place."""
        with torch._C.DisableTorchFunction():  # nobody who watches code is to see this
            return self._has_changed()

    def _has_changed(self) -> bool:
        now, before = self.tensor.data, self.memory
        if (now.shape, now.stride(), now.dtype, now.device) != (before.shape, before.stride(), before.dtype, before.device):
            return True
        return now.data_ptr() != before.data_ptr() or not torch.equal(_bits(now), _bits(self.values))

    def restore(self) -> None:
        """Set it back."""
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad(), torch._C.DisableTorchFunction():
            self.memory.copy_(self.values)
            self.tensor.data = self.memory


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)  # so that NaN equals itself, and types that can't be compared can


def _can_be_kept(tensor: Tensor) -> bool:
    """Whether a tensor has values in memory of its own: no other kind of tensor, no element in the place of another."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or 0 in tensor.stride())


def _own_tensors(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield from (module.__dict__.get("_parameters", {}), module.__dict__.get("_buffers", {}))


def _reachable(root: Any, seen: set[int], modules: Mapping[int, nn.Module]) -> Iterator[Any]:
    """The built-in containers and the tensors that `root` leads to, also through objects of classes that users define.

    And through modules, but for those in `modules`: whoever asks goes through these himself.
    """
    stack = [root]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _ATOMS or id(value) in seen or id(value) in modules:
            continue
        if kind not in _DICTS and isinstance(value, (type, types.FunctionType, torch.jit.ScriptModule)):
            continue
        seen.add(id(value))
        if kind in _GENERATORS or (kind not in _DICTS and isinstance(value, Tensor)):
            yield value
        elif kind in _DICTS or isinstance(value, (dict, list, set, collections.deque)):
            yield value
            stack += [each for each in (value.values() if isinstance(value, dict) else value) if type(each) not in _ATOMS]
        elif isinstance(value, tuple):
            stack += value
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, functools.partial):
            stack += (value.func, value.args, value.keywords)
        elif isinstance(value, nn.Module) or (
            kind.__module__.partition(".")[0] not in _NOT_USERS and hasattr(value, "__dict__")
        ):
            stack.append(value.__dict__)


_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_CLASSES = 0  # stands for all classes, where modules have their ids
_DICTS = frozenset({dict, collections.OrderedDict})
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


def _same(container: Any, items: Any) -> bool:
    """Whether a container still holds the same objects, in the same order."""
    if isinstance(container, dict):
        return (
            len(container) == len(items)
            and all(map(operator.is_, container.values(), items.values()))
            and container.keys() == items.keys()
        )
    if isinstance(container, set) or type(container) in _GENERATORS:
        return bool(_items(container) == items)
    return len(container) == len(items) and all(map(operator.is_, container, items))
