"""Composer's Trainer with se_fx's algorithm, on scikit-learn's handwritten digits.

docs/composer.md says how to install Composer beside a current PyTorch. Takes under a minute on two cores.
"""

from __future__ import annotations

import argparse

import timm
import torch
from composer import Trainer
from composer.algorithms import LabelSmoothing
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from digits import CLASSES, digits
from torch.utils.data import DataLoader, TensorDataset

import se_fx
from se_fx.integrations.composer import SqueezeExcite


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="a name of timm's: the network to train")
    parser.add_argument("--size", type=int, default=32, help="height and width that the 8x8 digits are enlarged to")
    parser.add_argument("--duration", default="3ep", help="how long to train, in Composer's words: 3ep, 50ba")
    parser.add_argument(
        "--latent-channels", type=float, default=64, help="hidden width of the blocks, or a fraction of the channels"
    )
    parser.add_argument("--min-channels", type=int, default=128, help="least output channels of a conv that gets a block")
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    train, test = digits(chosen.size)
    model = ComposerClassifier(timm.create_model(chosen.model, num_classes=CLASSES), num_classes=CLASSES)
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(*train), batch_size=50, shuffle=True),
        eval_dataloader=DataLoader(TensorDataset(*test), batch_size=100),
        optimizers=torch.optim.AdamW(model.parameters(), lr=2e-3),
        algorithms=[SqueezeExcite(chosen.latent_channels, chosen.min_channels), LabelSmoothing(0.1)],
        loggers=logger,
        max_duration=chosen.duration,
        seed=0,
        device="cpu",
        progress_bar=True,
    )
    trainer.fit()
    trainer.close()

    print(se_fx.report(model))
    print(f"\nlogged: {logger.hyperparameters['squeeze_excite/num_squeeze_excite_layers']} blocks")
    accuracies = [float(value) for _, value in logger.data["metrics/eval/MulticlassAccuracy"]]
    print(f"accuracy on held-out digits after each epoch: {', '.join(f'{value:.1%}' for value in accuracies)}")


if __name__ == "__main__":
    main()
