"""Parts that are compiled or scripted are left alone, and all around them gets its blocks; a root that is one is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from two_convs import X

import se_fx
from se_fx import SqueezeExciteError


def part(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WAYS = {"scripted": scripted, "compiled": compiled, "compiled in place": compiled_in_place}
REASONS = {"scripted": "is TorchScript", "compiled": "is compiled already", "compiled in place": "is compiled already"}
OPTIONS: dict[str, Any] = {"min_channels": 1, "latent_channels": 2, "init": "identity"}


class Net(nn.Module):
    def __init__(self, close: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.stem, self.closed, self.last = nn.Conv2d(3, 3, 1), close(part()), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.closed(self.stem(x)))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def closed_convs(model: nn.Module) -> list[str]:
    """The convs within the closed part."""
    kinds = {name: {type(module).__name__, getattr(module, "original_name", "")} for name, module in model.named_modules()}
    return [name for name, kind in kinds.items() if "Conv2d" in kind and name.startswith("closed")]


@pytest.mark.parametrize("placement", ["conv", "norm"])
def test_the_part_is_left_alone_and_named(way: str, placement: str) -> None:
    model = Net(WAYS[way])
    if placement == "norm":
        model.last = part()
    result = se_fx.transform(model, placement=placement, **OPTIONS)
    report = se_fx.report(result)
    assert [site.name for site in report.sites] == (["stem", "last"] if placement == "conv" else ["last.0"])
    assert dict(report.opaque) == {"closed": REASONS[way]}
    within = {skip.name: skip.reason for skip in report.skipped if skip.name.startswith("closed")}
    assert within == {
        name: f"is in 'closed', which {REASONS[way]}" for name in closed_convs(model) if name.startswith("closed")
    }
    assert len(within) == 1
    assert {skip.channels for skip in report.skipped if skip.name in within} == {3}
    assert REASONS[way] in str(report)


def test_outputs_modes_and_running_statistics_are_the_same(way: str) -> None:
    model = Net(WAYS[way])
    result = se_fx.transform(model, **OPTIONS)
    model, result = model, result
    for training in (False, True, False):
        state = copy.deepcopy(dict(model.state_dict()))
        expected = model.train(training)(X)
        after = copy.deepcopy(dict(model.state_dict()))
        for key, value in model.state_dict().items():
            value.copy_(state[key])
        assert torch.equal(result.train(training)(X), expected)
        for key, value in after.items():
            assert torch.equal(result.state_dict()[key], value), key


def test_a_compiled_part_is_a_copy_in_the_copy() -> None:
    for way in ("compiled", "compiled in place"):
        model = Net(WAYS[way]).train()
        result = se_fx.transform(model, **OPTIONS).eval()
        assert all(module.training for module in model.modules())
        before = model.state_dict()
        kept = {key: value.clone() for key, value in before.items()}
        result(X)
        assert all(torch.equal(before[key], kept[key]) for key in kept)  # norms in eval mode count nothing
        assert any(module.training for module in model.modules())


def test_keys_and_parameters_are_the_models(way: str) -> None:
    model = Net(WAYS[way])
    result = se_fx.transform(model, **OPTIONS)
    new = result.state_dict(keep_vars=True)
    assert all(new[key] is value or torch.equal(new[key], value) for key, value in model.state_dict(keep_vars=True).items())
    assert all("squeeze_excite" in key.split(".") for key in new.keys() - model.state_dict().keys())
    assert torch.equal(se_fx.remove(result).eval()(X), model.eval()(X))


def test_plans_in_place_and_replay(way: str) -> None:
    model = Net(WAYS[way]).eval()
    plan = se_fx.plan(model, **OPTIONS)
    assert [site.name for site in plan.sites] == ["stem", "last"]
    expected = model(X)
    assert torch.equal(se_fx.transform(model, se_fx.Plan.from_dict(plan.to_dict()))(X), expected)
    se_fx.apply_squeeze_excite(model, latent_channels=2, min_channels=1)
    assert [site.name for site in se_fx.Plan.of(model).sites] == ["stem", "last"]
    assert not torch.equal(model(X), expected)


def test_a_site_within_is_refused(way: str) -> None:
    plan = se_fx.plan(Net(lambda module: module), **OPTIONS)
    with pytest.raises(SqueezeExciteError, match=r"'closed\.0' does not fit"):
        se_fx.transform(Net(WAYS[way]), plan)


def test_channels_of_closed_parts_count_for_nothing(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), WAYS[way](part(64)))
    plan = se_fx.plan(model, min_channels="auto", latent_channels=1)
    assert [site.name for site in plan.sites] == ["0"]


def test_a_model_with_no_other_convs_gets_none(way: str) -> None:
    model = nn.Sequential(nn.ReLU(), WAYS[way](part())).eval()
    plan = se_fx.plan(model, **OPTIONS)
    assert not plan.sites
    assert [skip.channels for skip in plan.skipped] == [3]
    assert torch.equal(se_fx.transform(model, **OPTIONS)(X), model(X))


def test_parts_without_convs_are_leaves_as_ever(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), WAYS[way](nn.ReLU()))
    result = se_fx.transform(model, **OPTIONS)
    assert not se_fx.report(result).opaque
    assert torch.equal(result(X), model(X))


@pytest.mark.parametrize("verb", [se_fx.transform, se_fx.plan, se_fx.apply_squeeze_excite, se_fx.suggest])
def test_a_root_is_refused(way: str, verb: Callable[..., Any]) -> None:
    words = "model is TorchScript: transform the Python model" if way == "scripted" else "model is compiled already"
    with pytest.raises(SqueezeExciteError, match=words):
        verb(WAYS[way](part()))


def test_optimising_goes_around_it(way: str) -> None:
    model = Net(WAYS[way])
    model.last = part()
    model.eval()
    torch.testing.assert_close(se_fx.optimize_for_inference(model)(X), model(X))


class Calls(nn.Module):
    """Can't be traced, so its children are looked at one by one."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = conv, nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x) if x.sum() > 0 else -self.conv(x))


def test_a_conv_that_is_compiled_itself(way: str) -> None:
    model = Calls(WAYS[way](nn.Conv2d(3, 3, 1))).eval()
    result = se_fx.transform(model, **OPTIONS)
    assert [site.name for site in se_fx.report(result).sites] == ["last"]
    assert torch.equal(result(X), model(X))
    whole = nn.Sequential(WAYS[way](nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1)).eval()
    result = se_fx.transform(whole, **OPTIONS)
    assert [site.name for site in se_fx.report(result).sites] == ["1"]
    assert torch.equal(result(X), whole(X))
