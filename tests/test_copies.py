"""What is done with models after they are built: copies, other modules; for all three kinds of result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import se_fx


class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(F.dropout(x.relu(), 0.5, self.training))


class Split(TwoModes):
    """Runs its own code, since that has an optional argument; its submodule is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TwoModes()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.body(x)
        if mask is not None:
            x = x * mask
        return super().forward(x)


KINDS = {
    "whole graph": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), BasicBlock(8, 8), nn.Conv2d(8, 8, 1)),
    "two modes": TwoModes,
    "split": Split,
}


def in_place(model: nn.Module) -> nn.Module:
    se_fx.apply_squeeze_excite(model, latent_channels=2, min_channels=1)
    return model


def hybrid() -> nn.Module:
    """Convolutions in front of a transformer. Its root and its patch embedding run their own code."""
    return timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, depth=1, num_classes=10)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The blocks' parameters and buffers, by key."""
    blocks = {key: value for key, value in model.state_dict().items() if "squeeze_excite" in key.split(".")}
    return {key: value for key, value in blocks.items() if not key.endswith("._extra_state")}


def rewriting(placement: str, init: str) -> Callable[[nn.Module], nn.Module]:
    options = {"placement": placement, "init": init, "latent_channels": 2, "min_channels": 1}
    return lambda model: se_fx.transform(model, **options)


WAYS = {
    f"{placement}, {init}": rewriting(placement, init) for placement in ("conv", "residual") for init in ("default", "identity")
} | {"in place": in_place}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return se_fx.transform(KINDS[request.param](), min_channels=1, latent_channels=2)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_kinds_are_what_they_are_called() -> None:
    kinds = {name: se_fx.report(se_fx.transform(make(), min_channels=1)).regions for name, make in KINDS.items()}
    assert kinds == {"whole graph": ("",), "two modes": ("",), "split": ("body",)}


def test_meta_then_to_empty(model: nn.Module) -> None:
    rebuilt = se_fx.transform(KINDS["whole graph"]().to("meta"), min_channels=1).to_empty(device="cpu")
    source = se_fx.transform(KINDS["whole graph"](), min_channels=1).eval()
    rebuilt.load_state_dict(source.state_dict())
    assert torch.equal(rebuilt.eval()(X), source(X))


def test_ema(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(X), model.eval()(X))
