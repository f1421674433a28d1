"""Writes torch.inv and python.inv: where the names that our docstrings and pages link to are documented.

    python docs/_inventories/make.py

The pages are then built alike with a network and without. Each name is looked up in the installed package, so that one that is
gone stops the script. It is listed under the name it is documented by; under the one its `__module__` gives, which is what
Sphinx makes of an annotation; and, if it is a class, under its bare name, which is what annotations say. `sphinx-build -n`
tells which names are missing here.
"""

from __future__ import annotations

import inspect
import pkgutil
import zlib
from pathlib import Path

GENERATED = "generated/{name}.html"
TORCH = {  # page: names documented there
    GENERATED: [
        "torch.nn.Module", "torch.nn.Conv2d", "torch.nn.Linear", "torch.optim.Optimizer",
        "torch.compile", "torch.inference_mode", "torch.is_tensor",
    ],
    "tensors.html": ["torch.Tensor"],
    "tensor_attributes.html": ["torch.dtype", "torch.device"],
    "fx.html": ["torch.fx.Graph", "torch.fx.GraphModule", "torch.fx.Node"],
    "optim.html": ["torch.optim.Optimizer"],
    "export.html": ["torch.export.export"],
}  # fmt: skip
PYTHON = {
    "library/functions.html": ["int", "float", "bool", "str", "tuple", "list", "dict", "frozenset", "set", "object"],
    "library/exceptions.html": ["ValueError"],
    "library/typing.html": ["typing.Any"],
    "library/os.html": ["os.PathLike"],
    "library/constants.html": ["None"],
    "library/collections.abc.html": [
        f"collections.abc.{name}" for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
    ],
}  # fmt: skip


def lines(pages: dict[str, list[str]]) -> list[str]:
    """One line for each name: name, role, priority, address, title."""
    found = {}
    for page, names in pages.items():
        for name in names:
            thing = pkgutil.resolve_name(name if "." in name else f"builtins:{name}")
            role = "class" if inspect.isclass(thing) else "data" if thing is None else "function"
            known_as = {
                name,
                f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}",
            }
            if role == "class":
                known_as.add(thing.__name__)
            for alias in known_as if "." in name else {name}:
                found[alias] = f"{alias} py:{role} 1 {page.format(name=name)}#{name} -"
    return [found[alias] for alias in sorted(found)]


def write(project: str, pages: dict[str, list[str]]) -> None:
    """Write an inventory, version 2: four lines of text, and the names, compressed."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    body = "".join(f"{line}\n" for line in lines(pages))
    Path(__file__).with_name(f"{project}.inv").write_bytes(
        head.encode() + zlib.compress(body.encode(), 9)
    )


if __name__ == "__main__":
    write("torch", TORCH)
    write("python", PYTHON)
