"""Options: blocks, gates and activations of others, and overrides for some sites."""

from __future__ import annotations

import copy
import json
import pickle
import pkgutil

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model

import se_fx
from se_fx import Plan, SqueezeExciteError
from se_fx.blocks import BLOCKS, GATES
from se_fx.placement import PLACEMENTS
from se_fx.planning import Options


class Attention(nn.Module):
    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // reduction, 1)
        self.out = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x):
        return x * self.out(self.conv(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def squeeze_excitation(channels: int) -> nn.Module:
    return torchvision.ops.SqueezeExcitation(channels, channels // 16)


@pytest.mark.parametrize("factory", [Attention, squeeze_excitation, "timm.layers.EcaModule", "timm.layers.cbam.CbamModule"])
def test_blocks_of_others(factory) -> None:
    if isinstance(factory, str):
        factory = pkgutil.resolve_name(factory)
    model = get_model("resnet18", weights=None).eval().to(torch.bfloat16)
    example = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    plan = se_fx.plan(model, example_inputs=example, placement="residual", min_channels=256, block=factory)
    expected = sum(p.numel() for p in factory(256).parameters()) * 2 + sum(p.numel() for p in factory(512).parameters()) * 2
    assert plan.added.params == expected
    assert plan.added.flops > 0
    gm = se_fx.transform(model, plan)
    assert all(p.dtype == torch.bfloat16 for p in gm.parameters())
    blocks = [m for n, m in gm.named_modules() if n.count("squeeze_excite") and type(m) is type(factory(16))]
    assert len(blocks) == 4
    assert not any(block.training for block in blocks)
    report = se_fx.report(gm, example)
    assert report.added == plan.added
    assert "block" in str(report)
    assert gm(example).shape == (1, 1000)
    assert len(se_fx.plan(gm, min_channels=1)) == 16  # a second transform leaves what is in the blocks alone
    assert se_fx.remove(gm).state_dict().keys() == model.state_dict().keys()
    assert pickle.loads(pickle.dumps(gm)).state_dict().keys() == gm.state_dict().keys()
    assert copy.deepcopy(gm)(example).shape == (1, 1000)


def test_blocks_gates_and_policies_of_ones_own_are_saved_by_name(monkeypatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
    own = {"block": (BLOCKS, Attention), "placement": (PLACEMENTS, PLACEMENTS["conv"]), "gate": (GATES, torch.tanh)}
    for option, (table, value) in own.items():
        value = (lambda graph, root: PLACEMENTS["conv"](graph, root)) if option == "placement" else value
        plan = se_fx.plan(model, min_channels=1, **{option: value})
        name = getattr(plan.sites[0], option)
        data = json.loads(json.dumps(plan.to_dict()))
        assert pickle.loads(pickle.dumps(plan)) == plan  # without the function, which is local
        with pytest.raises(SqueezeExciteError, match=f"{option}.*must be added to se_fx"):
            Plan.from_dict(data)
        monkeypatch.setitem(table, name, (lambda value=value: value) if option == "gate" else value)
        assert Plan.from_dict(data).to_dict() == plan.to_dict()
        assert (
            se_fx.transform(model, Plan.from_dict(data)).state_dict().keys() == se_fx.transform(model, plan).state_dict().keys()
        )


def test_gates_and_activations_of_ones_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    gm = se_fx.transform(model, min_channels=1, gate=torch.tanh, activation=nn.PReLU())
    slopes = {id(p) for n, p in gm.named_parameters() if "activation" in n}
    assert len(slopes) == 2  # each block has its own
    assert se_fx.Plan.of(gm).sites[0].activation == "torch.nn.modules.activation.PReLU"
    with pytest.raises(SqueezeExciteError, match=r"gate=.*identity"):
        se_fx.transform(model, min_channels=1, gate=torch.tanh, init="identity")


def test_overrides() -> None:
    model = get_model("resnet18", weights=None)
    overrides = {
        "layer[34].*": {"latent_channels": 1 / 4, "bias": True},
        "layer4.1.*": {"block": Attention},
        "layer4.0.*": {"gate": "hardsigmoid"},
    }
    plan = se_fx.plan(model, placement="residual", min_channels=1, latent_channels=16, overrides=overrides)
    kinds = {site.name: (site.latent_channels, site.bias, site.gate, site.block) for site in plan.sites}
    assert kinds["layer2.0.conv2"] == (16, False, "sigmoid", None)
    assert kinds["layer3.0.conv2"] == (64, True, "sigmoid", None)
    assert kinds["layer4.0.conv2"] == (128, True, "hardsigmoid", None)
    assert kinds["layer4.1.conv2"] == (None, False, "sigmoid", "test_options.Attention")


def test_options_of_one_site() -> None:
    options = Options(
        latent_channels=16, overrides={"a*": {"bias": True}, "ab": {"latent_channels": 4}, "c": {"block": Attention}}
    )
    assert options.of("ab") == Options(latent_channels=4, bias=True)
    assert options.of("c") == Options(block=Attention)  # whose width is its own affair
    assert options.of("d") == options
