"""Fakes: a model and its inputs on tensors that have shapes, but no memory and no values."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.capture import Snapshot
from se_fx.errors import SqueezeExciteError, blaming
from se_fx.regions import clone, exchange_tensors

__all__ = ["as_batches", "as_call", "calling", "describe_call", "faked", "isolated"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(example_inputs: Any, argument: str = "example_inputs") -> Call:
    """Positional and keyword arguments of a call from `example_inputs`: a tensor, a tuple, or a dict of keyword arguments.

    Raises:
        SqueezeExciteError: it is something else; names `argument`.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return (), dict(example_inputs)
    raise SqueezeExciteError(
        f"{argument}={type(example_inputs).__name__}: expected a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def describe_call(call: Call) -> str:
    """The shapes of a call's tensors, for errors."""
    args, kwargs = call
    parts = [tuple(arg.shape) if isinstance(arg, Tensor) else type(arg).__name__ for arg in (*args, *kwargs.values())]
    return f"inputs {', '.join(map(str, parts))}" if parts else "no inputs"


def as_batches(batches: Any, argument: str) -> Iterable[Any]:
    """Batches, one after the other.

    Raises:
        SqueezeExciteError: they can't be iterated, or are a single batch.
    """
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise SqueezeExciteError(f"{argument}={type(batches).__name__}: expected batches; for a single one, {argument}=[batch]")
    return batches


def calling(argument: str, call: Call) -> contextlib.AbstractContextManager[None]:
    """Within, a model is called with what the caller gave for `argument`; the error says so, if that fails."""
    return blaming(f"{argument}: the model could not be called with {describe_call(call)}")


@contextlib.contextmanager
def faked(model: nn.Module, call: Call) -> Iterator[tuple[nn.Module, Call]]:
    """Within, a copy of `model` and a call, all of whose tensors are fake; meta tensors get the device of the others."""
    devices = [t.device for t in (*tree_leaves(call), *model.parameters()) if isinstance(t, Tensor)]
    device = next((d for d in devices if d.type != "meta"), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def made_of(tensor: Tensor) -> Tensor:
        return _fake(tensor, mode, device if tensor.device.type == "meta" else tensor.device)

    with isolated(model, call, made_of) as copies, _quiet(), mode:
        yield copies


def fake_on(module: nn.Module, like: FakeTensor) -> None:
    """Give a module fake tensors in place of its own, on the device of a fake tensor, in place."""
    exchange_tensors(module, lambda tensor: _fake(tensor, like.fake_mode, like.device))


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def isolated(model: nn.Module, call: Call, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> Iterator[tuple[nn.Module, Call]]:
    """Within, a copy of `model` and a call that may run: each tensor is a copy, and what code does to attributes is undone."""
    module = clone(model)
    before = Snapshot(module)
    once = exchange_tensors(module, copy)
    try:
        yield module, cast("Call", tree_map_only(Tensor, once, call))
    finally:
        before.undo()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, PyTorch doesn't log the errors that it raises on fake tensors: who calls is told of them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
