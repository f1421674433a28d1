"""Moments: in compiled code, norm and squeeze are of one pass over a map, that of each sample's and channel's moments.

u = norm(x),  s = mean(u),  y = u * g        u = a x + b for each channel, so that s = a mean(x) + b
s = mean(x),  y = x * g,  u = norm(y)        the statistics of y are those of x, times g and its square

A norm's statistics and a squeeze are sums over space, which compilers don't know to be related: each is a pass over the map. Of
the moments m and v of x, for each sample and channel, a batch norm's are mean(m) and mean(v + (m - mean(m))^2).
Equal up to rounding, and for compilers alone: eager calls are as they were.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.terms import Scale
from se_fx.rewrites.training.calls import BatchNorm, Callee, GroupNorm, module_or_function, normalized
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.recipes import Recipe
from se_fx.rewrites.training.weaving import insert_wrapped, normalize

__all__ = ["moments"]


# -------------------------------------------------------------------------------------------------- what graphs call
class Moments(NamedTuple):
    """Mean and variance of a map for each sample and channel, (N, C, 1, 1), in float32 or wider."""

    mean: Tensor
    var: Tensor


def measured(value: Tensor) -> Moments | None:
    """The moments of a map, in compiled code."""
    if not torch.compiler.is_compiling() or value.dim() != 4 or not value.is_floating_point():
        return None
    var, mean = torch.var_mean(_wide(value), (2, 3), correction=0, keepdim=True)
    return Moments(mean, var)


def multiplied(found: Moments | None, gate: Tensor) -> Moments | None:
    """The moments of a map with these, times a gate."""
    if found is None:
        return None
    factor = _wide(gate)
    return Moments(found.mean * factor, found.var * factor.square())


def squeezed(pooled: Tensor, found: Moments | None) -> Tensor:
    """The average of a map with these moments, in the form of what pooling gave."""
    return pooled if found is None else found.mean.reshape(pooled.shape).to(pooled.dtype)


def normalized_by_moments(
    norm: Callee,
    value: Tensor,
    recipe: Recipe | None,
    how: str,
    known: tuple[str, ...],
    found: Moments | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Recipe | None, Moments | None]:
    """``norm(value)``, its recipe and its moments: in compiled code from those of its input, else as `normalized` does."""
    if not torch.compiler.is_compiling():
        return (*normalized(norm, value, recipe, how, known, *args, **kwargs), None)
    by_moments = _ByMoments(value, measured(value) if found is None else found)
    with by_moments:
        result = module_or_function(norm)(value, *args, **kwargs)
    return result, None, by_moments.moments if result is by_moments.result else None


class _ByMoments(TorchFunctionMode):
    """Has a norm take its statistics from moments of its input, and tells those of its result."""

    def __init__(self, value: Tensor, given: Moments | None) -> None:
        super().__init__()
        self.value, self.given = value, given
        self.result: Tensor | None = None
        self.moments: Moments | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.result is None and self.given is not None:
            if func is F.batch_norm:
                return self._batch_norm(self.given, BatchNorm(*args, **kwargs))
            if func is F.group_norm:
                return self._group_norm(self.given, GroupNorm(*args, **kwargs))
        return func(*args, **kwargs)

    def _batch_norm(self, given: Moments, call: BatchNorm) -> Tensor:
        input, running_mean, running_var, weight, bias, training, momentum, eps = call
        count = input.numel() // input.shape[1]
        if input is not self.value or not training or count < 2:  # of one value, it raises
            return F.batch_norm(*call)
        mean = given.mean.mean(0, keepdim=True)
        var = (given.var + (given.mean - mean).square()).mean(0, keepdim=True)
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                if running is not None:
                    running.lerp_(batch.detach().flatten().to(running.dtype), momentum)
        return self._affine(given, input, mean, var, weight, bias, eps)

    def _group_norm(self, given: Moments, call: GroupNorm) -> Tensor:
        input, num_groups, weight, bias, eps = call
        if input is not self.value:
            return F.group_norm(*call)
        means, variances = (torch.unflatten(each, 1, (num_groups, -1)) for each in given)
        mean = means.mean(2, keepdim=True)
        var = (variances + (means - mean).square()).mean(2, keepdim=True)
        mean, var = (each.expand_as(means).flatten(1, 2) for each in (mean, var))
        return self._affine(given, input, mean, var, weight, bias, eps)

    def _affine(
        self, given: Moments, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        factor = (var + eps).rsqrt()
        if weight is not None:
            factor = factor * _wide(weight)[:, None, None]
        summand = -mean * factor if bias is None else _wide(bias)[:, None, None] - mean * factor
        self.result = (_wide(input) * factor + summand).to(input.dtype)
        self.moments = Moments(given.mean * factor + summand, given.var * factor.square())
        return self.result


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------------- the rewrite
def moments(keeping: Keeping) -> Iterator[Change]:
    """Norms and squeezes of one map, or of its product with a gate, take one pass over it in compiled code."""
    averages: dict[fx.Node, list[fx.Node]] = {}
    for node in keeping.graph.nodes:
        value = keeping.average(node)
        if value is not None and not keeping.effects.may_change(value, value, node):
            averages.setdefault(keeping.passed(value), []).append(node)
    norms = {node: _scale(keeping, node) for node in keeping.graph.nodes if keeping.norm(node)}
    known: dict[fx.Node, fx.Node] = {}
    for norm, scale in norms.items():
        value = keeping.passed(scale.value) if scale else None
        found = None
        if scale is not None and value in averages:
            if value not in known:
                with keeping.graph.inserting_after(value):
                    known[value] = insert_wrapped(keeping, value, measured, value)
            node, _, gate = keeping.now(scale)
            with keeping.graph.inserting_after(node):
                found = insert_wrapped(keeping, node, multiplied, known[value], gate)
            yield Change(place_of(norm), True, f"has its statistics from the pass that squeezes what {place_of(value)} gives")
        elif norm in averages and keeping.is_all_of(norm):
            yield Change(place_of(norm), True, "gives its squeeze from its statistics")
        else:
            continue
        known[norm] = _by_moments(keeping, norm, found)
    for value, its_moments in known.items():
        for pooled in averages.get(value, ()):
            with keeping.graph.inserting_after(pooled):
                new = insert_wrapped(keeping, pooled, squeezed, pooled, its_moments)
            pooled.replace_all_uses_with(new, delete_user_cb=functools.partial(operator.is_not, new))


def _scale(keeping: Keeping, norm: fx.Node) -> Scale | None:
    """The product with a gate that a norm normalises."""
    if not isinstance(norm.args[0], fx.Node):
        return None
    scaled = keeping.passed(norm.args[0])
    scale, effects = keeping.scale(scaled), keeping.effects
    if scale is None or effects.of(scaled).writes or effects.may_change(scaled, scaled, norm):
        return None
    return None if effects.may_change(scale.value, scale.value, scaled) else scale


def _by_moments(keeping: Keeping, norm: fx.Node, found: fx.Node | None) -> fx.Node:
    """Have a norm take its statistics from moments; returns those of its result."""
    normalize(keeping, norm, None)
    pair = keeping.pair(norm)
    pair.target = normalized_by_moments
    pair.args = (*pair.args[:5], found, *pair.args[5:])
    with keeping.graph.inserting_after(keeping.woven.recipes[norm]):
        return keeping.graph.call_function(operator.getitem, (pair, 2))
