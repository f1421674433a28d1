"""Choosing: from options, or a plan made before, to the sites of a captured model, each with its place there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_fx.analysis import attention_convs, remembering
from se_fx.blocks import latent_width
from se_fx.capture import Capture, drawing_from, is_conv
from se_fx.cost import Cost, measure
from se_fx.criteria import CRITERIA, Candidate, Surroundings
from se_fx.errors import SqueezeExciteError, blaming, shown
from se_fx.insertion import CONTAINER, Insertion
from se_fx.names import check_each_matches
from se_fx.placement import PLACEMENTS
from se_fx.planning.locating import Place, elsewhere, places_of, policy_of
from se_fx.planning.making import a_parameter, new_block
from se_fx.planning.options import Options
from se_fx.planning.plan import Callables, Plan, plan_within
from se_fx.planning.site import Site, Skip, parameters_only
from se_fx.planning.surroundings import surroundings_of

__all__ = ["Choice", "check_alone", "choose", "fit"]


@dataclass(frozen=True)
class Choice:
    """What is to be inserted into a captured model, and where.

    Attributes:
        plan: the sites.
        places: where each of them is, by its name.
        convs: the model's own Conv2d layers, by qualified name.
        before: the sites that the model has had before, in blocks of its own or of modules within it.
        capture: the captured model.
    """

    capture: Capture
    plan: Plan
    places: Mapping[str, Place]
    convs: Mapping[str, nn.Conv2d]
    before: Plan

    @property
    def after(self) -> Plan:
        """The plan that the rewritten model is to carry."""
        return self.before | self.plan

    def blocks(self, made_on: torch.device | None = None) -> dict[str, nn.Module]:
        """A new block for each site, by its name.

        Args:
            made_on: where the blocks' values are drawn; by default, on their conv's device.

        Raises:
            SqueezeExciteError: a site names a function that isn't known here, or a factory makes no module.
        """
        return {site.name: new_block(site, self.plan.callables, self.convs[site.name], made_on) for site in self.plan.sites}

    def insertions(self, made_on: torch.device | None = None) -> dict[str, list[Insertion]]:
        """The `blocks`, with the places they go to, by region path."""
        return self.insertions_of(self.blocks(made_on))

    def insertions_of(self, blocks: Mapping[str, nn.Module]) -> dict[str, list[Insertion]]:
        """Blocks, by their sites' names, with the places they go to, by region path."""
        found: dict[str, list[Insertion]] = {}
        for name, block in blocks.items():
            region, spots = self.places[name].region, self.places[name].spots
            found.setdefault(region.path, []).append(Insertion(name[len(region.path) :].lstrip("."), block, spots))
        return found


def check_alone(plan: Any, options: Options) -> None:
    """Raise `SqueezeExciteError` where something else than a plan was given as one, or options beside it."""
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise SqueezeExciteError(
            f"plan={type(plan).__name__}: expected a Plan, as se_fx.plan() or Plan.from_dict() returns; options go by keyword"
        )
    for name in options.changed():
        raise SqueezeExciteError(f"{name}: a plan fixes all options already; pass either plan= or options")


@remembering()
def choose(capture: Capture, options: Options) -> Choice:
    """The sites `options` ask for in a captured model.

    Raises:
        SqueezeExciteError: the model has no Conv2d, or nothing that the placement is for, or a pattern of `where` or
            `overrides` matches none.
    """
    names = _Names()
    placement = names.of("placement", options.placement)
    before = plan_within(capture.model)
    convs = _convs(capture, before)
    if not convs and not capture.closed:
        raise SqueezeExciteError(
            f"model: {type(capture.model).__name__} has no nn.Conv2d for a block to follow; calls of F.conv2d and "
            "convolutions of one or three dimensions get none"
        )
    places = places_of(capture, policy_of(placement, names.callables))
    taken = {site.name for site in before.sites}
    if not places and not taken and convs:
        others = " or ".join(repr(name) for name, policy in PLACEMENTS.items() if places_of(capture, policy))
        raise SqueezeExciteError(
            f"placement={placement!r}: the graphs of {type(capture.model).__name__} have no such place; "
            + (f"they have for {others}" if others else "nor for any other, since they call no Conv2d")
        )
    check_each_matches(options.overrides or {}, convs, "overrides", "Conv2d")
    excluded = _excluded(options.criteria, convs, places, capture)
    attention = _attention(capture)
    sites: list[Site] = []
    skipped: list[Skip] = []
    for name, conv in convs.items():
        reason = _why_not(name, conv, attention, taken, excluded) or (None if name in places else elsewhere(placement))
        if reason is None:
            sites.append(_site(name, places[name].channels, placement, options.of(name), names))
        else:
            skipped.append(Skip(name, conv.out_channels, reason))
    skipped += _closed_convs(capture)
    plan = _with_model(Plan(tuple(sites), tuple(skipped), callables=names.callables), capture, before)
    return Choice(capture, plan, places, convs, before)


@remembering()
def fit(capture: Capture, plan: Plan) -> Choice:
    """A plan that was made before, on a captured model of the same architecture, without the sites that this has already.

    Raises:
        SqueezeExciteError: a site does not fit the model; names the first that doesn't.
    """
    before = plan_within(capture.model)
    convs = _convs(capture, before)
    names, taken = ({site.name for site in each.sites} for each in (plan, before))
    left = tuple(site for site in plan.sites if site.name not in taken)
    policies = {site.placement: policy_of(site.placement, plan.callables) for site in left}
    found = {placement: places_of(capture, policy) for placement, policy in policies.items()}
    model = type(capture.model).__name__
    for site in left:
        place, does_not_fit = found[site.placement].get(site.name), f"plan: site {shown(site.name)} does not fit"
        if site.name not in convs:
            raise SqueezeExciteError(f"{does_not_fit}: {model} has no such Conv2d")
        if place is None:
            raise SqueezeExciteError(f"{does_not_fit}: {model} has this Conv2d, but it {elsewhere(site.placement)}")
        if place.channels != site.channels:
            raise SqueezeExciteError(f"{does_not_fit}: the plan has {site.channels} channels there, the model {place.channels}")
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    skipped = tuple(
        Skip(name, conv.out_channels, reasons.get(name, "not in the plan")) for name, conv in convs.items() if name not in names
    )
    skipped += tuple(_closed_convs(capture))
    sites = tuple(_with_parameters(site, plan.callables) for site in left)
    fitted = _with_model(dataclasses.replace(plan, sites=sites, skipped=skipped), capture, before)
    return Choice(capture, fitted, {site.name: found[site.placement][site.name] for site in left}, convs, before)


# ----------------------------------------------------------------------------------------------------------------- sites
class _Names:
    """Names for the caller's own functions, by which sites refer to them."""

    def __init__(self) -> None:
        self.callables: dict[tuple[str, str], Callable[..., Any]] = {}

    def of(self, field: str, choice: str | Callable[..., Any]) -> str:
        if isinstance(choice, str):
            return choice
        described = choice if hasattr(choice, "__name__") else type(choice)
        base = ".".join(filter(None, (getattr(described, "__module__", ""), described.__name__)))
        count, name = 1, base
        while self.callables.get((field, name), choice) is not choice:
            count += 1
            name = f"{base}#{count}"
        self.callables[field, name] = choice
        return name


def _site(name: str, channels: int, placement: str, options: Options, names: _Names) -> Site:
    if options.block is not None:
        site = Site(name, channels, None, placement, options.init, block=names.of("block", options.block))
    else:
        width = latent_width(options.latent_channels, channels)
        activation, gate = names.of("activation", options.activation), names.of("gate", options.gate)
        site = Site(name, channels, width, placement, options.init, options.bias, activation, gate)
    return _with_parameters(site, names.callables)


def _with_parameters(site: Site, callables: Callables) -> Site:
    """The site with the cost that is known before anything is measured.

    Raises:
        SqueezeExciteError: a block with functions of others in it does not return what a feature map can be replaced by.
    """
    of_others = [name for name in ("block", "activation", "gate") if (name, getattr(site, name)) in callables]
    if site.block is None and not of_others:
        return dataclasses.replace(site, cost=parameters_only(site))
    with drawing_from(0):  # what it draws is only counted
        block = new_block(site, callables)
    shape = (1, site.channels, 64, 64)
    expected = shape if site.block is not None else (1, site.channels, 1, 1)
    returned = _shape_after(block if site.block is not None else _Excitation(block), shape)
    if returned is not None and returned != expected:
        named = ", ".join(f"{name}={getattr(site, name)!r}" for name in of_others or ["block"])
        raise SqueezeExciteError(
            f"{named}: expected what returns a tensor of its input's shape; at {site.name!r}, {returned} comes instead of "
            f"{expected}"
        )
    return dataclasses.replace(site, cost=Cost(params=sum(parameter.numel() for parameter in block.parameters())))


class _Excitation(nn.Module):
    """The gates of a block, (N, C, H, W) to (N, C, 1, 1)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> Any:
        return self.block.excitation(x)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------- the model
def _with_model(plan: Plan, capture: Capture, there: Plan) -> Plan:
    alone = tuple(region.path for region in capture.regions if region.graphs is None)
    parameters = sum(parameter.numel() for parameter in capture.model.parameters())
    base = Cost(params=parameters) - Cost(params=there.added.params)
    return dataclasses.replace(plan, opaque=tuple(capture.opaque.items()), alone=alone, base=base, measured=False)


def _convs(capture: Capture, there: Plan) -> dict[str, nn.Conv2d]:
    """The model's own Conv2d layers by qualified name; not those of the blocks that it has already."""
    convs = {name: module for name, module in capture.model.named_modules() if isinstance(module, nn.Conv2d)}
    own = {name: conv for name, conv in convs.items() if not there.sites or CONTAINER not in name.split(".")}
    return {name: conv for name, conv in own.items() if capture.within_closed(name) is None}


def _closed_convs(capture: Capture) -> Iterator[Skip]:
    """The Conv2d layers in compiled and scripted parts, as far as they can be seen."""
    for name, module in capture.model.named_modules():
        part = capture.within_closed(name)
        if part is not None and is_conv(module):
            reason = capture.opaque[part]
            yield Skip(name, int(module.out_channels), reason if name == part else f"is in {part!r}, which {reason}")


def _attention(capture: Capture) -> set[str]:
    """The convs that compute gates of the model's own attention."""
    return {
        region.qualified(name)
        for region in capture.regions
        for graph in set((region.graphs or {}).values())  # one, where the modes agree
        for name in attention_convs(graph, region.module)
    }


def _excluded(
    criteria: Mapping[str, Any], convs: Mapping[str, nn.Conv2d], places: Mapping[str, Place], capture: Capture
) -> Mapping[str, str]:
    """What criteria leave out, each with the reason of the first that does."""

    @functools.cache
    def found() -> Mapping[str, Surroundings]:
        return surroundings_of(capture, convs)  # takes time, and few ask

    def candidate(name: str, conv: nn.Conv2d) -> Candidate:
        return Candidate(conv, places[name].channels if name in places else conv.out_channels, lambda: found()[name])

    candidates = {name: candidate(name, conv) for name, conv in convs.items()}
    excluded: dict[str, str] = {}
    for criterion, value in criteria.items():
        with blaming(f"{criterion}={shown(value)} failed"):
            excluded = {**CRITERIA[criterion].excludes(value, candidates), **excluded}
    return excluded


def _why_not(name: str, module: nn.Conv2d, attention: set[str], taken: set[str], excluded: Mapping[str, str]) -> str | None:
    if name in taken:
        return "has a Squeeze-and-Excitation block already"
    if name in attention:
        return "computes an attention gate"
    if not a_parameter(module).dtype.is_floating_point:
        return f"is of dtype {a_parameter(module).dtype}, which no block is made for"
    if name in excluded:
        return excluded[name]
    if "squeeze_excite" in module._modules:
        return "has a child of its own called squeeze_excite"
    if type(module).forward is not nn.Conv2d.forward and not _returns_a_feature_map(module):
        return "returns something else than a tensor (N, C, H, W)"
    return None


def _returns_a_feature_map(conv: nn.Conv2d) -> bool:
    """Whether a subclass, as far as can be told, returns what a Conv2d does."""
    shape = _shape_after(conv, (1, conv.in_channels, 64, 64))
    return shape is None or (len(shape) == 4 and shape[1] == conv.out_channels)


def _shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of what `module` returns for a tensor of a shape; empty for what is no tensor, None where a call fails.

    A call may fail for reasons that aren't the module's: it is made on fake tensors.
    """
    try:
        image = torch.empty(shape, device="meta", dtype=next((p.dtype for p in module.parameters()), None))
        return measure(module, image, {"": ""}).shapes.get("", ())
    except SqueezeExciteError:
        return None
