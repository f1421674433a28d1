"""Every placement at identity, removed, a second time, and after another placement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from units import UNITS, Doubled, Unit

import se_fx


@pytest.mark.parametrize("placement", ["norm", "residual", "pre", "post", "identity"])
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("training", [False, True])
def test_identity_is_bitwise_and_remove_undoes_it(name: str, placement: str, training: bool) -> None:
    model = Unit(UNITS[name]).train(training)
    try:
        gm = se_fx.transform(model, placement=placement, init="identity", min_channels=1)
    except se_fx.SqueezeExciteError:
        assert (name, placement) not in {(unit, each) for unit in UNITS for each in ("residual", "post")}
        return
    x = torch.randn(2, 3, 4, 4)
    outputs = []
    for each in (model, gm, se_fx.remove(gm)):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_two_placements_on_one_value_follow_each_other_in_any_order() -> None:
    def two(m: Unit, x: Tensor) -> Tensor:
        x = F.relu(m.a(F.relu(m.stem_like(x))) + x)
        return F.relu(m.b(F.relu(m.down(x))) + x)

    model = Unit(two)
    model.stem_like = nn.Conv2d(8, 8, 1)
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    first = {"placement": "post", "where": "a", "block": Doubled, "min_channels": 1}
    second = {"placement": "pre", "where": "b", "block": Doubled, "min_channels": 1}
    once = se_fx.transform(se_fx.transform(model, **first), **second)
    other = se_fx.transform(se_fx.transform(model, **second), **first)
    s = model.stem(x)
    y = 2 * F.relu(model.a(F.relu(model.stem_like(s))) + s)
    expected = F.relu(model.b(F.relu(model.down(2 * y))) + y)
    assert torch.equal(once(x), expected)
    assert torch.equal(other(x), expected)
    assert torch.equal(se_fx.transform(model, se_fx.Plan.of(once))(x), expected)
    assert torch.equal(se_fx.transform(model, se_fx.Plan.of(other))(x), expected)


@pytest.mark.parametrize("placement", ["residual", "pre", "post", "identity"])
def test_a_second_transform_finds_the_same_places_beside_hooked_modules(placement: str) -> None:
    model = Unit(lambda m, x: UNITS["functional"](m, m.down(x)))
    model.down = nn.Sequential(nn.Conv2d(8, 8, 1))
    model.down.register_forward_hook(lambda module, args, output: None)
    gm = se_fx.transform(model, placement=placement, min_channels=1)
    again = se_fx.transform(gm, placement=placement, min_channels=1)
    assert again.state_dict().keys() == gm.state_dict().keys()
    assert {skip.name for skip in se_fx.plan(gm, placement=placement).skipped if "already" in skip.reason} == {"b"}
