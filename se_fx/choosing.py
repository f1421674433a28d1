"""Choosing: from options to the sites of a captured model, and what a plan made before says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from se_fx.blocks import latent_width
from se_fx.capture import Capture
from se_fx.cost import Cost, measure
from se_fx.criteria import CRITERIA, Candidate
from se_fx.dataflow import attention_convs
from se_fx.errors import SqueezeExciteError, blaming, shown
from se_fx.insertion import CONTAINER
from se_fx.locating import a_parameter, elsewhere, new_block, places, policy_of, spots_of
from se_fx.options import Options
from se_fx.patterns import check_each_matches
from se_fx.placement import PLACEMENTS, Spot
from se_fx.plan import Callables, Plan, Site, Skip, parameters_only, plan_within
from se_fx.randomness import drawing_from

__all__ = ["choose", "fit"]


def choose(capture: Capture, options: Options) -> Plan:
    """The sites `options` ask for in a captured model.

    Raises:
        SqueezeExciteError: the model has no Conv2d, or nothing that the placement is for, or a pattern of `where` or
            `overrides` matches none.
    """
    names = _Names()
    placement = names.of("placement", options.placement)
    there = plan_within(capture.model)
    convs = _convs(capture, there)
    if not convs:
        raise SqueezeExciteError(
            f"model: {type(capture.model).__name__} has no nn.Conv2d for a block to follow; calls of F.conv2d and "
            "convolutions of one or three dimensions get none"
        )
    spots = {name: spot for name, (_, spot, _) in spots_of(capture, policy_of(placement, names.callables)).items()}
    taken = {site.name for site in there.sites}
    if not spots and not taken:
        others = " or ".join(repr(name) for name, policy in PLACEMENTS.items() if spots_of(capture, policy))
        raise SqueezeExciteError(
            f"placement={placement!r}: the graphs of {type(capture.model).__name__} have no such place; "
            + (f"they have for {others}" if others else "nor for any other, since they call no Conv2d")
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
        with blaming(f"{criterion}={shown(value)} failed"):
            excluded = {**CRITERIA[criterion].excludes(value, candidates), **excluded}
    sites: list[Site] = []
    skipped: list[Skip] = []
    for name, module in convs.items():
        spot = spots.get(name)
        reason = _why_not(name, module, attention, taken, excluded) or (elsewhere(placement) if spot is None else None)
        if reason is None and spot is not None:
            sites.append(_site(name, spot, placement, options.of(name), names))
        elif reason is not None:
            skipped.append(Skip(name, module.out_channels, reason))
    return _with_model(Plan(tuple(sites), tuple(skipped), callables=names.callables), capture, there)


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


def fit(plan: Plan, capture: Capture) -> Plan:
    """A plan that was made before, with what it says of the model at hand: what it skips, what was captured how."""
    there = plan_within(capture.model)
    taken = {site.name for site in there.sites}
    names = {site.name for site in plan.sites}
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    skipped = (
        Skip(name, conv.out_channels, reasons.get(name, "not in the plan"))
        for name, conv in _convs(capture, there).items()
        if name not in names
    )
    left = dataclasses.replace(plan, sites=tuple(site for site in plan.sites if site.name not in taken))
    if any(site.block is not None for site in left.sites):
        places(capture, left)  # before factories make blocks of as many channels as a plan from elsewhere says
    sites = tuple(_with_parameters(site, plan.callables) for site in left.sites)
    return _with_model(dataclasses.replace(plan, sites=sites, skipped=tuple(skipped)), capture, there)


def _with_model(plan: Plan, capture: Capture, there: Plan) -> Plan:
    alone = tuple(region.path for region in capture.regions if region.graphs is None)
    parameters = sum(parameter.numel() for parameter in capture.model.parameters())
    base = Cost(params=parameters) - Cost(params=there.added.params)
    return dataclasses.replace(plan, opaque=tuple(capture.opaque.items()), alone=alone, base=base, measured=False)


def _convs(capture: Capture, there: Plan) -> dict[str, nn.Conv2d]:
    """The model's own Conv2d layers by qualified name; not those of the blocks that it has already."""
    convs = {name: module for name, module in capture.model.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: conv for name, conv in convs.items() if not there.sites or CONTAINER not in name.split(".")}


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
