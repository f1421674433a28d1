"""Necks: the convs of feature pyramids, decoders and heads that merge maps of several resolutions, found by how data flows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from se_fx.analysis.flow import ENLARGED, ConvFlow, reachable

__all__ = ["neck_convs"]


def neck_convs(flow: ConvFlow, modules: Mapping[str, nn.Module]) -> set[str]:
    """The convs of necks and decoders.

    A neck begins where a map that a conv has computed gets larger, by whatever means, before another conv reads it. It is that
    conv, and all that is computed from it. *Lateral* convs belong to it too: those on the way of another map into a join with
    an enlarged one, where nobody else reads what they return, and the enlarged one is not computed from it. So does the conv
    whose map is enlarged, if it is like a lateral one (the top of a pyramid), and all of a module that holds some of these
    and none on the way down: it is given a trunk's maps, and lowers none but to enlarge it next.

    A conv that is called on maps of several sizes is a head, shared by the levels of a pyramid, and no neck's.

    Args:
        flow: what happens to an image in a module.
        modules: that module's, by name.
    """
    calls = flow.calls
    readers: dict[int, set[int]] = {number: set() for number in range(len(calls))}
    for number, call in enumerate(calls):
        for source in call.sources:
            readers[source].add(number)
    raised = {n: {s for s in call.sources if call.is_raised_from(calls[s])} for n, call in enumerate(calls)}
    neck = reachable({number for number, sources in raised.items() if sources}, readers.__getitem__)
    while True:
        joins = [(calls[n].sources, raised[n] | (calls[n].sources & neck)) for n in sorted(neck)]
        joins += [(sources, _enlarged(flow, positions, sources, neck)) for positions, sources in flow.outputs if positions]
        found = {number for sources, up in joins for number in _laterals(flow, readers, modules, sources, up, neck)}
        if found <= neck:
            break
        neck = reachable(neck | found, readers.__getitem__)
    calls_of: dict[str, set[int]] = {}
    for number, call in enumerate(calls):
        calls_of.setdefault(call.conv, set()).add(number)
    names = {name for name, n in calls_of.items() if n <= neck and len({calls[each].entered for each in n}) == 1}
    ends = {source for sources in raised.values() for source in sources} | flow.aside()
    return names | _completed(flow, readers, names, {name for name, numbers in calls_of.items() if numbers <= ends})


def _enlarged(flow: ConvFlow, positions: int, sources: frozenset[int], neck: set[int]) -> set[int]:
    """Those sources of a returned map that are the neck's, or got larger to be joined with a larger one."""
    sizes = {source: flow.calls[source].left[0] for source in sources}
    largest = max(sizes.values(), default=0)
    smaller = {s for s, size in sizes.items() if size * ENLARGED <= min(largest, positions)}
    return smaller | (sources & neck)


def _laterals(
    flow: ConvFlow,
    readers: Mapping[int, set[int]],
    modules: Mapping[str, nn.Module],
    sources: frozenset[int],
    up: set[int],
    neck: set[int],
) -> set[int]:
    """The calls on other ways into a join with enlarged maps, and those of the enlarged ones that are like them."""
    if not up:
        return set()
    leads = flow.upstream(up)
    found: set[int] = set()
    open_ends = [source for source in sources if source not in leads]
    while open_ends:
        number = open_ends.pop()
        if number not in found and number not in leads and readers[number] <= neck | found:
            found.add(number)
            open_ends += flow.calls[number].sources
    kinds = {_kind(modules[flow.calls[number].conv]) for number in found}
    return found | {number for number in up if _kind(modules[flow.calls[number].conv]) in kinds}


def _kind(conv: nn.Module) -> tuple[object, ...]:
    assert isinstance(conv, nn.Conv2d)
    return conv.out_channels, conv.kernel_size, conv.groups, conv.bias is None


def _completed(flow: ConvFlow, readers: Mapping[int, set[int]], names: set[str], ends: set[str]) -> set[str]:
    """The convs of modules that hold some of the neck, and none of the trunk."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            within = ".".join(parts[:length]) + "."
            if _holds_no_trunk(flow, readers, names, ends, within):
                found |= {each for each in flow.convs() if each.startswith(within)}
                break
    return found


def _holds_no_trunk(flow: ConvFlow, readers: Mapping[int, set[int]], names: set[str], ends: set[str], within: str) -> bool:
    inside = {number for number, call in enumerate(flow.calls) if call.conv.startswith(within)}
    given = {source for number in inside for source in flow.calls[number].sources} - inside
    if not given or not all(flow.calls[number].sources for number in inside):
        return False
    coarsest = min(flow.calls[number].left[0] for number in given)
    rest = [number for number in inside if flow.calls[number].conv not in names | ends]
    return all(
        flow.calls[number].left[0] * ENLARGED > coarsest
        and all(reader in inside or flow.calls[reader].conv in names for reader in readers[number])
        for number in rest
    )
