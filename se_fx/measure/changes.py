"""Changes: how far one model's outputs over data are from another's. Knows nothing of what the models are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.cost import as_call, calling
from se_fx.errors import SqueezeExciteError
from se_fx.measure.gates import labelled
from se_fx.measure.progress import progress_bar
from se_fx.regions import clone

__all__ = ["Changes", "compare"]


@dataclass(frozen=True)
class Changes:
    """How far outputs moved over some batches, in eval mode.

    Attributes:
        largest: the largest absolute change of any number that the model returns.
        relative: that, as a multiple of the standard deviation of all these numbers; None where they are all alike.
        agreement: share of samples whose largest output stays the same one; None unless outputs are one (N, classes).
        accuracy: share of samples whose largest output is their label's, before and after; None without labels.
        alone: the largest absolute change where a single part of what was done is done alone, by the part's name.
    """

    largest: float
    relative: float | None
    agreement: float | None
    accuracy: tuple[float, float] | None
    alone: Mapping[str, float]

    def __str__(self) -> str:
        words = f"On held-out batches outputs move by at most {self.largest:.3g}"
        words += "" if self.relative is None else f", {self.relative:.3g} of their standard deviation"
        words += "" if self.agreement is None else f"; the top class stays for {self.agreement:.2%} of samples"
        words += "" if self.accuracy is None else "; top-1 accuracy {:.2%} before, {:.2%} after".format(*self.accuracy)
        return words + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        accuracy = None if self.accuracy is None else list(self.accuracy)
        return {**dataclasses.asdict(self), "accuracy": accuracy}


def compare(before: nn.Module, after: nn.Module, alone: Mapping[str, nn.Module], batches: list[Any], progress: bool) -> Changes:
    """Run `batches` through models, in eval mode on copies, so that the modes of the models themselves stay.

    Args:
        before: the model that outputs are compared with.
        after: the model it was turned into.
        alone: models with a part of what was done, by the name of that part.
        batches: each a tensor, a tuple or a dict of arguments, or a pair of these and labels.
        progress: show a progress bar on stderr, if tqdm is installed.

    Raises:
        SqueezeExciteError: there are no numbers in what the models return.
    """
    old, new, *parts = (clone(model).eval() for model in (before, after, *alone.values()))
    whole, single, classes = _Distance(), [_Distance() for _ in parts], _Classes()
    with torch.no_grad(), progress_bar("outputs", "batch", len(batches), progress) as tick:
        for batch in batches:
            inputs, labels = labelled(batch)
            expected, got = _run(old, inputs), _run(new, inputs)
            whole.add(expected, got)
            classes.add(expected, got, labels)
            for distance, part in zip(single, parts, strict=True):
                distance.add(expected, _run(part, inputs))
            tick()
    largest = {name: float(distance.largest) for name, distance in zip(alone, single, strict=True)}
    return Changes(float(whole.largest), whole.relative, classes.agreement, classes.accuracy, largest)


def _run(model: nn.Module, inputs: Any) -> Any:
    # models may change their inputs in place
    args, kwargs = call = tree_map_only(Tensor, Tensor.clone, as_call(inputs, "held_out: batch"))
    with calling("held_out", call):
        return model(*args, **kwargs)


class _Distance:
    """The largest difference between outputs, and the spread of the first of them, over batches, in float64."""

    def __init__(self) -> None:
        self.largest, self.count, self.first, self.second = torch.zeros((), dtype=torch.float64), 0, 0.0, 0.0

    def add(self, expected: Any, got: Any) -> None:
        """Take in two models' outputs for one batch."""
        old, new = _numbers(expected), _numbers(got)
        difference = (old - new).abs().max() if old.shape == new.shape else torch.tensor(math.inf)
        self.largest = torch.maximum(self.largest, difference)  # unlike max(), of NaN too
        self.count += old.numel()
        self.first += float(old.sum())
        self.second += float(old.square().sum())

    @property
    def relative(self) -> float | None:
        """The largest difference as a multiple of the spread."""
        variance = self.second / self.count - (self.first / self.count) ** 2
        return float(self.largest) / math.sqrt(variance) if variance > 0 else None


def _numbers(output: Any) -> Tensor:
    """All numbers in an output, one after the other, (numbers,), float64."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
    if not found:
        raise SqueezeExciteError(
            f"held_out: the model returns a {type(output).__name__} without floating-point tensors to compare; "
            "leave held_out away, and compare yourself"
        )
    return torch.cat([leaf.detach().cpu().double().flatten() for leaf in found])


class _Classes:
    """Counts of samples by what outputs (N, classes) say of them."""

    def __init__(self) -> None:
        self.samples = self.same = self.labelled = self.right_before = self.right_after = 0

    def add(self, expected: Any, got: Any, labels: Tensor | None) -> None:
        """Take in two models' outputs for one batch; nothing, if they are no scores of classes."""
        if not isinstance(expected, Tensor) or expected.ndim != 2 or got.shape != expected.shape:
            return
        old, new = expected.argmax(1).cpu(), got.argmax(1).cpu()
        self.samples += len(old)
        self.same += int((old == new).sum())
        if labels is not None and len(labels) == len(old):
            self.labelled += len(old)
            self.right_before += int((old == labels).sum())
            self.right_after += int((new == labels).sum())

    @property
    def agreement(self) -> float | None:
        """Share of samples of which both say the same."""
        return self.same / self.samples if self.samples else None

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Shares of labelled samples of which each is right."""
        if not self.labelled:
            return None
        return self.right_before / self.labelled, self.right_after / self.labelled
