"""Matrices: convolutions of gates are products with matrices, and so are the gradients of convolutions behind gates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from recomputed import CHANNELS, Mobile, assert_alike, conv, names_of_nodes, step
from test_moments import X, assert_close, both, compiled
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import se_fx
from se_fx.rewrites.training import matrices, recipes, saving


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


# ------------------------------------------------------------------------------------------------------- behind products
@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of any size are large."""
    monkeypatch.setattr(matrices, "LARGE", 0)
    monkeypatch.setattr(saving, "SMALL", 0)
    monkeypatch.setattr(recipes, "PART", X[0].numel() * X.element_size())


def exact(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().double().train()
    return model, copy.deepcopy(se_fx.optimize_for_training(model))


def is_joint(model: nn.Module, x: Tensor = X) -> bool:
    return "_ConvolvedBackward" in names_of_nodes(copy.deepcopy(model)(x))


class Last(Mobile):
    """With another convolution behind the product."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last


LASTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "fewer": (lambda: nn.Conv2d(CHANNELS, 3, 1, bias=False), True),
    "more": (lambda: nn.Conv2d(CHANNELS, 13, 1), True),
    "named paddings": (lambda: nn.Conv2d(CHANNELS, 5, 1, padding="same"), True),
    "half as many as positions": (lambda: nn.Conv2d(CHANNELS, 15, 1), True),
    "too many": (lambda: nn.Conv2d(CHANNELS, 16, 1), False),
    "in groups": (lambda: nn.Conv2d(CHANNELS, 4, 1, groups=2), False),
    "strided": (lambda: nn.Conv2d(CHANNELS, 4, 1, stride=2), False),
    "padded": (lambda: nn.Conv2d(CHANNELS, 4, 1, padding=1), False),
    "larger": (lambda: nn.Conv2d(CHANNELS, 4, 3), False),
    "of another class": (lambda: Doubled(CHANNELS, 4, 1), False),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(CHANNELS, 4, 1)), True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LASTS)
@pytest.mark.usefixtures("joint")
def test_gradients_behind_a_product_are_of_one_product(name: str, layout: torch.memory_format) -> None:
    make, expected = LASTS[name]
    x = X.contiguous(memory_format=layout)
    model, lean = (each.to(memory_format=layout) for each in exact(lambda: Last(make())))
    assert is_joint(lean, x) == expected
    assert_alike(step(lean, x), step(model, x))


def test_those_of_small_maps_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SMALL", 0)
    for large in (X.numel() * X.element_size(), X.numel() * X.element_size() - 1):
        monkeypatch.setattr(matrices, "LARGE", large)
        assert is_joint(exact(Mobile)[1]) == (large < X.numel() * X.element_size())


@pytest.mark.usefixtures("joint")
def test_memory_that_nobody_wrote_to_is_not_read() -> None:
    """What PyTorch doesn't initialise is NaN when its results are to be the same each time."""
    model, lean = exact(Mobile)
    expected = step(model, X)
    torch.use_deterministic_algorithms(True)
    try:
        assert is_joint(lean)
        assert_alike(step(lean, X), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("frozen", ["last.weight", "last.bias", "se", "conv norm se last.weight", "se last"])
@pytest.mark.usefixtures("joint")
def test_gradients_that_nobody_wants_are_none(frozen: str) -> None:
    model, lean = exact(lambda: Last(nn.Conv2d(CHANNELS, 4, 1)))
    for each in (model, lean):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not any(name.startswith(start) for start in frozen.split()))
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.usefixtures("joint")
def test_a_gate_without_gradients() -> None:
    class Gated(Mobile):
        def forward(self, x: Tensor) -> Tensor:
            u = self.act(self.norm(self.conv(x)))
            return self.last(u * u.mean((2, 3), keepdim=True).sigmoid().detach())

    model, lean = exact(Gated)
    assert is_joint(lean)
    assert_alike(step(lean, X), step(model, X))


LATER: dict[str, Callable[[Any], object]] = {
    "a hook before": lambda last: last.register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),)),
    "a hook behind": lambda last: last.register_forward_hook(lambda module, inputs, output: output.square()),
    "a backward hook": lambda last: last.register_full_backward_hook(lambda module, ours, theirs: (ours[0].square(),)),
    "a forward of its own": lambda last: setattr(last, "forward", lambda x: nn.Conv2d.forward(last, x).square()),
    "groups": lambda last: (setattr(last, "groups", 2), setattr(last, "weight", nn.Parameter(last.weight[:, :4].clone()))),
}


@pytest.mark.parametrize("how", LATER)
@pytest.mark.usefixtures("joint")
def test_what_is_done_to_the_convolution_later_holds(how: str) -> None:
    model, lean = exact(Mobile)
    for each in (model, lean):
        LATER[how](each.last)
    assert not is_joint(lean)
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.parametrize("what", ["map", "gate"])
@pytest.mark.usefixtures("joint")
def test_factors_that_are_changed_between_the_product_and_its_convolution(what: str) -> None:
    """The product was of what they were before."""

    class Changed(Mobile):
        def forward(self, x: Tensor) -> Tensor:
            u = self.act(self.norm(self.conv(x)))
            gate = u.mean((2, 3), keepdim=True).sigmoid()
            y = u * gate
            (u if what == "map" else gate).add_(1)
            return self.last(y)

    model, lean = exact(Changed)
    with torch.no_grad():
        assert torch.equal(lean(X), model(X))
    assert torch.equal(lean(X), model(X))
    if what == "gate":  # the map itself isn't kept
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            lean(X).sum().backward()


@pytest.mark.usefixtures("joint")
def test_norms_are_run_again_once() -> None:
    """By part for the product, they would be once more for the activation."""
    _, lean = exact(Mobile)
    loss = lean(X).sum()
    with torch.profiler.profile() as profile:
        loss.backward()
    assert {event.key: event.count for event in profile.key_averages()}["aten::native_batch_norm"] == 1


@pytest.mark.usefixtures("joint")
def test_a_product_with_other_readers_is_made() -> None:
    class Two(Mobile):
        def forward(self, x: Tensor) -> Tensor:
            y = self.se(self.act(self.norm(self.conv(x))))
            return self.last(y) + y

    model, lean = exact(Two)
    assert not is_joint(lean)
    assert_alike(step(lean, X), step(model, X))


@pytest.mark.usefixtures("joint")
def test_half_precision_and_autocast_have_gradients_of_their_own() -> None:
    _, lean = exact(Mobile)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_joint(lean.float(), X.float())
    assert not is_joint(lean.bfloat16(), X.bfloat16())
