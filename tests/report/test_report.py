"""Reports: what they say, and that they say it of what really is."""

from __future__ import annotations

import json

import torch
import torchvision
from torch import Tensor, nn

import se_fx

X = torch.zeros(1, 3, 8, 8)


def test_one_row_a_site_with_its_numbers(cnn: nn.Sequential) -> None:
    report = se_fx.report(se_fx.transform(cnn, min_channels=1, latent_channels=4), X)
    assert [(s.name, s.channels, s.latent_channels, s.spatial) for s in report.sites] == [
        ("0", 16, 4, (8, 8)),
        ("3", 32, 4, (8, 8)),
    ]
    assert [(s.cost.params, s.cost.macs) for s in report.sites] == [(2 * 16 * 4, 2 * 16 * 4), (2 * 32 * 4, 2 * 32 * 4)]
    assert report.added.params == 128 + 256
    assert report.added.macs == 128 + 256
    base_macs = 64 * (27 * 16 + 16 * 32)
    assert report.base.macs == base_macs
    text = str(report)
    assert "Sequential: 2 Squeeze-and-Excitation blocks inserted." in text
    assert f"{100 * 256 / base_macs:.3f} %" in text
    assert f"{100 * 384 / base_macs:.3f} %" in text


def test_without_inputs_parameters_alone_and_how_to_get_the_rest(cnn: nn.Sequential) -> None:
    report = se_fx.report(se_fx.transform(cnn, min_channels=1))
    assert report.sites[0].spatial is None
    assert not report.measured
    assert "Pass example_inputs" in str(report)
    assert "MACs" not in str(report).replace("to see MACs", "")


def test_skipped_convs_have_reasons() -> None:
    model = torchvision.models.mobilenet_v3_small()
    report = se_fx.report(se_fx.transform(model, min_channels=64, where="!features.1.*"))
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {s.name for s in report.sites} | {s.name for s in report.skipped} == convs
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons["features.0.0"] == "16 output channels < min_channels=64"
    assert reasons["features.12.0" if "features.12.0" in reasons else "features.4.block.2.fc1"] == "computes an attention gate"


def test_a_conv_that_is_never_called_is_said_to_be() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    gm = se_fx.transform(Unused(), min_channels=1)
    (skip,) = se_fx.report(gm).skipped
    assert (skip.name, skip.reason) == ("unused", "is never called by the code that was captured")
    assert "unused.weight" in gm.state_dict()


def test_sites_the_inputs_do_not_reach_are_named() -> None:
    model = torchvision.models.googlenet(init_weights=False)
    report = se_fx.report(se_fx.transform(model, min_channels=128), torch.zeros(1, 3, 64, 64))
    assert "Not reached by the example inputs in eval mode: aux1.conv.conv, aux2.conv.conv." in str(report)


def test_untraceable_parts_are_named_with_the_reason() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    report = se_fx.report(se_fx.transform(nn.Sequential(Branches()), min_channels=1))
    assert report.regions == ("",)
    assert [name for name, _ in report.opaque] == ["0"]
    assert report.alone == ("0.conv",)
    assert "Convs that such code calls, captured alone: 0.conv." in str(report)
    assert "These run their own code" in str(report)
    assert "branches on a value" in str(report)


def test_to_dict_is_json(cnn: nn.Sequential) -> None:
    data = json.loads(json.dumps(se_fx.report(se_fx.transform(cnn, min_channels=1), X).to_dict()))
    assert data["sites"][0]["name"] == "0"
    assert data["base"]["macs"] == 64 * (27 * 16 + 16 * 32)


def test_a_report_of_a_detector_is_complete() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    report = se_fx.report(se_fx.transform(model, min_channels=400), ([torch.rand(3, 64, 64)],))
    assert all(site.spatial for site in report.sites)
    assert report.base.macs > 10**8


def test_conv_work_is_told_apart_from_all_else() -> None:
    report = se_fx.report(se_fx.transform(torchvision.models.resnet18(), min_channels=512), torch.zeros(1, 3, 64, 64))
    rows = {line[:24].strip(): line[24:].split() for line in str(report).splitlines() if line.startswith(("FLOPs", "- of"))}
    base = {name: int(cells[0].replace(",", "")) for name, cells in rows.items() if name != "FLOPs per byte"}
    assert base["FLOPs"] == base["- of MACs, two each"] + base["- of all else"] == report.base.flops
    assert base["- of MACs, two each"] == 2 * report.base.macs
