"""Scikit-learn's handwritten digits, and training on them: what several examples have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
Data = tuple[Tensor, Tensor]  # images (N, 3, H, W) and labels (N,)


def digits(size: int) -> tuple[Data, Data]:
    """Training and test images (N, 3, size, size) in about [-1, 1], with their labels (N,): two thirds and one third."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(images: Tensor, labels: Tensor, size: int = 100) -> list[Data]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def accuracy(model: nn.Module, data: list[Data]) -> float:
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data)
    return right / sum(len(labels) for _, labels in data)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    steps: int,
    *,
    batch_size: int = 50,
    seed: int = 0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train in the mode that the model is in, each group's rate rising and falling in one cycle; the loss of each step.

    What batches hold, and `augment` makes of them, depends on `seed` alone: two models given one seed see the same.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    losses: list[float] = []
    while len(losses) < steps:
        order = torch.randperm(len(images), generator=generator)
        whole = len(order) // batch_size * batch_size or len(order)  # a rest of one image would upset BatchNorm
        for chosen in order[:whole].split(batch_size)[: steps - len(losses)]:
            batch = images[chosen] if augment is None else augment(images[chosen], generator)
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            tick()
    return losses
