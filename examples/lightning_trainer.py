"""Lightning's Trainer with se_fx's callback, on scikit-learn's handwritten digits; then the checkpoint, without a Trainer.

Takes under a minute on two cores. Needs Lightning: pip install -e '.[examples,lightning]'
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from digits import CLASSES, accuracy, batches, digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from se_fx.integrations.lightning import SqueezeExcite


class Classifier(L.LightningModule):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(model, num_classes=CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        SqueezeExcite.restore(self, checkpoint)  # so that load_from_checkpoint finds the blocks it loads


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="a name of timm's: the network to train")
    parser.add_argument("--size", type=int, default=32, help="height and width that the 8x8 digits are enlarged to")
    parser.add_argument("--epochs", type=int, default=3, help="how long to train")
    parser.add_argument(
        "--latent-channels", type=float, default=1 / 4, help="hidden width of the blocks, or a fraction of the channels"
    )
    parser.add_argument("--placement", default="residual", help="where blocks go; residual is where the paper has them")
    chosen = parser.parse_args(arguments)

    L.seed_everything(0, verbose=False)
    train, test = digits(chosen.size)
    module = Classifier(chosen.model)
    squeeze_excite = SqueezeExcite(latent_channels=chosen.latent_channels, min_channels=1, placement=chosen.placement)
    with tempfile.TemporaryDirectory() as path:
        trainer = L.Trainer(accelerator="cpu", max_epochs=chosen.epochs, callbacks=[squeeze_excite], default_root_dir=path)
        trainer.fit(module, DataLoader(TensorDataset(*train), batch_size=50, shuffle=True))
        loaded = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    print(f"accuracy on held-out digits, from the checkpoint: {accuracy(loaded.eval(), batches(*test)):.1%}")


if __name__ == "__main__":
    main()
