"""Edits of a graph whose algebra is known: new modules and tensors under free names, and nothing left that nobody reads."""

from __future__ import annotations

from torch import Tensor, fx, nn

from se_fx.analysis import changes_in_place, describes
from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.products import VectorLinear
from se_fx.rewrites.terms import Affine

__all__ = ["insert_buffer", "insert_call", "multiply", "replace", "sweep"]


def multiply(algebra: Algebra, old: fx.Node, vector: fx.Node, affine: Affine) -> VectorLinear:
    """Put a product of `vector` and a matrix in place of `old`, and of what alone led there."""
    weight, bias = affine.matrix.to(affine.dtype), affine.bias.to(affine.dtype)
    module = VectorLinear(weight, bias if bool(bias.any()) else None)
    with algebra.graph.inserting_before(old):
        new = insert_call(algebra, old, "product", module, vector)
    replace(algebra, old, new)
    return module


def insert_call(algebra: Algebra, near: fx.Node, suffix: str, module: nn.Module, source: fx.Node) -> fx.Node:
    """A call of a new module, named after what `near` calls."""
    target = _free_name(algebra, str(near.target) if near.op == "call_module" else near.name, suffix)
    algebra.module.add_submodule(target, module)
    algebra.modules[target] = module
    return algebra.graph.call_module(target, (source,))


def insert_buffer(algebra: Algebra, near: fx.Node, suffix: str, value: Tensor) -> fx.Node:
    """A new buffer, named after a node."""
    name = _free_name(algebra, near.name, suffix)
    algebra.module.register_buffer(name, value.detach())
    return algebra.graph.get_attr(name)


def _free_name(algebra: Algebra, base: str, suffix: str) -> str:
    name, count = f"{base}_{suffix}", 2
    taken = {*algebra.modules, *(str(node.target) for node in algebra.graph.nodes if node.op == "get_attr")}
    while name in taken:
        name, count = f"{base}_{suffix}_{count}", count + 1
    return name


def replace(algebra: Algebra, old: fx.Node, new: fx.Node) -> None:
    """Have all readers of a value read another in its place, and erase what nobody reads any more."""
    if old in algebra.maps:
        algebra.maps.setdefault(new, algebra.maps[old])
    if old in algebra.vectors:
        algebra.vectors.setdefault(new, algebra.vectors[old])
    new.meta = {**old.meta, **new.meta}
    old.replace_all_uses_with(new)
    sweep(algebra, old)


def sweep(algebra: Algebra, node: fx.Node) -> None:
    """Erase a node that nobody reads, and then those it read, if they do nothing but compute gates or constants."""
    if node.users or node._erased:
        return
    sources = node.all_input_nodes
    algebra.graph.erase_node(node)
    for source in sources:
        idle = source in algebra.vectors or source.op == "get_attr" or describes(source) or algebra.constant(source) is not None
        if idle and (not changes_in_place(source, algebra.modules) or algebra.is_own(source)):
            sweep(algebra, source)
