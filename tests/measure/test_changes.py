"""Changes: what folding does to outputs on held-out batches, by hand."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from folds import X, blocks, fold
from torch import Tensor, nn

import se_fx


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def test_changes_on_held_out_batches() -> None:
    net = Classifier()
    model = se_fx.transform(net, min_channels=1, latent_channels=4).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    profile = se_fx.profile_gates(model, [X], progress=False)
    x, labels = torch.randn(11, 3, 8, 8) * 3, torch.randint(5, (11,))
    batches = iter([(x[:6], labels[:6]), (x[6:], labels[6:])])
    folding = se_fx.fold_gates(model, profile, 1.0, held_out=batches, progress=False)

    def by_hand(folded: set[str]) -> Tensor:
        y = x
        for layer, site in zip(("a", "b"), profile.sites, strict=True):
            conv, block = net.get_submodule(layer), blocks(model)[f"squeeze_excite.of_{layer}"]
            y = conv(y)
            y = F.relu(y * site.channel_means[:, None, None].float() if layer in folded else block(y))
        return net.head(y.mean((2, 3)))

    with torch.no_grad():
        before, after = by_hand(set()), by_hand({"a", "b"})
        alone = {name: float((by_hand({name}) - before).abs().max()) for name in ("a", "b")}
    changes = folding.changes
    largest = float((after - before).abs().max())
    assert largest > 1e-3
    assert changes.largest == pytest.approx(largest, rel=1e-3)
    assert changes.relative == pytest.approx(largest / float(before.std(correction=0)), rel=1e-3)
    assert changes.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).float().mean()))
    assert changes.accuracy == pytest.approx([float((y.argmax(1) == labels).float().mean()) for y in (before, after)])
    assert changes.alone == pytest.approx(alone, rel=1e-3)
    data = json.loads(json.dumps(folding.to_dict()))
    assert data["changes"]["accuracy"] == list(changes.accuracy)
    assert [site["saved"]["params"] for site in data["folded"]] == [128, 128]
    assert "moves outputs by" in str(folding)
    assert "top-1 accuracy" in str(folding)


def test_changes_of_other_outputs(cnn: nn.Module) -> None:
    class TwoOutputs(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = super().forward(x)
            return {"map": y, "mean": y.mean((2, 3))}

    model = se_fx.transform(TwoOutputs(*cnn), min_channels=1, latent_channels=4, init="identity")
    changes = fold(model, held_out=[{"x": X}]).changes
    assert (changes.largest, changes.relative, changes.agreement, changes.accuracy) == (0.0, 0.0, None, None)
