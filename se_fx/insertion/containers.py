"""Containers: where inserted blocks stand in a model, and how they are found and taken out again."""

from __future__ import annotations

from torch import nn

from se_fx.regions import Inserted, restore_code

__all__ = ["CONTAINER", "block_names", "hold", "withdraw"]

#: The child of a module that holds the blocks inserted there.
CONTAINER = "squeeze_excite"
_CONTAINER = "_squeeze_excite_container"  # attribute of such a module: its container's name
_BLOCKS = "_squeeze_excite_blocks"  # of a rewritten model: its blocks' names by their sites'


def hold(model: nn.Module, home: str, site: str, block: nn.Module) -> tuple[Inserted, str, str]:
    """Put a block into a module's container, which is made if there is none, under a name that says which conv it is of.

    No such name ends in that of a conv: tools match names by their ends. A container is the first child, so that whoever takes
    a model's children up to some layer has the blocks among them.

    Args:
        model: the model, which knows its blocks.
        home: the qualified name of the module.
        site: the site's.
        block: the block.

    Returns:
        The container, the block's name in the module, and in the container.
    """
    module = model.get_submodule(home)
    if _CONTAINER not in module.__dict__:
        made = container = Inserted()
        path = CONTAINER
        if _has(module, CONTAINER):  # a child of the model's own
            made, path = Inserted(), f"se_fx.{CONTAINER}"
            made.add_module(CONTAINER, container)
        made.train(module.training)
        children = dict(module._modules)
        module._modules.clear()
        module.add_module(path.partition(".")[0], made)
        module._modules.update(children)
        module.__dict__[_CONTAINER] = path
    path = str(module.__dict__[_CONTAINER])
    found = module.get_submodule(path)
    assert isinstance(found, Inserted)
    inside = "" if site == home else site.removeprefix(f"{home}.")
    name = first = f"of_{inside.replace('.', '_') or 'conv'}"
    count = 1
    while name in found._modules:
        count += 1
        name = f"{first}_{count}"
    found._modules[name] = block
    model.__dict__[_BLOCKS] = {**model.__dict__.get(_BLOCKS, {}), site: f"{home}.{path}.{name}".lstrip(".")}
    return found, f"{path}.{name}", name


def _has(module: nn.Module, name: str) -> bool:
    """`hasattr`, for modules whose `__getattr__` has an answer to everything."""
    return name in module._modules or name in module.__dict__ or hasattr(type(module), name)


def block_names(model: nn.Module) -> dict[str, str]:
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
