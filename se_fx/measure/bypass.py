"""The blocks of a rewritten model, and how they are switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from se_fx.insertion import block_names
from se_fx.planning import Plan

__all__ = ["blocks_of", "bypassed"]


def blocks_of(rewritten: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a rewritten model, by the names of their sites.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one.

    >>> import se_fx
    >>> net = se_fx.transform(nn.Sequential(nn.Conv2d(3, 256, 3)))
    >>> {name: block.num_features for name, block in blocks_of(net).items()}
    {'0': 256}
    """
    Plan.of(rewritten)
    return {site: rewritten.get_submodule(name) for site, name in block_names(rewritten).items()}


@contextlib.contextmanager
def bypassed(rewritten: nn.Module) -> Iterator[None]:
    """Within, the blocks of a rewritten model do nothing: its outputs are the original's.

    To see what blocks do, as adapters elsewhere can be switched off.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one.

    >>> import se_fx, torch
    >>> net, x = nn.Sequential(nn.Conv2d(3, 256, 3)), torch.randn(1, 3, 8, 8)
    >>> gm = se_fx.transform(net)
    >>> with bypassed(gm):
    ...     print(torch.equal(gm(x), net(x)))
    True
    """
    blocks = {id(block): block for block in blocks_of(rewritten).values()}.values()
    set_before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = _unchanged
        yield
    finally:
        for block, forward in set_before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _unchanged(x: Tensor) -> Tensor:
    return x
