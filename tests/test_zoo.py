"""Every torchvision model with a Conv2d: bitwise identity, keys, Parameter objects and at least one site. Slow: `-m zoo`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import pytest
import torch
import torchvision
import zoo
from torch.utils.flop_counter import FlopCounterMode

import se_fx
from se_fx.analysis import remembering
from se_fx.capture import capture
from se_fx.cost import faked, measure
from se_fx.loading import load_model

CLASSIFIERS, SEGMENTERS, DETECTORS = (
    torchvision.models.list_models(module)
    for module in (torchvision.models, torchvision.models.segmentation, torchvision.models.detection)
)
#: In train mode and in place, too: one model of every family. All: `python examples/zoo.py torchvision --in-place --train`.
TRAINED = {
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2", "raft_small", *SEGMENTERS, *DETECTORS,
    "quantized_resnet18", "quantized_mobilenet_v2", "quantized_googlenet", "quantized_shufflenet_v2_x0_5",
}  # fmt: skip
#: They hold no nn.Conv2d but Conv3d.
VIDEO = {"mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_b", "swin3d_s", "swin3d_t"}
#: Without a residual unit of convolutions, in whatever is a graph.
UNITLESS = ("alexnet", "densenet", "googlenet", "inception", "shufflenet", "squeezenet", "swin", "vgg", "vit")


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One capture, and one look at its graphs, serve all that is done to a model: none of it changes the model for good."""
    monkeypatch.setattr(sys.modules["se_fx.transform"], "capture", functools.cache(capture))
    with remembering():
        yield


@pytest.mark.zoo
@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("name", zoo.torchvision_names())
@torch.no_grad()
def test_torchvision(name: str) -> None:
    """`transform`, at each placement for classifiers, and of one model of each family in place and in train mode."""
    modes = (False, True) if name in TRAINED else (False,)
    found = zoo.load(name, zoo.torchvision_attempts, modes)
    assert (found is None) == (name in VIDEO)
    if found is None:
        return
    before = zoo.Original(*found, modes)
    model, row = before.model, zoo.check_transform(name, before)
    assert row.result == "equal"
    assert row.sites > 0
    assert row.kind == ("own class" if name in DETECTORS or name.startswith("raft") else "graph")
    for placement in ("norm", "residual", "pre", "post", "identity") if name in CLASSIFIERS else ():
        try:
            rewritten = se_fx.transform(model.eval(), min_channels=1, latent_channels=4, placement=placement, init="identity")
        except se_fx.SqueezeExciteError:  # no such place
            assert name.startswith(UNITLESS)
            continue
        assert len(se_fx.Plan.of(rewritten)) > 0
        assert before.difference_transformed(rewritten) == ""
        assert type(se_fx.remove(rewritten)) is type(model)
    if name in TRAINED:
        in_place(name, before)


def in_place(name: str, before: zoo.Original) -> None:
    """At each placement the model is and does what it was and did, in both modes, and again when blocks are removed."""
    row = zoo.check_placements(name, before)
    assert row.result == "equal"
    assert row.kind.startswith("conv")
    assert row.sites >= len(row.kind.split(", "))


COUNTED = [*TRAINED.intersection(CLASSIFIERS), *SEGMENTERS, *VIDEO]


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(COUNTED))
def test_macs_are_half_of_pytorchs_flops(name: str) -> None:
    model = load_model(name)
    size = (3, 16, 224, 224) if name in VIDEO else (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    x = torch.empty(2, *size, device="meta")
    if name in VIDEO:
        assert 2 * measure(model, x).total.macs == counted(model, x) > 0
        return
    rewritten = se_fx.transform(model, example_inputs=x, min_channels=1, latent_channels=8)
    plan, original = se_fx.Plan.of(rewritten), counted(model, x)
    assert 2 * plan.base.macs == original > 0
    assert 2 * plan.added.macs == counted(rewritten, x) - original > 0


def counted(model: torch.nn.Module, x: torch.Tensor) -> int:
    """FLOPs by PyTorch's counter, on fake tensors; with gradients, since without them it misses attention's fused kernel."""
    with faked(model, ((x,), {})) as (copied, (args, _)), FlopCounterMode(display=False) as counter:
        copied.eval()(*args)
    return counter.get_total_flops()


FAMILIES = """
resnet18 resnetv2_50 resnext26ts seresnet18 legacy_seresnet18 resnest14d skresnet18 ecaresnet26t gcresnet33ts res2net50_26w_4s
regnetx_002 regnety_002 regnetz_b16 densenet121 dla34 dpn48b hrnet_w18_small inception_v3 inception_v4 inception_resnet_v2
xception41 nasnetalarge pnasnet5large vgg11_bn darknet17 cspresnet50 cspdarknet53 efficientnet_b0 efficientnet_lite0
efficientnetv2_rw_t tf_efficientnet_b0 mixnet_s mnasnet_050 mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small fbnetc_100 spnasnet_100 ghostnet_100 ghostnetv2_100 hardcorenas_a lcnet_035 tinynet_e rexnet_100
selecsls42 tresnet_m repvgg_a0 mobileone_s0 nf_regnet_b0 nfnet_l0 convnext_atto convnextv2_atto convmixer_768_32
edgenext_xx_small poolformer_s12 mobilevit_xxs mobilevitv2_050 fastvit_t8 repghostnet_050 repvit_m0_9 starnet_s1 hgnet_tiny
vovnet39a ese_vovnet19b_dw efficientvit_b0 efficientvit_m0 efficientformer_l1 efficientformerv2_s0 inception_next_atto
focalnet_tiny_srf gernet_s eca_botnext26ts_256 halonet26t lambda_resnet26t coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256
levit_128s visformer_tiny convit_tiny crossvit_tiny_240 pvt_v2_b0 twins_pcpvt_small xcit_nano_12_p16_224 coat_tiny
vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 mixer_s32_224 gmlp_s16_224
resmlp_12_224 cait_xxs24_224 volo_d1_224 davit_tiny nextvit_small tiny_vit_5m_224 mambaout_femto hiera_tiny_224
""".split()  # noqa: SIM905


@pytest.mark.zoo
@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_timm(name: str) -> None:
    found = zoo.load(name, zoo.timm_attempts, (False, True))
    assert isinstance(found, tuple)
    before = zoo.Original(*found, (False, True))
    row = zoo.check_transform(name, before)
    assert row.result == "equal"
    assert row.sites > 0
    in_place(name, before)
