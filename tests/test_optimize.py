"""`optimize_for_inference` on networks nobody here wrote: outputs stay, and the model stays."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from trained import applied, assert_close, settled

import se_fx
from se_fx.placement import PLACEMENTS
from se_fx.rewrites import REWRITES

#: Squeezes hoisted, gates' products, and scales fused: one, two and one for each block, where that is legal.
NETWORKS = {
    "timm:seresnet18": (0, 16, 8),
    "timm:seresnet34": (0, 32, 16),
    "timm:seresnet50": (16, 32, 16),
    "timm:seresnext50_32x4d": (16, 32, 16),
    "timm:legacy_seresnet50": (16, 32, 16),
    "timm:seresnext26d_32x4d": (8, 16, 8),
    "timm:ecaresnet26t": (0, 0, 8),
    "timm:efficientnet_b0": (0, 32, 16),
    "timm:regnety_008": (0, 28, 14),
    "timm:mobilenetv3_large_100": (0, 16, 8),
    "timm:resnest26d": (0, 0, 0),
    "timm:skresnet18": (0, 0, 0),
    "timm:resnet18": (0, 0, 0),
    "regnet_y_400mf": (0, 32, 16),
    "efficientnet_b0": (0, 32, 16),
    "mobilenet_v3_large": (0, 16, 8),
}


def network(name: str) -> nn.Module:
    model = timm.create_model(name[5:]) if name.startswith("timm:") else torchvision.models.get_model(name)
    return settled(model)


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_networks_of_others(name: str) -> None:
    model = network(name)
    state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    fast = se_fx.optimize_for_inference(model)
    for x in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 96, 64)):
        assert_close(fast(x), model(x))
    x = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert_close(fast(x), model(x))
    done = applied(fast)
    assert (done["hoist_squeezes"], done["vector_products"], done["fuse_scales"]) == NETWORKS[name]
    assert done["fold_norms"] == sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert not any("running_mean" in key for key in fast.state_dict())
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is value and torch.equal(value, was) for key, (value, was) in state.items())
    assert not model.training


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["timm:seresnet152d", "timm:ecaresnet50t", "timm:resnest50d", "timm:skresnet50", "regnet_y_32gf"]
)
@torch.inference_mode()
def test_large_networks_of_others(name: str) -> None:
    model, x = network(name), torch.randn(1, 3, 96, 96)
    assert_close(se_fx.optimize_for_inference(model, x)(x), model(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.inference_mode()
def test_every_placement_on_resnet50(placement: str) -> None:
    model = settled(torchvision.models.resnet50())
    gm = se_fx.transform(model, placement=placement, min_channels=64, latent_channels=1 / 16).eval()
    fast = se_fx.optimize_for_inference(gm)
    x = torch.randn(2, 3, 32, 32)
    assert_close(fast(x), gm(x))
    assert applied(fast)["vector_products"] == 2 * len(se_fx.Plan.of(gm).sites)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.inference_mode()
def test_every_placement_on_lite0_keeps_what_it_sees(lite0: nn.Module, placement: str) -> None:
    from quickstart import PHOTOS, photo

    gm = se_fx.transform(lite0, placement=placement, min_channels=24, latent_channels=8).eval()
    identical = se_fx.transform(lite0, placement=placement, min_channels=24, init="identity").eval()
    x = torch.cat([photo(name) for name in list(PHOTOS)[:2]])
    for model in (gm, identical):
        fast = se_fx.optimize_for_inference(model)
        expected = model(x)
        assert_close(fast(x), expected)
        assert torch.equal(fast(x).topk(5).indices, expected.topk(5).indices)
    assert applied(fast)["constant_gates"] == len(se_fx.Plan.of(identical).sites)


@pytest.mark.parametrize("rewrite", REWRITES)
@torch.inference_mode()
def test_each_rewrite_alone(rewrite: str) -> None:
    model, x = network("timm:seresnext26d_32x4d"), torch.randn(2, 3, 32, 32)
    fast = se_fx.optimize_for_inference(model, x, rewrites=[rewrite])
    assert list(applied(fast)) == [rewrite]
    assert_close(fast(x), model(x))


@torch.inference_mode()
def test_bfloat16_is_no_further_from_float32_than_the_model_is() -> None:
    for name in ("timm:seresnext26d_32x4d", "timm:efficientnet_b0"):
        model, x = network(name), torch.randn(2, 3, 64, 64)
        exact, half = model(x), copy.deepcopy(model).bfloat16()
        fast = se_fx.optimize_for_inference(half)
        assert {tensor.dtype for tensor in (*fast.parameters(), *fast.buffers())} == {torch.bfloat16}
        before = (half(x.bfloat16()) - exact).square().mean().sqrt()
        after = (fast(x.bfloat16()) - exact).square().mean().sqrt()
        # Rounding errors are random: half as much again would be no accident.
        assert after < 1.5 * before, (name, before, after)


@torch.inference_mode()
def test_autocast() -> None:
    model, x = network("timm:seresnet50"), torch.randn(2, 3, 64, 64)
    fast = se_fx.optimize_for_inference(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x), fast(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)  # bfloat16 has 8 bits


def test_models_changed_in_place() -> None:
    model = torchvision.models.resnet18()
    se_fx.apply_squeeze_excite(model, latent_channels=8, min_channels=64)
    settled(model)
    fast = se_fx.optimize_for_inference(model)
    x = torch.randn(2, 3, 64, 64)
    assert_close(fast(x), model(x))
    assert applied(fast)["vector_products"] == 2 * len(se_fx.Plan.of(model).sites) == 40


@torch.inference_mode()
def test_models_in_regions() -> None:
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    model = settled(se_fx.transform(detector, min_channels=64))
    fast = se_fx.optimize_for_inference(model)
    assert isinstance(fast, type(detector))
    assert applied(fast)["vector_products"] > 16
    x = [torch.rand(3, 200, 160), torch.rand(3, 150, 150)]
    for a, b in zip(fast(x), model(x), strict=True):
        assert_close(a["boxes"], b["boxes"])
        assert_close(a["scores"], b["scores"])
    assert "the model itself: " in str(se_fx.report(fast))


def test_models_of_two_modes() -> None:
    model = settled(torchvision.models.googlenet(init_weights=False))
    gm = se_fx.transform(model, min_channels=200).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_close(se_fx.optimize_for_inference(gm)(x), gm(x))
