"""Gates that are kept, each with the reason: where they vary, or no weight can take them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from folds import X, applied, assert_same_outputs, blocks, fold, reasons, split
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import se_fx
from se_fx import GateProfile


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x))))


def test_a_conv_called_twice_is_kept() -> None:
    model = se_fx.transform(Shared(), min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert reasons(folding) == {"b": "b is called several times"}
    assert_same_outputs(folding.model, model)


class ReadsWeights(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.b(self.a(x)), self.b.weight)


def test_weights_that_the_graph_reads_are_kept() -> None:
    model = se_fx.transform(ReadsWeights(), where=["a", "b"], min_channels=1, latent_channels=2, init="identity")
    assert reasons(fold(model, 0.0)) == {"b": "weights of b are read in another way too"}


def test_tied_weights_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    net[2].bias = net[1].bias
    model = se_fx.transform(net, min_channels=1, latent_channels=2, init="identity")
    assert reasons(fold(model, 0.0)) == {"1": "1.bias is also 2.bias", "2": "1.bias is also 2.bias"}


@pytest.mark.parametrize("make", [split, applied])
def test_hooks_see_scaled_values_before_and_after(make) -> None:
    model = make()
    seen: list[Tensor] = []
    for name in ("body.0", "head"):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    expected = model.eval()(X)
    before = list(seen)
    folding = fold(model, 0.0)
    assert not reasons(folding)
    seen.clear()
    assert torch.equal(folding.model.eval()(X), expected)
    assert len(seen) == len(before) == 3
    assert all(torch.equal(one, other) for one, other in zip(seen, before, strict=True))


def test_a_block_with_hooks_is_kept(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=2, init="identity")
    blocks(model)["squeeze_excite.of_0"].register_forward_hook(lambda block, args, output: output * 3)
    assert reasons(fold(model, 0.0)) == {"0": "its block has hooks"}


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("conv", "norm", "placement", "reason"),
    [
        (parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.Identity(), "conv", "0 is parametrized"),
        (Doubled(3, 8, 1), nn.Identity(), "conv", "it scales what 0 returns, a Doubled: no plain Conv2d or norm"),
        (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), "norm", "1 has no weight of its own"),
        (nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(2), "norm", "it scales what 1 returns, a LocalResponseNorm: no plain"),
    ],
)
def test_what_takes_no_gate_is_kept(conv: nn.Module, norm: nn.Module, placement: str, reason: str) -> None:
    model = se_fx.transform(nn.Sequential(conv, norm), placement=placement, min_channels=1, latent_channels=2, init="identity")
    folding = fold(model, 0.0)
    assert reasons(folding)["0"].startswith(reason)
    assert_same_outputs(folding.model, model)


def test_every_channel_counts(cnn: nn.Module) -> None:
    """One channel in 16 whose gate spreads more than the tolerance: the mean spread is below it."""
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4)
    profile = se_fx.profile_gates(model, [X], progress=False)
    first, second = profile.sites
    spreads = torch.zeros(16, dtype=torch.float64)
    spreads[3] = 0.05
    made = GateProfile((replace(first, channel_spreads=spreads), replace(second, channel_spreads=torch.full((32,), 0.02))))
    folding = se_fx.fold_gates(model, made, 0.0201)
    assert [site.name for site in folding.folded] == ["3"]
    assert reasons(folding) == {"0": "its gates' spread over samples is up to 0.0500"}


def test_a_rare_class_counts(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    profile = se_fx.profile_gates(model, [X], progress=False)
    one = torch.ones(16, dtype=torch.float64)
    first = replace(profile.sites[0], samples=1000, class_means={0: one, 7: one - 0.3})
    folding = se_fx.fold_gates(model, GateProfile((first, *profile.sites[1:])))
    assert reasons(folding) == {"0": "a class's mean gate is up to 0.3000 off the mean"}
    within = se_fx.fold_gates(model, GateProfile((first, *profile.sites[1:])), 0.31)
    assert within.folded[0].deviation == pytest.approx(0.3)
    assert "over classes" in str(within)


def test_gates_that_are_not_finite_and_single_samples_are_kept(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    assert set(reasons(fold(model, x=X * math.nan)).values()) == {"some of its gates are not finite"}
    assert "one sample" in reasons(fold(model, x=X[:1]))["0"]


def test_blocks_of_others_are_kept(cnn: nn.Module) -> None:
    own = se_fx.transform(cnn, where="0", min_channels=1, latent_channels=4, init="identity")
    model = se_fx.transform(own, where="3", min_channels=1, block=lambda channels: nn.Hardtanh())
    folding = fold(model, 0.0)
    assert [site.name for site in folding.folded] == ["0"]
    assert reasons(folding) == {"3": "the profile has no gates for it"}
    assert_same_outputs(folding.model, model)
