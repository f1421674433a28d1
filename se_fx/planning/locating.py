"""Locating: where a policy has spots in a captured model, by the names of convs. Policies may be the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from se_fx.analysis import modules_of, name_results
from se_fx.capture import Capture, Region
from se_fx.errors import SqueezeExciteError, blaming, shown
from se_fx.placement import ELSEWHERE, PLACEMENTS, Policy, Spot
from se_fx.planning.plan import Callables

__all__ = ["Place", "elsewhere", "places_of", "policy_of"]


@dataclass(frozen=True)
class Place:
    """Where a block goes in a captured model.

    Attributes:
        region: the region that it goes into.
        channels: of the value that it scales.
        spots: where it goes in each of the region's graphs, by `training`; empty for a lone Conv2d.
    """

    region: Region
    channels: int
    spots: Mapping[bool, Spot]


def places_of(capture: Capture, policy: Policy) -> dict[str, Place]:
    """What a policy finds in a captured model, by the qualified name of the conv. It is called once for each graph.

    Raises:
        SqueezeExciteError: the policy fails, or yields something else than spots.
    """
    alone = {region.path for region in capture.regions if region.graphs is None}
    found: dict[str, Place] = {}
    for region in capture.regions:
        if region.graphs is None:
            assert isinstance(region.module, nn.Conv2d)
            if policy is PLACEMENTS["conv"]:
                found[region.path] = Place(region, region.module.out_channels, {})
            continue
        for graph in dict.fromkeys(region.graphs.values()):
            for value, statement in name_results(graph, region.module):
                region.calls[graph].rename(value, statement)
        by_graph = {graph: list(_checked(policy, graph, region.module)) for graph in dict.fromkeys(region.graphs.values())}
        spots: dict[str, dict[bool, Spot]] = {}
        for training, graph in region.graphs.items():
            for spot in by_graph[graph]:
                spots.setdefault(region.qualified(spot.conv), {})[training] = spot
        for name, by_training in spots.items():
            if name not in alone:
                channels = next(iter(by_training.values())).channels
                found.setdefault(name, Place(region, channels, by_training))
    return found


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
