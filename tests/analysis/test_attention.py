"""Where blocks go, and above all where they don't: inside attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import se_fx

timm = pytest.importorskip("timm")
ATTENTION = "computes an attention gate"


def attention_of(model: nn.Module) -> set[str]:
    return {skip.name for skip in se_fx.plan(model, min_channels=1).skipped if skip.reason == ATTENTION}


def convs_inside(model: nn.Module, kinds: tuple[type, ...]) -> set[str]:
    gates = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    return {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and any(n.startswith(gate + ".") for gate in gates)}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "efficientnet_v2_s"])
def test_torchvisions_squeeze_excitation_is_left_alone(name: str) -> None:
    model = torchvision.models.get_model(name)
    assert attention_of(model) == convs_inside(model, (torchvision.ops.SqueezeExcitation,)) != set()


@pytest.mark.parametrize(
    "name",
    ["seresnet18", "legacy_seresnet18", "efficientnet_b0", "mobilenetv3_large_100", "regnety_002", "resnet18d", "skresnet18",
     "resnest14d", "ecaresnet26t", "gcresnet33ts", "ese_vovnet19b_dw", "ghostnet_100", "cait_xxs24_224", "hrnet_w18_small"],
)  # fmt: skip
def test_timms_gates_are_left_alone(name: str) -> None:
    model = timm.create_model(name)
    kinds = tuple(
        kind
        for kind in (
            timm.layers.SEModule, timm.layers.SqueezeExcite, timm.layers.EffectiveSEModule, timm.layers.SelectiveKernel,
            timm.models.senet.SEModule, timm.models._efficientnet_blocks.SqueezeExcite, timm.layers.SplitAttn,
            timm.layers.GlobalContext,
        )
    )  # fmt: skip
    inside = convs_inside(model, kinds)
    paths = {n for n in inside if "split_attn" in n or "SelectiveKernel" in n}
    # The feature convs of selective-kernel and split-attention units are no gate's; all convs after a pooling are.
    feature = {n for n in inside if n.endswith(".conv") and n.count("conv") > 1 and (".paths." in n or ".conv2.conv" in n)}
    global_context = {n for n in inside if n.endswith("conv_attn")}  # pools with a matrix product, by softmax over space
    assert attention_of(model) == inside - feature - global_context, paths


class Gated(nn.Module):
    """Hand-written gates in functional style."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.body, self.reduce, self.expand = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Conv2d(16, 32, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x * self.expand(F.relu(self.reduce(self.pool(x)))).sigmoid()
        return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.mean(dim=[-1, -2], keepdim=True),
        lambda x: torch.mean(x, (2, 3), True),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
        lambda x: F.adaptive_avg_pool2d(x, output_size=1),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.avg_pool2d(x, x.shape[2:]),
        lambda x: F.avg_pool2d(x, kernel_size=(x.size(2), x.size(3))),
        lambda x: x.view(x.size(0), x.size(1), -1).mean(-1)[:, :, None, None],
        lambda x: x.flatten(2).mean(2).view(x.size(0), -1, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Identity()),
    ],
)
def test_hand_written_gates_are_left_alone_and_heads_are_not(pool) -> None:
    model = Gated(pool)
    assert attention_of(model) == {"reduce", "expand"}
    assert [site.name for site in se_fx.plan(model, min_channels=1).sites] == ["body", "head"]


@pytest.mark.parametrize("multiply", [torch.mul, lambda x, g: x.mul(g), lambda x, g: x.mul_(g), lambda x, g: g * x])
def test_whatever_multiplies(multiply) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return multiply(x, torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    assert attention_of(Model()) == {"gate"}


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(7), lambda x: x.mean(1, keepdim=True)])
def test_other_pooling_makes_no_gate(pool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.LazyConv2d(8, 1)
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.pool(self.a(x))) * 2

    model = Model()
    model(torch.randn(1, 8, 14, 14))
    assert attention_of(model) == set()


def test_our_own_blocks_are_left_alone(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1)
    assert len(se_fx.plan(gm, min_channels=1)) == 0


def test_gates_in_lone_regions_are_left_alone_too() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 8, 1), torchvision.ops.SqueezeExcitation(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.gate(x) if x.sum() > 0 else x

    assert attention_of(Untraceable()) == {"gate.fc1", "gate.fc2"}
