"""Copies of module trees that share their tensors."""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from se_fx.regions.forwards import held_by
from se_fx.regions.running import is_region

__all__ = ["clone", "exchange_tensors"]


def clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree in which only the tensors, and objects se_fx can't look into, are shared.

    Every module is a new object of the same class. Parameters and buffers are the very same objects. Lists, dicts and
    other built-in containers are copied, and references to the model's modules within them (bound methods and
    `functools.partial` too, which is what hooks often are) point into the copy.

    >>> linear = nn.Linear(2, 2)
    >>> copied = clone(linear)
    >>> copied is linear, copied.weight is linear.weight
    (False, True)
    """
    shells: dict[int, Any] = {
        id(module): _shell(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)
    }
    originals = list(model.modules())  # alive for as long as their ids are keys
    for module in originals:
        if id(module) in shells:
            _fill(module, shells[id(module)], shells)
    return shells.get(id(model), model)  # type: ignore[no-any-return]


def exchange_tensors(model: nn.Module, made_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Give a module tree, but its scripted parts, other parameters and buffers in place of its own, in place.

    Args:
        model: the module.
        made_of: from a tensor to the one in its place.

    Returns:
        What gives that of any tensor, once: what is one tensor stays one.
    """
    exchanged: dict[Tensor, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if tensor not in exchanged:
            made = made_of(tensor)
            exchanged[tensor] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return exchanged[tensor]

    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for tensors in (cast("dict[str, Any]", module._parameters), cast("dict[str, Any]", module._buffers)):
                tensors.update({name: once(tensor) for name, tensor in tensors.items() if tensor is not None})
    return once


def _shell(module: nn.Module) -> nn.Module:
    return object.__new__(type(module))


def _fill(module: nn.Module, shell: nn.Module, memo: dict[int, Any]) -> None:
    attributes = shell.__dict__
    for name, value in module.__dict__.items():
        carry = _CARRIED.get(type(value))
        if carry is None or name in ("_graphs", "_host_graphs"):
            attributes[name] = memo.get(id(value), value)
        else:
            attributes[name] = carry(value, memo)
    if isinstance(module, fx.GraphModule) and not is_region(module):
        # fx keeps one class per GraphModule, since the class holds the generated code.
        fresh = fx.GraphModule(nn.Module(), fx.Graph(), type(module).__name__)
        shell.__class__ = type(fresh)
        shell.graph = copy.deepcopy(module.graph)  # type: ignore[assignment]


def _carry(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with the modules in `memo` exchanged, built-in containers copied, all else shared."""
    carry = _CARRIED.get(type(value))
    return memo.get(id(value), value) if carry is None else carry(value, memo)


def _carry_dict(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = copied = value.copy()
    for key, item in value.items():
        copied[key] = _carry(item, memo)
    return copied


def _carry_list(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = copied = value.copy()
    for position, item in enumerate(value):
        copied[position] = _carry(item, memo)
    return copied


def _carry_tuple(value: tuple[Any, ...], memo: dict[int, Any]) -> Any:
    if not any(type(item) in _CARRIED or id(item) in memo for item in value):
        return value
    return tuple(_carry(item, memo) for item in value)


def _carry_set(value: set[Any], memo: dict[int, Any]) -> Any:
    return {_carry(item, memo) for item in value}


def _carry_method(value: types.MethodType, memo: dict[int, Any]) -> Any:
    owner = _carry(value.__self__, memo)
    return value if owner is value.__self__ else types.MethodType(value.__func__, owner)


def _carry_function(value: types.FunctionType, memo: dict[int, Any]) -> Any:
    """Closures over modules are made anew over their copies; nothing else a function refers to is looked into."""
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = value  # for those that refer to themselves
    cells = value.__closure__ or ()
    contents = held_by(value)
    inner = [_carry(each, memo) if type(each) in _CODE else memo.get(id(each), each) for each in contents]
    defaults = [memo.get(id(default), default) for default in value.__defaults__ or ()]
    before = (*contents, *(value.__defaults__ or ()))
    if len(contents) != len(cells) or all(new is old for new, old in zip((*inner, *defaults), before, strict=True)):
        return value
    closure = tuple(map(types.CellType, inner))
    copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, tuple(defaults) or None, closure)
    memo[id(value)] = copied
    copied.__kwdefaults__ = value.__kwdefaults__
    copied.__dict__.update(value.__dict__)
    copied.__qualname__ = value.__qualname__
    return copied


def _carry_partial(value: functools.partial[Any], memo: dict[int, Any]) -> Any:
    keywords = {name: _carry(item, memo) for name, item in value.keywords.items()}
    return functools.partial(_carry(value.func, memo), *_carry(value.args, memo), **keywords)


def _carry_weakref(value: weakref.ref[Any], memo: dict[int, Any]) -> Any:
    return weakref.ref(memo[id(value())]) if id(value()) in memo else value


_CARRIED: dict[type, Callable[[Any, dict[int, Any]], Any]] = {
    **dict.fromkeys((dict, collections.OrderedDict, collections.defaultdict), _carry_dict),
    **dict.fromkeys((list, collections.deque), _carry_list),
    tuple: _carry_tuple,
    set: _carry_set,
    types.MethodType: _carry_method,
    types.FunctionType: _carry_function,
    functools.partial: _carry_partial,
    weakref.ref: _carry_weakref,
}
#: What a closure may hold that leads on to modules: so has the code of a module that is compiled.
_CODE = (types.MethodType, types.FunctionType)
