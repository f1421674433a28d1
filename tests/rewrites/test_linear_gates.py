"""Linear gates: convolutions of gates are matrix products, while they are convolutions of one position."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from recomputed import CHANNELS, assert_alike, conv, step
from test_moments import X, assert_close, both, compiled
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import se_fx


class Gated(nn.Module):
    """Squeeze-and-Excitation by convolutions."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.pool = conv(3), nn.AdaptiveAvgPool2d(1)
        self.narrow, self.wide = nn.Conv2d(CHANNELS, 4, 1, groups=groups), nn.Conv2d(4, CHANNELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.wide(input=self.narrow(self.pool(x)).relu()).sigmoid()


UNITS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "by hand": (Gated, 2),
    "timm's": (lambda: nn.Sequential(conv(), timm.layers.SEModule(CHANNELS, rd_channels=4)), 2),
    "torchvision's": (lambda: nn.Sequential(conv(), torchvision.ops.SqueezeExcitation(CHANNELS, 4)), 2),
    "in groups": (lambda: Gated(2), 1),
    "of one channel": (lambda: nn.Sequential(conv(), timm.layers.EcaModule(CHANNELS)), 0),
}


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "compiled"])
def run(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    """A model as it is called."""
    return compiled if request.param == "compiled" else lambda model: model


class Convolutions(TorchFunctionMode):
    """How many of them are called within."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.conv2d
        return func(*args, **(kwargs or {}))


def called(model: nn.Module) -> int:
    with Convolutions() as found:
        model(X)
    return found.calls


def convolutions(model: nn.Module, x: Tensor = X) -> int:
    """How many of them there are in what is compiled."""
    found: list[int] = []

    def backend(captured: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        found.append(sum(node.target is torch.conv2d for node in captured.graph.nodes))
        return captured

    compiled(copy.deepcopy(model), backend)(x)
    return sum(found)


@pytest.mark.parametrize("name", UNITS)
def test_they_are_products(name: str, run: Callable[[nn.Module], Any]) -> None:
    make, linear = UNITS[name]
    model, lean = both(make)
    assert convolutions(model) - convolutions(lean) == linear
    assert called(model) - called(lean) == linear
    assert sum(change.applied for change in se_fx.report(lean).steps[0].changes) == linear
    assert_close(step(run(lean), X), step(model, X))


def test_for_exact_results_they_stay() -> None:
    model, _ = both(Gated)
    exact = se_fx.optimize_for_training(model)
    assert convolutions(exact) == convolutions(model)
    assert_alike(step(exact, X), step(model, X))


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


@pytest.mark.parametrize(
    "other",
    [
        Doubled(CHANNELS, 4, 1),
        nn.Conv2d(CHANNELS, 4, 1, groups=4),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.Tanh()),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(CHANNELS, 4, 1)),
    ],
    ids=["a class", "in groups", "others", "parametrized"],
)
def test_what_is_put_in_their_places_runs(other: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    model, lean = both(Gated)
    for each in (model, lean):
        each.narrow = copy.deepcopy(other).double()
    assert_close(step(run(lean), X), step(model, X))


def test_hooks_that_are_registered_later_run(run: Callable[[nn.Module], Any]) -> None:
    model, lean = both(Gated)
    for each in (model, lean):
        each.narrow.register_forward_hook(lambda module, inputs, output: output.square())
    assert_close(step(run(lean), X), step(model, X))


def test_a_map_of_more_positions_is_convolved(run: Callable[[nn.Module], Any]) -> None:
    """As where what pools is given another size later."""
    model, lean = both(Gated)
    for each in (model, lean):
        each.pool = nn.AvgPool2d((2, 5))
    x = X[..., :2, :]
    assert_close(step(run(lean), x), step(model, x))
    for each in (model, lean):
        each.pool = nn.Identity()
    torch._dynamo.reset()
    assert_close(step(run(lean), X), step(model, X))


def test_under_autocast(run: Callable[[nn.Module], Any]) -> None:
    model, lean = (each.float() for each in both(Gated))
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(lean)(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # several roundings of 2^-9
