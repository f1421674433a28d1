"""Sites: one block as plain data; and the convs that get none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from se_fx.blocks import ACTIVATIONS, BLOCKS, GATES, INITS, MOST_CHANNELS, latent_width
from se_fx.cost import NO_COST, Cost
from se_fx.errors import SqueezeExciteError, shown
from se_fx.placement import PLACEMENTS

__all__ = ["Site", "Skip", "parameters_only", "site_from_dict", "site_to_dict"]


@dataclass(frozen=True)
class Site:
    """One block: at which conv, how wide, of what kind.

    Attributes:
        name: qualified name of the Conv2d.
        channels: channels of the scaled value.
        latent_channels: hidden width of the block; None where `block` is somebody else's.
        placement: the policy that found the site.
        init: initialisation of the block.
        bias: whether the block's linear layers have biases.
        activation: the block's hidden activation.
        gate: the block's gate function.
        block: the factory of the block; None for se_fx's own.
        spatial: (H, W) of the scaled value; None unless measured on example inputs, or never reached by them.
        cost: what the block adds for the example inputs; without them, its parameters alone.
        score: how much a loss wants the block's gate to move, from `se_fx.score`; None where nobody has asked. Not saved.

    Raises:
        SqueezeExciteError: a value is of another type, out of bounds, or wider than any block is made.
    """

    name: str
    channels: int
    latent_channels: int | None
    placement: str = "conv"
    init: str = "default"
    bias: bool = False
    activation: str = "relu"
    gate: str = "sigmoid"
    block: str | None = None
    spatial: tuple[int, int] | None = None
    cost: Cost = NO_COST
    score: float | None = None

    def __post_init__(self) -> None:
        for name, kinds in _SITE_TYPES.items():
            value = getattr(self, name)
            if type(value) not in kinds or (type(value) is int and not 1 <= value <= MOST_CHANNELS):
                bounds = " from 1 to 2**20" if int in kinds else ""
                raise SqueezeExciteError(f"{name}={shown(value)}: expected {kinds[0].__name__}{bounds}")
        if (self.latent_channels is None) != (self.block is not None):
            raise SqueezeExciteError(
                f"latent_channels={self.latent_channels}, block={shown(self.block)}: expected a width, or a block of others"
            )
        if self.latent_channels is not None:
            latent_width(self.latent_channels, self.channels)


@dataclass(frozen=True)
class Skip:
    """A Conv2d that gets no block, and why."""

    name: str
    channels: int
    reason: str


def parameters_only(site: Site) -> Cost:
    """What a block of se_fx's own costs before anything is measured."""
    if site.latent_channels is None:
        return NO_COST
    biases = site.latent_channels + site.channels if site.bias else 0
    return Cost(params=2 * site.channels * site.latent_channels + biases)


# --------------------------------------------------------------------------------------------------------------- as JSON
def site_to_dict(site: Site) -> dict[str, Any]:
    """Plain JSON types; what depends on example inputs is left out."""
    return {name: getattr(site, name) for name in _SITE_TYPES}


def site_from_dict(where: str, data: Mapping[str, Any]) -> Site:
    """The site that `site_to_dict` saved; `where` it stands, for errors.

    Raises:
        SqueezeExciteError: `data` is no such thing, or has unknown names, or sizes that no block has.
    """
    if set(data) != set(_SITE_TYPES):
        raise SqueezeExciteError(f"{where}: expected exactly the keys {', '.join(_SITE_TYPES)}; got {shown(list(data))}")
    try:
        site = Site(**data)
    except SqueezeExciteError as error:
        raise SqueezeExciteError(f"{where}: {error}") from error
    for name, (table, known) in _TABLES.items():
        value = data[name]
        if value is not None and value not in known:
            expected = f"one of {', '.join(map(repr, known))}; " if known else ""
            raise SqueezeExciteError(
                f"{where}: {name}={shown(value)}: expected {expected}own ones must be added to se_fx.{table} first"
            )
    return dataclasses.replace(site, cost=parameters_only(site))


_Nothing = type(None)
_SITE_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "channels": (int,),
    "latent_channels": (int, _Nothing),
    "placement": (str,),
    "init": (str,),
    "bias": (bool,),
    "activation": (str,),
    "gate": (str,),
    "block": (str, _Nothing),
}
_TABLES: dict[str, tuple[str, Iterable[str]]] = {
    "placement": ("placement.PLACEMENTS", PLACEMENTS),
    "init": ("blocks.INITS", INITS),
    "activation": ("blocks.ACTIVATIONS", ACTIVATIONS),
    "gate": ("blocks.GATES", GATES),
    "block": ("blocks.BLOCKS", BLOCKS),
}
