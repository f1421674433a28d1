"""Calls: whose code a node runs, and its arguments by the names that this code has for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from se_fx.capture import Snapshot
from se_fx.regions import hooked

__all__ = ["Modules", "arguments", "called", "holds_hooks_or_convs", "is_plain", "modules_of", "on_meta", "runs_pytorch"]

Modules = Mapping[str, nn.Module]  # by qualified name


def modules_of(root: nn.Module) -> Modules:
    """All modules that a graph's targets may name."""
    return dict(root.named_modules(remove_duplicate=False))


def called(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The module that a `call_module` node calls; None for other nodes."""
    return modules[str(node.target)] if node.op == "call_module" else None


def arguments(node: fx.Node, modules: Modules) -> dict[str, Any] | None:
    """A call's arguments by the names of the parameters, however they were passed; None where those can't be told.

    PyTorch's operators are asked for their schemas, all else for its signature. What a schema calls `self` is called `input`,
    as in the documentation; the operands of Python's operators are `input` and `other`. Defaults are left out.
    """
    module = called(node, modules)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if module is not None:
        return _bound(inspect.signature(type(module).forward), (module, *node.args), node.kwargs, skip=1)
    if node.op == "call_method":
        return _by_schema(str(node.target), node.args, node.kwargs)
    if node.op != "call_function":
        return None
    function: Any = node.target
    home = getattr(function, "__module__", None) or ""
    if home == "_operator":
        names = ("input", "other")
        return dict(zip(names, node.args, strict=True)) if len(node.args) == 2 and not node.kwargs else None
    if inspect.isfunction(function):
        # Such as F.max_pool2d, which is one of two functions of the same parameters.
        function = torch._jit_internal.boolean_dispatched.get(function, {}).get("if_false", function)
        return _bound(inspect.signature(function), node.args, node.kwargs)
    return _by_schema(function.__name__, node.args, node.kwargs) if home.startswith("torch") else None


def _bound(signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any], skip: int = 0) -> dict[str, Any] | None:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    return dict(list(bound.items())[skip:])


def _by_schema(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments by the first overload of an operator that takes them."""
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        parameters = getattr(packet, overload)._schema.arguments
        names = ["input" if parameter.name == "self" else parameter.name for parameter in parameters]
        positional = [name for name, parameter in zip(names, parameters, strict=True) if not parameter.kwarg_only]
        given = dict(zip(positional, args, strict=False))
        required = {name for name, parameter in zip(names, parameters, strict=True) if not parameter.has_default_value()}
        if len(args) <= len(positional) and not given.keys() & kwargs.keys():
            given |= kwargs
            if given.keys() <= set(names) and required <= given.keys():
                return given
    return None


def runs_pytorch(node: fx.Node, modules: Modules) -> bool:
    """Whether a node runs PyTorch's own code (or Python's, or se_fx's) and nothing else: all else may do what can't be told."""
    module = called(node, modules)
    if module is not None:
        return all(is_plain(part) for part in module.modules())
    if any(callable(leaf) and not isinstance(leaf, (fx.Node, type)) for leaf in tree_leaves((node.args, node.kwargs))):
        return False
    if node.op == "call_method":
        return _is_pytorchs(getattr(torch.Tensor, str(node.target), None))
    return node.op != "call_function" or _is_pytorchs(node.target)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs the code of a class of PyTorch's (or se_fx's) on its own tensors, and nothing else."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = {**module._parameters, **module._buffers}
    if hooked(module) or not {type(tensor) for tensor in tensors.values()} <= _PLAIN_TENSORS:
        return False
    theirs = [kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] not in ("torch", "se_fx", "builtins")]
    code = {name for kind in type(module).__mro__ if kind not in theirs for name in vars(kind)} - _NO_CODE
    changed = {name for kind in theirs for name in vars(kind)} | module.__dict__.keys() & _CALLING
    home = type(module).forward.__module__ or ""  # the code of an fx.GraphModule has none
    return home.startswith(("torch.nn.", "se_fx.")) and not changed & (code | tensors.keys())


_PLAIN_TENSORS = {torch.Tensor, nn.Parameter, nn.Buffer, type(None)}
_CALLING = {"forward", "_conv_forward", "__call__", "_call_impl", "_slow_forward"}
_NO_CODE = {"__module__", "__doc__", "__init__", "__annotations__", "__firstlineno__", "__static_attributes__", "__dict__"}
_NO_CODE |= {"extra_repr", "__repr__", "reset_parameters", "__constants__", "__parameters__", "__orig_bases__", "__weakref__"}


def _is_pytorchs(function: Callable[..., Any] | str | None) -> bool:
    if function is None:
        return False
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and owner.__name__ != "_VariableFunctionsClass":
        return False  # such as the `apply` of a class of somebody's
    home = getattr(function, "__module__", None) or getattr(getattr(function, "__objclass__", None), "__module__", "")
    return str(home).split(".")[0] in ("torch", "_operator", "builtins", "math", "se_fx", "_C")


# ------------------------------------------------------------------------------------------------- calls on meta tensors
def holds_hooks_or_convs(module: nn.Module) -> bool:
    """Whether to run a module, which may be a conv itself, would run hooks, or take time."""
    itself, *parts = module.modules()
    return any(map(hooked, (itself, *parts))) or any(isinstance(part, nn.Conv2d) for part in parts)


def on_meta(module: nn.Module) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function that calls a module on meta tensors in the place of its own, and leaves it as it was; and these."""
    tensors = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}

    def call(*args: Any, **kwargs: Any) -> Any:
        before = Snapshot(module)
        try:
            return functional_call(module, tensors, args, kwargs)
        finally:
            before.undo()

    return call, list(tensors.values())
