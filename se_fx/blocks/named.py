"""Attention blocks of others by name: timm's, and two that it doesn't have. Each maps (N, C, H, W) to the same shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from se_fx.errors import SqueezeExciteError, reason_of

__all__ = ["BLOCKS", "ConcurrentSqueezeExcite2d", "OfTimm", "SimAM"]


@dataclass(frozen=True)
class OfTimm:
    """A factory of blocks that timm makes, else with timm's defaults.

    Attributes:
        name: what timm calls it, in `timm.layers.create_attn`.
        paper: where it was published.
        options: what it is made with beside the channels.
    """

    name: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, channels: int) -> nn.Module:
        """A block for so many channels.

        Raises:
            SqueezeExciteError: timm is missing, or too old to have it.
        """
        try:
            from timm.layers.create_attn import create_attn
        except ImportError as error:
            raise SqueezeExciteError(
                f"block: timm makes this one, {self.name!r}, and could not be imported ({reason_of(error)}): "
                "pip install 'se_fx[timm]'"
            ) from error
        try:
            block: nn.Module = create_attn(self.name, channels, **self.options)  # type: ignore[no-untyped-call]
        except AssertionError as error:  # so it says that it knows no such name
            raise SqueezeExciteError(
                f"block: timm makes this one, {self.name!r}, and this version of timm does not: pip install -U 'se_fx[timm]'"
            ) from error
        return block


class ConcurrentSqueezeExcite2d(nn.Module):
    r"""Concurrent spatial and channel squeeze and excitation (scSE): the map scaled by channel, plus the map scaled by place.

    .. math:: y = U \cdot \sigma(W_2\,\mathrm{relu}(W_1\,\mathrm{mean}_{H,W}(U))) + U \cdot \sigma(w \cdot U)

    For U of shape (N, C, H, W), or unbatched (C, H, W); w is a convolution of size 1 to one channel.

    Source: Roy, Navab, Wachinger, *Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks*,
    arXiv 1803.02579, section 2.

    Args:
        channels: C.
        reduction: C divided by the hidden width; the paper's is 2.
    """

    paper = "Roy et al., 2018, arXiv 1803.02579"

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, max(1, channels // reduction))
        self.fc2 = nn.Linear(max(1, channels // reduction), channels)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W), or (C, H, W); same shape."""
        by_channel = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((-2, -1))))))
        return x * by_channel[..., None, None] + x * torch.sigmoid(self.spatial(x))


class SimAM(nn.Module):
    r"""Simple, parameter-free attention: each value is scaled by how far it stands out from its channel's others.

    .. math:: y = U \cdot \sigma\!\left(\frac{(U - \mu)^2}{4\,(s^2 + \lambda)} + \frac{1}{2}\right)

    where :math:`\mu` and :math:`s^2` are the mean and the unbiased variance over (H, W); that of a single value is zero.

    Source: Yang, Zhang, Li, Xie, *SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks*, ICML
    2021, equation 5.

    Args:
        channels: C; nothing depends on it.
        regularization: :math:`\lambda`; the paper's is 1e-4.
    """

    paper = "Yang et al., 2021, ICML"

    def __init__(self, channels: int, regularization: float = 1e-4) -> None:
        super().__init__()
        self.regularization = regularization

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W), or (C, H, W); same shape and dtype. Squares are taken in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = (wide - wide.mean((-2, -1), keepdim=True)).square()
        count = x.shape[-2] * x.shape[-1]
        variance = squares.mean((-2, -1), keepdim=True) * (count / max(count - 1, 1))
        return x * (squares / (4 * (variance + self.regularization)) + 0.5).sigmoid().to(x.dtype)

    def extra_repr(self) -> str:
        """The block's number, for `repr`."""
        return f"regularization={self.regularization}"


#: Attention blocks of others by name, factories ``channels -> nn.Module``. Add your own to save plans with them.
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "eca": OfTimm("eca", "Wang et al., 2020, arXiv 1910.03151"),
    "ese": OfTimm("ese", "Lee and Park, 2020, arXiv 1911.06667"),
    "cbam": OfTimm("cbam", "Woo et al., 2018, arXiv 1807.06521"),
    "scse": ConcurrentSqueezeExcite2d,
    "gc": OfTimm("gca", "Cao et al., 2019, arXiv 1904.11492"),  # added to the map, as in the paper; timm's "gc" scales it
    "coord": OfTimm("coord", "Hou et al., 2021, arXiv 2103.02907"),
    "ela": OfTimm("ela", "Xu and Wan, 2024, arXiv 2403.01123"),
    "ge": OfTimm("ge", "Hu et al., 2018, arXiv 1810.12348", {"use_mlp": False}),  # without parameters
    "simam": SimAM,
}
