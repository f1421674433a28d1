"""Optimised networks with attention, of every family there is in timm and torchvision, are their networks. Slow: `-m zoo`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
import zoo
from rewrites.excited import settled
from torch import Tensor, nn

import se_fx
from se_fx.cost import NO_COST

#: By kind of attention; each name a network of timm's, or of torchvision's.
NETWORKS = [
    # Squeeze-and-Excitation, as it was written in a dozen ways
    "seresnet18", "seresnet33ts", "seresnext26d_32x4d", "seresnext26t_32x4d",
    "seresnext26ts", "legacy_seresnet18", "legacy_seresnext26_32x4d", "resnetrs50", "nf_seresnet26", "cs3sedarknet_l",
    "efficientnet_b0", "tf_efficientnet_b0", "efficientnet_b0_gn", "efficientnet_b0_g8_gn",
    "efficientnetv2_rw_t", "tf_efficientnetv2_b0", "mobilenetv3_small_050", "tf_mobilenetv3_small_075", "mobilenetv3_rw",
    "semnasnet_050", "hardcorenas_b", "lcnet_035", "mixnet_s", "tf_mixnet_s", "rexnet_100", "rexnetr_100",
    "tinynet_e", "ghostnet_050", "ghostnetv2_100", "repghostnet_050", "repvit_m0_9", "regnety_002",
    "regnety_008_tv", "regnetz_005", "regnetz_b16", "mobileone_s4", "tresnet_m",
    "fastvit_sa12", "test_efficientnet", "test_byobnet", "coatnet_pico_rw_224", "nf_regnet_b0",
    "hgnetv2_b0", "edgenext_xx_small",
    # of channels in a band, effective, of context, split, selective
    "ecaresnet26t", "ecaresnext26t_32x4d", "ecaresnetlight", "eca_resnet33ts", "eca_nfnet_l0",
    "nf_ecaresnet26", "eca_botnext26ts_256", "ese_vovnet19b_dw", "gcresnext26ts",
    "gcresnet33ts", "gc_efficientnetv2_rw_t", "resnest14d", "skresnet18",
    # torchvision's
    "efficientnet_b0 of torchvision", "efficientnet_v2_s of torchvision", "mobilenet_v3_small of torchvision",
    "regnet_y_400mf of torchvision", "ssdlite320_mobilenet_v3_large's backbone of torchvision",
    # in a resnet, whatever layer of attention timm knows
    *(f"resnet18 with {kind}" for kind in ("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "sk")),
]  # fmt: skip
#: Their images have one size.
FIXED = ("coatnet", "eca_botnext", "fastvit")


def network(name: str) -> nn.Module:
    if name.endswith(" of torchvision"):
        builder = name.removesuffix(" of torchvision").removesuffix("'s backbone")
        options = {"weights_backbone": None} if "backbone" in name else {}
        model = torchvision.models.get_model(builder, weights=None, **options)
        return model.backbone if "backbone" in name else model
    family, _, kind = name.partition(" with ")
    return timm.create_model(family, **({"block_args": {"attn_layer": kind}} if kind else {}))


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    bound = tolerance * float(expected.abs().max())
    return bool(expected.isfinite().all()) and float((found - expected).abs().max()) <= bound


def leaves(output: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_of_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = settled(zoo.with_noise(lambda: network(name)))
    side = model.default_cfg["input_size"][-1] if name.startswith(FIXED) else 64
    others = [(side, side)] * 2 if name.startswith(FIXED) else [(96, 64), (64, 128)]
    sizes = [(batch, *size) for batch, size in zip((1, 2, 5), [(side, side), *others], strict=True)]
    images = [torch.randn(batch, 3, *size, dtype=torch.float64) for batch, *size in sizes]
    with torch.no_grad():
        expected = [leaves(model(x)) for x in images]
    monkeypatch.setattr("se_fx.optimize.inference.measure", lambda *args: SimpleNamespace(total=NO_COST))  # which takes longest
    for inputs in (None, images[0]):
        fast = se_fx.optimize_for_inference(model, inputs)
        with torch.no_grad():
            for x, outputs in zip(images, expected, strict=True):
                for a, b in zip(leaves(fast(x)), outputs, strict=True):
                    assert a.shape == b.shape
                    assert near(a, b, 1e-9), (x.shape, inputs is None)
    gradients = []
    for each in (model, fast):
        x = images[1][:1].clone().requires_grad_()
        sum(output.square().mean() for output in leaves(each(x))).backward()
        gradients.append(x.grad)
    assert near(gradients[1], gradients[0], 1e-6)
