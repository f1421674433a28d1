"""Rooflines: latencies from two rates of a machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import se_fx
from se_fx import Machine


def test_rooflines() -> None:
    machine = Machine(flops_per_second=1e9, bytes_per_second=1e8, device="cpu", dtype="float32")
    gm = se_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), min_channels=1, latent_channels=4)
    report = se_fx.report(gm, torch.zeros(1, 3, 6, 6))
    estimate = report.estimate(machine)
    conv_bytes, conv_flops = 4 * (108 + 216 + 128), 2 * 16 * 8 * 27
    assert estimate.base == pytest.approx(max(conv_flops / 1e9, conv_bytes / 1e8))
    assert estimate.added == pytest.approx(report.added.bytes / 1e8)  # every operator of a block is bound by memory
    assert "Estimated, not measured" in str(estimate)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"estimate.*example_inputs"):
        se_fx.report(gm).estimate(machine)
    here = se_fx.measure_machine()
    assert here.flops_per_second > 0
    assert here.bytes_per_second > 0
