"""What a model must be to be worked on: a plain module, not wrapped, sharded, compiled or scripted, with values."""

from __future__ import annotations

import torch
from torch import nn

from se_fx.errors import SqueezeExciteError

__all__ = ["check_plain", "check_whole", "closed_parts", "is_conv"]

_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DDP"}


def check_whole(
    model: nn.Module, advice: str = "use a plain model made by the same plan, and load the full state_dict into it"
) -> None:
    """Refuse what only works on whole tensors and plain modules.

    Raises:
        SqueezeExciteError: a part of the model is wrapped, or its tensors are sharded, for distribution.
    """
    for name, module in model.named_modules():
        where = f"model's submodule {name!r}" if name else "model"
        if _torch_bases(module) & _WRAPPERS:
            raise SqueezeExciteError(f"{where} is wrapped for distribution already ({type(module).__name__}): {advice}")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if "DTensor" in (kind.__name__ for kind in type(tensor).__mro__):
                raise SqueezeExciteError(f"{where} has {key!r} distributed already, as a DTensor: {advice}")


def check_plain(model: nn.Module) -> None:
    """Refuse what is no longer, or not yet, a module whose code can be captured.

    Raises:
        SqueezeExciteError: `model` is not an `nn.Module`, or is wrapped, sharded, compiled, scripted or not initialised yet.
    """
    if not isinstance(model, nn.Module):
        call = "; call it to make one" if callable(model) else ""
        raise SqueezeExciteError(f"model={type(model).__name__}: expected an nn.Module{call}")
    check_whole(model, "transform the plain model first, then wrap or shard the result")
    if _is_compiled(model):
        raise SqueezeExciteError(
            f"model is compiled already ({type(model).__name__}): transform the plain model first, then compile the result"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise SqueezeExciteError("model is TorchScript: transform the Python model first, then script or export the result")
    for name, module in model.named_modules():
        where = f"model's submodule {name!r}" if name else "model"
        lazy = [key for key, p in module._parameters.items() if p is not None and nn.parameter.is_lazy(p)]
        if lazy:
            raise SqueezeExciteError(
                f"{where} has the uninitialised lazy parameter {lazy[0]!r}: run the model once on an example, then transform it"
            )


def closed_parts(model: nn.Module) -> dict[str, str]:
    """The parts whose code can't be looked into any more, by qualified name, outermost only; each with the reason."""
    closed: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        if _is_compiled(module):
            closed[name] = "is compiled already"
        elif isinstance(module, torch.jit.ScriptModule):
            closed[name] = "is TorchScript"
    return closed


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a Conv2d layer, scripted or not."""
    return isinstance(module, nn.Conv2d) or getattr(module, "original_name", "") == "Conv2d"


def _is_compiled(module: nn.Module) -> bool:
    return "OptimizedModule" in _torch_bases(module) or getattr(module, "_compiled_call_impl", None) is not None


def _torch_bases(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
