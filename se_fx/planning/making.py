"""Making: from a site to a new block of the kind it says."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from se_fx.blocks import BLOCKS, IdentityStart, SqueezeExcite2d
from se_fx.cost import fake_on
from se_fx.errors import SqueezeExciteError, blaming
from se_fx.planning.plan import Callables
from se_fx.planning.site import Site

__all__ = ["a_parameter", "new_block"]


def new_block(
    site: Site,
    callables: Callables,
    conv: nn.Conv2d | None = None,
    made_on: torch.device | None = None,
) -> nn.Module:
    """A block of the kind `site` says; with a conv, on its device, of its dtype and in its mode.

    Its values are drawn on the device `made_on`, if that is given, and moved; those on the meta device have none.

    Raises:
        SqueezeExciteError: `site` names a function that isn't known here, or a factory makes no module.
    """
    like = None if conv is None else a_parameter(conv)
    dtype = None if like is None else like.dtype
    with unset_fake_temporarily():
        if isinstance(like, FakeTensor):
            block = _made(site, callables, None, dtype, made_on)
            fake_on(block, like)
        else:
            block = _made(site, callables, None if like is None else like.device, dtype, made_on)
    return block.train(conv is None or conv.training)


def _made(
    site: Site, callables: Callables, device: torch.device | None, dtype: torch.dtype | None, made_on: torch.device | None
) -> nn.Module:
    if site.block is None:
        assert site.latent_channels is not None
        activation = copy.deepcopy(callables.get(("activation", site.activation), site.activation))
        gate = copy.deepcopy(callables.get(("gate", site.gate), site.gate))
        where = device if device is not None and device.type == "meta" else made_on or device
        kind: dict[str, Any] = {"bias": site.bias, "init": site.init, "device": where, "dtype": dtype}
        block: Any = SqueezeExcite2d(site.channels, site.latent_channels, activation=activation, gate=gate, **kind)
    else:
        factory = callables.get(("block", site.block)) or BLOCKS.get(site.block)
        if factory is None:
            raise SqueezeExciteError(
                f"plan: site {site.name!r} has the block {site.block!r}, unknown here; add its factory to se_fx.blocks.BLOCKS"
            )
        with blaming(f"block={site.block!r}: expected a factory channels -> nn.Module, and for {site.channels} it failed"):
            block = factory(site.channels)
        if not isinstance(block, nn.Module):
            raise SqueezeExciteError(
                f"block={site.block!r}: expected a factory channels -> nn.Module, and it made a {type(block).__name__}"
            )
        block = (IdentityStart(block) if site.init == "identity" else block).to(dtype=dtype)
    return block.to(device)  # type: ignore[no-any-return]


def a_parameter(conv: nn.Conv2d) -> torch.Tensor:
    """A parameter of a conv. Not its weight: parametrized weights are computed, some (spectral norm) with side effects."""
    for parameter in conv.parameters():
        return parameter
    return conv.weight
