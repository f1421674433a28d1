"""Saving: what autograd keeps for operators is looked at once they have run, and recipes are put in its place.

The forward pass isn't touched, and neither are the formulas of the backward pass, whatever operator it is.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from se_fx.rewrites.training.recipes import Hooks, Recipe

__all__ = ["has_hooks_around", "is_kept", "keep", "recomputed"]


#: Bytes of a map that is worth computing again. For smaller ones, the calls take longer than they are worth.
SMALL = 2**18


def is_kept(value: Any) -> bool:
    """Whether autograd may keep a value now, and hooks may decide about that."""
    return (
        not torch.compiler.is_compiling()  # a compiler decides by itself what to compute again
        and type(value) in (Tensor, FakeTensor)
        and value.requires_grad
        and torch.is_grad_enabled()
        and not _C._get_tracing_state()
        and not _C._are_functorch_transforms_active()
        and _C._autograd._saved_tensors_hooks_is_enabled()
        and value.numel() * value.element_size() >= SMALL
    )


def recomputed(
    call: Callable[..., Any], value: Tensor, args: Any, kwargs: Any, recipe: Recipe | None, again: Recipe | None = None
) -> Any:
    """``call(value, *args, **kwargs)``, for which autograd keeps recipes of the value, and of the result.

    Args:
        call: a function.
        value: what it is called with.
        args: more arguments.
        kwargs: more arguments.
        recipe: how to compute the value again, if it can be.
        again: how to compute the result again, if it can be.
    """
    hooks = _hooks_around()
    if hooks is not None:
        with _without_hooks():
            first, result = _sequence_nr(), call(value, *args, **kwargs)
    elif recipe is None and again is None:
        return call(value, *args, **kwargs)
    else:
        first, result = _sequence_nr(), call(value, *args, **kwargs)
        if _put_at_once(value, recipe, result, again):
            return result
    for tensor, saved in _saved_since(first, result):
        known = _known(tensor, value, recipe, result, again)
        if known is not None:
            _put(known.under(hooks), saved)
        elif hooks is not None and tensor is not None:
            _pack(saved, hooks)
    return result


def keep(recipe: Recipe, result: Tensor) -> None:
    """Have the `torch.autograd.Function` that gave a result keep a recipe for the first tensor that it has saved."""
    node: Any = result.grad_fn
    _put(recipe, node._raw_saved_tensors[0])
    node.kept = weakref.ref(recipe)  # which lives as long as autograd keeps it


def _put_at_once(value: Tensor, recipe: Recipe | None, result: Any, again: Recipe | None) -> bool:
    """Put a recipe where the last operator has saved what it is of, as nearly all do that save it."""
    first = result[0] if isinstance(result, tuple) else result
    node = getattr(first, "grad_fn", None)
    kind: Any = type(node)
    for name, raw in _names_saved(kind):
        known = _known(_read(node, name), value, recipe, result, again)
        if known is not None:
            _put(known, getattr(node, raw))
            return True
    return False


def _known(tensor: Tensor | None, value: Tensor, recipe: Recipe | None, result: Any, again: Recipe | None) -> Recipe | None:
    """The recipe of a tensor that is saved."""
    if tensor is value and value is not result:
        return recipe
    return again if again is not None and isinstance(tensor, Tensor) and _place(tensor) == _place(result) else None


def _put(recipe: Recipe, saved: Any) -> None:
    """Have autograd keep a recipe for what is saved."""
    recipe.shelf.readers += 1
    saved.register_hooks(recipe.packed, Recipe.unpack)


def _saved_since(first: int, result: Any) -> Iterator[tuple[Tensor | None, Any]]:
    """What autograd has saved since for the operators that gave a result: the tensors, and what takes hooks for them."""
    outputs = (result,) if isinstance(result, Tensor) else tree_leaves(result)
    nodes = [output.grad_fn for output in outputs if isinstance(output, Tensor) and output.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # which grows
        for name, raw in _names_saved(type(node)):
            tensors = _read(node, name)
            if isinstance(tensors, tuple):
                yield from zip(tensors, getattr(node, raw), strict=True)
            else:
                yield tensors, getattr(node, raw)
        for before, _ in node.next_functions:
            if before is not None and first <= before._sequence_nr() < _OF_LEAVES and before not in seen:
                seen.add(before)
                nodes.append(before)


@functools.cache
def _names_saved(kind: Any) -> list[tuple[str, str]]:
    """The attributes of operators' nodes that are what autograd has saved: tensors, and what takes hooks for them."""
    raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    names = [name.removeprefix("_raw") for name in raw]
    return [
        (name if hasattr(kind, name) else name.removeprefix("_"), its_raw) for name, its_raw in zip(names, raw, strict=True)
    ]


def _read(node: Any, name: str) -> Any:
    try:
        return getattr(node, name)
    except RuntimeError:  # has been changed in place since: using it will raise
        return None


def _place(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _pack(saved: Any, hooks: Hooks) -> None:
    """Have hooks of others keep what is saved, unless hooks within the call do."""
    asked = []

    def pack(tensor: Tensor) -> Any:
        asked.append(True)
        return hooks[0](tensor)

    try:
        saved.register_hooks(pack, hooks[1])
    except RuntimeError:
        if asked:  # it comes from them
            raise


def has_hooks_around() -> bool:
    """Whether hooks of others, such as those of activation checkpointing, keep what autograd would."""
    return _hooks_around() is not None


def _hooks_around() -> Hooks | None:
    """The hooks that hold here, such as those of activation checkpointing; only the innermost are asked by autograd."""
    return _top_hooks(False) if _top_hooks is not None else None


@contextlib.contextmanager
def _without_hooks() -> Iterator[None]:
    """Within, no hooks hold."""
    taken: list[Hooks] = []
    while (hooks := _hooks_around()) is not None:
        taken.append(hooks)
        _C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            _C._autograd._push_saved_tensors_default_hooks(pack, unpack)


_C: Any = torch._C
_sequence_nr = _C._autograd._get_sequence_nr
_top_hooks = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
_OF_LEAVES = 2**64 - 1  # the number of nodes that accumulate gradients of leaves
