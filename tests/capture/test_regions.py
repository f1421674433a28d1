"""Regions: graphs inside code that is none, of the modules' own classes, and the convs that such code calls alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from two_convs import Model, X, assert_same, rewritten

import se_fx


def test_a_region_inside_untraceable_code_is_a_graph_of_the_modules_own_class() -> None:
    class Backbone(Model):
        out_channels = 8

        def describe(self) -> str:
            return f"{type(self).__name__} of {self.out_channels}"

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [self.backbone(image[None]) for image in images]

    model = Detector()
    result = rewritten(model)
    assert se_fx.report(result).regions == ("backbone",)
    assert isinstance(result.backbone, type(model.backbone))
    assert result.backbone.describe() == "Backbone of 8"
    assert "backbone.squeeze_excite.of_first.fc1.weight" in result.state_dict()
    for each in (result, copy.deepcopy(result)):
        assert all(map(torch.equal, each([X[0], X[1]]), model([X[0], X[1]])))
    assert torch.equal(torch.compile(result.backbone, fullgraph=True, backend="eager")(X), model.backbone(X))


def test_a_sequential_may_be_iterated_by_its_owner() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1)))
            self.pieces = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(8, 8, 1)])})

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            for layer in self.body:
                x = layer(x)
            return self.pieces["a"][0](x)

    model = Owner()
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    for name in ("body.squeeze_excite.of_0", "body.2.squeeze_excite.of_0", "squeeze_excite.of_pieces_a_0"):
        assert f"{name}.fc1.weight" in result.state_dict()
    blocks = [se_fx.blocks_of(result)[name] for name in ("body.0", "body.2.0", "pieces.a.0")]
    calls: list[nn.Module] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: calls.append(module))
    result(X)
    assert calls == blocks


def test_submodules_whose_methods_are_called_are_not_captured_whole() -> None:
    class Wrapped(Model):
        def features(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Wrapped()

        def forward(self, x: Tensor) -> Tensor:
            x = self.net.features(x)
            return x if x.sum() > 0 else -x

    result = rewritten(Owner())
    assert {"net.squeeze_excite.of_first.fc1.weight", "net.squeeze_excite.of_second.fc1.weight"} <= result.state_dict().keys()


def test_a_conv_called_twice_by_the_root_of_a_region_scales_both_times() -> None:
    """The second value is what the region returns, the first isn't; one seat serves both."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Twice()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x + 1 if x.sum() > 0 else x)

    model, x = Asks().eval(), torch.randn(2, 4, 5, 5)
    rewritten = se_fx.transform(model, min_channels=1, latent_channels=2)
    (block,) = se_fx.blocks_of(rewritten).values()
    conv = model.part.conv
    with torch.no_grad():
        inner = x + 1 if x.sum() > 0 else x
        assert torch.equal(rewritten(x), block(conv(block(conv(inner)))))
        assert not torch.equal(rewritten(x), model(x))


def test_a_conv_called_from_two_regions_has_one_block_applied_once_a_call() -> None:
    class Half(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, Half(shared))
    result = se_fx.transform(model, min_channels=1, latent_channels=2)
    assert [key for key in result.state_dict() if "squeeze" in key and not key.startswith("1.")] == [
        "squeeze_excite.of_0._extra_state", "squeeze_excite.of_0.fc1.weight", "squeeze_excite.of_0.fc2.weight",
    ]  # fmt: skip
    block = result.get_submodule("squeeze_excite.of_0")
    x = block(shared(X))
    x = block(shared(x if x.sum() > 0 else -x))
    assert torch.equal(result(X), x)


def test_a_hooked_block_shared_by_two_regions() -> None:
    class Uses(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.conv = block, nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.block(x))

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
            block.register_forward_hook(lambda module, args, output: output * 2)
            self.a, self.z = Uses(block), Uses(block)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.a(x)) if float(x.sum()) > -1e9 else x

    model = Owner()
    assert_same(model, rewritten(model, 3), X)
