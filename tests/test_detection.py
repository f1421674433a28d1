"""Detection models, which no tracer takes whole, and the networks whose code differs by mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import se_fx


def targets(count: int) -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[2.0, 3.0, 40.0, 50.0], [10.0, 10.0, 60.0, 30.0]]), "labels": torch.tensor([1, 2])}
        for _ in range(count)
    ]


def detector(name: str) -> nn.Module:
    size = {"min_size": 96, "max_size": 128} if name.startswith("fasterrcnn") else {}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **size)


DETECTORS = ["fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large"]


@pytest.mark.parametrize("name", DETECTORS)
def test_trains_a_step_and_detects_as_before(name: str) -> None:
    model = detector(name)
    rewritten = se_fx.transform(copy.deepcopy(model), min_channels=64, latent_channels=8, init="identity")
    assert isinstance(rewritten, type(model))
    images = [torch.rand(3, 64, 80), torch.rand(3, 96, 64)]
    results = []
    for each in (model, rewritten):
        optimizer = torch.optim.SGD(each.train().parameters(), lr=0.01)
        torch.manual_seed(3)
        losses = each(images, targets(2))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        with torch.no_grad():
            detections = each.eval()(images)
        results.append((losses, detections))
    (losses, _), (new_losses, detections) = results
    assert losses.keys() == new_losses.keys()
    assert all(torch.equal(new_losses[key], loss) for key, loss in losses.items())
    assert all(set(each) == {"boxes", "labels", "scores"} for each in detections)
    moved = [
        n for n, p in rewritten.named_parameters() if "squeeze_excite" in n and p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert moved
    assert set(model.state_dict()) <= set(rewritten.state_dict())


@pytest.mark.integration
@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_the_backbone_compiles_as_one_graph(name: str) -> None:
    rewritten = se_fx.transform(detector(name).eval(), min_channels=64, latent_channels=8)
    x = torch.rand(1, 3, 64, 64)
    expected = rewritten.backbone(x)
    actual = torch.compile(rewritten.backbone, fullgraph=True, backend="aot_eager")(x)
    assert actual.keys() == expected.keys()
    # aot_eager runs the same kernels, but decomposes some operators: fp32's default tolerances.
    torch.testing.assert_close(dict(actual), dict(expected))


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_modes_flip_back_and_forth(name: str, size: int) -> None:
    model = torchvision.models.get_model(name, init_weights=False, num_classes=10)
    rewritten = se_fx.transform(model, min_channels=64, latent_channels=8, init="identity")
    x = torch.randn(2, 3, size, size)
    for training in (True, False, False, True, True, False):
        results = []
        state = {key: buffer.clone() for key, buffer in model.named_buffers()}
        for each in (model.train(training), rewritten.train(training)):
            for key, buffer in model.named_buffers():
                buffer.copy_(state[key])
            torch.manual_seed(5)
            results.append(each(x))
        expected, actual = results
        assert type(actual) is type(expected)
        flat = [(expected, actual)] if isinstance(expected, Tensor) else zip(expected, actual, strict=True)
        assert all(torch.equal(a, b) for a, b in flat)
