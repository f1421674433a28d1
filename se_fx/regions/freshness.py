"""Freshness: a graph is a cache of code. What the code has read, and whether that is still so."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor, fx, nn

from se_fx.errors import SqueezeExciteError
from se_fx.regions.code import asked_of_others, words
from se_fx.regions.sequences import Inserted
from se_fx.regions.surgery import refuse_surgery

__all__ = ["INNER", "Named", "Watched", "fixed_children", "hooked", "is_fresh", "reached", "refuse_stale", "watch"]

#: Modules, the names they are known by, and what their code may have read: values, and what these hold. Built-in types alone,
#: so that those of a copied model are about the copy's modules.
Watched = list[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]

Named = tuple[str, nn.Module, Any]  # a module, the name it is known by, and the class whose code it runs

_ABSENT = inspect.Parameter.empty  # of attributes that a class has, and the instance hasn't
_MODULES = frozenset({"training", "call_super_init", "dump_patches"})  # what every module has
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NOT_USERS = sys.stdlib_module_names | {"torch", "numpy"}
#: The attribute that holds what somebody has set as `forward` since.
INNER = "_inner_forward"
_DEPTH = 3  # of objects in objects that are looked into


def watch(modules: Iterable[Named]) -> Watched:
    """What would make a graph stale that was traced through the code of these modules.

    The values of those attributes, of the instance and of its class, whose names the code's source knows; tensors and modules
    are read at each call by graphs too.

    Args:
        modules: names for errors, modules, and the classes whose code they run.
    """
    inherited = functools.cache(_inherited)  # while this runs
    return [(name, module, _readable(module, _asked(own), inherited(own, _asked(own)))) for name, module, own in modules]


def _asked(own: Any) -> frozenset[str]:
    """The names that a class's code knows, and those of what PyTorch's class that it inherits from takes for constant."""
    return words(own) | frozenset(getattr(own, "__constants__", ()))


def reached(modules: Sequence[Named], among: Iterable[Named]) -> Watched:
    """What else would make that graph stale: what the code asks of other modules, such as one that holds settings.

    Args:
        modules: as `watch` is given them.
        among: all modules that their code can reach, likewise.
    """
    watched = {id(module) for _, module, _ in modules}
    asked = frozenset[str]().union(*(asked_of_others(own) for own in {own for _, _, own in modules}))
    inherited, found = functools.cache(_inherited), []
    for name, module, own in among:
        if not isinstance(module, Inserted):
            names = asked - words(own) if id(module) in watched else asked
            found.append((name, module, _readable(module, names, inherited(own, names))))
    return [each for each in found if each[2]]


def fixed_children(module: nn.Module, graphs: Iterable[fx.Graph]) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
    """The modules in a region, with what holds each, that its graphs don't call by the only name that they have."""
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")}
    names = Counter(id(each) for _, each in module.named_modules(remove_duplicate=False))

    def within(holder: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
        for name, child in holder._modules.items():
            is_called = f"{prefix}{name}" in called
            if not is_called or names[id(child)] > 1:
                yield holder, name, child
            if child is not None and not is_called and not isinstance(child, Inserted):
                yield from within(child, f"{prefix}{name}.")

    return within(module, "")


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than run its forward: it has forward or backward hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(module.__dict__.get(name) for name in names)


def is_fresh(module: Any) -> bool:
    """Whether a region's graphs are what its code does; if they aren't, and the code can't run in their place, this raises.

    Raises:
        SqueezeExciteError: they are stale, and blocks stand in them alone, or somebody has edited them.
    """
    for host in module._hosts:
        refuse_surgery(host)
    change = _change(module)
    if change is None:
        return True
    if module.__dict__.get("_edited") or not module._replaceable:
        why = "was edited since" if module.__dict__.get("_edited") else "has blocks that stand nowhere else"
        raise SqueezeExciteError(
            f"since this model was traced, {change}; its graph doesn't know of that, and can't be given up for the code, since "
            f"it {why}. Change the original first, and transform it then"
        )
    return False


def _change(module: Any) -> str | None:
    """What has changed since a region was traced, in words."""
    if INNER in module.__dict__:
        return "its forward was set"
    changed = change_in(module._watched) or change_in(module._reached)
    if changed is not None:
        return changed
    for name, inner, _ in module._watched[1:]:  # the first is the region's own
        state = inner.__dict__
        if hooked(inner):
            return f"hooks were registered on {name}"
        if "forward" in state or INNER in state:
            return f"{name}.forward was set"
        if inner.training is not module.training and module._modes_differ:
            return f"{name} was put into another mode"
    return _exchanged(module)


def _exchanged(module: Any) -> str | None:
    for holder, name in module._leaves:
        leaf = holder._modules.get(name)
        if leaf is None or hooked(leaf):
            return f"hooks were registered on {name}, whose value a block scales"
    for parent, name, child in module._children:
        if parent._modules.get(name) is not child:
            return f"the module {name} was replaced"
    return None


def refuse_stale(module: Any) -> None:
    """Raise where what a host's graphs have read was changed.

    Raises:
        SqueezeExciteError: names the attribute.
    """
    change = change_in(module._host_watched)
    if change is not None:
        raise SqueezeExciteError(
            f"{module._own_class.__name__}: since Squeeze-and-Excitation blocks were put into its code, {change}; the graph "
            "that it runs now doesn't know of that. Set it before blocks go in; or se_fx.remove() them, set it, insert again"
        )


def change_in(watched: Watched) -> str | None:
    """The first change since `watch`, in words; None where there is none."""
    for name, module, values in watched:
        now = module.__dict__
        for attribute, (value, content) in values.items():
            other = now.get(attribute, _ABSENT)
            if other is not value and not _is_alike(other, value):
                return f"the attribute {f'{name}.{attribute}' if name else attribute} was set"
            if content is not None and _content(value) != content:
                return f"what the attribute {f'{name}.{attribute}' if name else attribute} holds was changed"
    return None


def _is_alike(other: Any, value: Any) -> bool:
    """Whether two numbers or strings, or tuples of such, are equal; compiled code makes them anew."""
    if type(other) is type(value) is tuple:
        return len(other) == len(value) and all(map(_is_alike, other, value))
    return type(other) is type(value) in _ATOMS and bool(other == value)


def _readable(module: nn.Module, names: Set[str], inherited: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {
        name: (value, _content(value))
        for name, value in module.__dict__.items()
        if name in names and name not in _MODULES and not isinstance(value, (Tensor, nn.Module))
    }
    return found | {name: (_ABSENT, None) for name in inherited if name not in found}


def _inherited(own: Any, names: frozenset[str]) -> list[str]:
    """Those of the names that instances have from their class, and could set."""
    found = []
    for name in names:
        inherited = inspect.getattr_static(own, name, _ABSENT)
        if inherited is not _ABSENT and not hasattr(nn.Module, name) and not hasattr(type(inherited), "__set__"):
            found.append(name)
    return found


def _content(value: Any, depth: int = _DEPTH) -> Any:
    """The numbers and strings that containers and objects of users hold; None for what is none."""
    if type(value) in _ATOMS or not depth or isinstance(value, (Tensor, nn.Module, type, types.FunctionType)):
        return None
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _NOT_USERS:
        items = list(vars(value).items())
    else:
        return None
    return [(str(key), each if type(each) in _ATOMS else _content(each, depth - 1)) for key, each in items]
