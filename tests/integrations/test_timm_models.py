"""Timm's models stay timm's: methods, feature extraction, layer decay, averages of weights, reparameterisation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import nn
from trained import settled

import se_fx

pytestmark = pytest.mark.integration
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = ["resnet18", "efficientnet_b0", "convnext_atto", "regnety_002", "mobilenetv3_small_050"]


def network(name: str, **options) -> nn.Module:
    return settled(timm.create_model(name, **options))


def trained(model: nn.Module) -> nn.Module:
    for block in se_fx.blocks_of(model).values():
        nn.init.normal_(block.fc2.weight, std=0.5)
    return model


def transformed(model: nn.Module, placement: str) -> nn.Module:
    return trained(se_fx.transform(model, placement=placement, min_channels=1, latent_channels=4))


def applied(model: nn.Module, placement: str) -> nn.Module:
    model = copy.deepcopy(model)
    se_fx.apply_squeeze_excite(model, 4, 1, placement=placement)
    return trained(model)


BOTH = pytest.mark.parametrize("insert", [transformed, applied])


@pytest.mark.parametrize("name", NETWORKS)
@BOTH
def test_methods(name: str, insert: Callable[..., nn.Module]) -> None:
    model = network(name, num_classes=3)
    full = insert(model, "conv" if name == "convnext_atto" else "activation")
    features = full.forward_features(X)
    assert torch.equal(full.forward_head(features), full(X))
    assert not torch.equal(features, model.forward_features(X))
    assert full.group_matcher().keys() == model.group_matcher().keys()
    expected = full(X)
    full.set_grad_checkpointing(True)
    torch.testing.assert_close(full(X), expected)
    full.train()(X).sum().backward()
    assert all(block.fc1.weight.grad is not None for block in se_fx.blocks_of(full).values())
    full.eval().set_grad_checkpointing(False)
    full.reset_classifier(7)
    assert full(X).shape == (2, 7)
    assert full.get_classifier().out_features == 7


@pytest.mark.parametrize("name", NETWORKS)
@BOTH
def test_layer_decay_has_the_models_groups(name: str, insert: Callable[..., nn.Module]) -> None:
    model = network(name, num_classes=3)
    full = insert(model, "conv")
    names = {id(p): key for key, p in full.named_parameters()}
    before, after = ({}, {})
    for found, each in ((before, model), (after, full)):
        for group in param_groups_layer_decay(each, layer_decay=0.7):
            found.update({id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]})
    keys = dict(model.named_parameters())
    for identity, rates in after.items():
        key = names[identity]
        if "squeeze_excite" not in key.split("."):
            assert rates == before[id(keys[key])], key
        elif any(other.startswith(key.split("squeeze_excite")[0]) for other in keys):
            assert rates[0] in {rate for rate, _ in before.values()}


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "mobileone_s0"])
@pytest.mark.parametrize(("insert", "outside", "inside"), [(transformed, "residual", "norm"), (applied, "activation", "conv")])
@torch.no_grad()
def test_reparameterisation_keeps_blocks_outside_and_is_refused_inside(
    name: str, insert: Callable[..., nn.Module], outside: str, inside: str
) -> None:
    model = network(name, num_classes=3)
    if name not in ("repvgg_a0", "mobileone_s0"):  # which have no place outside
        full = insert(model, outside)
        assert se_fx.blocks_of(full)
        torch.testing.assert_close(reparameterize_model(full)(X), full(X), rtol=1e-4, atol=1e-4)
    full = insert(model, inside)
    with pytest.raises((se_fx.SqueezeExciteError, ValueError)) as caught:
        reparameterize_model(full)(X)
    if name != "repvit_m0_9":  # which unpacks the children of its units
        assert "Squeeze-and-Excitation block" in str(caught.value)


@BOTH
def test_averages_of_weights(insert: Callable[..., nn.Module]) -> None:
    full = insert(network("resnet18", num_classes=3), "residual")
    average = ModelEmaV3(full, decay=0.0)
    full.train()(X).sum().backward()
    torch.optim.SGD(full.parameters(), lr=0.1).step()
    average.update(full)
    assert torch.equal(average.module.eval()(X), full.eval()(X))
