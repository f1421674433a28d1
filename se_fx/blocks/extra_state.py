"""Extra state: what a checkpoint says of a block beside its weights, as a tensor that every format of checkpoint can hold.

Keys of a checkpoint hold tensors: safetensors and ``torch.load(weights_only=True)`` take nothing else. So a block's options are
written as JSON, and its ASCII characters as numbers. They survive being halved, averaged with their like and moved, as tools
do with all tensors of a checkpoint.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from se_fx.errors import SqueezeExciteError, shown

__all__ = ["decoded", "encoded", "function_name", "same_function"]


def encoded(options: Mapping[str, Any]) -> Tensor:
    """`options` as a new one-dimensional uint8 tensor on the CPU, whatever the default device.

    >>> decoded(encoded({"gate": "sigmoid"}))
    {'gate': 'sigmoid'}
    """
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8, device="cpu")


def decoded(state: Any) -> dict[str, Any] | None:
    """What `encoded` was given; None where the tensor has no values, as on the meta device.

    Raises:
        SqueezeExciteError: `state` is something else.
    """
    if isinstance(state, Tensor) and (state.is_meta or isinstance(state, FakeTensor)):
        return None
    try:
        options = json.loads(bytes(round(number) for number in state.detach().flatten().tolist()))
        if not isinstance(options, dict):
            raise TypeError
    except Exception as error:
        raise SqueezeExciteError(
            f"_extra_state={shown(state)}: expected the numbers that a SqueezeExcite2d has written of its options, which come "
            "with its weights in a state_dict"
        ) from error
    return options


def function_name(function: Callable[..., Any], table: Mapping[str, Callable[[], nn.Module]]) -> str:
    """The name of a function of tensors: that in `table`, where it is one of these, else its qualified name.

    What a module of PyTorch's own is made with is part of its name.

    >>> function_name(nn.ReLU(), {"relu": nn.ReLU}), function_name(nn.LeakyReLU(0.1), {"relu": nn.ReLU})
    ('relu', 'torch.nn.modules.activation.LeakyReLU(negative_slope=0.1)')
    """
    name = _described(function)
    return next((known for known, make in table.items() if _described(make()) == name), name)


def same_function(a: object, b: object) -> bool:
    """Whether two names are of one function: a script's own are in ``__main__``, and elsewhere for those that import it."""
    if not isinstance(a, str) or not isinstance(b, str):
        return False
    own = "__main__."
    if (a.startswith(own) or b.startswith(own)) and "." in a and "." in b:  # the names in a table have none
        a, b = (f".{name.removeprefix(own)}" for name in (a, b))
        return a.endswith(b) or b.endswith(a)
    return a == b


def _described(function: Any) -> str:
    if isinstance(function, functools.partial):
        given = [*map(shown, function.args), *(f"{name}={shown(value)}" for name, value in function.keywords.items())]
        return f"{_described(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    name = f"{named.__module__}.{named.__qualname__}"
    if isinstance(function, nn.Module) and name.startswith("torch."):
        made_with = (part for part in function.extra_repr().split(", ") if part and not part.startswith("inplace="))
        return f"{name}({', '.join((*made_with, *map(_described, function.children())))})"
    return name
