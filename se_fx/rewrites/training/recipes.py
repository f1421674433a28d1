"""Recipes: how autograd computes a value again in backward that it would keep otherwise.

Autograd lets hooks decide what it keeps of an operator's inputs. Here, in the place of one input, it is given a *recipe*: a
function, and the tensors it needs, which are kept anyway for the operators before. The forward pass isn't touched, and neither
are the formulas of the backward pass, whatever operator it is. All other tensors are kept as ever: through the hooks around, of
activation checkpointing or offloading, or else with the check that nobody has changed them in place.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Recipe", "Recomputed", "is_kept"]

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Recipe:
    """How to compute a value again.

    Args:
        run: a function of tensors that gives the same for the same, and changes nothing, since that may be used once more.
        sources: what it is called with: tensors, recipes of tensors, or None.
        by_sample: whether it gives each sample for what the maps among its sources are for that sample.
    """

    def __init__(self, run: Callable[..., Tensor], *sources: Tensor | Recipe | None, by_sample: bool = True) -> None:
        self.run, self.sources = run, sources
        self.by_sample: bool = by_sample and all(source.by_sample for source in sources if isinstance(source, Recipe))
        self.shelf = _Shelf()
        self._kept: _Computed | None = None
        self._versions = [source._version if isinstance(source, Tensor) else 0 for source in sources]

    def kept(self, hooks: Hooks | None) -> _Computed:
        """With its sources kept: once for all its readers, but for hooks, which may give back each tensor but once."""
        if hooks is not None:
            return _Computed(self, hooks)
        if self._kept is None:
            self._kept = _Computed(self, None)
        return self._kept

    def is_current(self) -> bool:
        """Whether no source has been changed in place since."""
        for source, version in zip(self.sources, self._versions, strict=True):
            if isinstance(source, Tensor) and source._version != version:
                return False
            if isinstance(source, Recipe) and not source.is_current():
                return False
        return True


class _Shelf:
    """What one reader has computed is kept for the others: the backward passes of those within a unit follow each other."""

    def __init__(self) -> None:
        self.readers, self.left, self.value = 0, 0, None  # type: int, int, Tensor | None

    def put(self, value: Tensor, readers: int) -> None:
        """Keep a value for so many readers."""
        if readers > 0:
            self.left, self.value = readers, value

    def take(self) -> Tensor | None:
        """The value, which is forgotten when its last reader has it."""
        value, self.left = self.value, self.left - 1
        if self.left <= 0:
            self.value = None
        return value


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
        return self.packed


class _Computed:
    """A recipe whose sources are kept."""

    def __init__(self, recipe: Recipe, hooks: Hooks | None) -> None:
        self.run, self.shelf, self.by_sample = recipe.run, recipe.shelf, recipe.by_sample
        self.sources = [
            _Kept(source, hooks) if isinstance(source, Tensor) else source and source.kept(hooks) for source in recipe.sources
        ]

    def __call__(self) -> Tensor:
        """For an operator."""
        value = self.shelf.take()
        if value is None:
            value = self._run()
            self.shelf.put(value, self.shelf.readers - 1)
        return value

    def within(self) -> Tensor:
        """For another recipe."""
        if self.shelf.value is not None:
            return self.shelf.value
        value = self._run()
        self.shelf.put(value, self.shelf.readers)
        return value

    def samples(self, count: int) -> Iterator[Tensor]:
        """Each of so many samples by itself, so that there is room for one only, unless it is known already."""
        if self.shelf.value is not None:
            yield from self.shelf.value.chunk(count)
            return
        parts = (source.samples(count) if isinstance(source, _Computed) else _samples(source, count) for source in self.sources)
        for values in zip(*parts, strict=True):
            yield self.run(*values)

    def _run(self) -> Tensor:
        values = [source.within() if isinstance(source, _Computed) else source and source() for source in self.sources]
        return self.run(*values)


def _samples(kept: Any, count: int) -> Iterable[Tensor | None]:
    value: Tensor | None = kept and kept()
    is_of_samples = value is not None and value.ndim == 4 and len(value) == count  # else it is for all of them
    return value.chunk(count) if value is not None and is_of_samples else itertools.repeat(value, count)


class _Last:
    """The value itself, computed as it was: under the same autocast, and for nobody's gradients."""

    def __init__(self, recipe: Recipe, hooks: Hooks | None, device: str) -> None:
        self.computed = recipe.kept(hooks)
        self.device, self.is_spared = device, False
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        recipe.shelf.readers += 1

    def __call__(self) -> Tensor:
        if self.is_spared:
            return torch.empty(0)
        with torch.no_grad(), self._autocast():
            return self.computed()

    def times(self, gradient: Tensor) -> Tensor:
        """The sum over space of the value times a gradient, (N, C, 1, 1). Sample by sample: nothing of their size is made."""
        shelf, sums = self.computed.shelf, []
        with torch.no_grad(), self._autocast():
            alone = shelf.value is None and shelf.readers == 1 and self.computed.by_sample
            count = len(gradient)
            values = self.computed.samples(count) if alone else self.computed().chunk(count)
            for value, one in zip(values, gradient.chunk(count), strict=True):
                with torch.autocast(self.device, enabled=False) if self.autocast[0] else contextlib.nullcontext():
                    sums.append((one * value).sum((2, 3), keepdim=True))
        return torch.cat(sums)

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Within, autograd is given something else, at no cost."""
        self.is_spared = True
        try:
            yield
        finally:
            self.is_spared = False

    def _autocast(self) -> AbstractContextManager[Any]:
        is_on, dtype = self.autocast
        if is_on or torch.is_autocast_enabled(self.device):
            return torch.autocast(self.device, dtype=dtype, enabled=is_on)
        return contextlib.nullcontext()


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
    )


class Recomputed:
    """Within, what operators keep of `value` is its recipe.

    Args:
        value: a value.
        recipe: how to compute it again.
        settles: whether `settle` will be called, by which it is decided about all else.
    """

    def __init__(self, value: Tensor, recipe: Recipe, *, settles: bool = False) -> None:
        self.hooks, self.place, self.device = _hooks_around(), _place(value), value.device.type
        self.recipe: Recipe | None = recipe
        self.last: weakref.ref[_Last] | None = None  # which lives as long as autograd keeps it
        self.open: list[tuple[_Packed, Tensor]] | None = [] if settles else None

    def __enter__(self) -> None:
        self.context = saved_tensors_hooks(self._pack, _unpack)
        self.context.__enter__()

    def __exit__(self, *raised: object) -> None:
        context, self.recipe = self.context, None  # autograd keeps hooks, and so their owner
        del self.context  # which leads back here: values would wait for the garbage collector
        context.__exit__(*raised)

    def _pack(self, tensor: Tensor) -> _Packed:
        if self.recipe is not None and _place(tensor) == self.place and self.recipe.is_current():
            last = _Last(self.recipe, self.hooks, self.device)
            self.last = weakref.ref(last)
            return _Packed(last)
        if self.open is None:
            return _Packed(_Kept(tensor, self.hooks))
        packed = _Packed(None)
        self.open.append((packed, tensor.detach()))
        return packed

    def settle(self, result: Tensor, recipe: Recipe | None) -> None:
        """Have what was kept of an operator's result be a recipe, too, if there is one; and keep all else."""
        for packed, tensor in self.open or ():
            known = recipe is not None and _place(tensor) == _place(result) and recipe.is_current()
            packed.content = _Last(recipe, self.hooks, self.device) if known and recipe else _Kept(tensor, self.hooks)
        self.open = None


class _Packed:
    """What autograd is given, and gives back for the value."""

    def __init__(self, content: _Kept | _Last | None) -> None:
        self.content = content


def _unpack(packed: _Packed) -> Tensor:
    if packed.content is None:
        raise RuntimeError("what was to be kept for backward is not known: the forward pass was interrupted")
    return packed.content()


def _place(tensor: Tensor) -> Any:
    """What two names of one tensor have in common, as long as it isn't changed in place."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _hooks_around() -> Hooks | None:
    """The hooks that hold here, such as those of activation checkpointing; only the innermost are asked by autograd."""
    return _top_hooks(False) if _top_hooks is not None else None


_C: Any = torch._C
_top_hooks = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
