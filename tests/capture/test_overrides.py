"""What classes and instances override stays overridden: forwards, calls, other methods, convs of other classes."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, weight_norm
from two_convs import Model, X, assert_same, rewritten

import se_fx


def test_a_forward_replaced_on_the_instance_is_the_one_that_runs() -> None:
    model = Model()

    def doubled(self: Model, x: Tensor) -> Tensor:
        return 2 * Model.forward(self, x)

    model.forward = types.MethodType(doubled, model)
    result = rewritten(model)
    assert_same(model, result, X)
    nested = nn.Sequential(model, nn.Conv2d(8, 8, 1))
    assert_same(nested, rewritten(nested, 3), X)


class FreezesNorm(nn.Sequential):
    """Keeps its norm in eval mode whatever it is told, as detection backbones do."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))

    def train(self, mode: bool = True):
        super().train(mode)
        self[1].eval()
        return self


class Doubles(Model):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class KeepsExtraState(Model):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state) -> None:
        self.version = state["version"]


@pytest.mark.parametrize("kind", [FreezesNorm, Doubles, KeepsExtraState])
def test_methods_of_every_module_that_a_model_overrides_stay_overridden(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert isinstance(result, kind)
    for each in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(model, each, X)
        each.load_state_dict(each.state_dict())
        assert getattr(each, "version", 3) == 3
        if kind is FreezesNorm:
            assert not each.train()[1].training
        if kind is not Doubles:  # dynamo compiles forward alone
            assert torch.equal(torch.compile(each.eval(), fullgraph=True, backend="eager")(X), model.eval()(X))
    assert set(model.state_dict()) <= set(result.state_dict())
    assert type(se_fx.remove(result)) is kind
    twice = rewritten(result)
    assert twice.state_dict().keys() == result.state_dict().keys()
    assert_same(model, twice, X)


def test_names_that_containers_have_too() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add, self.names = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.names(self.add(x))

    model = Names()
    assert_same(model, rewritten(model), X)
    assert type(se_fx.remove(rewritten(model))) is Names


# ---------------------------------------------------------------------------------------------------------------- convs
@pytest.mark.parametrize(
    "normalise",
    [
        weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized_convs(normalise) -> None:
    model = Model()
    normalise(model.first)
    model(X)  # spectral norms estimate as they go
    reference = Model()
    normalise(reference.first)
    reference.load_state_dict(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = rewritten(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    state = result.state_dict(keep_vars=True)
    assert all(state[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert_same(reference, result, X)
    result(X).sum().backward()
    assert all(p.grad is not None for n, p in result.first.named_parameters() if "squeeze" not in n and n != "bias")


def test_conv_subclasses_are_sites() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    model = nn.Sequential(Standardized(3, 8, 3), nn.ReLU())
    result = rewritten(model, 1)
    assert_same(model, result, X)
    assert isinstance(result.get_submodule("0"), Standardized)


class Partial(nn.Conv2d):
    def forward(self, x: Tensor):
        return super().forward(x), 1


class ChannelsLast(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Partial, ChannelsLast])
def test_conv_subclasses_that_return_something_else_are_skipped(kind: type[nn.Conv2d], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind(3, 8, 1)).to(dtype)
    result = rewritten(model, 0)
    assert repr(result(X.to(dtype))) == repr(model(X.to(dtype)))
    assert se_fx.report(result).skipped[0].reason == "returns something else than a tensor (N, C, H, W)"


class Doubled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def test_leaves_whose_call_is_their_own() -> None:
    model = nn.Sequential(Doubled(3, 8, 1), nn.ReLU())
    assert_same(model, rewritten(model, 1), X)
