"""No name of a child, a parameter or an argument hides what generated code needs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from two_convs import X

import se_fx
from se_fx.capture import capture

NAMES = ["self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice", "len", "input", "Self"]
NAMES += ["return_", "forward", "operator", "math_sqrt", "x", "squeeze_excite"]


class Child(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(3, 3, 1))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self._modules[self.name](x)
        y = torch.where(y > float("-inf"), y, torch.zeros(1, device=x.device))[:, :, slice(0, len([1, 2, 3]))]
        return self.last(y * self._modules[self.name](x).shape[1])


class Held(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(1)))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) * self._parameters[self.name]) + getattr(self, self.name)


def argument(name: str, default: str = "") -> nn.Module:
    """A module whose argument has this name."""
    source = f"def forward(own, {name}{default}):\n    y = own.conv({name})\n    return relu(y)[:, 0:2].clamp(max=big).to(cpu)"
    scope: dict[str, Any] = {"relu": torch.relu, "big": float("inf"), "cpu": torch.device("cpu")}
    exec(source, scope)
    made = type("Argument", (nn.Module,), {"forward": scope["forward"]})()
    made.conv = nn.Conv2d(3, 3, 1)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Child, Held])
def test_children_and_parameters_may_be_called_anything(kind: Any, name: str) -> None:
    if kind is Held and name in ("forward", "squeeze_excite"):
        return
    if kind is Child and name == "forward":
        return
    model = kind(name).eval()
    assert not capture(model).opaque
    result = se_fx.transform(model, min_channels=1, latent_channels=1, init="identity")
    assert isinstance(result, fx.GraphModule)
    assert torch.equal(result(X), model(X))
    assert torch.equal(copy.deepcopy(result)(X), model(X))
    assert torch.equal(se_fx.remove(result)(X), model(X))
    torch.testing.assert_close(se_fx.optimize_for_inference(model)(X), model(X))
    torch.testing.assert_close(se_fx.optimize_for_inference(result)(X), model(X))


def test_the_name_survives_pickling() -> None:
    model = Child("self").eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=1, init="identity")
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again(X), model(X))
    optimized = pickle.loads(pickle.dumps(se_fx.optimize_for_inference(model)))
    torch.testing.assert_close(optimized(X), model(X))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("squeeze_excite",)])
@pytest.mark.parametrize("default", ["", "=None"])
def test_arguments_may_be_called_anything(name: str, default: str) -> None:
    model = argument(name, default).eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=1, init="identity")
    for call in (lambda m: m(X), lambda m: m(**{name: X})) if name != "self" else (lambda m: m(X),):
        assert torch.equal(call(result), call(model))
        torch.testing.assert_close(call(se_fx.optimize_for_inference(model)), call(model))


@pytest.mark.parametrize(("name", "whole"), [("x", True), ("input", True), ("len", True), ("torch", False), ("slice", False)])
def test_only_what_the_code_needs_keeps_a_module_from_being_a_graph(name: str, whole: bool) -> None:
    opaque = capture(argument(name)).opaque
    assert opaque == ({} if whole else {"": f"TraceError: has an argument called {name!r}, a name that generated code needs"})


def test_attention_with_a_child_called_self() -> None:
    """As Hugging Face's Swin2SR has it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self, self.output = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.self(x))

    model = nn.Sequential(Attention(), nn.Conv2d(4, 4, 1)).eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=1, init="identity")
    assert torch.equal(result(X), model(X))
    torch.testing.assert_close(se_fx.optimize_for_inference(model)(X), model(X))
