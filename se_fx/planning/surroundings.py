"""Surroundings: in which stage of a network each conv is, and whether in a neck. By how data flows; else by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import fx

from se_fx.analysis import conv_flow, modules_of, neck_convs
from se_fx.capture import Capture, Region
from se_fx.criteria import Surroundings
from se_fx.names import stages

__all__ = ["surroundings_of"]


def surroundings_of(capture: Capture, convs: Collection[str]) -> dict[str, Surroundings]:
    """Where in a network each of these convs is.

    Stages are those of the *trunk*: the part captured in one piece that has more than half of all convs, without its necks. A
    stage is all its convs whose maps have one resolution; the convs of a block that lowers it are of the stage that they lead
    to. What can't be run there goes by names, and so do all stages where there is no such part.

    Args:
        capture: the captured model.
        convs: the qualified names of its convs, in the order of the model.
    """
    flows = {region.path: conv_flow(region.module, graphs).renamed(region.qualified) for region, graphs in _parts(capture)}
    modules = modules_of(capture.model)
    if "" not in flows and "" in capture.opaque:
        whole = conv_flow(capture.model, {})
        flows = {"": whole} if 2 * len(whole.convs()) > len(convs) else flows
    necks = {name for flow in flows.values() for name in neck_convs(flow, modules)}
    trunk = next((flow for flow in flows.values() if 2 * len(flow.convs() | flow.missed) > len(convs)), None)
    if trunk is None:
        strides: dict[str, int] = {}
        groups = list(stages(name for name in convs if name not in necks).values())
    else:
        strides = {name: stride for name, stride in trunk.strides().items() if name in convs}
        groups = _stages(
            strides, trunk.behind(necks) | necks, [name for name in convs if name in trunk.missed - necks], list(convs)
        )
    numbers = {name: number for number, members in enumerate(groups) for name in members}
    return {name: Surroundings(numbers.get(name), name in necks, strides.get(name)) for name in convs}


def _parts(capture: Capture) -> Iterable[tuple[Region, Mapping[str, fx.Graph]]]:
    """The outermost regions, each with the graphs for inference of all regions in it, by name in it."""
    graphs = {region.path: region.graphs[False] for region in capture.regions if region.graphs is not None}
    for region in capture.regions:
        if region.path in graphs and not any(_is_within(region.path, path) for path in graphs if path != region.path):
            inner = {path: graph for path, graph in graphs.items() if _is_within(path, region.path)}
            yield region, {path.removeprefix(region.path).lstrip("."): graph for path, graph in inner.items()}


def _is_within(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")


# ---------------------------------------------------------------------------------------------------------------- stages
def _stages(strides: Mapping[str, int], others: set[str], missed: list[str], convs: list[str]) -> list[list[str]]:
    """The convs of each stage of a trunk, in the order of the stages; `others` are of necks, and heads behind these."""
    trunk = {name: stride for name, stride in strides.items() if name not in others}
    of_blocks = {name: _after_its_block(name, trunk) for name in trunk}
    groups: dict[int, list[str]] = {stride: [] for stride in dict.fromkeys(trunk.values())}
    for name in convs:
        if name in of_blocks:
            groups[of_blocks[name]].append(name)
    by_name: list[list[str]] = []
    for members in stages(convs).values():
        unknown = [name for name in members if name in missed]
        known = Counter(of_blocks[name] for name in members if name in of_blocks)
        if unknown and known:
            groups[known.most_common(1)[0][0]] += unknown
        elif unknown:
            by_name.append(unknown)
    ordered = [members for members in groups.values() if members]
    for members in by_name:
        later = (place for place, others in enumerate(ordered) if convs.index(others[0]) > convs.index(members[0]))
        ordered.insert(next(later, len(ordered)), members)
    return ordered


def _after_its_block(name: str, trunk: Mapping[str, int]) -> int:
    """The stride of a conv's stage: that behind its block, where it is at the entry of one that lowers the resolution.

    Its block is the innermost module that holds another conv too; a stage is not left without any conv by this.
    """
    own, path = trunk[name], name
    within: dict[str, int] = {}
    while "." in path and len(within) < 2:
        path = path.rpartition(".")[0]
        within = {each: stride for each, stride in trunk.items() if each.startswith(f"{path}.")}
    counts = Counter(within.values())
    lowered = max(counts, default=own)
    is_entry = set(counts) == {own, lowered} and lowered > own and counts[own] <= counts[lowered]
    remains = any(stride == own for each, stride in trunk.items() if each not in within)
    return lowered if is_entry and remains else own
