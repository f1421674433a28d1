"""Generators of random numbers: their states, seeds of one's own, and what is undrawn where something fails."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from se_fx.arguments import is_count
from se_fx.errors import SqueezeExciteError, shown

__all__ = ["check_seed", "drawing_from", "kept_on_failure", "random_state", "set_random_state"]


def random_state() -> tuple[Any, ...]:
    """The states of all generators that a model's code may draw random numbers from on the CPU."""
    numpy = sys.modules.get("numpy")
    name, keys, *rest = numpy.random.get_state() if numpy is not None else ("", b"")
    state = torch.get_rng_state()
    held = ctypes.string_at(state.data_ptr(), state.numel())  # its bytes, without NumPy, which torch does not require
    return held, random.getstate(), (name, bytes(keys), *rest)


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set the generators back to what `random_state` returned."""
    for_torch, for_random, (name, keys, *rest) = state
    torch.set_rng_state(torch.frombuffer(bytearray(for_torch), dtype=torch.uint8))
    random.setstate(for_random)
    if name:
        numpy = sys.modules["numpy"]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def check_seed(seed: Any) -> None:
    """Refuse what no generator can start from.

    Raises:
        SqueezeExciteError: `seed` is neither None nor an integer from 0 to 2**64 - 1.
    """
    if seed is not None and not (is_count(seed, 0) and seed < 2**64):
        raise SqueezeExciteError(
            f"seed={shown(seed)}: expected an integer from 0 to 2**64 - 1, or None for the global generators"
        )


@contextlib.contextmanager
def drawing_from(seed: int | None) -> Iterator[torch.device | None]:
    """Within, the CPU's generator starts at `seed`, and is the default device's; yields where to draw, None for anywhere.

    Other devices' generators are left alone: what one seed gives there depends on the model of the GPU.
    """
    if seed is None:
        yield None
        return
    cpu = torch.device("cpu")
    with cpu, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
        yield cpu


@contextlib.contextmanager
def kept_on_failure(model: nn.Module) -> Iterator[None]:
    """Where what is within fails, the random numbers it has drawn are undrawn."""
    state = random_state()
    others = {device: torch.cuda.get_rng_state(device) for device in _drawn_from(model)}
    try:
        yield
    except BaseException:
        set_random_state(state)
        for device, other in others.items():
            torch.cuda.set_rng_state(other, device)
        raise


def _drawn_from(model: nn.Module) -> set[torch.device]:
    """The GPUs that a model is on; none where CUDA was never started, so that its tensors are fake."""
    return {parameter.device for parameter in model.parameters() if parameter.is_cuda} if torch.cuda.is_initialized() else set()  # type: ignore[no-untyped-call]
