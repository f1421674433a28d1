"""Plans: which convs get a block and of what kind, as plain data that can be looked at, saved and replayed."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from se_fx.blocks import ACTIVATIONS, GATES, INITS, SqueezeExcite2d, latent_width
from se_fx.capture import Capture, Region
from se_fx.cost import NO_COST, Cost, measure
from se_fx.errors import SqueezeExciteError
from se_fx.insertion import Insertion
from se_fx.placement import PLACEMENTS, Spot, attention_convs

__all__ = ["Options", "Plan", "Site", "Skip", "choose", "fit", "give_plan", "locate", "new_block", "plan_of"]

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
    return dataclasses.replace(site, cost=_parameters_only(site))


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


# -------------------------------------------------------------------------------------------------------------- choosing
def choose(capture: Capture, options: Options) -> Plan:
    """The sites `options` ask for in a captured model.

    Raises:
        SqueezeExciteError: the model has no Conv2d, or `where` matches none.
    """
    convs = {name: module for name, module in capture.model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs:
        raise SqueezeExciteError(f"model: {type(capture.model).__name__} has no nn.Conv2d for a block to follow")
    spots = {name: spot for name, (_, spot, _) in _spots(capture, options.placement).items()}
    attention = {
        region.qualified(name)
        for region in capture.regions
        for graph in (region.graphs or {}).values()
        for name in attention_convs(graph, region.module)
    }
    least = _least_channels(options, convs)
    wanted = _wanted(options.where, convs)
    there = plan_of(capture.model)
    taken = {site.name: site for site in there.sites} if there else {}
    sites: list[Site] = []
    skipped: list[Skip] = []
    for name, module in convs.items():
        reason = _why_not(name, module, least, wanted, spots, attention, taken)
        if reason is None:
            spot = spots[name]
            width = latent_width(options.latent_channels, spot.channels)
            kind = {key: getattr(options, key) for key in ("placement", "init", "bias", "activation", "gate")}
            site = Site(name, spot.channels, width, **kind)
            sites.append(dataclasses.replace(site, cost=_parameters_only(site)))
        elif "squeeze_excite" not in name.split("."):
            skipped.append(Skip(name, module.out_channels, reason))
    return _with_capture(Plan(tuple(sites), tuple(skipped)), capture)


def fit(plan: Plan, capture: Capture) -> Plan:
    """A plan that was made before, with what it says of the model at hand: what it skips, what was captured how."""
    there = plan_of(capture.model)
    taken = {site.name for site in there.sites} if there else set()
    names = {site.name for site in plan.sites}
    convs = {name: module for name, module in capture.model.named_modules() if isinstance(module, nn.Conv2d)}
    skipped = (Skip(name, module.out_channels, "not in the plan") for name, module in convs.items() if name not in names)
    sites = tuple(site for site in plan.sites if site.name not in taken)
    return _with_capture(dataclasses.replace(plan, sites=sites, skipped=tuple(skipped)), capture)


def _with_capture(plan: Plan, capture: Capture) -> Plan:
    alone = tuple(region.path for region in capture.regions if region.graphs is None)
    return dataclasses.replace(plan, opaque=tuple(capture.opaque.items()), alone=alone)


def _why_not(
    name: str,
    module: nn.Conv2d,
    least: int,
    wanted: set[str],
    spots: Mapping[str, Spot],
    attention: set[str],
    taken: Mapping[str, Site],
) -> str | None:
    if name in taken:
        return "has a Squeeze-and-Excitation block already"
    if name in attention:
        return "computes an attention gate"
    if not _parameter(module).dtype.is_floating_point:
        return f"is of dtype {_parameter(module).dtype}, which no block is made for"
    if module.out_channels < least:
        return f"{module.out_channels} output channels < min_channels={least}"
    if name not in wanted:
        return "excluded by where"
    if "squeeze_excite" in module._modules:
        return "has a child of its own called squeeze_excite"
    if type(module).forward is not nn.Conv2d.forward and not _returns_a_feature_map(module):
        return "returns something else than a tensor (N, C, H, W)"
    if name not in spots:
        return "is never called by the code that was captured"
    return None


def _returns_a_feature_map(conv: nn.Conv2d) -> bool:
    """Whether a subclass, as far as can be told from an image of zeros, returns what a Conv2d does."""
    try:
        shape = measure(conv, torch.empty(1, conv.in_channels, 64, 64, device="meta"), {"": ""}).shapes.get("")
    except SqueezeExciteError:
        return True
    return shape is not None and len(shape) == 4 and shape[1] == conv.out_channels


def _least_channels(options: Options, convs: Mapping[str, nn.Conv2d]) -> int:
    """`min_channels`, "auto" being 512, or the largest output channel count where no conv has as many."""
    if options.min_channels == "auto":
        return min(512, max(conv.out_channels for conv in convs.values()))
    return int(options.min_channels)


def _wanted(where: Where, convs: Mapping[str, nn.Conv2d]) -> set[str]:
    if where is None:
        return set(convs)
    if callable(where):
        return {name for name, module in convs.items() if where(name, module)}
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern.removeprefix("!")) for name in convs):
            raise SqueezeExciteError(
                f"where={where!r}: {pattern!r} matches no Conv2d; the first is named {next(iter(convs))!r}"
            )
    include = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    exclude = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return {name for name in convs if _matches(name, include) and not _matches(name, exclude)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parameters_only(site: Site) -> Cost:
    biases = site.latent_channels + site.channels if site.bias else 0
    return Cost(params=2 * site.channels * site.latent_channels + biases)


# ------------------------------------------------------------------------------------------------------------- replaying
def locate(capture: Capture, plan: Plan, device: torch.device | None = None) -> dict[str, list[Insertion]]:
    """The insertions that `plan` means in a captured model, by region path, each with a new block.

    Args:
        capture: of the model, or of another of the same architecture.
        plan: the plan.
        device: where the blocks' parameters go; by default, to their conv's device.

    Raises:
        SqueezeExciteError: a site does not fit the model; names the first that doesn't.
    """
    convs = dict(capture.model.named_modules())
    found = {placement: _spots(capture, placement) for placement in {site.placement for site in plan.sites}}
    insertions: dict[str, list[Insertion]] = {}
    for site in plan.sites:
        conv = convs.get(site.name)
        if not isinstance(conv, nn.Conv2d) or site.name not in found[site.placement]:
            has = "has no such Conv2d" if not isinstance(conv, nn.Conv2d) else "does not call it where a block could follow"
            raise SqueezeExciteError(f"plan: site {site.name!r} does not fit: {type(capture.model).__name__} {has}")
        region, spot, nodes = found[site.placement][site.name]
        if spot.channels != site.channels:
            raise SqueezeExciteError(
                f"plan: site {site.name!r} does not fit: the plan has {site.channels} channels there, the model {spot.channels}"
            )
        name = site.name[len(region.path) + 1 :] if region.path else site.name
        insertions.setdefault(region.path, []).append(Insertion(name, new_block(site, conv, device), nodes))
    return insertions


def new_block(site: Site, conv: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A block of the kind `site` says, on the device and of the dtype and mode of `conv`."""
    assert isinstance(conv, nn.Conv2d)
    return site.block(device or _parameter(conv).device, _parameter(conv).dtype).train(conv.training)


def _parameter(conv: nn.Conv2d) -> torch.Tensor:
    """A parameter of a conv. Not its weight: parametrized weights are computed, some (spectral norm) with side effects."""
    for parameter in conv.parameters():
        return parameter
    return conv.weight


def _spots(capture: Capture, placement: str) -> dict[str, tuple[Region, Spot, dict[bool, tuple[fx.Node, ...]]]]:
    """The spots of a captured model by the qualified name of their conv: region, spot, and nodes by `training`."""
    found: dict[str, tuple[Region, Spot, dict[bool, tuple[fx.Node, ...]]]] = {}
    alone = {region.path for region in capture.regions if region.graphs is None}
    for region in capture.regions:
        if region.graphs is None:
            assert isinstance(region.module, nn.Conv2d)
            found[region.path] = region, Spot("", region.module.out_channels, ()), {}
            continue
        by_graph = {graph: list(PLACEMENTS[placement](graph, region.module)) for graph in set(region.graphs.values())}
        for training, graph in region.graphs.items():
            for spot in by_graph[graph]:
                name = region.qualified(spot.conv)
                if name not in alone:
                    found.setdefault(name, (region, spot, {}))[2][training] = spot.nodes
    return found


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a rewritten model carries; None for other models."""
    plan = model.__dict__.get(_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def give_plan(model: nn.Module, plan: Plan | None) -> None:
    """Have `model` carry `plan`, or none."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if plan is not None:
        model.__dict__[_ATTRIBUTE] = plan
