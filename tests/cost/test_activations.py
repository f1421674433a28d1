"""Activations: what autograd keeps for backward, by hand and as it really is."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import se_fx
from se_fx.cost import activation_bytes


def test_activations_kept_for_training_by_hand() -> None:
    # conv keeps its input (2*3*36 floats); ReLU its output (2*8*16), which linear keeps too, flattened, without a copy.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    assert activation_bytes(model, torch.zeros(2, 3, 6, 6)) == 4 * (2 * 3 * 36 + 2 * 8 * 16)
    assert activation_bytes(model.requires_grad_(False), torch.zeros(2, 3, 6, 6)) == 0


def really_kept(model: nn.Module, x: Tensor) -> int:
    model = copy.deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        out = model(x)  # noqa: F841  keeps the graph alive
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("placement", ["conv", "residual"])
def test_activations_are_what_autograd_keeps(placement: str) -> None:
    model = torchvision.models.resnet18()
    gm = se_fx.transform(model, placement=placement, min_channels=64)
    x = torch.randn(2, 3, 64, 64)
    modes = model.training, gm.training
    report = se_fx.report(gm, x)
    assert report.activation_bytes == (really_kept(model, x), really_kept(gm, x))
    assert report.activation_bytes[0] < report.activation_bytes[1]
    assert report.activation_bytes_optimized == really_kept(se_fx.optimize_for_training(gm), x) < report.activation_bytes[1]
    assert (model.training, gm.training) == modes
    assert all(p.grad is None for p in gm.parameters())


def test_activations_are_unknown_where_training_calls_for_other_inputs() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert activation_bytes(model, ([torch.rand(3, 32, 32)],)) is None
