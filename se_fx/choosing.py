"""Choosing: from options to the sites of a captured model, and from a plan to its sites in a model again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from se_fx.blocks import BLOCKS, SqueezeExcite2d, latent_width
from se_fx.capture import Capture, Region
from se_fx.cost import Cost, measure
from se_fx.criteria import CRITERIA, Candidate
from se_fx.dataflow import attention_convs, modules_of
from se_fx.errors import SqueezeExciteError
from se_fx.insertion import CONTAINER, Insertion
from se_fx.options import Options
from se_fx.patterns import check_each_matches
from se_fx.placement import ELSEWHERE, PLACEMENTS, Policy, Spot
from se_fx.plan import Callables, Plan, Site, Skip, parameters_only, plan_within
from se_fx.randomness import drawing_from

__all__ = ["choose", "fit", "locate", "new_block"]


# -------------------------------------------------------------------------------------------------------------- choosing
def choose(capture: Capture, options: Options) -> Plan:
    """The sites `options` ask for in a captured model.

    Raises:
        SqueezeExciteError: the model has no Conv2d, or nothing that the placement is for, or a pattern of `where` or
            `overrides` matches none.
    """
    names = _Names()
    placement = names.of("placement", options.placement)
    convs = _convs(capture)
    if not convs:
        raise SqueezeExciteError(f"model: {type(capture.model).__name__} has no nn.Conv2d for a block to follow")
    spots = {name: spot for name, (_, spot, _) in _spots(capture, _policy(placement, names.callables)).items()}
    taken = {site.name for site in _there(capture).sites}
    if not spots and not taken:
        others = " or ".join(repr(name) for name, policy in PLACEMENTS.items() if _spots(capture, policy))
        raise SqueezeExciteError(
            f"placement={placement!r}: the graphs of {type(capture.model).__name__} have no such place; they have for {others}"
        )
    attention = {
        region.qualified(name)
        for region in capture.regions
        for graph in set((region.graphs or {}).values())  # one, where the modes agree
        for name in attention_convs(graph, region.module)
    }
    check_each_matches(options.overrides or {}, convs, "overrides", "Conv2d")
    candidates = {
        name: Candidate(conv, spots[name].channels if name in spots else conv.out_channels) for name, conv in convs.items()
    }
    excluded: dict[str, str] = {}
    for criterion, value in options.criteria.items():
        excluded = {**CRITERIA[criterion].excludes(value, candidates), **excluded}
    elsewhere = ELSEWHERE.get(placement, f"is not chosen by {placement}")
    sites: list[Site] = []
    skipped: list[Skip] = []
    for name, module in convs.items():
        spot = spots.get(name)
        reason = _why_not(name, module, attention, taken, excluded) or (elsewhere if spot is None else None)
        if reason is None and spot is not None:
            sites.append(_site(name, spot, placement, options.of(name), names))
        elif reason is not None:
            skipped.append(Skip(name, module.out_channels, reason))
    return _with_model(Plan(tuple(sites), tuple(skipped), callables=names.callables), capture)


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


def _site(name: str, spot: Spot, placement: str, options: Options, names: _Names) -> Site:
    if options.block is not None:
        site = Site(name, spot.channels, None, placement, block=names.of("block", options.block))
    else:
        width = latent_width(options.latent_channels, spot.channels)
        activation, gate = names.of("activation", options.activation), names.of("gate", options.gate)
        site = Site(name, spot.channels, width, placement, options.init, options.bias, activation, gate)
    return _with_parameters(site, names.callables)


def _with_parameters(site: Site, callables: Callables) -> Site:
    """The site with the cost that is known before anything is measured."""
    if site.block is None:
        return dataclasses.replace(site, cost=parameters_only(site))
    with drawing_from(0):  # what it draws is only counted
        parameters = new_block(site, callables).parameters()
    return dataclasses.replace(site, cost=Cost(params=sum(parameter.numel() for parameter in parameters)))


def fit(plan: Plan, capture: Capture) -> Plan:
    """A plan that was made before, with what it says of the model at hand: what it skips, what was captured how."""
    taken = {site.name for site in _there(capture).sites}
    names = {site.name for site in plan.sites}
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    skipped = (
        Skip(name, conv.out_channels, reasons.get(name, "not in the plan"))
        for name, conv in _convs(capture).items()
        if name not in names
    )
    sites = tuple(_with_parameters(site, plan.callables) for site in plan.sites if site.name not in taken)
    return _with_model(dataclasses.replace(plan, sites=sites, skipped=tuple(skipped)), capture)


def _with_model(plan: Plan, capture: Capture) -> Plan:
    alone = tuple(region.path for region in capture.regions if region.graphs is None)
    parameters = sum(parameter.numel() for parameter in capture.model.parameters())
    base = Cost(params=parameters) - Cost(params=_there(capture).added.params)
    return dataclasses.replace(plan, opaque=tuple(capture.opaque.items()), alone=alone, base=base, measured=False)


def _there(capture: Capture) -> Plan:
    """The blocks that the model has already."""
    return plan_within(capture.model) or Plan(())


def _convs(capture: Capture) -> dict[str, nn.Conv2d]:
    """The model's own Conv2d layers by qualified name; not those of blocks."""
    convs = {name: module for name, module in capture.model.named_modules() if isinstance(module, nn.Conv2d)}
    there = plan_within(capture.model)
    return {name: conv for name, conv in convs.items() if there is None or CONTAINER not in name.split(".")}


def _why_not(name: str, module: nn.Conv2d, attention: set[str], taken: set[str], excluded: Mapping[str, str]) -> str | None:
    if name in taken:
        return "has a Squeeze-and-Excitation block already"
    if name in attention:
        return "computes an attention gate"
    if not _parameter(module).dtype.is_floating_point:
        return f"is of dtype {_parameter(module).dtype}, which no block is made for"
    if name in excluded:
        return excluded[name]
    if "squeeze_excite" in module._modules:
        return "has a child of its own called squeeze_excite"
    if type(module).forward is not nn.Conv2d.forward and not _returns_a_feature_map(module):
        return "returns something else than a tensor (N, C, H, W)"
    return None


def _returns_a_feature_map(conv: nn.Conv2d) -> bool:
    """Whether a subclass, as far as can be told from an image of zeros, returns what a Conv2d does."""
    try:
        shape = measure(conv, torch.empty(1, conv.in_channels, 64, 64, device="meta"), {"": ""}).shapes.get("")
    except SqueezeExciteError:
        return True
    return shape is not None and len(shape) == 4 and shape[1] == conv.out_channels


# ------------------------------------------------------------------------------------------------------------- replaying
def locate(
    capture: Capture, plan: Plan, device: torch.device | None = None, made_on: torch.device | None = None
) -> dict[str, list[Insertion]]:
    """The insertions that `plan` means in a captured model, by region path, each with a new block.

    Args:
        capture: of the model, or of another of the same architecture.
        plan: the plan.
        device: where the blocks' parameters go; by default, to their conv's device.
        made_on: where their values are drawn; by default, where they go.

    Raises:
        SqueezeExciteError: a site does not fit the model; names the first that doesn't.
    """
    convs = dict(capture.model.named_modules())
    placements = {site.placement for site in plan.sites}
    found = {placement: _spots(capture, _policy(placement, plan.callables)) for placement in placements}
    insertions: dict[str, list[Insertion]] = {}
    for site in plan.sites:
        conv = convs.get(site.name)
        if not isinstance(conv, nn.Conv2d) or site.name not in found[site.placement]:
            elsewhere = ELSEWHERE.get(site.placement, f"is not chosen by {site.placement}")
            why = "has no such Conv2d" if not isinstance(conv, nn.Conv2d) else f"has this Conv2d, but it {elsewhere}"
            raise SqueezeExciteError(f"plan: site {site.name!r} does not fit: {type(capture.model).__name__} {why}")
        region, spot, spots = found[site.placement][site.name]
        if spot.channels != site.channels:
            raise SqueezeExciteError(
                f"plan: site {site.name!r} does not fit: the plan has {site.channels} channels there, the model {spot.channels}"
            )
        name = site.name[len(region.path) + 1 :] if region.path else site.name
        block = new_block(site, plan.callables, conv, device, made_on)
        insertions.setdefault(region.path, []).append(Insertion(name, block, spots))
    return insertions


def new_block(
    site: Site,
    callables: Callables,
    conv: nn.Conv2d | None = None,
    device: torch.device | None = None,
    made_on: torch.device | None = None,
) -> nn.Module:
    """A block of the kind `site` says; with a conv, on its device (or the one given), of its dtype and in its mode.

    Its values are drawn on the device `made_on`, if that is given, and moved.

    Raises:
        SqueezeExciteError: `site` names a function that isn't known here, or a factory makes no module.
    """
    device = device or (None if conv is None else _parameter(conv).device)
    dtype = None if conv is None else _parameter(conv).dtype
    if site.block is None:
        assert site.latent_channels is not None
        activation = copy.deepcopy(callables.get(("activation", site.activation), site.activation))
        gate = copy.deepcopy(callables.get(("gate", site.gate), site.gate))
        kind: dict[str, Any] = {"bias": site.bias, "init": site.init, "device": made_on or device, "dtype": dtype}
        block: Any = SqueezeExcite2d(site.channels, site.latent_channels, activation=activation, gate=gate, **kind)
    else:
        factory = callables.get(("block", site.block)) or BLOCKS.get(site.block)
        if factory is None:
            raise SqueezeExciteError(
                f"plan: site {site.name!r} has the block {site.block!r}, unknown here; add its factory to se_fx.blocks.BLOCKS"
            )
        block = factory(site.channels)
        if not isinstance(block, nn.Module):
            raise SqueezeExciteError(
                f"block={site.block!r}: expected a factory channels -> nn.Module, and it made a {type(block).__name__}"
            )
        block = block.to(dtype=dtype)
    return block.to(device).train(conv is None or conv.training)  # type: ignore[no-any-return]


def _policy(placement: str, callables: Callables) -> Policy:
    policy = callables.get(("placement", placement)) or PLACEMENTS.get(placement)
    if policy is None:
        raise SqueezeExciteError(
            f"plan: placement {placement!r} is unknown here; add the policy to se_fx.placement.PLACEMENTS under that name"
        )
    return policy


def _parameter(conv: nn.Conv2d) -> torch.Tensor:
    """A parameter of a conv. Not its weight: parametrized weights are computed, some (spectral norm) with side effects."""
    for parameter in conv.parameters():
        return parameter
    return conv.weight


def _spots(capture: Capture, policy: Policy) -> dict[str, tuple[Region, Spot, dict[bool, Spot]]]:
    """The spots of a captured model by the qualified name of their conv: region, one spot, and spots by `training`."""
    found: dict[str, tuple[Region, Spot, dict[bool, Spot]]] = {}
    alone = {region.path for region in capture.regions if region.graphs is None}
    for region in capture.regions:
        if region.graphs is None:
            assert isinstance(region.module, nn.Conv2d)
            if policy is PLACEMENTS["conv"]:
                found[region.path] = region, Spot("", region.module.out_channels, ()), {}
            continue
        by_graph = {graph: list(_checked(policy, graph, region.module)) for graph in set(region.graphs.values())}
        for training, graph in region.graphs.items():
            for spot in by_graph[graph]:
                name = region.qualified(spot.conv)
                if name not in alone:
                    found.setdefault(name, (region, spot, {}))[2][training] = spot
    return found


def _checked(policy: Policy, graph: fx.Graph, module: nn.Module) -> Iterator[Spot]:
    """What a policy, which may be the caller's, yields."""
    modules = modules_of(module)
    for spot in policy(graph, module):
        is_spot = isinstance(spot, Spot) and isinstance(modules.get(spot.conv), nn.Conv2d) and len(spot.nodes) > 0
        nodes = (*spot.nodes, *(spot.readers or ())) if is_spot else ()
        if not is_spot or any(not isinstance(node, fx.Node) or node.graph is not graph for node in nodes):
            raise SqueezeExciteError(
                f"placement={policy!r}: expected it to yield Spots, each with the name of a Conv2d and nodes of the graph "
                f"it was given, and it yielded {spot!r}"
            )
        yield spot
