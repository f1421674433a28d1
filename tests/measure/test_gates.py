"""Profiles of gates, against gates computed one sample at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import se_fx


def rewritten(cnn: nn.Module, **options) -> nn.Module:
    return se_fx.transform(cnn, min_channels=1, latent_channels=4, **options)


def gates_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each site's gates, (N, C), by calling the layers before it by hand."""
    first = model.get_submodule("squeeze_excite.of_0")
    second = model.get_submodule("squeeze_excite.of_3")
    plain = se_fx.remove(model)
    y = plain[0](x)
    gates = {"0": first.excitation(y)[..., 0, 0]}
    y = plain[3](torch.relu(plain[1](first(y))))
    return gates | {"3": second.excitation(y)[..., 0, 0]}


def test_means_and_spreads_by_hand(cnn: nn.Module) -> None:
    model = rewritten(cnn).eval()
    batches = [torch.randn(3, 3, 8, 8), torch.randn(5, 3, 6, 6)]
    profile = se_fx.profile_gates(model, batches, progress=False)
    parts = [gates_of(model, batch) for batch in batches]
    for site in profile.sites:
        gates = torch.cat([part[site.name] for part in parts]).double()
        assert site.samples == 8
        # Sums in float64 of float32 gates, by another formula.
        torch.testing.assert_close(site.channel_means, gates.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(site.channel_spreads, gates.std(0, correction=0), rtol=1e-4, atol=1e-6)
        assert site.mean == pytest.approx(gates.mean().item(), rel=1e-6)
        assert site.spread_over_channels == pytest.approx(gates.mean(0).std(correction=0).item(), rel=1e-4)
        assert site.spread_over_classes is None
    assert [site.name for site in profile.sites] == ["0", "3"]


def test_classes(cnn: nn.Module) -> None:
    model = rewritten(cnn).eval()
    x, labels = torch.randn(6, 3, 8, 8), torch.tensor([2, 0, 2, 2, 0, 7])
    profile = se_fx.profile_gates(model, [(x[:4], labels[:4]), [x[4:], labels[4:]]], progress=False)
    for site in profile.sites:
        gates = gates_of(model, x)[site.name].double()
        assert list(site.class_means) == [0, 2, 7]
        for label, means in site.class_means.items():
            torch.testing.assert_close(means, gates[labels == label].mean(0), rtol=1e-6, atol=1e-7)
        assert site.spread_over_classes > 0
    assert "over classes" in str(profile)


def test_identity_gates_are_constant(cnn: nn.Module) -> None:
    profile = se_fx.profile_gates(rewritten(cnn, init="identity"), [torch.randn(4, 3, 8, 8)], progress=False)
    assert all((site.mean, site.spread_over_samples, site.spread_over_channels) == (1.0, 0.0, 0.0) for site in profile.sites)


def test_the_model_is_left_as_it_was(cnn: nn.Module) -> None:
    model = rewritten(cnn).train()
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    se_fx.profile_gates(model, [{"input": torch.randn(2, 3, 8, 8)}], progress=False)
    with pytest.raises(se_fx.SqueezeExciteError):
        se_fx.profile_gates(model, [torch.randn(2, 4, 8, 8)], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_shared_modules_and_lone_convs_and_half_precision() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)) if x.sum() > 1e9 else self.conv(self.conv(self.conv(x)))

    model = se_fx.transform(Loop().bfloat16(), min_channels=1, latent_channels=2)
    (site,) = se_fx.profile_gates(model, iter([torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)]), progress=False).sites
    assert site.samples == 3 * 2
    assert site.channel_means.dtype == torch.float64


def test_sites_that_are_never_reached_have_no_samples() -> None:
    gm = se_fx.transform(torchvision.models.googlenet(init_weights=False), min_channels=1000)
    model = se_fx.transform(gm, where="aux1*", min_channels=1)
    profile = se_fx.profile_gates(model, [torch.randn(1, 3, 64, 64)], progress=False)
    samples = {site.name: site.samples for site in profile.sites}
    assert samples["aux1.conv.conv"] == 0
    assert "-" in str(profile)


def test_json_and_plot(cnn: nn.Module, tmp_path: Path) -> None:
    profile = se_fx.profile_gates(rewritten(cnn), [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))], progress=False)
    data = json.loads(json.dumps(profile.to_dict()))
    assert [len(site["class_means"]["1"]) for site in data["sites"]] == [16, 32]
    profile.plot(tmp_path / "gates.svg")
    drawn = (tmp_path / "gates.svg").read_text("utf-8")
    assert drawn.count("<svg") == 1
