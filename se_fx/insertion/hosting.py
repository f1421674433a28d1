"""Hosting: in which module of a model a block stands, so that least of the model's own code is replaced.

A value to be scaled is found in a region's flat graph. It comes from an operator, or from the call of a module; the outermost
such call whose every call returns the value is asked first:

    a module that returns it       scales what it returns by itself; its code stays, and it keeps its block if it is taken out
    the code that computes it      else: that module, the block's *host*, runs a graph, which calls its children as its code did
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from se_fx.capture import EXCITED, Call, Region
from se_fx.placement import Spot
from se_fx.regions import goes_through_children, hooked, own_class

__all__ = ["Seat", "Seats"]

Place = tuple[Call, fx.Node | Call | str]  # a call, and what it has the value from: a step of its code, or an input by name


@dataclass(frozen=True)
class Seat:
    """Where one block stands in a region, and who applies it.

    Attributes:
        host: the module whose code receives the value, by name.
        returns: the module that scales what it returns; None where the host's graph scales the value.
        values: in the host's graph, by `training`: the step that computes the value, or the input that it is.
        readers: likewise, the steps that are to read the scaled value; None for all.
    """

    host: str
    returns: str | None = None
    values: Mapping[bool, int | str] = field(default_factory=dict)
    readers: Mapping[bool, frozenset[int]] | None = None


class Seats:
    """The seats of spots in one region.

    Args:
        region: the region.
        shared: the names in it of modules that stand outside of it as well.
    """

    def __init__(self, region: Region, shared: Set[str] = frozenset()) -> None:
        self.region, self.shared = region, shared
        self.owners: dict[fx.Node, Call] = {}
        self.calls: dict[str, list[fx.Node | Call]] = {}  # all calls of a module, whether looked into or not
        self.step: dict[fx.Node | Call, int] = {}
        for graph in set((region.graphs or {}).values()):
            if graph in region.calls:
                self.calls.setdefault("", []).append(region.calls[graph])
                self._note(region.calls[graph])

    def _note(self, call: Call) -> None:
        for number, step in enumerate(call.steps):
            self.step[step] = number
            if isinstance(step, Call):
                self.calls.setdefault(step.path, []).append(step)
                self._note(step)
                continue
            self.owners[step] = call
            if EXCITED in step.meta:  # what a module returns that scales it by itself
                path = step.meta[EXCITED]
                self.calls[path] = [each for each in self.calls[path] if each is not step.all_input_nodes[0]] + [step]
            elif step.op == "call_module":
                self.calls.setdefault(str(step.target), []).append(step)

    def of(self, spots: Mapping[bool, Spot]) -> Seat | None:
        """The seat of a block; None where only the region's own graph can hold it."""
        ways: list[tuple[bool, frozenset[int] | None, list[Place]]] = []
        for training, spot in spots.items():
            for value in spot.nodes:
                if spot.readers is None:
                    places, chosen = list(self._outwards(value))[::-1], None
                else:
                    places, chosen = self._parting(value, spot.readers)
                if not places:
                    return None
                ways.append((training, chosen, places))
        first = ways[0][2]
        if all(chosen is None for _, chosen, _ in ways):
            for path in dict.fromkeys(self._path(step) for _, step in first):
                found = [place for _, _, places in ways for place in places if self._path(place[1]) == path]
                hosts = {call.path for call, _ in found}
                if path is None or len(found) != len(ways) or len(hosts) != 1:
                    continue
                if self._returns(path, {step for _, step in found}):
                    return Seat(hosts.pop(), path)
        seats = (self._in_graph(host, ways) for host in dict.fromkeys(call.path for call, _ in first))
        return next((seat for seat in seats if seat is not None), None)

    def _outwards(self, value: fx.Node) -> Iterator[Place]:
        """The calls that receive a value, and what each receives it from: what computes it, then calls that return it."""
        call = self.owners.get(value)
        if call is None:
            return
        yield call, value
        returned = value if call.returned is value else self._past_identities(value)
        while call.returned is returned and not any(self._within(user, call) for user in returned.users):
            module = self.region.module.get_submodule(call.path)
            if own_class(module) is nn.Sequential:
                break  # people take these apart, and the block is to go with what it scales
            if call.caller is None:
                if self.region.path and not hooked(module) and not isinstance(module, fx.GraphModule):
                    yield call, call
                break
            step, call = call, call.caller
            yield call, step

    def _past_identities(self, value: fx.Node) -> fx.Node:
        """What identities behind a value return, which is the same."""
        while len(value.users) == 1:
            user = next(iter(value.users))
            module = self.region.module.get_submodule(str(user.target)) if user.op == "call_module" else None
            if type(module) is not nn.Identity or hooked(module):
                break
            value = user
        return value

    def _parting(self, value: fx.Node, readers: frozenset[fx.Node]) -> tuple[list[Place], frozenset[int] | None]:
        """The innermost call in which all readers read a value, those chosen in other steps than the others."""
        users = [user for user in value.users if user.op != "output"]
        ways = [self._way(user) for user in users if user in self.owners]
        if len(ways) != len(users) or not ways:
            return [], None
        depth = 0
        while all(len(way) > depth + 1 for way in ways) and len({way[depth] for way in ways}) == 1:
            depth += 1
        call = ways[0][depth - 1] if depth else None
        if not isinstance(call, Call):
            return [], None
        steps = {user: self.step[way[depth]] for user, way in zip(users, ways, strict=True)}
        chosen = frozenset(step for user, step in steps.items() if user in readers)
        if chosen & {step for user, step in steps.items() if user not in readers}:
            return [], None
        inputs = [node for node in value.graph.nodes if node.op == "placeholder"]
        known: dict[int | str, Any] = dict(enumerate(inputs if call.caller is None else call.args))
        known.update(call.kwargs)
        given = [str(key) for key, node in known.items() if node is value]
        own = self.owners.get(value)
        if own is not None and self._is_in(own, call):
            inside: fx.Node | Call = value
            while own is not call:
                if own.returned is not value or own.caller is None:
                    return [], None
                inside, own = own, own.caller
            return [(call, inside)], chosen
        return ([(call, given[0])], chosen) if len(given) == 1 else ([], None)

    def _way(self, node: fx.Node) -> list[fx.Node | Call]:
        """The calls that lead to a node, outermost first, and the node."""
        way: list[fx.Node | Call] = [node]
        call: Call | None = self.owners[node]
        while call is not None:
            way.append(call)
            call = call.caller
        return way[::-1]

    def _within(self, node: fx.Node, call: Call) -> bool:
        return node in self.owners and self._is_in(self.owners[node], call)

    def _is_in(self, inner: Call | None, outer: Call) -> bool:
        while inner is not None and inner is not outer:
            inner = inner.caller
        return inner is outer

    def _returns(self, path: str, steps: set[fx.Node | Call | str]) -> bool:
        """Whether a module can scale what it returns by itself: these are its calls, all of them."""
        if set(self.calls[path]) != steps:
            return False
        module = self.region.module.get_submodule(path)
        own: Any = own_class(module)
        # Code that isn't in the region may call it; its hooks are to see what it returns, unscaled; and its block is its child.
        return not (path in self.shared or hooked(module) or isinstance(module, fx.GraphModule) or goes_through_children(own))

    def _path(self, step: fx.Node | Call | str) -> str | None:
        """The module that a step calls."""
        if isinstance(step, Call):
            return step.path
        if isinstance(step, str):
            return None
        excited: str | None = step.meta.get(EXCITED)
        return str(step.target) if excited is None and step.op == "call_module" else excited

    def _in_graph(self, host: str, ways: list[tuple[bool, frozenset[int] | None, list[Place]]]) -> Seat | None:
        """A seat in the host's graph, if the value is the same step of its code in each of its calls."""
        values: dict[bool, int | str] = {}
        readers: dict[bool, frozenset[int]] = {}
        seen = set()
        for training, chosen, places in ways:
            for call, step in places:
                if call.path == host and step is not call:
                    break
            else:
                return None
            seen.add(call)
            value = step if isinstance(step, str) else self.step[step]
            if values.setdefault(training, value) != value:
                return None
            if chosen is not None and readers.setdefault(training, chosen) != chosen:
                return None
        if isinstance(self.region.module.get_submodule(host), fx.GraphModule):  # whose class holds generated code
            return None
        every = self.calls.get(host, ()) if host else ()
        if any(call not in seen for call in every if isinstance(call, Call)):
            return None
        return Seat(host, None, values, readers or None)
