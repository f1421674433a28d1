"""Plans: which convs get a block and of what kind, as plain data that can be looked at, saved and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from se_fx.blocks import ACTIVATIONS, GATES, INITS, SqueezeExcite2d, latent_width
from se_fx.cost import NO_COST, Cost
from se_fx.errors import SqueezeExciteError
from se_fx.placement import PLACEMENTS

__all__ = ["Options", "Plan", "Site", "Skip", "Where", "give_plan", "parameters_only", "percent", "plan_of", "site_table"]

Where = Callable[[str, nn.Module], bool] | str | Sequence[str] | None
_VERSION = 1
_ATTRIBUTE = "_squeeze_excite_plan"  # of a rewritten model


# --------------------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class Options:
    """What `transform` and `plan` can be told; see `se_fx.transform`.

    Raises:
        SqueezeExciteError: a value is not among those expected.
    """

    min_channels: int | str = 128
    latent_channels: float = 64
    placement: str = "conv"
    init: str = "default"
    bias: bool = False
    activation: str = "relu"
    gate: str = "sigmoid"
    where: Where = None

    def __post_init__(self) -> None:
        if self.min_channels != "auto" and not (_is_int(self.min_channels) and int(self.min_channels) >= 1):
            raise SqueezeExciteError(
                f"min_channels={self.min_channels!r}: expected the least number of output channels a Conv2d needs, "
                'an integer >= 1, or "auto"'
            )
        latent_width(self.latent_channels, 1)
        for name, choices in (("placement", PLACEMENTS), ("init", INITS), ("activation", ACTIVATIONS), ("gate", GATES)):
            _one_of(name, getattr(self, name), choices)
        if not isinstance(self.bias, bool):
            raise SqueezeExciteError(f"bias={self.bias!r}: expected True or False")
        patterns = [self.where] if isinstance(self.where, str) else self.where
        is_patterns = (
            isinstance(patterns, Sequence) and len(patterns) > 0 and all(isinstance(pattern, str) for pattern in patterns)
        )
        if not (self.where is None or callable(self.where) or is_patterns):
            raise SqueezeExciteError(
                f"where={self.where!r}: expected a predicate (name, module) -> bool, or glob patterns of qualified names "
                "such as 'layer4.*' ('!layer4.0.*' excludes)"
            )


def _one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise SqueezeExciteError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------------------- sites
@dataclass(frozen=True)
class Site:
    """One block: after which conv, how wide, of what kind.

    Attributes:
        name: qualified name of the Conv2d.
        channels: channels of the scaled value.
        latent_channels: hidden width of the block.
        placement: the policy that found the site.
        init: initialisation of the block.
        bias: whether the block's linear layers have biases.
        activation: the block's hidden activation.
        gate: the block's gate function.
        spatial: (H, W) of the scaled value; None unless measured on example inputs, or never reached by them.
        cost: what the block adds for the example inputs; without them, its parameters alone.
    """

    name: str
    channels: int
    latent_channels: int
    placement: str = "conv"
    init: str = "default"
    bias: bool = False
    activation: str = "relu"
    gate: str = "sigmoid"
    spatial: tuple[int, int] | None = None
    cost: Cost = NO_COST

    def block(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> SqueezeExcite2d:
        """A new block of this kind."""
        return SqueezeExcite2d(
            self.channels,
            self.latent_channels,
            bias=self.bias,
            activation=self.activation,
            gate=self.gate,
            init=self.init,
            device=device,
            dtype=dtype,
        )


_SITE_TYPES: dict[str, Any] = {
    "name": str,
    "channels": int,
    "latent_channels": int,
    "placement": str,
    "init": str,
    "bias": bool,
    "activation": str,
    "gate": str,
}


@dataclass(frozen=True)
class Skip:
    """A Conv2d that gets no block, and why."""

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """The sites of one model, in the order of its modules.

    Attributes:
        sites: the blocks to insert.
        skipped: the other Conv2d layers, each with the reason. Not saved.
        opaque: parts of the model that run their own code, with the reason. Not saved.
        alone: convs that such code calls, each captured alone. Not saved.
        base: cost of the model itself on the example inputs. Not saved.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    base: Cost | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def added(self) -> Cost:
        """What all blocks add."""
        return sum((site.cost for site in self.sites), Cost())

    def __str__(self) -> str:
        summary = f"{len(self)} site{'s' * (len(self) != 1)}, {len(self.skipped)} Conv2d layers skipped"
        return summary + (f"\n{site_table(self.sites, self.base)}" if self.sites else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. What depends on example inputs (spatial size, costs) and what was skipped is left out."""
        sites = [{name: getattr(site, name) for name in _SITE_TYPES} for site in self.sites]
        return {"version": _VERSION, "sites": sites}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` saved.

        Raises:
            SqueezeExciteError: `data` is no such thing, or from a later version.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != _VERSION:
            raise SqueezeExciteError(
                f"plan: expected what Plan.to_dict() returns, of version {_VERSION}, and got version {version!r}; "
                "upgrade se_fx if a later one has saved it"
            )
        sites = data.get("sites")
        if not isinstance(sites, list) or not all(isinstance(site, Mapping) for site in sites):
            raise SqueezeExciteError("plan['sites']: expected a list of sites, each a mapping")
        read = tuple(_site_from_dict(f"plan['sites'][{i}]", site) for i, site in enumerate(sites))
        names = [site.name for site in read]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise SqueezeExciteError(f"plan['sites']: expected each site once, and got {twice!r} twice")
        return cls(read)


def _site_from_dict(where: str, data: Mapping[str, Any]) -> Site:
    if set(data) != set(_SITE_TYPES):
        raise SqueezeExciteError(
            f"{where}: expected exactly the keys {', '.join(_SITE_TYPES)}; got {', '.join(map(str, data))}"
        )
    for name, kind in _SITE_TYPES.items():
        if type(data[name]) is not kind or (kind is int and not 1 <= data[name] <= 2**20):
            bounds = " from 1 to 2**20" if kind is int else ""
            raise SqueezeExciteError(f"{where}[{name!r}]={data[name]!r}: expected {kind.__name__}{bounds}")
    for name, choices in (("placement", PLACEMENTS), ("init", INITS), ("activation", ACTIVATIONS), ("gate", GATES)):
        _one_of(f"{where}[{name!r}]", data[name], choices)
    site = Site(**data)
    return dataclasses.replace(site, cost=parameters_only(site))


def site_table(sites: Iterable[Site], base: Cost | None) -> str:
    """One row for each site; with the model's own cost given, MACs too and their share of the model's."""
    rows: list[list[Any]] = []
    for site in sites:
        row: list[Any] = [site.name, site.channels, site.latent_channels]
        if base:
            row.append("x".join(map(str, site.spatial)) if site.spatial else "-")
        row.append(site.cost.params)
        if base:
            row += [site.cost.macs, percent(site.cost.macs, base.macs)]
        rows.append(row)
    spatial, macs = (["spatial"], ["MACs", "of model"]) if base else ([], [])
    headers = ["after", "channels", "hidden", *spatial, "parameters", *macs]
    return tabulate(rows, headers, intfmt=",", colalign=["left", *["right"] * (len(headers) - 1)])


def percent(part: int, whole: int) -> str:
    """`part` of `whole`, for people."""
    return f"{100 * part / whole:.3f} %" if whole else "-"


def parameters_only(site: Site) -> Cost:
    """What a site's block costs before anything is measured."""
    biases = site.latent_channels + site.channels if site.bias else 0
    return Cost(params=2 * site.channels * site.latent_channels + biases)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a rewritten model carries; None for other models."""
    plan = model.__dict__.get(_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def give_plan(model: nn.Module, plan: Plan | None) -> None:
    """Have `model` carry `plan`, or none."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if plan is not None:
        model.__dict__[_ATTRIBUTE] = plan
