"""docs/recipes.md with the packages that it is about: Transformers, segmentation_models_pytorch, peft, Ultralytics, torchinfo.

Each needs its package (`pip install -e '.[recipes]'`) and is skipped without. Nothing is downloaded: weights are random.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import se_fx

pytestmark = pytest.mark.integration
OPTIONS: dict[str, Any] = {"latent_channels": 1 / 4, "min_channels": 1, "placement": "residual", "init": "identity"}
EXAMPLES = Path(__file__).parents[2] / "examples"


def trained_a_little(model: nn.Module) -> None:
    """Blocks that do something."""
    for block in se_fx.blocks_of(model).values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, 0, 0.5)


# ----------------------------------------------------------------------------------------------------------- Hugging Face
def test_transformers(tmp_path: Path) -> None:
    """Blocks into a pretrained model, the Trainer, and back through a subclass that has them from the start."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "pretrained")

    model = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "pretrained")
    original, x = copy.deepcopy(model).eval(), torch.randn(2, 3, 32, 32)
    se_fx.apply_squeeze_excite(model, **OPTIONS)
    assert torch.equal(model.eval()(x).logits, original(x).logits)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(8)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "learning_rate": 0.1}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "runs"), **settings)
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    model.save_pretrained(tmp_path / "trained")

    class SEResNetForImageClassification(transformers.ResNetForImageClassification):  # type: ignore[name-defined,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            se_fx.apply_squeeze_excite(self, **OPTIONS)

    again = SEResNetForImageClassification.from_pretrained(tmp_path / "trained")
    assert len(se_fx.blocks_of(again)) == len(se_fx.blocks_of(model)) == 2
    with torch.no_grad():
        found, expected = again.eval()(x).logits, model.eval()(x).logits
        assert torch.equal(found, expected)
        with se_fx.bypassed(again):
            assert not torch.equal(again(x).logits, found)  # they have learnt


# ------------------------------------------------------------------------------------------- segmentation_models_pytorch
@pytest.mark.parametrize("way", ["in place", "transform"])
def test_segmentation_models(way: str) -> None:
    """Encoder and decoder called apart are the whole, blocks included; blocks in the decoder alone."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None).eval()
    options = OPTIONS | {"placement": "activation", "where": "decoder.*", "latent_channels": 4}
    if way == "in place":
        se_fx.apply_squeeze_excite(model, **options)
    else:
        model = se_fx.transform(model, **options)
    assert se_fx.blocks_of(model)
    assert all(path.startswith("decoder.") for path in se_fx.blocks_of(model))
    trained_a_little(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model.segmentation_head(model.decoder(model.encoder(x))), whole)
        with se_fx.bypassed(model):
            assert not torch.equal(model(x), whole)


# --------------------------------------------------------------------------------------------------------------------- peft
def test_peft() -> None:
    """`target_modules=["conv1"]` finds convolutions and no block; merged, outputs are the same."""
    peft = pytest.importorskip("peft")
    model = timm.create_model("resnet18", num_classes=4).eval()
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": "conv"})
    trained_a_little(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv1"], init_lora_weights=False)).eval()
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.layer.LoraLayer)]
    assert len(wrapped) == 9
    assert all(name.endswith("conv1") for name in wrapped)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = adapted(x)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)  # a sum of kernels for a sum of outputs
        assert len(se_fx.blocks_of(merged)) == 20


# ---------------------------------------------------------------------------------------------------- what counts and prunes
@pytest.mark.parametrize("placement", ["conv", "norm", "activation", "residual"])
def test_torchinfo_counts_convolutions_too(placement: str) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    model, x = timm.create_model("resnet18"), torch.zeros(1, 3, 64, 64)
    without = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0).total_mult_adds
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": placement, "latent_channels": 4})
    added = torchinfo.summary(model, input_data=x, verbose=0).total_mult_adds - without
    assert 0 < added < 0.01 * without


@pytest.mark.parametrize("placement", ["norm", "residual"])
def test_torch_pruning(placement: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    model, x = timm.create_model("resnet18", num_classes=4).eval(), torch.randn(1, 3, 64, 64)
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": placement, "latent_channels": 4})
    before = sum(parameter.numel() for parameter in model.parameters())
    importance = pruning.importance.MagnitudeImportance()
    pruning.pruner.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.5 * before
    assert model(x).shape == (1, 4)
    assert all(
        block(torch.randn(1, block.fc2.out_features, 4, 4)).isfinite().all() for block in se_fx.blocks_of(model).values()
    )


# --------------------------------------------------------------------------------------------------------------------- YOLO
def test_yolo(tmp_path: Path) -> None:
    """Trained, validated unfused and fused, exported to ONNX and run, trained further in a new process; "conv" is refused."""
    pytest.importorskip("ultralytics")
    run = [sys.executable, "-W", "ignore", str(EXAMPLES / "yolo.py"), "--quick", "--ways", "in-place", "transform"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("yolov8n ")][-2:]
    for _, _, _, blocks, before, fused, off, exported in rows:
        assert (int(blocks), before) == (57, fused)
        assert float(off) < 1e-5
        assert float(exported) < 1e-4
    assert "trained further in a new process: 57 blocks" in done.stdout
    assert 'Use placement="activation" or "residual"' in done.stdout


@pytest.mark.parametrize("placement", ["activation", "residual", "conv", "norm"])
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov9t"])
def test_yolos_fused(name: str, placement: str) -> None:
    """With norms that do something: raw outputs before and after `fuse()`, or an error that names the way out."""
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", verbose=False).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": placement, "min_channels": 16})
    trained_a_little(model)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)[0].clone()
        fused = model.fuse(verbose=False)
        if placement in ("conv", "norm"):
            with pytest.raises(se_fx.SqueezeExciteError, match='placement="activation"'):
                fused(x)
            return
        assert float((fused(x)[0] - before).abs().max()) <= 1e-5 * float(before.abs().max())
