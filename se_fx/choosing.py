"""Choosing: from options to the sites of a captured model, and from a plan to its sites in a model again."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from se_fx.blocks import latent_width
from se_fx.capture import Capture, Region
from se_fx.cost import measure
from se_fx.errors import SqueezeExciteError
from se_fx.insertion import Insertion
from se_fx.placement import PLACEMENTS, Spot, attention_convs
from se_fx.plan import Options, Plan, Site, Skip, Where, parameters_only, plan_of

__all__ = ["choose", "fit", "locate", "new_block"]


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
        for graph in set((region.graphs or {}).values())  # one, where the modes agree
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
            sites.append(dataclasses.replace(site, cost=parameters_only(site)))
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
