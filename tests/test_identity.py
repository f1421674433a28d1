"""Identity: blocks that change nothing, bit by bit, until they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from test_transform import inserted
from torch import fx, nn

import se_fx


def assert_equal_outputs(model: nn.Module, gm: nn.Module, x: torch.Tensor) -> None:
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    torch.manual_seed(1)
    expected = model(x)
    after = {key: buffer.clone() for key, buffer in model.named_buffers()}
    for key, buffer in model.named_buffers():
        buffer.copy_(buffers[key])  # shared with the rewritten model
    torch.manual_seed(1)
    assert torch.equal(gm(x), expected)
    assert all(torch.equal(buffer, after[key]) for key, buffer in gm.named_buffers() if key in after)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121", "vgg11_bn"])
@pytest.mark.parametrize("training", [False, True])
def test_identity_is_bitwise(name: str, training: bool) -> None:
    model = torchvision.models.get_model(name, num_classes=10).train(training)
    gm = se_fx.transform(model, min_channels=64, latent_channels=8, init="identity")
    assert len(inserted(gm)) > 4
    assert_equal_outputs(model, gm, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("training", [False, True])
def test_identity_is_bitwise_on_a_pretrained_network(lite0: nn.Module, training: bool) -> None:
    model = copy.deepcopy(lite0).train(training)
    gm = se_fx.transform(model, init="identity")
    assert isinstance(gm, fx.GraphModule)
    assert_equal_outputs(model, gm, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_identity_in_other_dtypes_and_layouts(cnn: nn.Sequential, dtype: torch.dtype, layout: torch.memory_format) -> None:
    cnn.eval().to(dtype=dtype, memory_format=layout)
    gm = se_fx.transform(cnn, min_channels=1, init="identity")
    x = torch.randn(2, 3, 9, 9, dtype=dtype).to(memory_format=layout)
    assert torch.equal(gm(x), cnn(x))
    assert gm(x).stride() == cnn(x).stride()


def test_identity_under_autocast(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn.eval(), min_channels=1, init="identity")
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gm(x), cnn(x))
        assert gm(x).dtype == cnn(x).dtype


def test_other_batch_and_image_sizes_after_tracing(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn.eval(), min_channels=1, init="identity")
    for shape in ((1, 3, 5, 9), (7, 3, 16, 16), (0, 3, 8, 8)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), cnn(x))


def test_default_blocks_change_outputs(cnn: nn.Sequential) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(se_fx.transform(cnn.eval(), min_channels=1)(x), cnn(x))
