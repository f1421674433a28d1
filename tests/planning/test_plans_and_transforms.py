"""Plans say what a transform does, and make it again."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn

import se_fx
from se_fx import Cost, Plan, Site, SqueezeExciteError

X = torch.zeros(1, 3, 8, 8)


def test_a_plan_changes_nothing_and_agrees_with_the_transform(cnn: nn.Sequential) -> None:
    keys = list(cnn.state_dict())
    plan = se_fx.plan(cnn, min_channels=1, latent_channels=4, example_inputs=X)
    assert list(cnn.state_dict()) == keys
    assert plan.sites == se_fx.report(se_fx.transform(cnn, min_channels=1, latent_channels=4), X).sites
    assert plan.base == se_fx.report(se_fx.transform(cnn, min_channels=1), X).base
    assert "2 sites, 0 Conv2d layers skipped" in str(plan)
    assert len(plan) == 2


def test_example_inputs_give_the_transforms_plan_its_costs(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1, example_inputs=X)
    assert se_fx.report(gm).sites[0].spatial == (8, 8)


def test_a_plan_replays_on_a_fresh_model() -> None:
    plan = se_fx.plan(torchvision.models.resnet18(), min_channels=256, latent_channels=0.25, init="identity", bias=True)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.sites == plan.sites
    model = torchvision.models.resnet18().eval()
    gm = se_fx.transform(model, again)
    assert se_fx.report(gm).sites == plan.sites
    assert {skip.reason for skip in se_fx.report(gm).skipped} == {"not in the plan"}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(gm(x), model(x))
    checkpoint = {"plan": plan.to_dict(), "state_dict": gm.state_dict()}
    rebuilt = se_fx.transform(torchvision.models.resnet18(), Plan.from_dict(checkpoint["plan"])).eval()
    rebuilt.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(rebuilt(x), gm(x))


def test_a_replayed_plan_keeps_its_reasons(cnn: nn.Module) -> None:
    plan = se_fx.plan(cnn, min_channels=32)
    reasons = {skip.name: skip.reason for skip in se_fx.report(se_fx.transform(cnn, plan)).skipped}
    assert reasons == {"0": "16 output channels < min_channels=32"}


def test_a_plan_for_another_model_names_the_first_site_that_does_not_fit() -> None:
    plan = se_fx.plan(torchvision.models.resnet50(), min_channels=512)
    with pytest.raises(SqueezeExciteError, match=r"plan: site 'layer2.0.conv3' does not fit: ResNet has no such Conv2d"):
        se_fx.transform(torchvision.models.resnet18(), plan)
    wider = se_fx.plan(nn.Sequential(nn.Conv2d(3, 16, 1)), min_channels=1)
    with pytest.raises(SqueezeExciteError, match=r"plan: site '0' does not fit: the plan has 16 channels there, the model 8"):
        se_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 1)), wider)


GOOD = Site("0", 16, 4)
SAVED = Plan((GOOD,)).to_dict()


def test_widths_are_read_up_to_their_bounds() -> None:
    for width in (1, 2**20):
        site = {**SAVED["sites"][0], "channels": width, "latent_channels": width}
        assert Plan.from_dict({**SAVED, "sites": [site]}).sites == (
            Site("0", width, width, cost=Cost(params=2 * width * width)),
        )
