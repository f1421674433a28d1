"""Code that can't be traced goes on running itself, with blocks within it."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from two_convs import Model, X, assert_same, outputs, rewritten

import se_fx


class Counts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.second(self.first(x)) * self.calls


class Branches(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


class Iterates(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(self.first(sample[None]))[0] for sample in x])


class Optional(Model):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        return self.second(x)


class NoGrad(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class Autocasts(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            x = self.first(x.float())
        return self.second(x)


class DrawsNumbers(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * random.random() * np.random.rand() * torch.empty(1).uniform_()


class Checkpoints(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=False)


class ChecksPoints(Model):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.act, self.second(self.first(x)), use_reentrant=False)


UNTRACEABLE = [Branches, Iterates, Optional, NoGrad, Autocasts, Counts, DrawsNumbers, Checkpoints, ChecksPoints]


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_an_untraceable_root_keeps_its_class_and_runs_its_own_code(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert isinstance(result, kind)
    assert not isinstance(result, fx.GraphModule)
    assert result is not model
    assert_same(model, result, X)
    assert [name for name, _ in se_fx.report(result).opaque] == [""]
    state = result.state_dict()
    assert "squeeze_excite.of_first.fc1.weight" in state
    assert state["first.weight"] is not None
    assert torch.equal(outputs(copy.deepcopy(result), X), outputs(result, X)) or kind is Counts
    assert type(se_fx.remove(result)) is kind
    assert se_fx.remove(result).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", [kind for kind in UNTRACEABLE if kind is not Optional])  # as called here, it can be traced
def test_an_untraceable_submodule_stays_a_call_in_its_parents_graph(kind: type[nn.Module]) -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 3, 1), body=kind(), head=nn.Conv2d(8, 4, 1)))
    result = rewritten(model, 4)
    assert isinstance(result, fx.GraphModule)
    assert [n.target for n in result.graph.nodes if n.op == "call_module"] == [
        "stem", "squeeze_excite.of_stem", "body", "head", "squeeze_excite.of_head",
    ]  # fmt: skip
    assert isinstance(result.body, kind)
    if kind is not Counts:
        assert_same(model, result, X)
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert copied.state_dict().keys() == result.state_dict().keys()


def test_blocks_in_untraceable_code_do_scale() -> None:
    model = Branches()
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    first, second = se_fx.blocks_of(result).values()
    x = model.first(X) * first.excitation(model.first(X))
    sign = 1 if x.sum() > 0 else -1
    expected = second(model.second(sign * x))
    assert torch.equal(result(X), expected)
    assert isinstance(result.first, nn.Conv2d)
    assert result.first.stride == (1, 1)


def test_state_kept_in_attributes_goes_on_being_kept() -> None:
    model = Counts()
    result = rewritten(model)
    result(X), result(X)
    assert (result.calls, result.seen) == (2, [1, 2])
    assert (model.calls, model.seen) == (0, [])


def test_optional_arguments_work_with_and_without() -> None:
    model = Optional()
    result = rewritten(model)
    mask = (torch.rand(2, 8, 1, 1) > 0.5).float()
    assert_same(model, result, X)
    assert_same(model, result, X, mask)
    assert_same(model, result, X, mask=mask)


def test_an_optional_number_is_just_an_argument() -> None:
    class Scaled(Model):
        def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
            return self.second(self.first(x)) * scale + shift

    model = Scaled()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, X)
    assert_same(model, result, X, 3.0, shift=4.0)


def test_gradients_stop_where_they_stopped() -> None:
    result = rewritten(NoGrad())
    result(X).sum().backward()
    assert result.first.weight.grad is None
    assert result.second.weight.grad is not None
