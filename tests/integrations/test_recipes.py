"""The pages for models of other libraries, with these: Transformers, segmentation_models_pytorch, peft, Ultralytics, torchinfo.

The pages' own code runs, with names of downloads replaced by those of small random models. Each test needs its package
(`pip install -e '.[recipes]'`) and is skipped without.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pages import code_of
from torch import nn

import se_fx

pytestmark = pytest.mark.integration
OPTIONS: dict[str, Any] = {"latent_channels": 1 / 4, "min_channels": 1, "placement": "residual", "init": "identity"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where Ultralytics keeps its settings and runs, too; nothing is downloaded."""
    environment = {
        "YOLO_CONFIG_DIR": str(tmp_path),
        "YOLO_OFFLINE": "true",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained_a_little(model: nn.Module) -> None:
    """Blocks that do something."""
    for block in se_fx.blocks_of(model).values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, 0, 0.5)


def resnet10(**options: Any) -> nn.Module:
    """ResNet-18 with one unit in each stage: 12 convolutions."""
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), **options)


# ----------------------------------------------------------------------------------------------------------- Hugging Face
def test_transformers(elsewhere: Path) -> None:
    """Blocks into a pretrained model, the Trainer, and back through a subclass that has them from the start."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
    )
    original = transformers.ResNetForImageClassification(config).eval()
    original.save_pretrained("pretrained")
    x = torch.randn(2, 3, 32, 32)
    before: list[torch.Tensor] = []

    def train(model: Any) -> None:
        before.append(model.eval()(x).logits)
        data = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(8)]
        settings = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "learning_rate": 0.1}
        arguments = transformers.TrainingArguments(output_dir="runs", **settings)
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        names["trained"] = model

    names: dict[str, Any] = {"train": train}
    replaced = {"microsoft/resnet-18": "pretrained", "...  # Trainer(model=model, ...).train()": "train(model)"}
    exec(code_of("huggingface.md", replaced), names)
    assert torch.equal(before[0], original(x).logits)
    trained, again = names["trained"].eval(), names["model"].eval()
    assert type(again) is not type(trained)
    assert len(se_fx.blocks_of(again)) == len(se_fx.blocks_of(trained)) == 2
    with torch.no_grad():
        found, expected = again(x).logits, trained(x).logits
        assert torch.equal(found, expected)
        with se_fx.bypassed(again):
            assert not torch.equal(again(x).logits, found)  # they have learnt


# ------------------------------------------------------------------------------------------- segmentation_models_pytorch
@pytest.mark.parametrize("way", ["in place", "transform"])
def test_segmentation_models(way: str) -> None:
    """Encoder and decoder called apart are the whole, blocks included; blocks in the decoder alone."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    names: dict[str, Any] = {"se_fx": se_fx}
    exec(code_of("unet.md", {'encoder_weights="imagenet"': "encoder_weights=None"}), names)
    model = names["model"].eval()
    if way == "transform":
        options: dict[str, Any] = {"latent_channels": 16, "min_channels": 64, "placement": "activation", "where": "decoder.*"}
        model = se_fx.transform(smp.Unet("resnet18", encoder_weights=None).eval(), **options, init="identity")
        assert model.load_state_dict(names["model"].state_dict())
    assert se_fx.blocks_of(model)
    assert all(path.startswith("decoder.") for path in se_fx.blocks_of(model))
    trained_a_little(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model.segmentation_head(model.decoder(model.encoder(x))), whole)
        with se_fx.bypassed(model):
            assert not torch.equal(model(x), whole)


# --------------------------------------------------------------------------------------------------------------------- peft
def test_peft() -> None:
    """`target_modules=["conv1"]` finds convolutions and no block; merged, outputs are the same."""
    peft = pytest.importorskip("peft")
    model = resnet10(num_classes=4).eval()
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": "conv"})
    trained_a_little(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model_before = model(x)
    names: dict[str, Any] = {"model": model}
    exec(code_of("huggingface.md", {}, 1), names)
    adapted = names["adapted"].eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start
            nn.init.normal_(parameter, 0, 0.1)
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.layer.LoraLayer)]
    assert len(wrapped) == 5
    assert all(name.endswith("conv1") for name in wrapped)
    with torch.no_grad():
        expected = adapted(x)
        assert not torch.allclose(adapted.get_base_model()(x), model_before, rtol=1e-3, atol=1e-3)  # they do something
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)  # a sum of kernels for a sum of outputs
        assert len(se_fx.blocks_of(merged)) == 12


# ---------------------------------------------------------------------------------------------------- what counts and prunes
@pytest.mark.parametrize("placement", ["conv", "norm", "activation", "residual"])
def test_torchinfo_counts_convolutions_too(placement: str) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    model, x = resnet10(), torch.zeros(1, 3, 32, 32)
    without = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0).total_mult_adds
    se_fx.apply_squeeze_excite(model, **OPTIONS | {"placement": placement, "latent_channels": 4})
    added = torchinfo.summary(model, input_data=x, verbose=0).total_mult_adds - without
    assert 0 < added < 0.01 * without


def pruned(model: Any, x: torch.Tensor) -> None:
    pruning = pytest.importorskip("torch_pruning")
    importance = pruning.importance.MagnitudeImportance()
    pruning.pruner.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()


@pytest.mark.parametrize("insert", [se_fx.apply_squeeze_excite, se_fx.transform])
@pytest.mark.parametrize("placement", ["norm", "activation", "residual"])
def test_torch_pruning(placement: str, insert: Any) -> None:
    """Blocks lose the channels that their convolutions lose."""
    model, x = resnet10(num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    model = insert(model, **OPTIONS | {"placement": placement, "latent_channels": 4}) or model
    before = sum(parameter.numel() for parameter in model.parameters())
    pruned(model, x)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.5 * before
    assert model(x).shape == (1, 4)
    assert all(
        block(torch.randn(1, block.fc2.out_features, 4, 4)).isfinite().all() for block in se_fx.blocks_of(model).values()
    )


def test_torch_pruning_of_scaled_convolutions() -> None:
    """It takes the product for the convolution, and fails, never silently; blocks can go in afterwards."""
    model, x = resnet10(num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    options = OPTIONS | {"placement": "conv", "latent_channels": 4}
    scaled = se_fx.transform(model, **options)
    with pytest.raises(IndexError):
        pruned(scaled, x)
    pruned(model, x)
    expected = model(x)
    se_fx.apply_squeeze_excite(model, **options)
    assert torch.equal(model(x), expected)
    assert len(se_fx.blocks_of(model)) == 12


# --------------------------------------------------------------------------------------------------------------------- YOLO
def run(command: list[str | Path]) -> str:
    # Ultralytics puts what it writes elsewhere where it believes that its own tests run.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_pages_yolo(elsewhere: Path) -> None:
    """Training in one process, validation and export in another, which knows nothing of the trainer."""
    pytest.importorskip("ultralytics")
    (elsewhere / "before.py").write_text(
        "import pathlib, ultralytics, yolo\n"
        "yolo.draw(pathlib.Path(), 64, 4)\n"
        "ultralytics.settings.update(runs_dir='runs')\n"  # else in the repository it is installed in
    )
    data = str(elsewhere / "data.yaml")
    settings = 'epochs=1, imgsz=64, device="cpu", workers=0, amp=False, plots=False'
    replaced = {
        'train(data="coco8.yaml", epochs=3': f"train(data={data!r}, {settings}",
        'val(data="coco8.yaml")': f"val(data={data!r})",
    }
    training, validation = code_of("yolo.md", replaced).rsplit("\n", 2)[:2]
    (elsewhere / "training.py").write_text(f"import before\n{training}\n")
    weights = "runs/detect/train/weights/last.pt"
    told = (
        f"import pathlib, yolo\noff = yolo.exported_apart(pathlib.Path({weights!r}), pathlib.Path({data!r}), 64)\n"
        f"print(len(se_fx.blocks_of(YOLO({weights!r}).model)), off)\n"
    )
    (elsewhere / "validation.py").write_text(f"import se_fx\nfrom ultralytics import YOLO\n{validation}\n{told}")
    run(["training.py"])
    blocks, off = run(["validation.py"]).split()[-2:]
    assert blocks == "57"
    assert float(off) < 1e-3


def test_yolo(elsewhere: Path) -> None:
    """Trained, validated unfused and fused, exported to ONNX and run, trained further in a new process; "conv" is refused.

    By `transform`; the page's, before, is in place.
    """
    pytest.importorskip("ultralytics")
    printed = run([ROOT / "examples/yolo.py", "--quick", "--ways", "transform"])
    *_, row = (line.split() for line in printed.splitlines() if line.startswith("yolov8n "))
    _, way, _, blocks, before, fused, without, off, exported = row
    assert way == "transform"
    assert int(blocks) == 57
    assert float(before) > 0.1
    assert abs(float(before) - float(fused)) <= 0.005
    assert without != fused  # the blocks do something
    assert float(off) < 1e-4
    assert float(exported) < 1e-3
    assert "trained further in a new process: 57 blocks" in printed
    assert 'Use placement="activation" or "residual"' in printed


@functools.cache
def detector(name: str) -> nn.Module:
    """One of Ultralytics', with norms that do something."""
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", verbose=False).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


OUTSIDE, INSIDE = ("activation", "residual"), ("conv", "norm")
FUSED = [(name, placement) for name in ("yolov8n", "yolo11n", "yolo26n", "yolov9t") for placement in OUTSIDE]
REFUSED = [("yolov8n", "conv"), ("yolov8n", "norm"), ("yolov9t", "conv")]


@pytest.mark.parametrize("insert", [se_fx.apply_squeeze_excite, se_fx.transform])
@pytest.mark.parametrize(("name", "placement"), sorted(FUSED + REFUSED))
@pytest.mark.usefixtures("elsewhere")
def test_yolos_fused(name: str, placement: str, insert: Any) -> None:
    """Raw outputs before and after `fuse()`, or an error that names the way out."""
    model = copy.deepcopy(detector(name))
    model = insert(model, **OPTIONS | {"placement": placement, "min_channels": 16}) or model
    trained_a_little(model)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)[0].clone()
        fused = model.fuse(verbose=False)
        if placement in INSIDE:
            with pytest.raises(se_fx.SqueezeExciteError, match='placement="activation"'):
                fused(x)
            return
        assert float((fused(x)[0] - before).abs().max()) <= 1e-5 * float(before.abs().max())
