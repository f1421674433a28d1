"""Folding of constant gates, against models scaled by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from folds import X, applied, assert_same_outputs, blocks, fold, make_constant, reasons, split
from torch import Tensor, nn

import se_fx
from se_fx import GateProfile


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_conv_takes_the_gate(conv_bias: bool, groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=conv_bias, groups=groups), nn.ReLU())
    model = se_fx.transform(net, min_channels=1, latent_channels=2, bias=True)
    gate = torch.tensor([0.25, 0.5, 0.75, 0.9])
    make_constant(blocks(model)["squeeze_excite.of_0"], gate)
    folding = fold(model, x=X[:, :2])
    (site,) = folding.folded
    assert (site.name, site.into, site.deviation) == ("0", "0", None)
    assert site.spread == pytest.approx(0, abs=1e-7)
    assert site.saved.params == folding.saved.params == (4 * 2 + 2) + (2 * 4 + 4)
    assert not blocks(folding.model)
    torch.testing.assert_close(folding.model.get_submodule("0").weight, net[0].weight * gate[:, None, None, None])
    if conv_bias:
        torch.testing.assert_close(folding.model.get_submodule("0").bias, net[0].bias * gate)
    x = torch.randn(2, 2, 9, 7)
    torch.testing.assert_close(folding.model(x), F.relu(net[0](x) * gate[:, None, None]))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_a_norm_takes_the_gate(norm: nn.Module) -> None:
    norm = copy.deepcopy(norm)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True))
    model = se_fx.transform(net, placement="norm", min_channels=1, latent_channels=2, bias=True)
    gate = torch.tensor([0.25, 0.5, 0.75, 0.9])
    make_constant(blocks(model)["squeeze_excite.of_0"], gate)
    folding = fold(model)
    assert folding.folded[0].into == "1"
    folded = folding.model.get_submodule("1")
    torch.testing.assert_close((folded.weight, folded.bias), (norm.weight * gate, norm.bias * gate))
    for training in (True, False):
        net.train(training), folding.model.train(training)
        torch.testing.assert_close(folding.model(X), F.relu(norm(net[0](X)) * gate[:, None, None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["conv", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"init": "identity"}, {}], ids=["gate 1", "gate 1/2"])
def test_powers_of_two_fold_exactly(cnn: nn.Module, placement: str, dtype: torch.dtype, options: dict) -> None:
    model = se_fx.transform(cnn.to(dtype), placement=placement, min_channels=1, latent_channels=4, **options)
    for block in blocks(model).values():
        nn.init.zeros_(block.fc2.weight)
    folding = fold(model, 0.0, X.to(dtype))
    assert len(folding.folded) == 2
    assert all(parameter.dtype == dtype for parameter in folding.model.parameters())
    if options or dtype != torch.float16:
        assert_same_outputs(folding.model, model, X.to(dtype))
    else:  # halves of the smallest float16 numbers are rounded
        torch.testing.assert_close(folding.model.eval()(X.half()), model.eval()(X.half()), rtol=0, atol=1e-4)


class Residual(nn.Module):
    """A strided unit with a projection on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.branch(x) + self.shortcut(x))


@pytest.mark.parametrize(
    ("placement", "into"),
    [
        ("conv", ["stem", "branch.0", "branch.3", "shortcut.0"]),
        ("norm", ["branch.1", "branch.4", "shortcut.1"]),
        ("residual", ["branch.4"]),
        ("identity", ["shortcut.1"]),
        ("pre", "what stem returns is read by others too"),
        ("post", "it scales what relu returns, which is no module's value"),
    ],
)
def test_placements(placement: str, into: list[str] | str) -> None:
    model = se_fx.transform(Residual(), placement=placement, min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    if isinstance(into, str):
        assert reasons(folding) == {"branch.3": into}
        assert len(blocks(folding.model)) == 1
    else:
        assert [site.into for site in folding.folded] == into
        assert not blocks(folding.model)
    assert_same_outputs(folding.model, model)


# -------------------------------------------------------------------------------------------- kinds of rewritten models
class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(F.relu(self.aux(x))) if self.training else self.b(x)


def test_both_modes_graphs_are_folded_and_what_only_training_reaches_is_kept() -> None:
    model = se_fx.transform(TwoModes(), min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert [site.name for site in folding.folded] == ["a", "b"]
    assert "no sample" in reasons(folding)["aux"]
    assert list(blocks(folding.model)) == ["squeeze_excite.of_aux"]
    assert_same_outputs(folding.model, model)


@pytest.mark.parametrize("make", [split, applied])
def test_regions_inside_and_lone_convs(make) -> None:
    model = make()
    folding = fold(model, 0.0)
    assert [site.into for site in folding.folded] == ["body.0", "body.2", "head"]
    assert not blocks(folding.model)
    assert type(folding.model).__name__ == "Split"
    assert_same_outputs(folding.model, model)
    profile = se_fx.profile_gates(model, [X], progress=False)
    first = GateProfile(tuple(site for site in profile.sites if site.name == "body.0"))
    partly = se_fx.fold_gates(model, first)
    assert reasons(partly) == dict.fromkeys(("body.2", "head"), "the profile has no gates for it")
    assert len(blocks(partly.model)) == 2
    assert_same_outputs(partly.model, model)


def test_a_real_network_partly(lite0: nn.Module) -> None:
    options = {"placement": "norm", "where": "*_depthwise_conv", "min_channels": 480, "latent_channels": 4}
    model = se_fx.transform(lite0, init="identity", **options)
    moved = [block for name, block in blocks(model).items() if "_blocks.9." in name or "_blocks.12." in name]
    for block in moved:
        nn.init.normal_(block.fc2.weight)
    x = torch.rand(2, 3, 64, 64)
    folding = fold(model, x=x)
    assert all("spread" in reason for reason in reasons(folding).values())
    assert sorted(reasons(folding)) == ["_blocks.12._depthwise_conv", "_blocks.9._depthwise_conv"]
    with torch.no_grad():
        assert torch.equal(folding.model.eval()(x), model.eval()(x))
    assert [name for name in folding.model.state_dict() if "squeeze_excite" in name] == [
        name for name in model.state_dict() if "squeeze_excite" in name and ("_blocks.9." in name or "_blocks.12." in name)
    ]


def test_detection_models() -> None:
    detector = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    model = se_fx.transform(detector.eval(), placement="norm", where="*extra*", min_channels=256, init="identity")
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    profile = se_fx.profile_gates(model, [(images,)], progress=False)
    folding = se_fx.fold_gates(model, profile, held_out=[(images,)], progress=False)
    assert folding.folded
    assert not folding.kept
    assert folding.changes.largest == 0
