"""Recipes: how autograd computes a value again in backward that it would keep otherwise.

Autograd lets hooks decide what it keeps of an operator's inputs. Here, in the place of one input, it is given a *recipe*: a
function, and the tensors it needs, which are kept anyway for the operators before. The forward pass isn't touched, and neither
are the formulas of the backward pass, whatever operator it is. All other tensors are kept as ever: through the hooks around, of
activation checkpointing or offloading, or else with the check that nobody has changed them in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Recipe", "is_kept", "recomputed"]

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Recipe:
    """How to compute a value again.

    Args:
        run: a function of tensors, that gives the same for the same.
        sources: what it is called with: tensors, recipes of tensors, or None.
        shares: what recipes among the sources give is used once more soon, and is to be changed by nobody.
    """

    def __init__(self, run: Callable[..., Tensor], *sources: Tensor | Recipe | None, shares: bool = False) -> None:
        self.run, self.sources, self.shares = run, sources, shares
        self.shelf = _Shelf()
        self._versions = [source._version if isinstance(source, Tensor) else 0 for source in sources]

    def is_current(self) -> bool:
        """Whether no source has been changed in place since."""
        for source, version in zip(self.sources, self._versions, strict=True):
            if isinstance(source, Tensor) and source._version != version:
                return False
            if isinstance(source, Recipe) and not source.is_current():
                return False
        return True


class _Shelf:
    """What one reader has computed is kept for the next: a product's backward pass follows those of what reads the product."""

    def __init__(self) -> None:
        self.awaited, self.value = False, None  # type: bool, Tensor | None


class _Kept:
    """A tensor, kept as autograd keeps it."""

    def __init__(self, tensor: Tensor, hooks: Hooks | None) -> None:
        detached = tensor.detach()
        self.unpack = None if hooks is None else hooks[1]
        self.packed = detached if hooks is None else hooks[0](detached)
        self.version = detached._version

    def __call__(self) -> Tensor:
        if self.unpack is not None:
            return self.unpack(self.packed)
        if self.packed._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self.packed.shape)} is at version {self.packed._version}; expected version {self.version} instead"
            )
        return self.packed  # type: ignore[no-any-return]


class _Computed:
    """A recipe whose sources are kept."""

    def __init__(self, recipe: Recipe, hooks: Hooks | None) -> None:
        self.run, self.shelf, self.shares = recipe.run, recipe.shelf, recipe.shares
        self.sources = [
            _Kept(source, hooks) if isinstance(source, Tensor) else source and _Computed(source, hooks)
            for source in recipe.sources
        ]

    def __call__(self, *, again: bool = False) -> Tensor:
        value, self.shelf.value = self.shelf.value, None
        if value is None:
            value = self.run(*[self._given(source) for source in self.sources])
        if again and self.shelf.awaited:
            self.shelf.value = value
        return value

    def _given(self, source: _Kept | _Computed | None) -> Tensor | None:
        if isinstance(source, _Computed):
            return source(again=self.shares)
        return None if source is None else source()


class _Last:
    """The value itself, computed as it was: under the same autocast, and for nobody's gradients."""

    def __init__(self, recipe: Recipe, hooks: Hooks | None, device: str) -> None:
        self.computed = _Computed(recipe, hooks)
        self.device = device
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        recipe.shelf.awaited = True

    def __call__(self) -> Tensor:
        is_on, dtype = self.autocast
        with torch.no_grad():
            if not is_on and not torch.is_autocast_enabled(self.device):
                return self.computed()
            with torch.autocast(self.device, dtype=dtype, enabled=is_on):
                return self.computed()


def is_kept(value: Any) -> bool:
    """Whether autograd may keep a value now, and hooks may decide about that."""
    return (
        not torch.compiler.is_compiling()  # a compiler decides by itself what to compute again
        and type(value) in (Tensor, FakeTensor)
        and value.requires_grad
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


def recomputed(value: Tensor, recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """Within, what operators keep of `value` is its recipe."""
    hooks, place, device = _hooks_around(), _place(value), value.device.type

    def pack(tensor: Tensor) -> _Kept | _Last:
        if _place(tensor) == place and recipe.is_current():
            return _Last(recipe, hooks, device)
        return _Kept(tensor, hooks)

    return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: _Kept | _Last) -> Tensor:
    return packed()


def _place(tensor: Tensor) -> Any:
    """What two names of one tensor have in common, as long as it isn't changed in place."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _hooks_around() -> Hooks | None:
    """The hooks that hold here, such as those of activation checkpointing; only the innermost are asked by autograd."""
    return _top_hooks(False) if _top_hooks is not None else None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
