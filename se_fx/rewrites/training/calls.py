"""What graphs call so that less is kept: norms, products and whatever reads these, as they are, with recipes beside.

Each does exactly what it stands for, and so in eager mode without gradients, and in compiled code, nothing besides.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from se_fx.regions import hooked
from se_fx.rewrites.training.recipes import Recipe, Recomputed, is_kept

__all__ = [
    "BatchNorm",
    "Callee",
    "GroupNorm",
    "OutOfPlace",
    "activated",
    "held",
    "module_or_function",
    "normalized",
    "product",
    "reading",
    "repeated",
    "scaled",
]

Callee = nn.Module | str  # a module, or a function of PyTorch's by its qualified name


def normalized(
    norm: Callee, value: Tensor, recipe: Recipe | None, tail: str, *args: Any, **kwargs: Any
) -> tuple[Any, Recipe | None]:
    """``norm(value)``, and the recipe of it, from what its normalisation keeps.

    Args:
        norm: runs `F.batch_norm` or `F.group_norm`, and what there is besides.
        value: its input.
        recipe: how to compute that again; None to keep it.
        tail: what the activations that it runs afterwards are to keep: see `activated`.
        *args: more arguments.
        **kwargs: more arguments.
    """
    call = module_or_function(norm)
    if torch.compiler.is_compiling() or not is_kept(value) or _is_hooked(norm):
        return call(value, *args, **kwargs), None
    watch, keeps = _Watch(value, recipe, tail), recipe and Recomputed(value, recipe)
    with keeps or contextlib.nullcontext(), watch:
        result = call(value, *args, **kwargs)
    return result, watch.recipe if watch.result is result else None


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


class _Watch(TorchFunctionMode):
    """Has a norm tell how its result is computed: by which statistics, and what runs on what they give."""

    def __init__(self, value: Tensor, source: Recipe | None, tail: str) -> None:
        super().__init__()
        self.value, self.source, self.tail = value, source, tail
        self.result: Any = None
        self.recipe: Recipe | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, F.group_norm) and self.result is None:
            is_batch = func is F.batch_norm
            self.result = (
                self._batch_norm(BatchNorm(*args, **kwargs)) if is_batch else self._group_norm(GroupNorm(*args, **kwargs))
            )
            return self.result
        if self.recipe is not None and args and args[0] is self.result:
            again = Recipe(functools.partial(_applied, func, args[1:], kwargs), self.recipe)
            self.result, self.recipe = (
                _keeping_recipes(func, self.result, self.recipe, again, args[1:], kwargs, self.tail),
                again,
            )
            return self.result
        return func(*args, **kwargs)

    def _batch_norm(self, call: BatchNorm) -> Tensor:
        input, running_mean, running_var, weight, bias, training, momentum, eps = call
        if input is not self.value or input.numel() == input.shape[1]:
            return F.batch_norm(*call)
        source = input if self.source is None else self.source
        if not training:
            self.recipe = Recipe(_Fixed(eps), source, weight, bias, running_mean, running_var)
            return F.batch_norm(*call)
        operands = (input, weight, bias, running_mean, running_var)
        result, mean, invstd, *_ = torch._batch_norm_impl_index(*operands, True, momentum, eps, torch.backends.cudnn.enabled)
        self.recipe = Recipe(_Normalized(eps), source, weight, bias, mean, invstd, by_sample=mean.dtype in _PRECISE)
        return result

    def _group_norm(self, call: GroupNorm) -> Tensor:
        input, num_groups, weight, bias, eps = call
        if input is self.value:
            self.recipe = Recipe(_Grouped(num_groups, eps), input if self.source is None else self.source, weight, bias)
        return F.group_norm(*call)


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
    call = module_or_function(callee)
    if recipe is None or again is None or not is_kept(value) or _is_hooked(callee):
        return call(value, *args, **kwargs)
    return _keeping_recipes(call, value, recipe, again, args, kwargs, how)


def _keeping_recipes(call: Any, value: Tensor, recipe: Recipe, again: Recipe, args: Any, kwargs: Any, how: str) -> Any:
    if how == "as ever":
        return call(value, *args, **kwargs)
    keeps = Recomputed(value, recipe, settles=True)
    with keeps:
        result = _applied(call, args, kwargs, value) if how == "apart" else call(value, *args, **kwargs)
    keeps.settle(result, again)
    return result


def _applied(call: Any, args: Any, kwargs: Any, value: Tensor) -> Any:
    """What a function gives for a value, which is left as it is."""
    if inspect.isfunction(call) and call.__module__ == F.__name__:  # what it calls has no flags
        return _out_of_place(call, (value, *args), kwargs)
    with OutOfPlace():
        return call(value, *args, **kwargs)


class OutOfPlace(TorchFunctionMode):
    """Within, no activation works in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _out_of_place(func, args, kwargs or {})


def _out_of_place(func: Any, args: Any, kwargs: Any) -> Any:
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
        weight, bias = (each if each is None else each.to(mean.dtype) for each in (weight, bias))
        return torch.native_batch_norm(input, weight, bias, mean, invstd**-2, False, 0.0, 0.0)[0]


_PRECISE = (torch.float32, torch.float64)


def held(value: Tensor) -> Recipe | None:
    """The recipe of a value that is kept anyway."""
    return None if torch.compiler.is_compiling() or not is_kept(value) else Recipe(_same, value)


def _same(value: Tensor) -> Tensor:
    return value


def repeated(callee: Callee, recipe: Recipe | None, *args: Any, **kwargs: Any) -> Recipe | None:
    """The recipe of what a module or function, which knows nothing but its input, gives for a value with one."""
    if recipe is None or _is_hooked(callee):
        return None
    call = callee.forward if isinstance(callee, nn.Module) else module_or_function(callee)
    return Recipe(functools.partial(_applied, call, args, kwargs), recipe)


def scaled(recipe: Recipe | None, gate: Tensor) -> Recipe | None:
    """The recipe of the product of a value with one and its gate."""
    return None if recipe is None else Recipe(torch.mul, recipe, gate)


def product(value: Tensor, gate: Tensor, recipe: Recipe | None) -> Tensor:
    """``value * gate``, for which only the recipe of the value is kept, if there is one."""
    if recipe is None or not is_kept(value):
        return value * gate
    keeps = Recomputed(value, recipe)
    with keeps:
        return _Product.apply(value, gate, keeps) if _is_by_sample(value, gate) else value * gate


class _Product(torch.autograd.Function):
    """``value * gate``, whose gate's gradient is summed sample by sample, which is less to write and read than all at once.

    Derivatives of that are those of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor, keeps: Recomputed) -> Tensor:
        ctx.save_for_backward(value if ctx.needs_input_grad[1] else None, gate)
        ctx.keeps = keeps
        return value * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        last = ctx.keeps.last and ctx.keeps.last()
        for_gate = None
        if last is None or torch.is_grad_enabled():
            value, gate = ctx.saved_tensors
            if ctx.needs_input_grad[1]:
                for_gate = (gradient * value).sum_to_size(gate.shape)
        else:
            with last.spared():
                _, gate = ctx.saved_tensors
            for_gate = last.times(gradient)
        return gradient * gate if ctx.needs_input_grad[0] else None, for_gate, None


#: Bytes of maps that leave the CPU's caches: what is as large is made sample by sample.
LARGE = 4 * 2**20


def _is_by_sample(value: Tensor, gate: Tensor) -> bool:
    """Whether summing sample by sample is worth it, as it is where the CPU's caches hold one and not all, and right."""
    is_plain = type(value) is Tensor and type(gate) is Tensor and value.dtype == gate.dtype and value.is_floating_point()
    of_each = value.ndim == 4 and gate.shape == (*value.shape[:2], 1, 1)
    is_large = value.device.type == "cpu" and value.numel() * value.element_size() > LARGE
    return is_plain and of_each and is_large and forward_ad._current_level < 0


def reading(callee: Callee, value: Tensor, recipe: Recipe | None, *args: Any, **kwargs: Any) -> Any:
    """``callee(value)``, for which only the recipe of the value is kept, if there is one."""
    call = module_or_function(callee)
    if recipe is None or not is_kept(value):
        return call(value, *args, **kwargs)
    with Recomputed(value, recipe):
        return call(value, *args, **kwargs)


def module_or_function(callee: Callee) -> Any:
    """What a callee stands for."""
    if isinstance(callee, nn.Module):
        return callee
    found: Any = torch
    for name in callee.removeprefix("torch.").split("."):
        found = getattr(found, name)
    return found


def _is_hooked(callee: Callee) -> bool:
    return isinstance(callee, nn.Module) and hooked(callee)
