"""Edits of a graph whose algebra is known: new modules and tensors under free names, and nothing left that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.products import VectorLinear, in_type_of
from se_fx.rewrites.terms import Affine, with_parameters

__all__ = ["drop", "insert", "insert_buffer", "insert_call", "multiply", "promoted", "replace", "sweep"]


def multiply(algebra: Algebra, old: fx.Node, vector: fx.Node, affine: Affine) -> nn.Module:
    """Put a product of `vector` and a matrix in place of `old`, and of what alone led there."""
    weight, bias = affine.matrix.to(affine.dtype), affine.bias.to(affine.dtype)
    has_bias, spatial = bias.is_meta or bool(bias.any()), len(algebra.vectors[vector]) == 3
    given = bias if has_bias else None
    make = _layer if algebra.exported else VectorLinear
    module = make(weight, given, spatial=spatial)
    with algebra.graph.inserting_before(old):
        new = insert_call(algebra, old, "product", module, vector)
    replace(algebra, old, new)
    return module


def _layer(weight: Tensor, bias: Tensor | None, *, spatial: bool) -> nn.Module:
    """PyTorch's own layer, which engines know."""
    sizes = (weight.shape[1], weight.shape[0])
    if spatial:
        return with_parameters(nn.Conv2d(*sizes, 1, device="meta"), weight[..., None, None], bias)
    return with_parameters(nn.Linear(*sizes, device="meta"), weight, bias)


def insert_call(algebra: Algebra, near: fx.Node, suffix: str, module: nn.Module, source: fx.Node) -> fx.Node:
    """A call of a new module, named after what `near` calls, and said to stand where that stands."""
    target = _free_name(algebra, str(near.target) if near.op == "call_module" else near.name, suffix)
    algebra.module.add_submodule(target, module)
    algebra.modules[target] = module
    new = algebra.graph.call_module(target, (source,))
    new.meta = {"nn_module_stack": {**_place_of(near), target: (target, type(module))}}
    return new


def insert(algebra: Algebra, near: fx.Node, call: Callable[..., Any] | str, *args: Any) -> fx.Node:
    """A call of a function, or of a method by name, said to stand where `near` stands."""
    graph = algebra.graph
    new = graph.call_method(call, args) if isinstance(call, str) else graph.call_function(call, args)
    new.meta = {"nn_module_stack": _place_of(near)}
    return new


def insert_buffer(algebra: Algebra, near: fx.Node, suffix: str, value: Tensor) -> fx.Node:
    """A new buffer, named after a node."""
    name = _free_name(algebra, near.name, suffix)
    algebra.module.register_buffer(name, value.detach())
    return algebra.graph.get_attr(name)


def promoted(algebra: Algebra, value: fx.Node, *operands: fx.Node) -> fx.Node:
    """`value` in the type that these two would give: their own, except under autocast."""
    return insert(algebra, value, in_type_of, value, *operands)


def _place_of(node: fx.Node) -> dict[str, Any]:
    """The modules around what a node calls."""
    stack = node.meta.get("nn_module_stack", {})
    inner = 1 if node.op == "call_module" else 0
    return dict(list(stack.items())[: len(stack) - inner])


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
    if old in algebra.batched:
        algebra.batched.add(new)
    if "size" in old.meta:
        new.meta.setdefault("size", old.meta["size"])
    old.replace_all_uses_with(new)
    sweep(algebra, old)


def drop(algebra: Algebra, node: fx.Node) -> None:
    """Erase a node that nobody reads, whatever it writes: its caller has seen to it that nobody else sees that."""
    if not node.users and not node._erased:
        sources = node.all_input_nodes
        algebra.graph.erase_node(node)
        for source in sources:
            sweep(algebra, source)


def sweep(algebra: Algebra, node: fx.Node) -> None:
    """Erase a node that nobody reads, and then those it read, where that is all they do."""
    if node.users or node._erased or node.op == "placeholder" or not algebra.effects.is_idle(node):
        return
    drop(algebra, node)
