"""Containers: where inserted blocks stand in a model, and how they are found and taken out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from se_fx.regions import Inserted, restore_code

__all__ = ["CONTAINER", "blocks_of", "hold", "note_blocks", "withdraw"]

#: The child of a module that holds the blocks inserted there.
CONTAINER = "squeeze_excite"
_CONTAINER = "_squeeze_excite_container"  # attribute of such a module: its container's name
_BLOCKS = "_squeeze_excite_blocks"  # of a rewritten model: its blocks' names by their sites'


def hold(module: nn.Module, conv: str, block: nn.Module) -> tuple[Inserted, str, str]:
    """Put a block into a module's container, which is made if there is none, under a name that says which conv it is of.

    No such name ends in that of a conv: tools match names by their ends.

    Returns:
        The container, its name in the module, and the block's name in it.
    """
    if _CONTAINER not in module.__dict__:
        taken = _has(module, CONTAINER)  # by a child of the model's own
        if taken:
            module.add_module("se_fx", nn.Module())
        (module.get_submodule("se_fx") if taken else module).add_module(CONTAINER, Inserted())
        module.__dict__[_CONTAINER] = f"se_fx.{CONTAINER}" if taken else CONTAINER
    path = str(module.__dict__[_CONTAINER])
    container = module.get_submodule(path)
    assert isinstance(container, Inserted)
    name = first = f"of_{conv.replace('.', '_')}"
    count = 1
    while name in container._modules:
        count += 1
        name = f"{first}_{count}"
    container._modules[name] = block
    return container, path, name


def _has(module: nn.Module, name: str) -> bool:
    """`hasattr`, for modules whose `__getattr__` has an answer to everything."""
    return name in module._modules or name in module.__dict__ or hasattr(type(module), name)


def note_blocks(model: nn.Module, blocks: Mapping[str, str]) -> None:
    """Have `model` know where its blocks are: their qualified names, by those of their sites."""
    model.__dict__[_BLOCKS] = {**model.__dict__.get(_BLOCKS, {}), **blocks}


def blocks_of(model: nn.Module) -> dict[str, str]:
    """The qualified names of all inserted blocks in a rewritten model, by the qualified names of their sites."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for site, block in module.__dict__.get(_BLOCKS, {}).items():
            found.setdefault(f"{prefix}{site}".rstrip("."), f"{prefix}{block}")
    return found


def withdraw(module: nn.Module) -> None:
    """Undo what `insert` did to one module, in place. Nothing to do for other modules."""
    restore_code(module)
    if _CONTAINER in module.__dict__:
        del module._modules[module.__dict__.pop(_CONTAINER).split(".")[0]]
    module.__dict__.pop(_BLOCKS, None)
