"""Two reports that several tests read, and names that pages show."""

from __future__ import annotations

import functools

import torch
import torchvision

import se_fx
from se_fx import Report

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
HOSTILE = "<script>alert(1)</script>"


@functools.cache
def resnet50() -> Report:
    gm = se_fx.transform(
        torchvision.models.resnet50(weights=None), placement="residual", min_channels=1, latent_channels=1 / 16
    )
    return se_fx.report(gm, example_inputs=torch.zeros(1, 3, 224, 224))


@functools.cache
def faster_rcnn() -> Report:
    factory = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    gm = se_fx.transform(factory(weights=None, weights_backbone=None), min_channels=64)
    return se_fx.report(gm, example_inputs=([torch.rand(3, 64, 80)],))
