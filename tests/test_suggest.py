"""`suggest`: options by the method's own rules, and by what was measured."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import get_model

import se_fx


def test_suggestions_follow_the_method_card() -> None:
    large = se_fx.suggest(get_model("resnet50", weights=None), torch.zeros(1, 3, 64, 64))
    assert large.options == {"placement": "residual", "min_channels": 512, "latent_channels": 64}
    assert "as in the paper" in str(large)
    assert "block='eca'" in str(large)
    assert "by='score'" in str(large)
    assert "ImageNet-scale" in str(large)
    assert "bytes on these inputs" in str(large)
    assert len(large.plan) == len(se_fx.plan(get_model("resnet50", weights=None), **large.options)) > 0
    features = get_model("mobilenet_v3_small", weights=None).features[:9]
    small = se_fx.suggest(features)
    assert "placement" not in small.options  # its residual branches end in narrow layers
    widest = max(module.out_channels for module in features.modules() if isinstance(module, nn.Conv2d))
    assert small.options["min_channels"] == widest
    assert "attention" in str(small)
