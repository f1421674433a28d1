"""LightningModules, and a Trainer that is quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_fx.integrations.lightning import SqueezeExcite

OPTIONS: dict[str, Any] = {"min_channels": 16, "latent_channels": 4}


class Net(L.LightningModule):
    """timm's smallest ResNet after a conv that hangs on the module itself, with a metric."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.model = timm.create_model("test_resnet", num_classes=10, in_chans=16)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.stem(x))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Small(Net):
    """Two convs, for what needs no real network."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.stem = nn.Identity()
        convs = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        self.model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 10), 8)


def trainer(path: Path, *callbacks: Callback, epochs: int = 1, **settings: Any) -> L.Trainer:
    settings = {"logger": False, "devices": 1, "enable_checkpointing": False, **settings}
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=epochs,
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fitted(path: Path, module: L.LightningModule, epochs: int = 1, **options: Any) -> Path:
    """A checkpoint of `module` after training with the callback."""
    training = trainer(path, SqueezeExcite(**{**OPTIONS, **options}), epochs=epochs)
    training.fit(module, data())
    training.save_checkpoint(path / "last.ckpt")
    return path / "last.ckpt"


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
