"""Recipes: how a value is computed again in backward that autograd would keep otherwise.

A *recipe* is a function, and the tensors it needs, which are kept anyway for the operators before. These are kept as autograd
keeps what it needs: by the hooks around, of activation checkpointing or offloading, or else with the check that nobody has
changed them in place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Callee", "Hooks", "OutOfPlace", "Recipe", "module_or_function", "out_of_place"]

#: Bytes of a part of a map that the caches of cores hold.
PART = 2**21

Callee = nn.Module | str  # a module, or a function of PyTorch's by its qualified name
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Shelf:
    """What one reader has computed is kept for the others: the backward passes of those within a unit follow each other."""

    readers = left = 0
    value: Tensor | None = None
    is_spared = False

    def put(self, value: Tensor, readers: int) -> Tensor:
        """Keep a value for so many readers."""
        if readers > 0:
            self.left, self.value = readers, value
        return value

    def take(self) -> Tensor | None:
        """The value, which is forgotten when its last reader has it."""
        value, self.left = self.value, self.left - 1
        if self.left <= 0:
            self.value = None
        return value


class _Held:
    """A tensor that hooks keep."""

    def __init__(self, tensor: Tensor, hooks: Hooks) -> None:
        pack, self.unpack = hooks
        self.packed = pack(tensor.detach())

    def within(self) -> Tensor:
        """The tensor."""
        return self.unpack(self.packed)


class Recipe:
    """How to compute a value again, under the autocast that it was computed under.

    Args:
        run: a function of tensors that gives the same for the same, and changes nothing, since that may be used once more.
        sources: what it is called with: tensors, recipes of tensors, or None.
    """

    def __init__(self, run: Callable[..., Tensor], *sources: Tensor | Recipe | None) -> None:
        self.run, self.shelf = run, _Shelf()
        self.sources: list[Any] = [*sources]
        self.versions = [source._version if isinstance(source, Tensor) else 0 for source in sources]
        self.autocast = _autocast_on(_device(sources)) if _is_any_autocast_on() else None

    def under(self, hooks: Hooks | None) -> Recipe:
        """The same, with its sources kept by hooks, which may give back each but once."""
        if hooks is None:
            return self
        new = object.__new__(Recipe)
        new.__dict__.update(self.__dict__)
        new.sources = [_Held(each, hooks) if isinstance(each, Tensor) else each and each.under(hooks) for each in self.sources]
        return new

    def packed(self, _: Tensor) -> Recipe:
        """What autograd keeps in a tensor's place."""
        return self

    def unpack(self) -> Tensor:
        """The value, for autograd, and for nobody's gradients."""
        shelf = self.shelf
        if shelf.is_spared:
            return torch.empty(0)
        value = shelf.take()
        return shelf.put(self._computed(), shelf.readers - 1) if value is None else value

    def within(self) -> Tensor:
        """The value, for another recipe."""
        shelf = self.shelf
        return shelf.put(self._computed(), shelf.readers) if shelf.value is None else shelf.value

    def times(self, gradient: Tensor) -> Tensor:
        """The sum over space of the value times a gradient of its shape, (N, C, 1, 1)."""
        return self._with_parts(gradient, gradient.shape[1], lambda value, part: (part * value).sum((2, 3), keepdim=True))

    def outer(self, gradient: Tensor, channels: int) -> Tensor:
        """The sum over space of the value, of so many channels, times each channel of a gradient, (N, O, C)."""
        return self._with_parts(gradient, channels, lambda value, part: part.flatten(2).bmm(value.flatten(2).transpose(1, 2)))

    def _with_parts(self, gradient: Tensor, channels: int, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What is computed of the value and a gradient, part by part: nothing of their size is made."""
        shelf, parts = self.shelf, _Parts(gradient, channels)
        with torch.no_grad():
            alone = shelf.value is None and shelf.readers == 1 and self._is_by_sample()
            values = self._parts(parts) if alone else parts.of(self.unpack())
            with torch.autocast(gradient.device.type, enabled=False):
                return torch.cat([compute(*pair) for pair in zip(values, parts.of(gradient), strict=True)])

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Within, autograd is given something else, at no cost."""
        self.shelf.is_spared = True
        try:
            yield
        finally:
            self.shelf.is_spared = False

    def _computed(self) -> Tensor:
        values = [each if each is None or isinstance(each, Tensor) else each.within() for each in self._current()]
        if self.autocast is None and not torch.is_grad_enabled() and not _is_any_autocast_on():
            return self.run(*values)
        with torch.no_grad(), self._as_it_was(values):
            return self.run(*values)

    def _current(self) -> list[Any]:
        """The sources, none of which has been changed in place since."""
        for source, version in zip(self.sources, self.versions, strict=True):
            if isinstance(source, Tensor) and source._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{list(source.shape)} is at version {source._version}; expected version {version} instead"
                )
        return self.sources

    def _parts(self, parts: _Parts) -> Iterator[Tensor]:
        """The value, a few samples at a time, so that there is room for these only."""
        sources = [each._beside(parts) if isinstance(each, Recipe) else parts.of(each) for each in self._current()]
        for values in zip(*sources, strict=True):
            with self._as_it_was(values):
                part = self.run(*values)
            yield part

    def _beside(self, parts: _Parts) -> Iterable[Tensor]:
        """The value's parts: of all of it where others will want that, too."""
        return parts.of(self.within()) if self.shelf.readers else self._parts(parts)

    def _is_by_sample(self) -> bool:
        """Whether it gives each sample for what the maps among its sources are for that sample."""
        is_rounded = any(isinstance(each, Tensor) and each.ndim == 1 and each.dtype in _ROUNDED for each in self.sources)
        return not is_rounded and all(each._is_by_sample() for each in self.sources if isinstance(each, Recipe))

    def _as_it_was(self, values: Iterable[Tensor | None]) -> AbstractContextManager[Any]:
        if self.autocast is not None:
            device, dtype = self.autocast
            return torch.autocast(device, dtype=dtype)
        return torch.autocast(_device(values), enabled=False) if _is_any_autocast_on() else contextlib.nullcontext()


class _Parts:
    """Samples, as many at a time as caches hold, and threads can share."""

    def __init__(self, gradient: Tensor, channels: int) -> None:
        self.samples = len(gradient)
        self.size = max(1, PART // (channels * gradient.shape[2:].numel() * gradient.element_size()))

    def of(self, source: Tensor | _Held | None) -> Iterable[Any]:
        """The parts of a map, or for each part the same."""
        value = source.within() if isinstance(source, _Held) else source
        is_of_samples = value is not None and value.ndim == 4 and len(value) == self.samples  # else it is for all of them
        if value is not None and is_of_samples:
            return torch.split(value, self.size)
        return itertools.repeat(value, -(-self.samples // self.size))


def _device(sources: Iterable[Any]) -> str:
    """The type of device that sources are on."""
    for source in sources:
        if source is not None:
            return str(source.device.type) if isinstance(source, Tensor) else _device(source.sources)
    return "cpu"


def _autocast_on(device: str) -> tuple[str, torch.dtype] | None:
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


_ROUNDED = (torch.float16, torch.bfloat16)
_is_any_autocast_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


# -------------------------------------------------------------------------------------------------- what changes nothing
def module_or_function(callee: Callee) -> Any:
    """What a callee stands for."""
    if isinstance(callee, nn.Module):
        return callee
    found: Any = torch
    for name in callee.removeprefix("torch.").split("."):
        found = getattr(found, name)
    return found


def out_of_place(callee: Callee, args: Any, kwargs: Any, value: Tensor) -> Any:
    """What an activation gives for a value, which is left as it is."""
    if isinstance(callee, nn.Module):
        if type(callee).__module__ == nn.modules.activation.__name__:  # whether these work in place is told by their attribute
            return _told_not_to(callee).forward(value, *args, **kwargs)
        call = callee.forward
    else:
        call = module_or_function(callee)
        if inspect.isfunction(call) and call.__module__ == F.__name__:  # what it calls has no flags
            return _without_flag(call, (value, *args), kwargs)
    with OutOfPlace():
        return call(value, *args, **kwargs)


def _told_not_to(module: nn.Module) -> nn.Module:
    """The same module, told not to work in place."""
    if not getattr(module, "inplace", False):
        return module
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__, inplace=False)
    return other


class OutOfPlace(TorchFunctionMode):
    """Within, no activation works in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _without_flag(func, args, kwargs or {})


def _without_flag(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives, without its flag that it may work in place."""
    place = _place_of_flag(func)
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    elif place is not None and len(args) > place:
        args = (*args[:place], False, *args[place + 1 :])
    return func(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _place_of_flag(func: Any) -> int | None:
    """Where a function of `torch.nn.functional` has the flag that it may work in place."""
    if not inspect.isfunction(func):
        return None
    names = list(inspect.signature(func).parameters)
    return names.index("inplace") if "inplace" in names else None
