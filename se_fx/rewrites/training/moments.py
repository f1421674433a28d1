"""Moments: in compiled code, norm, squeeze and scale are of one pass over a map, that of each sample's and channel's moments.

u = norm(x),  s = mean(u),  y = u * g        u = a x + b for each channel, so that s = a mean(x) + b, and y = (a g) x + b g
s = mean(x),  y = x * g,  u = norm(y)        the statistics of y are those of x, times g and its square, and u = (a g) x + b

A norm's statistics and a squeeze are sums over space, which compilers don't know to be related: each is a pass over the map. Of
the moments m and v of x, for each sample and channel, a batch norm's are mean(m) and mean(v + (m - mean(m))^2). All that
follows is x times a factor, plus a summand, of each sample and channel: their gradients are of one pass in backward, too.
Equal up to rounding, and for compilers alone: eager calls are as they were.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_fx.rewrites.change import Change, place_of
from se_fx.rewrites.terms import Scale
from se_fx.rewrites.training.calls import (
    BatchNorm,
    GroupNorm,
    is_still,
    name_of_class,
    normalized,
    product,
)
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.recipes import Callee, Recipe, module_or_function
from se_fx.rewrites.training.weaving import callee, exchange, insert_wrapped, normalize

__all__ = ["moments"]


# -------------------------------------------------------------------------------------------------- what graphs call
class Moments(NamedTuple):
    """How a map follows from its source, ``source * factor + summand``, and its mean and variance over space.

    The latter four are of each sample and channel, (N, C, 1, 1), in float32 or wider; None is for 1, or 0.
    """

    value: Tensor
    source: Tensor
    factor: Tensor | None
    summand: Tensor | None
    mean: Tensor
    var: Tensor

    def then(self, dtype: torch.dtype, factor: Tensor, summand: Tensor | None = None) -> Moments:
        """Of that map times a factor, plus a summand."""
        mean, var, total = self.mean * factor, self.var * factor.square(), None
        if self.summand is not None:
            total = self.summand * factor
        if summand is not None:
            mean = mean + summand
            summand = summand.expand_as(mean)  # its gradient is summed over space first, as the factor's
            total = summand if total is None else total + summand
        factor = factor if self.factor is None else self.factor * factor
        value = _wide(self.source) * factor
        return Moments((value if total is None else value + total).to(dtype), self.source, factor, total, mean, var)


def measured(value: Tensor) -> Moments | None:
    """The moments of a map, in compiled code."""
    if not torch.compiler.is_compiling() or value.dim() != 4 or not value.is_floating_point():
        return None
    var, mean = torch.var_mean(_wide(value), (2, 3), correction=0, keepdim=True)
    return Moments(value, value, None, None, mean, var)


def product_by_moments(value: Tensor, operand: Tensor, recipe: Recipe | None, found: Moments | None, gate: Tensor) -> Tensor:
    """``value * operand``, a gate or an expanded one: in compiled code from the value's source, else as `product` does."""
    if found is None or found.value is not value:
        return product(value, operand, recipe)
    return found.then(torch.promote_types(value.dtype, operand.dtype), _wide(gate)).value


def multiplied(result: Tensor, value: Tensor, found: Moments | None, gate: Tensor) -> Moments | None:
    """The moments of the product of a map with these and a gate."""
    if found is None or found.value is not value:
        return None
    return found.then(result.dtype, _wide(gate))._replace(value=result)


def squeezed(pooled: Tensor, value: Tensor, found: Moments | None, *modules: tuple[nn.Module, str]) -> Tensor:
    """The average of a map with these moments, in the form of what pooling gave.

    Args:
        pooled: what pooling gave.
        value: the map.
        found: its moments.
        *modules: what has pooled, each with the name of its class as it was.
    """
    if found is None or found.value is not value or pooled.numel() != found.mean.numel():
        return pooled
    if not all(is_still(module, name) for module, name in modules):
        return pooled
    return found.mean.reshape(pooled.shape).to(pooled.dtype)


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
    by_moments = _ByMoments(value, measured(value) if found is None or found.value is not value else found)
    with by_moments:
        result = module_or_function(norm)(value, *args, **kwargs)
    moments = by_moments.moments
    return result, None, moments if moments is not None and result is moments.value else None


class _ByMoments(TorchFunctionMode):
    """Has a norm take its statistics from moments of its input, and tells those of its result."""

    def __init__(self, value: Tensor, given: Moments | None) -> None:
        super().__init__()
        self.value, self.given = value, given
        self.moments: Moments | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.moments is None and self.given is not None:
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
        return self._affine(given, input.dtype, mean, var, weight, bias, eps)

    def _group_norm(self, given: Moments, call: GroupNorm) -> Tensor:
        input, num_groups, weight, bias, eps = call
        if input is not self.value:
            return F.group_norm(*call)
        means, variances = (torch.unflatten(each, 1, (num_groups, -1)) for each in (given.mean, given.var))
        mean = means.mean(2, keepdim=True)
        var = (variances + (means - mean).square()).mean(2, keepdim=True)
        mean, var = (each.expand_as(means).flatten(1, 2) for each in (mean, var))
        return self._affine(given, input.dtype, mean, var, weight, bias, eps)

    def _affine(
        self,
        given: Moments,
        dtype: torch.dtype,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        factor = (var + eps).rsqrt()
        if weight is not None:
            factor = factor * _wide(weight)[:, None, None]
        summand = -mean * factor if bias is None else _wide(bias)[:, None, None] - mean * factor
        self.moments = given.then(dtype, factor, summand)
        return self.moments.value


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------------- the rewrite
@dataclass
class _Found:
    """What is known of a graph before it is edited.

    Attributes:
        squeezes: averages of maps, by map: each with what it is an average of, which is the map behind modules that do nothing.
        norms: those that go by moments, and the product with a gate that each normalises, if its moments are known.
        products: those with gates that go by moments, and the maps that they scale.
    """

    squeezes: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = field(default_factory=dict)
    norms: dict[fx.Node, Scale | None] = field(default_factory=dict)
    products: dict[fx.Node, tuple[Scale, fx.Node]] = field(default_factory=dict)


def moments(keeping: Keeping) -> Iterator[Change]:
    """Norms, squeezes and products with gates of one map take one pass over it in compiled code."""
    found = _found(keeping)
    pools = {pooled: _modules(keeping, pooled) for pairs in found.squeezes.values() for pooled, _ in pairs}
    known: dict[fx.Node, fx.Node] = {}
    for node in list(keeping.graph.nodes):
        if node in found.products:
            product_of_it, value = found.products[node]
            if value not in known:
                with keeping.graph.inserting_after(value):
                    known[value] = insert_wrapped(keeping, value, measured, value)
            known[node] = _multiply(keeping, product_of_it, known[value])
        elif node in found.norms:
            scale = found.norms[node]
            known[node] = _normalize(keeping, node, None if scale is None else known[scale.node])
            if scale is None:
                yield Change(place_of(node), True, "gives its squeeze from its statistics")
            else:
                place = place_of(found.products[scale.node][1])
                yield Change(place_of(node), True, f"has its statistics from the pass that squeezes what {place} gives")
    for value, pairs in found.squeezes.items():
        for pooled, averaged in pairs if value in known else ():
            _squeeze(keeping, pooled, averaged, known[value], pools[pooled])


def _found(keeping: Keeping) -> _Found:
    found, effects = _Found(), keeping.effects
    for node in keeping.graph.nodes:
        averaged = keeping.average(node)
        if averaged is not None and not effects.may_change(averaged, averaged, node):
            found.squeezes.setdefault(keeping.passed(averaged), []).append((node, averaged))
    sources: dict[fx.Node, fx.Node] = {}
    for norm in filter(keeping.norm, keeping.graph.nodes):
        scale = _scale(keeping, norm)
        value = keeping.passed(scale.value) if scale else None
        if scale is not None and value in found.squeezes:
            source = sources.get(value, value)
            if not effects.may_change(source, source, norm):
                found.norms[norm], sources[value], sources[norm] = scale, source, source
                continue
        if norm in found.squeezes and keeping.is_all_of(norm):
            found.norms[norm], sources[norm] = None, norm.args[0]
    for unit in keeping.units:
        scale, value = unit.scale, keeping.passed(unit.scale.value)
        is_changed = effects.of(scale.node).writes or effects.may_change(scale.value, scale.value, scale.node)
        if value in sources and not is_changed and not effects.may_change(sources[value], sources[value], scale.node):
            found.products[scale.node] = scale, value
    return found


def _scale(keeping: Keeping, norm: fx.Node) -> Scale | None:
    """The product with a gate that a norm normalises."""
    if not isinstance(norm.args[0], fx.Node):
        return None
    scaled = keeping.passed(norm.args[0])
    scale, effects = keeping.scale(scaled), keeping.effects
    if scale is None or effects.of(scaled).writes or effects.may_change(scaled, scaled, norm):
        return None
    return None if effects.may_change(scale.value, scale.value, scaled) else scale


def _modules(keeping: Keeping, pooled: fx.Node) -> list[fx.Node]:
    """The modules that an average is computed by."""
    return [node for node in keeping.evaluation.way(pooled, keeping.maps) or () if node.op == "call_module"]


def _multiply(keeping: Keeping, scale: Scale, moments_of_value: fx.Node) -> fx.Node:
    """Have a product with a gate go by moments; returns those of its result."""
    node, value, operand = keeping.now(scale)
    gate = keeping.woven.values.get(scale.gate, scale.gate)
    with keeping.graph.inserting_before(node):
        new = insert_wrapped(keeping, node, product_by_moments, value, operand, None, moments_of_value, gate)
    exchange(keeping, node, new)
    with keeping.graph.inserting_after(new):
        return insert_wrapped(keeping, new, multiplied, new, value, moments_of_value, gate)


def _normalize(keeping: Keeping, norm: fx.Node, moments_of_input: fx.Node | None) -> fx.Node:
    """Have a norm take its statistics from moments; returns those of its result."""
    normalize(keeping, norm, None)
    pair = keeping.pair(norm)
    pair.target = normalized_by_moments
    pair.args = (*pair.args[:5], moments_of_input, *pair.args[5:])
    with keeping.graph.inserting_after(keeping.woven.recipes[norm]):
        return keeping.graph.call_function(operator.getitem, (pair, 2))


def _squeeze(keeping: Keeping, pooled: fx.Node, averaged: fx.Node, moments_of_value: fx.Node, modules: list[fx.Node]) -> None:
    """Have an average be that of moments."""
    with keeping.graph.inserting_before(pooled):
        known = [(callee(keeping, node), name_of_class(keeping.modules[str(node.target)])) for node in modules]
    with keeping.graph.inserting_after(pooled):
        value = keeping.woven.values.get(averaged, averaged)
        new = insert_wrapped(keeping, pooled, squeezed, pooled, value, moments_of_value, *known)
    pooled.replace_all_uses_with(new, delete_user_cb=functools.partial(operator.is_not, new))
