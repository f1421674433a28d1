"""Costs: what running a model takes, counted operator by operator on fake tensors. Knows nothing of tables.

Words, as they are used here:

* a *MAC* is one multiply-accumulate of a convolution or matrix product, counted by `torch.utils.flop_counter`'s formulas;
* a *FLOP* is one floating-point operation: two for each MAC, and one for each element that any other operator computes
  (pointwise operators) or reads (reductions, pooling). Data movement is none;
* *bytes* are those of every operator's tensor arguments and results, each operator for itself, as eager mode moves them.

Counted in evaluation mode, for one call.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from se_fx.cost.fakes import Call, as_call, calling, faked, isolated
from se_fx.cost.rules import FREE, POINTWISE, RULES, written

__all__ = ["NEEDS_VALUES", "NO_COST", "Cost", "Measurement", "Operator", "measure"]


@dataclass(frozen=True)
class Cost:
    """What something takes; add and subtract them.

    Attributes:
        params: parameters.
        macs: multiply-accumulates of convolutions and matrix products.
        flops: floating-point operations: two for each MAC, one for each element of all else.
        bytes: bytes read and written by all operators.
    """

    params: int = 0
    macs: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[int, int, int, int]:
        """The four counts."""
        return self.params, self.macs, self.flops, self.bytes


#: Nothing.
NO_COST = Cost()


@dataclass(frozen=True)
class Operator:
    """One operator that ran.

    Attributes:
        flops: floating-point operations.
        bytes: bytes read and written.
        part: the key of the watched module it ran in; None outside of these.
    """

    flops: int
    bytes: int
    part: str | None


@dataclass
class Measurement:
    """One counted call of a model.

    Attributes:
        total: everything.
        parts: the part of each watched module, by its key.
        shapes: the shape of each watched module's last output; watched modules that weren't reached are missing.
        operators: those that computed or moved anything, in their order.
        uncounted: how often each operator ran that no rule covers; their FLOPs count as 0.
    """

    total: Cost = NO_COST
    parts: dict[str, Cost] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    uncounted: Counter[str] = field(default_factory=Counter)


def measure(model: nn.Module, example_inputs: Any, watched: Mapping[str, str] | None = None) -> Measurement:
    """Count one call of `model`, which is left as it is.

    Nothing is computed and no memory taken, unless the model's code depends on values (as detection models do): then
    the call is run for real, once.

    Args:
        model: any module, on the meta device too.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        watched: names of submodules whose part is to be told apart, by the keys to tell them by.

    Raises:
        SqueezeExciteError: the model can't be called with `example_inputs`.
    """
    call = as_call(example_inputs)
    watched = watched or {}
    with calling("example_inputs", call):
        with contextlib.suppress(*NEEDS_VALUES), faked(model, call) as (module, fakes):
            return _count(module, fakes, watched)
        with isolated(model, call) as (module, copies):
            return _count(module, copies, watched)


#: What is raised on fake tensors where code needs values.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


# ----------------------------------------------------------------------------------------------------------------- running
def _count(model: nn.Module, call: Call, watched: Mapping[str, str]) -> Measurement:
    """Count one call of `model`, a clone."""
    args, kwargs = call
    model.eval()
    measurement = Measurement()
    counting = _Counting(measurement)
    for key, name in watched.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _module, _args, key=key: counting.inside.append(key), prepend=True)
        module.register_forward_hook(lambda _module, _args, output, key=key: counting.leave(key, output))
        measurement.parts[key] = Cost(params=sum(parameter.numel() for parameter in module.parameters()))
    with torch.no_grad(), torch.random.fork_rng(), _no_fast_path(), counting:
        model(*args, **kwargs)
    measurement.total += Cost(params=sum(parameter.numel() for parameter in model.parameters()))
    return measurement


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Have attention run operator by operator: what its fused kernel multiplies is in nobody's tables."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operators that run within it."""

    def __init__(self, measurement: Measurement) -> None:
        from torch.utils.flop_counter import flop_registry  # takes time to import, since it imports Triton

        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas = flop_registry
        self.measurement = measurement
        self.inside: list[str] = []

    def leave(self, key: str, output: Any) -> None:
        self.inside.pop()
        if isinstance(output, Tensor):
            self.measurement.shapes[key] = tuple(output.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        macs, flops = self._operations(func, args, kwargs, out)
        moves = not func.is_view and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)] if moves else []
        moved = sum(t.numel() * t.element_size() for t in tensors)
        cost = Cost(macs=macs, flops=flops, bytes=moved)
        self.measurement.total += cost
        part = self.inside[-1] if self.inside else None
        if part is not None:
            self.measurement.parts[part] += cost
        if flops or moved:
            self.measurement.operators.append(Operator(flops, moved, part))
        return out

    def _operations(self, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
        packet = func._overloadpacket
        if packet in self.formulas:
            flops = int(self.formulas[packet](*args, **kwargs, out_val=out))
            return flops // 2, flops
        name = packet.__name__
        if name in FREE or func.is_view:
            return 0, 0
        if name in RULES:
            return 0, RULES[name](args, out)
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            return 0, written(args, out)
        self.measurement.uncounted[str(packet)] += 1
        return 0, 0
