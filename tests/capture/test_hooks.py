"""Hooks fire as before, on every level, and those over the model act on the copy."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from two_convs import Model, X, assert_same, rewritten

import se_fx


def test_hooks_fire_as_often_as_before_on_every_level() -> None:
    calls: list[str] = []

    def note(name: str, *args) -> None:
        calls.append(name)

    model = nn.Sequential(OrderedDict(a=Model(), b=nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))
    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(note, f"forward {name}"))
        module.register_forward_pre_hook(functools.partial(note, f"pre {name}"))
        module.register_full_backward_hook(functools.partial(note, f"backward {name}"))
        module.register_state_dict_post_hook(functools.partial(note, f"state {name}"))
    result = rewritten(model, 3)
    for each in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(se_fx.transform(Model(), min_channels=1)))):
        each(X)
    for hooked in (model, result):
        calls.clear()
        hooked(X.clone().requires_grad_()).sum().backward()
        hooked.state_dict()
        if hooked is model:
            expected = sorted(calls)
    assert sorted(calls) == expected


def test_hooks_that_change_values_go_on_changing_them() -> None:
    model = nn.Sequential(Model(), nn.Conv2d(8, 8, 1))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same(model, rewritten(model, 3), X)


def test_a_hook_that_is_a_models_own_method_acts_on_the_copy() -> None:
    class Hooked(Model):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.first.register_forward_hook(self.look)

        def look(self, module, args, output) -> None:
            self.seen += 1

    model = Hooked()
    result = rewritten(model)
    result(X)
    assert (model.seen, result.seen) == (0, 1)


def test_closures_and_hooks_over_the_model_act_on_the_copy() -> None:
    class Closes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 8, 1), nn.Dropout(0.5)
            self.body = lambda x: self.drop(self.conv(x))

        def before(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Closes()
    model.register_forward_pre_hook(lambda module, args: (module.before(args[0]),))
    result = rewritten(model, 1)
    assert_same(model, result, X)
    result.eval()
    model.train()
    assert torch.equal(result(X), result(X))


def test_timms_feature_extractor_by_hooks() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", features_only=True, feature_cls="hook").eval()
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    x = torch.randn(1, 3, 64, 64)
    expected, actual = model(x), result(x)
    assert len(actual) == len(expected) == 5
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, copy.deepcopy(result)(x), expected))
