"""A start at the identity for any block. Knows nothing of what the block does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["IdentityStart"]


class IdentityStart(nn.Module):
    r"""As much of a block as training asks for, and none of it at first.

    .. math:: y = U + a\,(B(U) - U), \quad a = 0 \text{ at the start}

    where B is the block, and a one number, learned with it. At the start outputs equal inputs, where the block's are
    finite, and the gradient of a says whether the block would help; that of the block's own parameters begins once a has moved.

    Source: the learned factor is that of Bachlechner et al., *ReZero is All You Need*, arXiv 2003.04887, on the difference that
    a block makes.

    Args:
        block: a module from a tensor to one of the same shape.

    >>> start = IdentityStart(nn.Sigmoid())
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.equal(start(x), x)
    True
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.strength = nn.Parameter(torch.zeros(1, 1, 1))  # not of no dimension: what shards parameters takes none such

    def forward(self, x: Tensor) -> Tensor:
        """From `x` to a tensor of its shape and dtype."""
        difference = self.block(x).type_as(x) - x
        return x + difference * self.strength.type_as(difference)  # type: ignore[no-any-return]
