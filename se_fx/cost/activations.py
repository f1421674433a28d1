"""Activation memory: the bytes that autograd keeps for the backward pass. Counted on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_fx.cost.fakes import as_call, faked

__all__ = ["activation_bytes"]


def activation_bytes(model: nn.Module, example_inputs: Any) -> int | None:
    """Bytes that one forward call in training mode keeps for backward; the model is left as it is.

    Each storage counts once, however many operators keep it; parameters and buffers don't count, since they are there
    anyway. None where the model can't be called so: detection models want targets in training mode, and code that
    depends on values can't run on fake tensors.

    >>> activation_bytes(nn.Sequential(nn.Linear(10, 4), nn.ReLU()), torch.zeros(2, 10))  # the input, and ReLU's output
    112
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        detached = tensor if tensor.grad_fn is None else tensor.detach()  # a result would hold what keeps it, for ever
        kept.setdefault(tensor.untyped_storage()._cdata, detached)
        return detached

    try:
        with faked(model, as_call(example_inputs)) as (copied, (args, kwargs)):
            copied.train()
            own = {t.untyped_storage()._cdata for t in (*copied.parameters(), *copied.buffers())}
            with (
                torch.enable_grad(),
                torch.random.fork_rng(devices=[]),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                copied(*args, **kwargs)
            return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    except Exception:  # whatever the model's code raises on such a call
        return None
