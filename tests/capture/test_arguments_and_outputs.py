"""Arguments and outputs keep their structure, their types and their names."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from two_convs import Model, X, assert_same, rewritten

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
