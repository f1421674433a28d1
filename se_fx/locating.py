"""Locating: where the policies have spots in a captured model, and where the sites of a plan are, each with a new block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from se_fx.blocks import BLOCKS, SqueezeExcite2d
from se_fx.capture import Capture, Region
from se_fx.dataflow import modules_of
from se_fx.errors import SqueezeExciteError, blaming, shown
from se_fx.insertion import Insertion
from se_fx.placement import ELSEWHERE, PLACEMENTS, Policy, Spot
from se_fx.plan import Callables, Plan, Site

__all__ = ["a_parameter", "elsewhere", "locate", "new_block", "places", "policy_of", "spots_of"]


def locate(capture: Capture, plan: Plan, made_on: torch.device | None = None) -> dict[str, list[Insertion]]:
    """The insertions that `plan` means in a captured model, by region path, each with a new block.

    Args:
        capture: of the model, or of another of the same architecture.
        plan: the plan.
        made_on: where the blocks' values are drawn; by default, on their conv's device.

    Raises:
        SqueezeExciteError: a site does not fit the model; names the first that doesn't.
    """
    insertions: dict[str, list[Insertion]] = {}
    for site, (region, conv, spots) in zip(plan.sites, places(capture, plan), strict=True):
        name = site.name[len(region.path) + 1 :] if region.path else site.name
        block = new_block(site, plan.callables, conv, made_on)
        insertions.setdefault(region.path, []).append(Insertion(name, block, spots))
    return insertions


def places(capture: Capture, plan: Plan) -> list[tuple[Region, nn.Conv2d, dict[bool, Spot]]]:
    """Where each site of a plan is in a captured model: the region, the conv, and the spots by `training`.

    Raises:
        SqueezeExciteError: a site does not fit the model; names the first that doesn't.
    """
    convs = dict(capture.model.named_modules())
    placements = {site.placement for site in plan.sites}
    spots = {placement: spots_of(capture, policy_of(placement, plan.callables)) for placement in placements}
    found = []
    for site in plan.sites:
        conv = convs.get(site.name)
        if not isinstance(conv, nn.Conv2d) or site.name not in spots[site.placement]:
            there = f"has this Conv2d, but it {elsewhere(site.placement)}"
            why = there if isinstance(conv, nn.Conv2d) else "has no such Conv2d"
            raise SqueezeExciteError(f"plan: site {shown(site.name)} does not fit: {type(capture.model).__name__} {why}")
        region, spot, by_training = spots[site.placement][site.name]
        if spot.channels != site.channels:
            raise SqueezeExciteError(
                f"plan: site {site.name!r} does not fit: the plan has {site.channels} channels there, the model {spot.channels}"
            )
        found.append((region, conv, by_training))
    return found


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
    device = None if conv is None else a_parameter(conv).device
    dtype = None if conv is None else a_parameter(conv).dtype
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
        block = block.to(dtype=dtype)
    return block.to(device).train(conv is None or conv.training)  # type: ignore[no-any-return]


def policy_of(placement: str, callables: Callables) -> Policy:
    """The policy of this name.

    Raises:
        SqueezeExciteError: there is none.
    """
    policy = callables.get(("placement", placement)) or PLACEMENTS.get(placement)
    if policy is None:
        raise SqueezeExciteError(
            f"plan: placement {placement!r} is unknown here; add the policy to se_fx.placement.PLACEMENTS under that name"
        )
    return policy


def elsewhere(placement: str) -> str:
    """Why a Conv2d is not where the policy of this name puts blocks."""
    return ELSEWHERE.get(placement, f"is not chosen by {placement}")


def a_parameter(conv: nn.Conv2d) -> torch.Tensor:
    """A parameter of a conv. Not its weight: parametrized weights are computed, some (spectral norm) with side effects."""
    for parameter in conv.parameters():
        return parameter
    return conv.weight


def spots_of(capture: Capture, policy: Policy) -> dict[str, tuple[Region, Spot, dict[bool, Spot]]]:
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
    with blaming(f"placement={shown(policy)}: expected a policy (graph, root) -> spots, and it failed"):
        spots = list(policy(graph, module))
    for spot in spots:
        is_spot = isinstance(spot, Spot) and isinstance(modules.get(spot.conv), nn.Conv2d) and len(spot.nodes) > 0
        nodes = (*spot.nodes, *(spot.readers or ())) if is_spot else ()
        if not is_spot or any(not isinstance(node, fx.Node) or node.graph is not graph for node in nodes):
            raise SqueezeExciteError(
                f"placement={shown(policy)}: expected it to yield Spots, each with the name of a Conv2d and nodes of the graph "
                f"it was given, and it yielded {shown(spot)}"
            )
        yield spot
