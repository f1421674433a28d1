"""State of any kind stays where it is, and goes on being read and kept: attributes, buffers, generators, other objects."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from two_convs import Model, X, assert_same, rewritten

import se_fx


class Recorder:
    """An object that is no module, as feature extractors have it."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen.setdefault(name, []).append(output)


class HooksIntoObjects(Model):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.first.register_forward_hook(functools.partial(self.recorder.hook, "first"))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.recorder.seen.clear()
        x = super().forward(x)
        return [*self.recorder.seen["first"], x]


class CountsInObjects(Model):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()

    def forward(self, x: Tensor) -> Tensor:
        self.recorder.seen.setdefault("calls", []).append(x)
        return super().forward(x)


def test_state_kept_in_other_objects_goes_on_being_kept() -> None:
    model = HooksIntoObjects()
    expected, actual = model(X), rewritten(model)(X)
    assert len(actual) == len(expected) == 2
    assert all(map(torch.equal, actual, expected))

    model = CountsInObjects()
    result = rewritten(model)
    assert model.recorder.seen == {}
    result(X), result(X)
    assert len(result.recorder.seen["calls"]) == 2


class Buffers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(1))
        self.register_buffer("b", torch.ones(1), persistent=False)
        self.plain = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(1)
        return self.second(self.first(x)) * (self.a + self.b) + self.plain + torch.tensor([0.25])


def test_buffers_and_constants_are_read_at_each_call() -> None:
    model, reference = Buffers(), Buffers()
    reference.load_state_dict(model.state_dict())
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert set(result.state_dict()) - set(model.state_dict()) == {k for k in result.state_dict() if "squeeze_excite" in k}
    for _ in range(3):
        assert torch.equal(result(X), reference(X))
    assert torch.equal(result.a, torch.tensor([4.0]))
    result.b.fill_(5)
    reference.b.fill_(5)
    assert torch.equal(result(X), reference(X))
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        fresh = copy.deepcopy(reference)
        assert torch.equal(copied(X), fresh(X))
    assert result.double()(X.double()).dtype == torch.float64
    removed = se_fx.remove(result)
    assert set(removed.__dict__) == set(model.__dict__)


def test_tied_parameters_and_modules_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[1].weight = model[0].weight
    model.append(model[0])
    result = rewritten(model, 2)
    assert list(se_fx.remove(result).state_dict()) == list(model.state_dict())
    assert set(model.state_dict()) <= set(result.state_dict())
    assert result.get_submodule("1").weight is model[0].weight
    assert_same(model, result, X)


def test_attributes_survive() -> None:
    model = Model()
    model.num_classes = 7
    model.first.note = {"k": [1]}
    model.alias = [model.first, {"second": model.second}]
    model.second.requires_grad_(False)
    result = rewritten(model)
    assert result.num_classes == 7
    assert result.first.note == {"k": [1]}
    assert result.alias[0] is result.first
    assert result.alias[1]["second"] is result.second
    assert result.alias[0] is not model.first
    assert [n for n, p in result.named_parameters() if not p.requires_grad] == ["second.weight", "second.bias"]


def test_modules_kept_in_plain_lists_are_called_in_the_copy() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.order = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    model = Listed()
    assert_same(model, rewritten(model), X)


def test_an_own_child_called_squeeze_excite_is_respected() -> None:
    class Own(Model):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze_excite = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.squeeze_excite(super().forward(x))

    model = Own()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert_same(model, result, X)
    assert set(model.state_dict()) <= set(result.state_dict())
    assert all("squeeze_excite" in key.split(".") for key in set(result.state_dict()) - set(model.state_dict()))
    assert se_fx.remove(result).state_dict().keys() == model.state_dict().keys()


def test_generators_of_the_models_own_are_left_alone() -> None:
    class Draws(Model):
        def __init__(self) -> None:
            super().__init__()
            self.numpy, self.python = np.random.default_rng(0), random.Random(0)
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.empty(1).normal_(generator=self.generator)
            return super().forward(x) * (self.numpy.random() + self.python.random()) * noise

    model, reference = Draws(), Draws()
    reference.load_state_dict(model.state_dict())
    result = rewritten(model)
    for _ in range(2):
        assert torch.equal(result(X), reference(X))


def test_an_error_while_tracing_leaves_everything_as_it_was() -> None:
    class Interrupts(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            raise KeyboardInterrupt

    model = Interrupts()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    state = torch.get_rng_state()
    with contextlib.suppress(KeyboardInterrupt):
        se_fx.transform(model)
        pytest.fail("should have been interrupted")
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattribute)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert rewritten(Model()) is not None
