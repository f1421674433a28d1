"""Containers: where inserted blocks stand in a model, and how they are found and taken out again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from se_fx.capture import TRACED_HOOKS
from se_fx.regions import Inserted, restore_code

__all__ = ["CONTAINER", "attach", "blocks_of", "container_of", "hold", "withdraw"]

#: The child of a region that holds the blocks inserted there, and of a lone Conv2d that is its block.
CONTAINER = "squeeze_excite"
_CONTAINER = "_squeeze_excite_container"  # attributes of a region: its container's name,
_NAMES = "_squeeze_excite_names"  # and those of the blocks in it


# ----------------------------------------------------------------------------------------------------------------- regions
def container_of(module: nn.Module) -> str:
    """The name of a region's container of blocks, which is made if there is none."""
    if _CONTAINER not in module.__dict__:
        taken = _has(module, CONTAINER)  # by a child of the model's own
        if taken:
            module.add_module("se_fx", nn.Module())
        (module.get_submodule("se_fx") if taken else module).add_module(CONTAINER, Inserted())
        module.__dict__[_CONTAINER] = f"se_fx.{CONTAINER}" if taken else CONTAINER
        module.__dict__[_NAMES] = []
    return str(module.__dict__[_CONTAINER])


def _has(module: nn.Module, name: str) -> bool:
    """`hasattr`, for modules whose `__getattr__` has an answer to everything."""
    return name in module._modules or name in module.__dict__ or hasattr(type(module), name)


def hold(module: nn.Module, container: str, name: str, block: nn.Module) -> None:
    """Put a block into a region's container, under a name that may have dots."""
    *path, last = name.split(".")
    inner = module.get_submodule(container)
    for part in path:
        inner = inner._modules.setdefault(part, nn.Module()) or inner
    inner._modules[last] = block
    module.__dict__[_NAMES].append(name)


# -------------------------------------------------------------------------------------------------------------- lone convs
def attach(conv: nn.Module, block: nn.Module) -> None:
    """Scale what `conv` returns by `block`, wherever it is called from, in place. The conv keeps its class and keys."""
    conv.register_forward_hook(_excite)  # first, since it tells `withdraw` of the block
    conv.add_module(CONTAINER, block)


def _excite(conv: nn.Module, args: Any, output: Tensor) -> Tensor:
    return conv.get_submodule(CONTAINER)(output)  # type: ignore[no-any-return]


TRACED_HOOKS.add(_excite)


# -------------------------------------------------------------------------------------------------------------------- both
def blocks_of(model: nn.Module) -> dict[str, str]:
    """The qualified names of all inserted blocks in a rewritten model, by the qualified names of their sites."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        region = f"{path}." if path else ""
        if _CONTAINER in module.__dict__:
            container = module.__dict__[_CONTAINER]
            found.update({f"{region}{name}": f"{region}{container}.{name}" for name in module.__dict__[_NAMES]})
        elif _excite in module._forward_hooks.values():
            found[path] = f"{region}{CONTAINER}"
    return found


def withdraw(module: nn.Module) -> None:
    """Undo what `insert` or `attach` did to one module, in place. Nothing to do for other modules."""
    restore_code(module)
    if _CONTAINER in module.__dict__:
        del module._modules[module.__dict__.pop(_CONTAINER).split(".")[0]], module.__dict__[_NAMES]
    for key, hook in list(module._forward_hooks.items()):
        if hook is _excite:
            del module._forward_hooks[key]
            module._modules.pop(CONTAINER, None)
