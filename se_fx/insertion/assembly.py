"""Assembly: blocks into a captured model, in place or into a copy that runs its graphs as well."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from se_fx.capture import Capture, Region, collector_paused
from se_fx.insertion.containers import hold
from se_fx.insertion.host_graphs import HostGraphs, host_graphs
from se_fx.insertion.hosting import Seat, Seats
from se_fx.insertion.insert_blocks import InsertBlocks
from se_fx.placement import Spot
from se_fx.regions import (
    EXCITE,
    add_constants,
    clone,
    copied,
    excite,
    goes_through_children,
    own_class,
    restore_code,
    run_graphs,
    run_host_graphs,
    run_own_code,
    view,
)

__all__ = ["Insertion", "insert", "insert_in_place", "undone_on_failure"]


@dataclass(frozen=True)
class Insertion:
    """One block to insert in a region.

    Attributes:
        name: the name in the region of the Conv2d that the block is named after; empty for a lone Conv2d.
        block: the module that scales the values.
        spots: where it goes in each graph, by `training`. Empty for a lone Conv2d.
    """

    name: str
    block: nn.Module
    spots: Mapping[bool, Spot]


def insert(capture: Capture, insertions: Mapping[str, list[Insertion]]) -> nn.Module:
    """A copy of the captured model that shares its tensors, with `insertions` (by region path) made.

    Regions that have any run their graphs, and so does the root: it is an `fx.GraphModule` where it was captured as a graph.
    Their own code, which runs where a graph is stale, holds the same blocks.
    """
    with collector_paused():
        model = clone(capture.model)
        _insert(model, capture, insertions, in_place=False)
    return model


def insert_in_place(capture: Capture, insertions: Mapping[str, list[Insertion]]) -> None:
    """Make `insertions` in the captured model itself, whose own code goes on running wherever that is possible.

    Call it within `undone_on_failure`.
    """
    with collector_paused():
        _insert(capture.model, capture, insertions, in_place=True)


def _insert(model: nn.Module, capture: Capture, insertions: Mapping[str, list[Insertion]], *, in_place: bool) -> None:
    furnished = []
    for region in capture.regions:
        chosen = insertions.get(region.path, [])
        if region.graphs is None:
            for insertion in chosen:
                _excite_alone(model, region.path, insertion.block)
        elif chosen or not (in_place or region.path):
            furnished.append(_Furnished(model, region, chosen))
    for each in furnished:
        if not in_place or each.homeless:
            each.run_flat()


def _excite_alone(model: nn.Module, path: str, block: nn.Module) -> None:
    """Have a lone conv scale what it returns, by a block that stands in the module around it."""
    home = _home(model, path.rpartition(".")[0], path)
    container, _, name = hold(model, home if path else "", path, block)
    excite(model.get_submodule(path), container, name)
    run_own_code(model.get_submodule(home))
    _notice_loss(model, home, path[len(home) :].lstrip("."))


def _home(model: nn.Module, path: str, scaling: str, base: str = "") -> str:
    """The module that may hold the block of one that scales what it returns: `path`, or around it, or that module itself.

    Around lists and dicts, which code goes through item by item. Where the code of any module around asks what the children of
    modules are, the block must be none of them.

    Args:
        model: the model.
        path: a module's name in the one at `base`.
        scaling: the scaling module's, likewise.
        base: where the names begin.
    """
    root = model.get_submodule(base)
    while path and isinstance(root.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    names = [name for name in f"{base}.{path}".split(".") if name]
    around: list[Any] = [own_class(model.get_submodule(".".join(names[:depth]))) for depth in range(len(names) + 1)]
    return scaling if any(map(goes_through_children, around)) else path


def _notice_loss(model: nn.Module, base: str, path: str) -> None:
    """Have all modules from one on down to another notice where that is deleted, as by what folds convolutions into one.

    Args:
        model: the model.
        base: the outer module's qualified name.
        path: the inner module's name in it.
    """
    around, names = model.get_submodule(base), path.split(".") if path else []
    for name in names:
        inner = around.get_submodule(name)
        if not isinstance(around, (nn.ModuleList, nn.ModuleDict)):  # whose code, if they have any, is seldom their own
            around.__dict__["_holding"] = {**around.__dict__.get("_holding", {}), name: inner}
            around.__dict__["_length"] = len(around._modules)
            run_own_code(around)
        around = inner


class _Furnished:
    """A region of a model whose blocks have been given their seats, in place."""

    def __init__(self, model: nn.Module, region: Region, insertions: Sequence[Insertion]) -> None:
        self.model, self.region, self.insertions = model, region, insertions
        self.module = model.get_submodule(region.path)
        restore_code(self.module, hosts=False)
        self.seats: dict[str, Seat] = {}
        self.graphs: dict[str, HostGraphs | None] = {}
        self.targets: dict[str, str] = {}  # of the blocks, in the region
        seats = Seats(region, _shared_with_others(model, region.path))
        for each in insertions:
            seat = seats.of(each.spots)
            if seat is not None and (seat.returns is not None or self._graphs_of(seat.host)):
                self.seats[each.name] = seat
        self.homeless = any(each.name not in self.seats for each in insertions)
        for each in insertions:
            self._hold(each)
        for host in {seat.host: None for seat in self.seats.values() if seat.returns is None}:
            self._run_graphs(host)

    def _graphs_of(self, host: str) -> HostGraphs | None:
        if host not in self.graphs:
            self.graphs[host] = host_graphs(self.region, host)
        return self.graphs[host]

    def _hold(self, insertion: Insertion) -> None:
        """Put one block where it stands."""
        seat = self.seats.get(insertion.name, Seat(""))
        home = seat.host
        if seat.returns is not None and any(True for _ in self.module.get_submodule(seat.returns).children()):
            home = seat.returns  # else it stays a module without children, of which tools know what it is
        if seat.returns is not None:
            home = _home(self.model, home, seat.returns, self.region.path)
        container, target, name = hold(
            self.model, self.region.qualified(home), self.region.qualified(insertion.name), insertion.block
        )
        self.targets[insertion.name] = f"{home}.{target}".lstrip(".")
        if seat.returns is not None:
            excite(self.module.get_submodule(seat.returns), container, name)
        if insertion.name in self.seats:
            _notice_loss(self.model, self.region.path, home if seat.returns is None else seat.returns)
            if isinstance(self.module.get_submodule(home), nn.Sequential):  # which shows its own modules alone
                run_own_code(self.module.get_submodule(home))
            self._note_between(seat.host, insertion.spots)

    def _note_between(self, path: str, spots: Mapping[bool, Spot]) -> None:
        """Have a host know of the norm behind a conv where a block stands between the two."""
        host, prefix = self.module.get_submodule(path), f"{path}." if path else ""
        for value in {node for spot in spots.values() for node in spot.nodes if spot.readers is None}:
            conv = self.region.module.get_submodule(str(value.target)) if value.op == "call_module" else None
            if not isinstance(conv, nn.Conv2d) or not str(value.target).startswith(prefix):
                continue
            for user in value.users:
                if user.op == "call_module" and str(user.target).startswith(prefix):
                    norm = self.region.module.get_submodule(str(user.target))
                    names = str(value.target).removeprefix(prefix), str(user.target).removeprefix(prefix)
                    if "norm" in type(norm).__name__.lower():
                        host.__dict__.setdefault("_between", []).append((*names, conv.bias is not None, own_class(norm)))
                        run_own_code(host)

    def _run_graphs(self, host: str) -> None:
        """Have a host run graphs of its own code, with the blocks that stand there."""
        known, module = self.graphs[host], self.module.get_submodule(host)
        assert known is not None
        here = [(each, self.seats[each.name]) for each in self.insertions if each.name in self.seats]
        here = [(each, seat) for each, seat in here if seat.host == host and seat.returns is None]
        add_constants(module, known.constants)
        edited: dict[fx.Graph, fx.Graph] = {}
        for training, graph in known.graphs.items():
            if graph in edited:
                continue
            blocks = []
            for each, seat in here:
                mode = training if training in seat.values else not training
                if training in seat.values or known.graphs[True] is known.graphs[False]:
                    value = known.value(training, seat.values[mode])
                    readers = None if seat.readers is None else frozenset(known.steps[training][i] for i in seat.readers[mode])
                    target = self.targets[each.name].removeprefix(f"{host}.") if host else self.targets[each.name]
                    blocks.append((target, each.block, Spot(each.name, 0, (value,), readers)))
            edited[graph] = _with_blocks(module, graph, blocks)
        by_mode = {training: edited[graph] for training, graph in known.graphs.items()}
        run_host_graphs(module, by_mode)

    def run_flat(self) -> None:
        """Have the region run the graphs of all its code."""
        region, module = self.region, self.module
        assert region.graphs is not None
        add_constants(module, region.constants)
        edited: dict[fx.Graph, fx.Graph] = {}
        # What scales the value of the region's own call isn't in the region's graph, but behind it.
        within = [each for each in self.insertions if self.seats.get(each.name, Seat("")).returns != ""]
        by_themselves = {seat.returns for seat in self.seats.values()}
        for training, graph in region.graphs.items():
            if graph not in edited:
                blocks = [(self.targets[e.name], e.block, e.spots[training]) for e in within if training in e.spots]
                edited[graph] = _with_blocks(module, graph, blocks, by_themselves)
        graphs = {training: edited[graph] for training, graph in region.graphs.items()}
        run_graphs(module, graphs, as_graph_module=not region.path, entered=region.entered(), replaceable=not self.homeless)


def _with_blocks(
    module: nn.Module,
    graph: fx.Graph,
    blocks: Sequence[tuple[str, nn.Module, Spot]],
    by_themselves: set[Any] = frozenset(),  # type: ignore[assignment]
) -> fx.Graph:
    """A copy of a graph of `module` with calls of blocks; what scales its values by itself is told not to."""
    edited, twin = copied(graph)
    for node in edited.nodes:
        if node.op == "call_module" and node.target in by_themselves:
            node.kwargs = {**node.kwargs, EXCITE: False}
    InsertBlocks((target, block, _moved(spot, twin)) for target, block, spot in blocks)(view(module, edited, compiled=False))
    return edited


def _moved(spot: Spot, twin: Mapping[fx.Node, fx.Node]) -> Spot:
    """The same spot in a copy of its graph."""
    readers = None if spot.readers is None else frozenset(twin[node] for node in spot.readers)
    return dataclasses.replace(spot, nodes=tuple(twin[node] for node in spot.nodes), readers=readers)


def _shared_with_others(model: nn.Module, path: str) -> set[str]:
    """The names, in the region at a path, of modules that stand elsewhere in the model as well."""
    prefix = f"{path}." if path else ""
    named = list(model.named_modules(remove_duplicate=False))
    outside = {module for name, module in named if not name.startswith(prefix)}
    return {name.removeprefix(prefix) for name, module in named if name.startswith(prefix) and module in outside}


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Where what is within fails, the model's modules are as they were: their classes, attributes and children."""
    kept = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    before = [
        (module, type(module), dict(module.__dict__), {name: module.__dict__[name].copy() for name in kept})
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which nothing is put into
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, containers in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in containers.items():
                attributes[name].clear()
                attributes[name].update(content)
        raise
