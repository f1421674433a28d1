"""Networks of other packages: bitwise identity in both modes, transformed and in place; optimised, close. `-m zoo`."""

from __future__ import annotations

import pytest
import strangers
import torch
import zoo

#: A package that isn't installed is skipped: `pip install -e '.[strangers]'`.
CHOSEN = (
    *("monai/BasicUNet", "monai/FlexibleUNet", "kornia/DISK", "pytorchcv/airnet50_1x64d_r2", "pytorchcv/shufflenetv2_wd2"),
    *("vit_pytorch/MobileViT", "transformers/MobileNetV2ForImageClassification", "transformers/Swin2SRForImageSuperResolution"),
    *("diffusers/UNet2DModel", "diffusers/AutoencoderKL"),
)


@pytest.mark.zoo
@pytest.mark.parametrize("name", CHOSEN)
@torch.no_grad()
def test_strangers(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    row = zoo.check_stranger(name, strangers.strangers_attempts, (False, True))
    assert row is not None
    assert (row.result, row.sites > 0, row.close) == ("equal", True, True), row
