"""Criteria: which convs get no block, and why; those of the caller's own too."""

from __future__ import annotations

import json
import math

import pytest
import torchvision
from torch import nn

import se_fx
from se_fx.cli import main
from se_fx.criteria import CRITERIA, Candidate, Criterion, least_channels


@pytest.fixture
def max_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option of the caller's own."""
    criterion = Criterion(
        default=math.inf,
        expected="the largest kernel a Conv2d may have, a number >= 1",
        accepts=lambda value: isinstance(value, (int, float)) and value >= 1,
        excludes=lambda most, candidates: {
            name: f"kernel > max_kernel={most}" for name, each in candidates.items() if max(each.conv.kernel_size) > most
        },
        argument={"type": int, "help": "largest kernel"},
    )
    monkeypatch.setitem(CRITERIA, "max_kernel", criterion)


@pytest.mark.usefixtures("max_kernel")
def test_a_criterion_of_the_callers_own_is_an_option_like_any(capsys: pytest.CaptureFixture[str]) -> None:
    model = torchvision.models.resnet18()
    plan = se_fx.plan(model, min_channels=512, max_kernel=1)
    assert [site.name for site in plan.sites] == ["layer4.0.downsample.0"]
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert reasons["layer4.1.conv2"] == "kernel > max_kernel=1"
    assert reasons["conv1"] == "64 output channels < min_channels=512"  # the first of those that leave it out
    assert [site.name for site in se_fx.Plan.of(se_fx.transform(model, min_channels=512, max_kernel=1)).sites] == [
        "layer4.0.downsample.0"
    ]
    assert len(se_fx.plan(model, min_channels=512)) == 5  # its default leaves nothing out

    assert main(["plan", "resnet18", "--min-channels", "512", "--max-kernel", "1", "--json"]) == 0
    assert [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]] == ["layer4.0.downsample.0"]


@pytest.mark.usefixtures("max_kernel")
def test_errors_know_a_criterion_of_the_callers_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1))
    with pytest.raises(se_fx.SqueezeExciteError, match=r"^max_kernel=0: expected the largest kernel a Conv2d may have"):
        se_fx.transform(net, max_kernel=0)
    with pytest.raises(se_fx.SqueezeExciteError, match="max_kernl: there is no such option; did you mean 'max_kernel'"):
        se_fx.transform(net, max_kernl=1)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"^max_kernel: a plan fixes all options already"):
        se_fx.transform(net, se_fx.plan(net), max_kernel=1)


def test_auto_is_512_or_the_largest_count() -> None:
    assert least_channels("auto", [64, 2048]) == 512
    assert least_channels("auto", [64, 320]) == 320
    assert least_channels(7, [64]) == 7


def test_channels_are_those_that_a_block_would_scale() -> None:
    """Before a branch, that is not the conv's output."""
    candidates = {"a": Candidate(nn.Conv2d(3, 64, 1), 16), "b": Candidate(nn.Conv2d(3, 8, 1), 8)}
    excludes = CRITERIA["min_channels"].excludes
    assert excludes(32, candidates) == {"a": "16 channels < min_channels=32", "b": "8 output channels < min_channels=32"}
    assert excludes(16, candidates).keys() == {"b"}
