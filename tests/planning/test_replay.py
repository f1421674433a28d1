"""Plans saved and loaded: in other processes, on other models, with other values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import se_fx
from se_fx import Plan, SqueezeExciteError

SAVE = """
import torch, se_fx
from torchvision.models import get_model
torch.manual_seed(3)
model = get_model("resnet18", weights=None)
options = {"placement": "residual", "min_channels": 1, "latent_channels": 0.25, "init": "identity"}
plan = se_fx.plan(model, **options, overrides={"layer4.*": {"bias": True}})
gm = se_fx.transform(model, plan.without("layer1.0.*")).eval()
for parameter in gm.parameters():
    parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
x = torch.randn(2, 3, 32, 32)
torch.save({"plan": se_fx.Plan.of(gm).to_dict(), "state_dict": gm.state_dict(), "x": x, "y": gm(x)}, "saved.pt")
"""
LOAD = """
import torch, se_fx
from torchvision.models import get_model
saved = torch.load("saved.pt", weights_only=True)
gm = se_fx.transform(get_model("resnet18", weights=None), se_fx.Plan.from_dict(saved["plan"])).eval()
gm.load_state_dict(saved["state_dict"])
assert torch.equal(gm(saved["x"]), saved["y"])
print("bitwise")
"""


def test_saved_in_one_process_and_rebuilt_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the se_fx under test, wherever another is installed
    monkeypatch.chdir(tmp_path)
    exec(SAVE, {})
    run = subprocess.run([sys.executable, "-c", LOAD], env=paths, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "bitwise\n"), run.stderr


def test_checkpoints_of_the_original_load_with_only_the_blocks_missing() -> None:
    model, fresh = get_model("resnet18", weights=None), get_model("resnet18", weights=None)
    gm = se_fx.transform(fresh, placement="residual", min_channels=1)
    missing, unexpected = gm.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert all("squeeze_excite" in key for key in missing)
    assert len(missing) == 8 * 3  # two layers, and what they are


@pytest.mark.parametrize(
    ("options", "other", "message"),
    [
        ({"placement": "residual"}, "resnet34", "site 'layer1.0.conv3' does not fit: ResNet has no such Conv2d"),
        ({"placement": "residual"}, "vgg11", "site 'layer1.0.conv3' does not fit: VGG has no such Conv2d"),
        ({"placement": "residual"}, "wide_resnet50_2", None),
        ({"where": "*.conv1"}, "wide_resnet50_2", "site 'layer1.0.conv1' does not fit: .* 64 channels there, the model 128"),
    ],
)
def test_a_plan_for_another_model_names_the_first_site_that_does_not_fit(options, other, message) -> None:
    plan = se_fx.plan(get_model("resnet50", weights=None), min_channels=1, **options)
    model = get_model(other, weights=None)
    if message is None:
        assert len(Plan.of(se_fx.transform(model, plan))) == 16
        return
    with pytest.raises(SqueezeExciteError, match=message):
        se_fx.transform(model, plan)


def test_a_site_whose_conv_is_elsewhere_now_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.stem, self.conv, self.residual = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), residual

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x.relu())
            return x + y if self.residual else y

    plan = se_fx.plan(Plain(True), placement="residual", min_channels=1)
    with pytest.raises(SqueezeExciteError, match=r"'conv' does not fit: .* is not the last Conv2d of a residual branch"):
        se_fx.transform(Plain(False), plan)


class Factors(nn.Module):
    """Another attention block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("options", [{"init": "identity"}, {"block": Factors}])
def test_plans_go_the_way_that_values_behind_blocks_decide(options: dict) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.wide(x) if x.sum() > 0 else self.narrow(x)

    model = Branches()
    nn.init.constant_(model.stem.weight, 0.1)
    costs = []
    for sign in (1, -1):
        x = torch.full((1, 3, 8, 8), 1e3 * sign)
        plan = se_fx.plan(model, example_inputs=x, min_channels=1, **options)
        assert plan == Plan.of(se_fx.transform(model, example_inputs=x, min_channels=1, **options))
        costs.append(plan.base.macs)
    assert costs == [3 * 8 * 64 + 8 * 8 * 9 * 36, 3 * 8 * 64 + 8 * 8 * 64]
