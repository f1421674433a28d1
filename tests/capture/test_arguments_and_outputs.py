"""Arguments and outputs keep their structure, their types and their names."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from two_convs import Model, X, assert_same, rewritten

import se_fx

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Result:
    out: Tensor
    aux: Tensor | None = None


@pytest.mark.parametrize(
    "structure",
    [
        lambda a, b: Pair(a, b),
        lambda a, b: OrderedDict(out=a, aux=b),
        lambda a, b: {"out": a, "nested": [b, (a, None, 3)]},
        lambda a, b: Result(a, b),
        lambda a, b: [a, b],
    ],
)
def test_outputs_keep_their_structure_and_types(structure) -> None:
    class Structured(Model):
        def forward(self, x: Tensor):
            a = self.first(x)
            return structure(a, self.second(a))

    model = Structured()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    with torch.no_grad():
        expected, actual = model(X), result(X)
    assert type(actual) is type(expected)
    assert repr(actual) == repr(expected)


def test_keyword_arguments_and_nested_inputs() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, batch: dict[str, Tensor], *, flip: Tensor) -> Tensor:
            return self.inner(x=batch["image"]) * flip

    model = Keywords()
    assert_same(model, rewritten(model), {"image": X}, flip=torch.tensor(-1.0))


def test_an_optional_argument_without_which_code_cant_be_traced() -> None:
    """It isn't code that fails without: a graph would go the way that it goes with the argument."""

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, size: Any = None) -> Tensor:
            size = tuple(2 * length for length in x.shape[2:]) if size is None else size
            return F.interpolate(self.conv(x), size=size)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = Up()

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) if x.sum() < 1e9 else x

    model = Asks().eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert torch.equal(result(X), model(X))
    assert torch.equal(result.up(X, (5, 5)), model.up(X, (5, 5)))
