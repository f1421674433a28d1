"""Kept: what autograd keeps for one node. Operators are asked themselves, on meta tensors, through hooks on what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.analysis import Modules, called, on_meta, runs_pytorch
from se_fx.rewrites.training.recipes import OutOfPlace

__all__ = ["Kept", "is_left", "kept_by"]


@dataclass(frozen=True)
class Kept:
    """What autograd keeps for one node.

    Attributes:
        inputs: those it keeps.
        result: whether it keeps what the node yields.
    """

    inputs: frozenset[fx.Node]
    result: bool


def kept_by(node: fx.Node, modules: Modules, inputs: Mapping[fx.Node, Any]) -> Kept | None:
    """What autograd keeps for a node; None where that can't be told.

    Args:
        node: the node.
        modules: what it may call.
        inputs: what its inputs are.
    """
    if node.op not in ("call_function", "call_method", "call_module") or not runs_pytorch(node, modules):
        return None
    storages: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage()._cdata)
        return tensor.detach()  # else a result that is kept would hold what keeps it, for ever

    try:
        with torch.inference_mode(False), torch.enable_grad():
            values = {source: tree_map_only(Tensor, _fresh, value) for source, value in inputs.items()}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
            with saved_tensors_hooks(keep, _same):
                result = _call(node, modules)(*args, **kwargs)
    except Exception:  # whatever an operator raises on what it isn't made for
        return None
    found = {source for source, value in values.items() if storages.intersection(_places(value))}
    return Kept(frozenset(found), bool(storages.intersection(_places(result))))


def is_left(node: fx.Node, modules: Modules, value: Any) -> bool:
    """Whether a node that works in place on its one input needs not."""
    if not isinstance(value, Tensor):
        return False
    try:
        with torch.inference_mode(False), torch.no_grad(), OutOfPlace():
            given = _fresh(value)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: given)
            _call(node, modules)(*args, **kwargs)
            return given._version == 0
    except Exception:  # whatever an operator raises on what it isn't made for
        return False


def _call(node: fx.Node, modules: Modules) -> Any:
    module = called(node, modules)
    if module is not None:
        return on_meta(module)[0]
    return getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target


def _fresh(tensor: Tensor) -> Tensor:
    """A tensor like it that has a gradient, and isn't a leaf, so that it may be changed in place."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return made.requires_grad_().mul(1) if tensor.is_floating_point() else made


def _places(value: Any) -> list[int]:
    return [leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _same(tensor: Tensor) -> Tensor:
    return tensor
