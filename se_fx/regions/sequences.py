"""Sequences: modules in which blocks stand beside the modules that are called one after the other."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Inserted", "Sequence"]


class Sequence:
    """A Sequential in which blocks stand: to whoever counts, indexes or iterates it, they are not among its modules."""

    def __len__(self) -> int:
        return len(self._visible())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._visible().values())

    def __getitem__(self, idx: Any) -> Any:
        items = list(self._visible().items())
        return self._part(OrderedDict(items[idx])) if isinstance(idx, slice) else items[idx][1]

    def __setitem__(self, idx: int, module: nn.Module) -> None:
        with self._alone() as itself:
            nn.Sequential.__setitem__(itself, idx, module)

    def __delitem__(self, idx: slice | int) -> None:
        with self._alone() as itself:
            nn.Sequential.__delitem__(itself, idx)

    def insert(self, index: int, module: nn.Module) -> Any:
        """Insert a module before a position."""
        with self._alone() as itself:
            return nn.Sequential.insert(itself, index, module)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[nn.Sequential]:
        """Within, it has its own modules alone, which `nn.Sequential` counts and names."""
        itself: Any = self
        held = {name: each for name, each in itself._modules.items() if isinstance(each, Inserted)}
        for name in held:
            del itself._modules[name]
        try:
            yield itself
        finally:
            own = dict(itself._modules)
            itself._modules.clear()
            itself._modules.update({**held, **own})

    def _part(self, modules: OrderedDict[str, nn.Module]) -> nn.Sequential:
        """A Sequential of some of these modules, with the blocks that scale what they return."""
        used = {id(container): container for each in modules.values() for container, _ in each.__dict__.get("_excited_by", ())}
        held = {name: each for name, each in self._modules.items() if id(each) in used}  # type: ignore[attr-defined]
        part = nn.Sequential(OrderedDict([*held.items(), *modules.items()]))
        if held:
            part.__dict__["_hosting"] = True
            self._furnish(part, nn.Sequential)  # type: ignore[attr-defined]
        return part

    def _visible(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = self._modules  # type: ignore[attr-defined]
        return {name: module for name, module in modules.items() if not isinstance(module, Inserted)}


class Inserted(nn.Module):
    """Holds the modules that a pass has inserted. They are no part of the model: capture never enters them.

    Called as one of the modules around it, by who calls a model's children one after the other, it does nothing.
    """

    def forward(self, x: Any) -> Any:
        """Return what it is given."""
        return x
