"""What graphs call so that less is kept: norms, products and whatever reads these, as they are, with recipes beside.

Each does exactly what it stands for, and so in eager mode without gradients, and in compiled code, nothing besides.
"""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from se_fx.regions import hooked, own_class
from se_fx.rewrites.training.recipes import Callee, Recipe, module_or_function, out_of_place
from se_fx.rewrites.training.saving import has_hooks_around, is_kept, keep, recomputed

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "activated",
    "held",
    "is_hooked",
    "is_plain_scale",
    "is_still",
    "name_of_class",
    "normalized",
    "product",
    "reading",
    "repeated",
    "scaled",
]


def normalized(
    norm: Callee, value: Tensor, recipe: Recipe | None, how: str, known: tuple[str, ...], *args: Any, **kwargs: Any
) -> tuple[Any, Recipe | None]:
    """``norm(value)``, and the recipe of it, from what its normalisation keeps.

    Args:
        norm: `F.batch_norm`, `F.group_norm`, or a module that runs one of these, and activations besides.
        value: its input.
        recipe: how to compute that again; None to keep it.
        how: what these activations are to keep: see `activated`.
        known: the module's class, and the activations' names in it; nothing for a function. Of any other class, it is called.
        *args: more arguments.
        **kwargs: more arguments.
    """
    if not is_kept(value) or (isinstance(norm, nn.Module) and not is_still(norm, known[0])):
        return module_or_function(norm)(value, *args, **kwargs), None
    result, run, sources = recomputed(_normalize, value, (norm, args, kwargs), {}, recipe)
    again = None if run is None else Recipe(run, value if recipe is None else recipe, *sources)
    for name in known[1:]:
        part = operator.attrgetter(name)(norm)
        following = repeated(part, again)
        result, again = activated(part, result, again, following, how), following
    return result, again


class BatchNorm(NamedTuple):
    """What `F.batch_norm` is given."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class GroupNorm(NamedTuple):
    """What `F.group_norm` is given."""

    input: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


def _normalize(value: Tensor, norm: Callee, args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    """What a norm gives, and how to compute it again: a function and what that needs besides the value; None if unknown."""
    if isinstance(norm, _BatchNorm):
        given: Any = norm
        result = _BatchNorm.forward(norm, value)
        is_training = norm.training or (norm.running_mean is None and norm.running_var is None)
    elif isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm.forward(norm, value), _Grouped(norm.num_groups, norm.eps), (norm.weight, norm.bias)
    elif module_or_function(norm) is F.group_norm:
        grouped = GroupNorm(value, *args, **kwargs)
        return F.group_norm(*grouped), _Grouped(grouped.num_groups, grouped.eps), (grouped.weight, grouped.bias)
    else:
        given = BatchNorm(value, *args, **kwargs)
        result, is_training = F.batch_norm(*given), given.training
    if not is_training:
        return result, _Fixed(given.eps), (given.weight, given.bias, given.running_mean, given.running_var)
    mean, invstd = (getattr(result.grad_fn, name, None) for name in ("_saved_result1", "_saved_result2"))
    run = None if mean is None or invstd is None else _Normalized(given.eps)
    return result, run, (given.weight, given.bias, mean, invstd)


def activated(
    callee: Callee, value: Tensor, recipe: Recipe | None, again: Recipe | None, how: str, *args: Any, **kwargs: Any
) -> Any:
    """``callee(value)``, for which only recipes are kept, if there are any.

    Args:
        callee: an activation.
        value: its input.
        recipe: how to compute that again.
        again: how to compute the result again.
        how: "as ever": keep what it keeps; "recipes": keep these instead; "apart": those, and don't work in place, for which
            the input would be copied first.
        *args: more arguments.
        **kwargs: more arguments.
    """
    if recipe is not None and again is not None and how == "apart":
        return recomputed(functools.partial(out_of_place, callee, args, kwargs), value, (), {}, recipe, again)
    call = module_or_function(callee)
    if recipe is None or again is None or how == "as ever":
        return call(value, *args, **kwargs)
    return recomputed(call, value, args, kwargs, recipe, again)


class _Grouped:
    """A group normalisation, whose statistics are those of its input."""

    def __init__(self, num_groups: int, eps: float) -> None:
        self.num_groups, self.eps = num_groups, eps

    def __call__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class _Fixed:
    """A batch normalisation with fixed statistics."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)


class _Normalized:
    """A batch normalisation with the statistics it had: (x - mean) * invstd * weight + bias, in one pass."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
        if mean.dtype not in _PRECISE:  # rounded: the batch itself knows better
            return torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, self.eps)[0]
        weight, bias = (each if each is None or each.dtype == mean.dtype else each.to(mean.dtype) for each in (weight, bias))
        return torch.native_batch_norm(input, weight, bias, mean, invstd.pow(-2), False, 0.0, 0.0)[0]


_PRECISE = (torch.float32, torch.float64)


def held(value: Tensor) -> Recipe | None:
    """The recipe of a value that is kept anyway."""
    return Recipe(_same, value) if is_kept(value) else None


def _same(value: Tensor) -> Tensor:
    return value


def repeated(callee: Callee, recipe: Recipe | None, *args: Any, **kwargs: Any) -> Recipe | None:
    """The recipe of what a module or function, which knows nothing but its input, gives for a value with one."""
    if recipe is None or is_hooked(callee):
        return None
    return Recipe(functools.partial(out_of_place, callee, args, kwargs), recipe)


def scaled(recipe: Recipe | None, gate: Tensor) -> Recipe | None:
    """The recipe of the product of a value with one and its gate."""
    return None if recipe is None else Recipe(torch.mul, recipe, gate)


def product(value: Tensor, gate: Tensor, recipe: Recipe | None) -> Tensor:
    """``value * gate``, for which only the recipe of the value is kept, if there is one."""
    if recipe is None:
        return value * gate
    if not _is_by_part(value, gate):
        return recomputed(torch.mul, value, (gate,), {}, recipe)  # type: ignore[no-any-return]
    result: Tensor = _Product.apply(value, gate)
    if gate.requires_grad:  # else nothing of the map is kept
        keep(recipe, result)
    return result


class _Product(torch.autograd.Function):
    """``value * gate``, whose gate's gradient is summed part by part, which is less to write and read than all at once.

    Where nobody else holds the product's gradient, the value's is made in its memory, as autograd makes sums of gradients.
    Derivatives of that are those of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value if ctx.needs_input_grad[1] else None, gate)
        ctx.kept = ctx.note = None
        return value * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        holders = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else _holders(gradient)
        recipe = ctx.kept and ctx.kept()
        for_gate = None
        if recipe is None or torch.is_grad_enabled():
            value, gate = ctx.saved_tensors
            if ctx.needs_input_grad[1]:
                for_gate = (gradient * value).sum_to_size(gate.shape)
        else:
            with recipe.spared():
                _, gate = ctx.saved_tensors
            for_gate = recipe.times(gradient)
        if not ctx.needs_input_grad[0]:
            return None, for_gate
        if ctx.note is not None:
            ctx.note(holders)
        elif holders is not None and holders == _unshared():
            return gradient.mul_(gate), for_gate
        return gradient * gate, for_gate


def _holders(gradient: Tensor) -> tuple[int, int, int] | None:
    """How many hold a gradient, as tensor, as an object of Python, and as memory; None where that can't be told."""
    if type(gradient) is not Tensor or _use_count is None or _storage is None or _uses_of_storage is None:
        return None
    return _use_count(gradient), sys.getrefcount(gradient), _uses_of_storage(_storage(gradient))


_use_count = getattr(Tensor, "_use_count", None)
_storage = getattr(torch._C, "_storage_address", None)  # Python's object of a storage would be one more that holds it
_uses_of_storage = getattr(torch._C, "_storage_Use_Count", None)


@functools.cache
def _unshared() -> Any:
    """What `_holders` finds in `backward` for a gradient that nobody holds but autograd: one that was just computed."""
    found: list[Any] = []
    with torch.enable_grad():
        value, gate = (torch.ones(1, 1, 1, 1, device="cpu", requires_grad=True) for _ in range(2))
        result: Tensor = _Product.apply(value, gate)
        result.grad_fn.note = found.append  # type: ignore[union-attr]
        torch.autograd.grad(result * 2, value)
    return found[0]


#: Bytes of maps that leave the CPU's caches: what is as large is made part by part.
LARGE = 4 * 2**20


def _is_by_part(value: Tensor, gate: Tensor) -> bool:
    """Whether summing part by part is worth it, as it is where the CPU's caches hold a part and not all, and right."""
    return value.numel() * value.element_size() > LARGE and is_plain_scale(value, gate)


def is_plain_scale(value: Tensor, gate: Tensor) -> bool:
    """Whether these are a map and its gate, on a CPU, and nobody else looks at what autograd keeps, or at derivatives."""
    if value.device.type != "cpu" or value.ndim != 4 or gate.shape != (*value.shape[:2], 1, 1) or has_hooks_around():
        return False
    is_plain = type(value) is Tensor and type(gate) is Tensor and value.dtype == gate.dtype and value.is_floating_point()
    return is_plain and forward_ad._current_level < 0


def reading(callee: Callee, value: Tensor, recipe: Recipe | None, *args: Any, **kwargs: Any) -> Any:
    """``callee(value)``, for which only the recipe of the value is kept, if there is one."""
    call = module_or_function(callee)
    if recipe is None:
        return call(value, *args, **kwargs)
    return recomputed(call, value, args, kwargs, recipe)


def is_hooked(callee: Callee) -> bool:
    """Whether calling a module does more than run the code of its class."""
    if isinstance(callee, str):
        return False
    return hooked(callee) or "forward" in callee.__dict__ or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def is_still(module: nn.Module, name: str) -> bool:
    """Whether a module's own class has this name, as when it was looked at, and calling it does no more than run that."""
    return name_of_class(module) == name and not is_hooked(module)


def name_of_class(module: nn.Module) -> str:
    """A module's own class, in code."""
    kind = own_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"
